"""A judge's verdicts: requested from an endpoint, kept in judgments.jsonl, read as battles or preferences.

A verdict is AlpacaEval's share of the first answer (0 to 1) or one of Arena-Hard's labels. It is None where
the judge's reply cannot be read: it refused, was cut off, or contradicts itself. Such a verdict is kept, so
that no question is asked twice, but not counted. A question without a reply has no row: a second start asks.
"""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from hashlib import sha256
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from judge.answers import Answers
from judge.prompts import LABEL, LABELS, Style, alternatives
from run import read_lines

if TYPE_CHECKING:  # openai takes a second to import: only asking a judge needs it
    from httpx2 import Response
    from openai import APIError, OpenAI

Key = tuple[str, ...]  # identifies a verdict: the values of KEY
Question = tuple[list[dict[str, str]], str]  # the messages, and their digest
Verdict = dict[str, Any]  # a row of judgments.jsonl: KEY's names, digest, verdict, logprobs, and the reply

KEY = ("id", "order", "model", "baseline", "judge")
ORDERS = ("baseline first", "model first")
DOWN = 10  # failures in a row after which no further question is asked
NO_REPLY = 599  # our status for an empty or malformed reply; the client retries it, as all from 500 up
REMEDIES = {400: "see --judge-max-tokens and --style"}  # by status
REMEDIES |= dict.fromkeys((401, 402, 403), "check OPENAI_API_KEY and its account")
REMEDIES |= dict.fromkeys((404, 405), "check --judge-model, and --judge-url, which mostly ends in /v1")


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
            user = user.encode("utf-8", "replace").decode()  # half of a surrogate pair becomes "?"
            messages = [{"role": "system", "content": style.system}] if style.system else []
            messages.append({"role": "user", "content": user})
            digest = sha256(json.dumps([messages, style.request]).encode()).hexdigest()[:16]
            questions[id, order, model, baseline, judge] = messages, digest
    return questions


def read_judgments(path: Path) -> dict[Key, Verdict]:
    """Read the verdicts of earlier starts from judgments.jsonl; {} if there is no such file.

    If a kill cut off the last line, it is removed from the file, and a printed line says so. ValueError for
    any other line that is not a verdict.
    """
    if not path.exists():
        return {}
    written = path.read_bytes()
    end = written.rfind(b"\n") + 1
    if end < len(written):
        print(f"{path}: its last line was cut off; it is dropped, and asked for again")
        os.truncate(path, end)
    judgments = {}
    for number, row in enumerate(read_lines(path), 1):
        known = all(isinstance(row.get(name), str) for name in (*KEY, "digest"))
        verdict = row.get("verdict", "") if known else ""
        if verdict not in (None, *LABELS) and not isinstance(verdict, float) or "logprobs" not in row:
            raise ValueError(f"{path}: object {number} is no verdict; delete it, or choose another --out")
        judgments[tuple(row[name] for name in KEY)] = row
    return judgments


def connect(url: str, retries: int, timeout: float = 600) -> "OpenAI":
    """Return a client of the endpoint; its key is the environment variable OPENAI_API_KEY.

    The client repeats a request when no reply comes within `timeout` seconds, the connection is lost, or the
    status is 408, 409, 429 or 5xx. Its pauses grow to 8 s, or are what the endpoint asks for, up to two
    minutes. ValueError if nothing answers at the URL, or if the key is refused.
    """
    import httpx2  # here, because they take a second; openai, which uses it, comes with vLLM
    import openai

    key = os.environ.get("OPENAI_API_KEY") or "EMPTY"  # `vllm serve` takes any key
    limit = openai.Timeout(timeout, connect=5)
    try:
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=limit)
        client.with_options(max_retries=0, timeout=20).models.with_raw_response.list()
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        raise ValueError(f"--judge-url {url}: refuses the key in OPENAI_API_KEY") from None
    except (openai.APIConnectionError, httpx2.InvalidURL) as error:
        raise ValueError(f"--judge-url {url}: nothing answers there ({error.__cause__ or error})") from None
    except openai.APIStatusError:
        pass  # the endpoint answers; some do not list their models
    return client.with_options(http_client=openai.DefaultHttpxClient(event_hooks={"response": [true_status]}))


def true_status(response: "Response") -> None:
    """Give an empty or malformed reply with status 200 an error status, which the client handles.

    That is the code of an error in its body, else NO_REPLY: for a web page, JSON of another shape, an empty
    message. A refusal, a tool call and a reply that was cut off before its first word keep their status:
    asked again, the judge would repeat them.
    """
    if response.status_code in (301, 302):
        response.status_code = 308  # repeat the POST at the new address, not an empty GET
    if not response.is_success:
        return
    response.read()
    body = None
    with suppress(ValueError):
        body = response.json()
    match body:
        case {"error": {"code": int(code)}} if 400 <= code < 600:
            response.status_code = code
        case {"choices": [{"message": dict(message), **choice}, *_]} if (
            any(str(message.get(name) or "").strip() for name in ("content", "refusal", "tool_calls"))
            or choice.get("finish_reason") in ("length", "content_filter")
            or choice.get("logprobs")
        ):
            pass
        case _:
            response.status_code = NO_REPLY


def ask(client: "OpenAI", key: Key, messages: list[dict[str, str]], digest: str, style: Style) -> Verdict:
    """Ask one question and return its row of judgments.jsonl."""
    reply = client.chat.completions.create(model=key[-1], messages=messages, **style.request)
    choice = reply.choices[0]
    listed = bool(alternatives(choice))
    quotable = len(LABEL.findall(messages[-1]["content"])) > len(LABEL.findall(style.prompt))
    verdict = {"digest": digest, "verdict": style.read(choice, quotable), "logprobs": listed}
    text = choice.message.content or choice.message.refusal
    said = {"finish_reason": getattr(choice, "finish_reason", None), "text": text}
    return dict(zip(KEY, key, strict=True)) | verdict | said


def ask_all(client: "OpenAI", questions: dict[Key, Question], style: Style, path: Path, workers: int) -> str:
    """Ask all questions, `workers` at a time, and append each verdict to judgments.jsonl as it arrives.

    A question that fails, for good or after all its retries, leaves no row. Return the failures in words, ""
    if there are none. After DOWN failures in a row the rest is not asked; ValueError if the first question
    fails with a status that all will have.
    """
    import openai

    def work(key, question):
        file.write(f"{json.dumps(ask(client, key, *question, style))}\n".encode())

    failures, in_a_row = [], 0
    with path.open("ab", buffering=0) as file:  # one system call per line: lines are never mixed or cut
        pool = ThreadPoolExecutor(workers)
        asked = [pool.submit(work, *item) for item in questions.items()]
        try:
            for done, future in enumerate(tqdm(as_completed(asked), "judge", len(asked))):
                try:
                    future.result()
                    in_a_row = 0
                except openai.APIError as error:
                    failures, in_a_row = [*failures, error], in_a_row + 1
                    if done == 0 and getattr(error, "status_code", 0) in set(REMEDIES) - {400}:
                        raise ValueError(f"--judge-url: {in_words(failures, 1, client.api_key)}") from None
                    if in_a_row == DOWN:
                        break
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C or a failure, send no further question
    return in_words(failures, len(asked), client.api_key) if failures else ""


def in_words(failures: list["APIError"], asked: int, key: str) -> str:
    """Count failures by kind, and give the first one's text and remedy, in one line without the key."""
    first, counts = failures[0], Counter(getattr(error, "status_code", 0) for error in failures)
    special = {0: "no reply", NO_REPLY: "an empty or malformed reply"}
    kinds = ", ".join(f"{n} with {special.get(status, f'status {status}')}" for status, n in counts.items())
    text = first.body or first.__cause__ or first
    text = text.get("message", text) if isinstance(text, dict) else text
    text = " ".join(re.sub("<[^>]*>", " ", str(text)).replace(key, "[key]").split())[:200]
    remedy = REMEDIES.get(getattr(first, "status_code", 0), "wait")
    said = f"the first, from {first.request.url}: {text or first}; {remedy}, and start again for them"
    return f"{len(failures)} of {asked} questions were rejected or failed ({kinds}); {said}"


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
