"""A judge's verdicts: asked from an endpoint, kept in judgments.jsonl, counted as battles or preferences.

A verdict is AlpacaEval's share of the first answer (0 to 1) or one of Arena-Hard's labels. It is None where
the judge's reply cannot be read. Such a verdict is kept, so that no question is asked twice, but not counted.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from hashlib import sha256
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from judge.answers import Answers
from judge.prompts import LABELS, Style
from run import read_lines

if TYPE_CHECKING:  # openai takes a second to import: only asking a judge needs it
    from openai import OpenAI

Key = tuple[str, ...]  # what identifies a verdict: the values of KEY
Question = tuple[list[dict[str, str]], str]  # the messages, and their digest
Verdict = dict[str, Any]  # a row of judgments.jsonl: KEY's names, digest, verdict, logprobs, text

KEY = ("id", "order", "model", "baseline", "judge")
ORDERS = ("baseline first", "model first")


def ask_about(
    answers: Answers, pairs: Iterable[tuple[str, str]], judge: str, style: Style
) -> dict[Key, Question]:
    """Build every question to the judge: each pair (model, baseline) on each prompt, in both orders.

    Judges favour a position, so both orders are asked, as in Arena-Hard. (AlpacaEval asks once, in a random
    order.) The digest covers all that is sent. It tells apart a verdict on other answers or by another
    prompt.
    """
    questions = {}
    for (model, baseline), order in product(pairs, ORDERS):
        shown = (baseline, model) if order == "baseline first" else (model, baseline)
        for id, row in answers[model].items():
            first, second = (answers[name][id]["response"] for name in shown)
            texts = {"prompt": row["prompt"], "first": first, "second": second}
            # All fields in one pass: an answer may hold "{second}". format() fails on the prompts' braces.
            user = re.sub(r"\{(prompt|first|second)\}", lambda m, texts=texts: texts[m[1]], style.prompt)
            messages = [{"role": "system", "content": style.system}] if style.system else []
            messages.append({"role": "user", "content": user})
            digest = sha256(json.dumps([messages, style.request]).encode()).hexdigest()[:16]
            questions[id, order, model, baseline, judge] = messages, digest
    return questions


def read_judgments(path: Path) -> dict[Key, Verdict]:
    """Read the verdicts of earlier starts from judgments.jsonl; {} if there is no such file.

    If a kill cut off the last line, it is removed from the file, and a printed line says so.
    """
    if not path.exists():
        return {}
    written = path.read_bytes()
    whole = written.rfind(b"\n") + 1
    if whole < len(written):
        print(f"{path}: its last line was cut off; it is dropped, and asked for again")
        os.truncate(path, whole)
    return {tuple(row[name] for name in KEY): row for row in read_lines(path)}


def connect(url: str, retries: int) -> "OpenAI":
    """Return a client of the endpoint; its key is the environment variable OPENAI_API_KEY.

    The client repeats a request, after growing pauses, when the connection is lost or the status is 408, 409,
    429 or 5xx. ValueError if nothing answers at the URL, or if the key is refused.
    """
    import openai  # here, because it takes a second; it comes with vLLM

    key = os.environ.get("OPENAI_API_KEY") or "EMPTY"  # `vllm serve` takes any key
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries)
    try:
        client.with_options(max_retries=0, timeout=20).models.list()
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        raise ValueError(f"--judge-url {url}: refuses the key in OPENAI_API_KEY") from None
    except openai.APIConnectionError:
        raise ValueError(f"--judge-url {url}: nothing answers there") from None
    except openai.APIStatusError:
        pass  # the endpoint answers; some do not list their models
    return client


def ask(client: "OpenAI", key: Key, messages: list[dict[str, str]], digest: str, style: Style) -> Verdict:
    """Ask one question and return its row of judgments.jsonl."""
    reply = client.chat.completions.create(model=key[-1], messages=messages, **style.request)
    choice = reply.choices[0]
    listed = bool(choice.logprobs and choice.logprobs.content)
    verdict = {"digest": digest, "verdict": style.read(choice), "logprobs": listed}
    return dict(zip(KEY, key, strict=True)) | verdict | {"text": choice.message.content}


def ask_all(client: "OpenAI", questions: dict[Key, Question], style: Style, path: Path, workers: int) -> None:
    """Ask all questions, `workers` at a time, and append each verdict to judgments.jsonl as it arrives.

    A question that the endpoint rejects (status 400: its prompt may exceed the context) leaves no row; a
    printed line gives their number and the first reason. Any other failure of the endpoint is a ValueError.
    """
    import openai

    def message(error):
        return " ".join(str(error).replace(client.api_key, "[key]").split())[:300]

    pool, rejected = ThreadPoolExecutor(workers), []
    asked = [pool.submit(ask, client, key, *question, style) for key, question in questions.items()]
    try:
        with path.open("a", buffering=1) as file:  # line buffered: a kill loses no whole line
            for future in tqdm(as_completed(asked), "judge", len(asked)):
                try:
                    file.write(json.dumps(future.result()) + "\n")
                except openai.BadRequestError as error:
                    rejected.append(message(error))
    except openai.OpenAIError as error:
        raise ValueError(f"--judge-url failed: {message(error)}; start again for the rest") from None
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or a failure, send no further question
    if rejected:
        print(f"{len(rejected)} of {len(asked)} questions were rejected, the first with: {rejected[0]}")


def to_battles(judgments: Iterable[Verdict]) -> list[dict[str, str]]:
    """Turn readable verdicts into battles, as winrates.py takes them.

    A strong verdict of Arena-Hard becomes three battles. AlpacaEval's share becomes a win of the likelier
    answer.
    """
    battles = []
    for row in judgments:
        names = [row["baseline"], row["model"]]
        if row["order"] == "model first":
            names.reverse()
        label = row["verdict"]
        if not isinstance(label, str):
            label = "A>B" if label > 0.5 else "B>A" if label < 0.5 else "A=B"
        winner, times = LABELS[label]
        battle = {"question_id": row["id"], "model_a": names[0], "model_b": names[1], "winner": winner}
        battles += [battle] * times
    return battles


def to_preferences(judgments: Iterable[Verdict]) -> dict[str, dict[str, float]]:
    """Turn AlpacaEval's readable verdicts into {model: {id: preference}}, 2 = the model wins.

    A preference is the mean of the two orders. A question that lacks one is left out, because the other alone
    would carry the judge's bias for a position.
    """
    shares = defaultdict(list)
    for row in judgments:
        share = row["verdict"] if row["order"] == "model first" else 1 - row["verdict"]
        shares[row["model"], row["id"]].append(share)
    preferences = defaultdict(dict)
    for (model, id), both in shares.items():
        if len(both) == len(ORDERS):
            preferences[model][id] = 1 + fmean(both)
    return preferences
