"""Compare answers with a judge: AlpacaEval's length-controlled win rate, Arena-Hard's score, Elo ratings.

    python judge.py --answers online.jsonl offline.jsonl --baseline gpt4.jsonl --style alpaca_eval \
        --judge-url http://127.0.0.1:8000/v1 --judge-model NAME --out judged
    python judge.py --answers seed.jsonl online.jsonl offline.jsonl --each-against-each --style arena_hard ...

An answers file, FILE or NAME=FILE, is what `evaluate.py --n 1 --answers FILE` writes: each line has a
question's id, its prompt, the response, and the response's length in characters. The judge is any
OpenAI-compatible endpoint, its key the environment variable OPENAI_API_KEY. A second start with the same
--out asks only for the verdicts that are missing.

This follows alpaca_eval 0.6.6 (Dubois et al. 2024, arXiv 2404.04475) and arena-hard-auto v0.1 (Li et al.
2024, arXiv 2406.11939), and takes its prompts from them (Apache-2.0). What differs:

1. Every question is asked in both orders, as in Arena-Hard, because judges favour a position. AlpacaEval asks
   once, in a random order; here its preference is the mean of the two.
2. AlpacaEval regularises its fit with data outside its repository: see length_controlled_winrate.
3. Arena-Hard asks on where a reply holds no verdict. Here that is recorded, counted and left out.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from run import Coefficient, Count, one_line_errors, parse_flags, read_lines, surroundings, write_json

# The mean of alpaca_eval's published weights, of tanh(length) and of difficulty, for the baseline told to be
# verbose and told to be concise (its weights/weighted_alpaca_eval_gpt4_turbo/length_controlled_v1).
GAMED_WEIGHTS = np.array([-1.6130, 0.7585])
PENALTIES = 1 / np.logspace(-4, 4, 10)  # of scikit-learn's LogisticRegressionCV, which alpaca_eval uses
FOLDS = 5
ELO = 400 / np.log(10)  # points in a nat of log-odds
PRIOR = 0.01  # precision of a model's log-odds: a deviation of 10 nats, 1737 Elo points
WINS = {"model_a": 1.0, "tie": 0.5, "tie (bothbad)": 0.5, "model_b": 0.0}
KEY = ("id", "order", "model", "baseline", "judge")  # of a verdict
ORDERS = ("baseline first", "model first")
CHARS_PER_TOKEN = 4  # a usual rough figure for English


# --- Statistics: pure functions ---


def sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))


def fit_logistic(features, shares, weights, l1=0.0, l2=0.0, start=None):
    """Logistic regression on shares of wins: features (N, K), shares and weights (N,) -> (K,).

    The b of least  sum_i weights_i logloss(shares_i, sigmoid(features_i b)) + l1 |b|_1 + l2/2 |b|_2^2,  by
    Newton's method; a step that raises it is halved.
    """

    def loss(b):
        x = features @ b
        return weights @ (np.logaddexp(0, x) - shares * x) + l1 * abs(b).sum() + l2 / 2 * b @ b

    b = np.zeros(features.shape[1]) if start is None else start
    for _ in range(100):
        predicted = sigmoid(features @ b)
        gradient = features.T @ (weights * (predicted - shares)) + l2 * b
        curvature = (features.T * (weights * predicted * (1 - predicted))) @ features
        curvature += (l2 + 1e-9) * np.eye(len(b))
        step = _l1_step(b, gradient, curvature, l1) if l1 else -np.linalg.solve(curvature, gradient)
        while loss(b + step) > loss(b) and abs(step).max() > 1e-9:
            step = step / 2
        b = b + step
        if abs(step).max() < 1e-7:
            break
    return b


def _l1_step(b, gradient, curvature, l1):
    """The step to the minimum of the quadratic model plus l1 |.|_1, one coordinate at a time."""
    new = b.copy()
    for _ in range(100):
        before = new.copy()
        for j in range(len(b)):
            pull = curvature[j, j] * new[j] - gradient[j] - curvature[j] @ (new - b)
            new[j] = np.sign(pull) * max(abs(pull) - l1, 0) / curvature[j, j]
        if abs(new - before).max() < 1e-10:
            break
    return new - b


def winrate(preferences):
    """Preferences (N,) in [1, 2], 2 = the model wins -> (percent, standard error); alpaca_eval's winrate.py.

    >>> winrate([1.0, 2.0, 2.0, 1.5])[0]
    62.5
    """
    shares = np.asarray(preferences, float) - 1
    if shares.ndim != 1 or len(shares) < 2 or not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError("a win rate needs two or more preferences from 1 to 2")
    return 100 * shares.mean().item(), 100 * shares.std(ddof=1).item() / len(shares) ** 0.5


def length_controlled_winrate(
    preferences, model_lengths, baseline_lengths, difficulties=None, regularize=0.2
):
    """The win rate if the two answers were equally long: all arguments (N,) -> (percent, standard error).

    preferences in [1, 2], 2 = the model wins; lengths in characters; difficulties on AlpacaEval's scale, or
    None for no such term. ValueError for fewer than 10 rows, or differences in length that are all the same.

    The recipe is alpaca_eval's `length_controlled_v1` (its glm_winrate.py): a logistic regression of the
    preference on tanh((baseline's length - model's) / their deviation), the difficulty and a constant, under
    an L1 penalty cross-validated in 5 folds; then the mean prediction with the length term at zero. Cutting
    short the answers that lose would game that. So alpaca_eval adds, with weight `regularize` in all, its
    judgments of the baseline told to be verbose and told to be concise, as rows without the constant.

    Those judgments (df_gamed.csv) and the difficulties are only on the Hugging Face Hub. The stand-in: each
    row again, with weight `regularize`, without the constant, and with the share of wins that the published
    weights of those two predict for its length and difficulty; `regularize=0` omits it
    (`length_controlled_noreg`).

    So, and with difficulties estimated from published results, 28 models of the leaderboard come out 0.45
    points off on average, 1.7 at most (claude-2), with a rank correlation of 0.998; gpt4_gamed, cut short on
    purpose, at 12.3 for 12.2. Without the stand-in: 1.7 on average, 27.4 for gpt4_gamed. No model is fitted
    apart. The leaderboard gave the k-th judgment the k-th difficulty, even past a missing one: to compare,
    pass them so; by the right instruction, the 5 models that lack some are up to 2.5 points off.

    The standard error is the delta method's, over the drawing of instructions. alpaca_eval's own is the
    spread of the predictions alone: it ignores the fit, and would be 0 without difficulties.
    """
    winrate(preferences)  # for its checks
    shares = np.asarray(preferences, float) - 1
    gaps = np.asarray(baseline_lengths, float) - np.asarray(model_lengths, float)
    hard = np.zeros_like(shares) if difficulties is None else np.asarray(difficulties, float)
    if not shares.shape == gaps.shape == hard.shape or len(shares) < 2 * FOLDS:
        raise ValueError(f"length control needs {2 * FOLDS} or more rows, each with both lengths")
    if not np.isfinite([gaps, hard]).all() or (np.ptp(gaps) == 0 and gaps[0] != 0):
        raise ValueError("length control needs finite lengths, and differences that are not all the same")
    length = np.tanh(gaps / (gaps.std(ddof=1) or 1.0))
    one, zero = np.ones_like(shares), np.zeros_like(shares)

    rows, equal = np.stack([length, hard, one], 1), np.stack([zero, hard, one], 1)  # (N, 3)
    gamed = np.stack([length, hard, zero], 1)  # (N, 3)
    features = np.concatenate([rows, gamed])  # (2N, 3)
    targets = np.concatenate([shares, sigmoid(gamed[:, :2] @ GAMED_WEIGHTS)])
    weights = np.concatenate([one, np.full_like(one, regularize)])
    b = _fit_cross_validated(features, targets, weights, np.tile(np.arange(len(shares)) % FOLDS, 2))

    predicted, fitted = sigmoid(equal @ b), sigmoid(features @ b)  # (N,), (2N,)
    curvature = (features.T * (weights * fitted * (1 - fitted))) @ features  # (3, 3)
    through_fit = np.linalg.pinv(curvature) @ equal.T @ (predicted * (1 - predicted))  # (3,)
    influence = predicted + rows @ through_fit * (shares - fitted[: len(shares)])  # (N,)
    return 100 * predicted.mean().item(), 100 * influence.std(ddof=1).item() / len(shares) ** 0.5


def _fit_cross_validated(features, shares, weights, folds):
    """fit_logistic with the L1 penalty that predicts left-out folds (N,) best, on all rows."""
    losses = np.zeros(len(PENALTIES))
    for fold in range(FOLDS):
        out, b = folds == fold, None
        for i, penalty in enumerate(PENALTIES):
            b = fit_logistic(features[~out], shares[~out], weights[~out], l1=penalty, start=b)
            x = features[out] @ b
            losses[i] += np.mean(weights[out] * (np.logaddexp(0, x) - shares[out] * x))
    return fit_logistic(features, shares, weights, l1=PENALTIES[losses.argmin()])


class Battles:
    """Battles as arrays: models, K names; a and b (N,), the numbers of the two; shares (N,), 1 where a won.

    ValueError for an unknown winner, or if no chain of battles connects two of the models.
    """

    def __init__(self, battles):
        self.models = list(dict.fromkeys(name for x in battles for name in (x["model_a"], x["model_b"])))
        numbers = {model: i for i, model in enumerate(self.models)}
        self.a = np.array([numbers[battle["model_a"]] for battle in battles], int)
        self.b = np.array([numbers[battle["model_b"]] for battle in battles], int)
        if unknown := {battle["winner"] for battle in battles} - set(WINS):
            raise ValueError(f"a battle's winner is {', '.join(WINS)}; not {unknown.pop()!r}")
        self.shares = np.array([WINS[battle["winner"]] for battle in battles])
        reached = np.arange(len(self.models)) == 0
        for _ in self.models:
            reached[self.a[reached[self.b]]] = True
            reached[self.b[reached[self.a]]] = True
        if len(self.models) < 2 or not reached.all():
            raise ValueError(f"ratings need battles that connect all models: {', '.join(self.models)}")

    def strengths(self, times):
        """The Bradley-Terry fit: log-odds (K,) in nats, mean 0; times (N,): how often each battle counts."""
        k = len(self.models)
        cells = np.concatenate([self.a * k + self.b, self.b * k + self.a])
        wins = np.bincount(cells, np.concatenate([times * self.shares, times * (1 - self.shares)]), k * k)
        wins = wins.reshape(k, k)  # [i, j]: how often i beat j, a tie being half a win
        i, j = np.nonzero(np.triu(wins + wins.T, 1))
        played = wins[i, j] + wins[j, i]
        return fit_logistic(np.eye(k)[i] - np.eye(k)[j], wins[i, j] / played, played, l2=PRIOR)

    def bootstrap(self, groups, rounds, seed):
        """strengths() in each of the rounds, which draw groups (N,) with replacement: (rounds, K)."""
        group = np.unique(groups, return_inverse=True)[1]
        n, rng = group.max() + 1, np.random.default_rng(seed)
        return np.array([self.strengths(rng.multinomial(n, np.full(n, 1 / n))[group]) for _ in range(rounds)])


def arena_hard_score(battles, baseline="gpt-4-0314", by="question", rounds=1000, seed=0):
    """Arena-Hard's score, {model: (score, low, high)}: the percentage of battles against the baseline that a
    Bradley-Terry fit predicts to be won, and its 95% bootstrap interval. The baseline's own is 50.

    battles: {"question_id", "model_a", "model_b", "winner"}, which is "model_a", "model_b" or "tie", half
    a win each; a strong verdict as three (arena-hard-auto v0.1: show_result.py, utils_math.py). The bootstrap
    draws questions, for one's battles are not independent: two orders, and three for a strong verdict.
    The leaderboard's draws battles, as `by="battle"`; for gpt-4-0613 its interval is 1.6 times narrower.
    """
    fit = Battles(battles)
    if baseline not in fit.models:
        raise ValueError(f"no battle has the baseline {baseline}; there are {', '.join(fit.models)}")
    base = fit.models.index(baseline)
    groups = {"question": [battle["question_id"] for battle in battles], "battle": range(len(battles))}[by]
    strengths, draws = fit.strengths(np.ones(len(battles))), fit.bootstrap(groups, rounds, seed)
    scores = 100 * sigmoid(strengths - strengths[base])
    low, high = np.percentile(100 * sigmoid(draws - draws[:, [base]]), [2.5, 97.5], axis=0).tolist()
    return {m: (s, low[i], high[i]) for i, (m, s) in enumerate(zip(fit.models, scores.tolist(), strict=True))}


def bradley_terry(battles):
    """Bradley-Terry ratings on the Elo scale, {model: rating}: their mean is 1000, and 400 points more are
    odds of 10 to 1. battles as for arena_hard_score.

    Each rating has a Gaussian prior of 1737 points around the mean. It moves a rating by far less than its
    error, and keeps it finite for a model that won, or lost, everything: read that as "never lost", no more.

    >>> wins = ["model_a"] * 1000 + ["model_b"] * 100
    >>> ten_to_one = [{"model_a": "x", "model_b": "y", "winner": w} for w in wins]
    >>> ratings = bradley_terry(ten_to_one)
    >>> round(ratings["x"] - ratings["y"])
    400
    """
    fit = Battles(battles)
    return dict(zip(fit.models, (1000 + ELO * fit.strengths(np.ones(len(battles)))).tolist(), strict=True))


def bradley_terry_intervals(battles, rounds=1000, seed=0):
    """bradley_terry() with a 95% bootstrap interval, {model: (rating, low, high)}. It draws questions, so
    that all battles on one, in both orders and between all models, stay together. The interval of a model
    that never lost is as meaningless as its rating."""
    fit = Battles(battles)
    draws = 1000 + ELO * fit.bootstrap([battle["question_id"] for battle in battles], rounds, seed)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0).tolist()
    return {m: (r, low[i], high[i]) for i, (m, r) in enumerate(bradley_terry(battles).items())}


# --- The judge ---

ALPACA_EVAL_SYSTEM = """\
You are a highly efficient assistant, who evaluates and selects the best large language model (LLMs) based \
on the quality of their responses to a given instruction. This process will be used to create a leaderboard\
 reflecting the most accurate and human-preferred answers."""

ALPACA_EVAL_PROMPT = """\
I require a leaderboard for various large language models. I'll provide you with prompts given to these \
models and their corresponding outputs. Your task is to assess these responses, and select the model that \
produces the best output from a human perspective.

## Instruction

{
    "instruction": \"""{prompt}\""",
}

## Model Outputs

Here are the unordered outputs from the models. Each output is associated with a specific model, identified\
 by a unique model identifier.

{
    {
        "model_identifier": "m",
        "output": \"""{first}\"""
    },
    {
        "model_identifier": "M",
        "output": \"""{second}\"""
    }
}

## Task

Evaluate the models based on the quality and relevance of their outputs, and select the model that \
generated the best output. Answer by providing the model identifier of the best model. We will use your \
output as the name of the best model, so make sure your output only contains one of the following model \
identifiers and nothing else (no quotes, no spaces, no new lines, ...): m or M.

## Best Model Identifier"""

ARENA_HARD_SYSTEM = """\
Please act as an impartial judge and evaluate the quality of the responses provided by two AI assistants to\
 the user prompt displayed below. You will be given assistant A's answer and assistant B's answer. Your job\
 is to evaluate which assistant's answer is better.

Begin your evaluation by generating your own answer to the prompt. You must provide your answers before \
judging any answers.

When evaluating the assistants' answers, compare both assistants' answers with your answer. You must \
identify and correct any mistakes or inaccurate information.

Then consider if the assistant's answers are helpful, relevant, and concise. Helpful means the answer \
correctly responds to the prompt or follows the instructions. Note when user prompt has any ambiguity or \
more than one interpretation, it is more helpful and appropriate to ask for clarifications or more \
information from the user than providing an answer based on assumptions. Relevant means all parts of the \
response closely connect or are appropriate to what is being asked. Concise means the response is clear and\
 not verbose or excessive.

Then consider the creativity and novelty of the assistant's answers when needed. Finally, identify any \
missing important information in the assistants' answers that would be beneficial to include when \
responding to the user prompt.

After providing your explanation, you must output only one of the following choices as your final verdict \
with a label:

1. Assistant A is significantly better: [[A>>B]]
2. Assistant A is slightly better: [[A>B]]
3. Tie, relatively the same: [[A=B]]
4. Assistant B is slightly better: [[B>A]]
5. Assistant B is significantly better: [[B>>A]]

Example output: "My final verdict is tie: [[A=B]]"."""

ARENA_HARD_PROMPT = """\
<|User Prompt|>
{prompt}

<|The Start of Assistant A's Answer|>
{first}
<|The End of Assistant A's Answer|>

<|The Start of Assistant B's Answer|>
{second}
<|The End of Assistant B's Answer|>"""

LABELS = {  # who wins, A being the first answer, and how often the verdict counts (show_result.py)
    "A>>B": ("model_a", 3),
    "A>B": ("model_a", 1),
    "A=B": ("tie", 1),
    "B>A": ("model_b", 1),
    "B>>A": ("model_b", 3),
}


def read_preference(choice):
    """The first answer's share, 0 to 1, of the probability of the two names, "m" and "M", as the first token
    (alpaca_eval's logprob_parser); None if neither is listed. Without log-probs: 1 or 0, by the letter."""
    if not (choice.logprobs and choice.logprobs.content):
        return {"m": 1.0, "M": 0.0}.get((choice.message.content or "").strip())
    listed = choice.logprobs.content[0].top_logprobs
    first, second = (sum(np.exp(t.logprob) for t in listed if t.token.strip() == name) for name in "mM")
    return float(first / (first + second)) if first + second > 0 else None


def read_label(choice):
    """One of LABELS; None if there is none, or if several differ (Arena-Hard's get_score)."""
    labels = set(re.findall(r"\[\[([AB<>=]+)\]\]", choice.message.content or ""))
    return labels.pop() if len(labels) == 1 and labels <= set(LABELS) else None


class Style(NamedTuple):
    system: str
    prompt: str  # with {prompt}, {first} and {second}
    request: dict  # alpaca_eval's weighted_alpaca_eval_gpt4_turbo, Arena-Hard's judge_config.yaml
    read: Callable  # a reply's choice -> the verdict on the first answer, None if there is none


ONE_TOKEN = {"max_tokens": 1, "temperature": 1, "logprobs": True, "top_logprobs": 5}
STYLES = {
    "alpaca_eval": Style(ALPACA_EVAL_SYSTEM, ALPACA_EVAL_PROMPT, ONE_TOKEN, read_preference),
    "arena_hard": Style(
        ARENA_HARD_SYSTEM, ARENA_HARD_PROMPT, {"max_tokens": 4096, "temperature": 0}, read_label
    ),
}


def ask_about(answers, pairs, judge, style):
    """Every question to the judge, {key: (messages, digest)}: each pair (model, baseline) on each prompt, in
    both orders. The digest, of all that is sent, tells a verdict on other answers or by another prompt."""
    questions = {}
    for (model, baseline), order in product(pairs, ORDERS):
        shown = (baseline, model) if order == "baseline first" else (model, baseline)
        for id, row in answers[model].items():
            first, second = (answers[name][id]["response"] for name in shown)
            texts = {"prompt": row["prompt"], "first": first, "second": second}
            # In one pass, for an answer may hold "{second}"; not by format(), for the prompts hold braces.
            user = re.sub(r"\{(prompt|first|second)\}", lambda m, texts=texts: texts[m[1]], style.prompt)
            messages = [{"role": "system", "content": style.system}] if style.system else []
            messages.append({"role": "user", "content": user})
            digest = sha256(json.dumps([messages, style.request]).encode()).hexdigest()[:16]
            questions[id, order, model, baseline, judge] = messages, digest
    return questions


def load_answers(files):
    """Answers files as {model: {id: row}}; each is FILE, for a model of the file's name, or MODEL=FILE.
    ValueError if they answer different questions, or for what is wrong with one."""
    answers, paths = {}, []
    for file in map(str, files):
        model, _, path = file.rpartition("=")
        model, paths = model or Path(path).stem, [*paths, path]
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
        if model in answers:
            raise ValueError(f"{path}: a second {model}; write NAME={path}")
        rows = read_lines(path)
        for name, kind in {"id": str, "prompt": str, "response": str, "length": int}.items():
            if any(not isinstance(row, dict) or not isinstance(row.get(name), kind) for row in rows):
                raise ValueError(f'{path}: each line needs "{name}", a {kind.__name__}')
        answers[model] = {row["id"]: row for row in rows}
        if not rows or len(answers[model]) < len(rows):
            problem = "two lines have one id; evaluate with --n 1" if rows else "no answers"
            raise ValueError(f"{path}: {problem}")
    questions = [{(row["id"], row["prompt"]) for row in rows.values()} for rows in answers.values()]
    for path, asked in zip(paths, questions, strict=True):
        if different := asked ^ questions[0]:
            raise ValueError(f"{path}: answers other questions than {paths[0]}, such as {min(different)[0]}")
    return answers


def read_judgments(path):
    """The verdicts of an earlier start, {key: row}. A last line that a kill cut off is removed, and said."""
    if not path.exists():
        return {}
    written = path.read_bytes()
    whole = written.rfind(b"\n") + 1
    if whole < len(written):
        print(f"{path}: its last line was cut off; it is dropped, and asked for again")
        os.truncate(path, whole)
    return {tuple(row[name] for name in KEY): row for row in read_lines(path)}


def connect(url, retries):
    """A client of the endpoint, which asks again with growing pauses after a lost connection, 408, 409, 429,
    5xx. ValueError if nothing answers, or the key is refused."""
    import openai  # comes with vLLM; only who asks a judge waits for the import

    key = os.environ.get("OPENAI_API_KEY") or "EMPTY"  # `vllm serve` takes any
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries)
    try:
        client.with_options(max_retries=0, timeout=20).models.list()
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        raise ValueError(f"--judge-url {url}: refuses the key in OPENAI_API_KEY") from None
    except openai.APIConnectionError:
        raise ValueError(f"--judge-url {url}: nothing answers there") from None
    except openai.APIStatusError:
        pass  # something answers, and not every endpoint lists its models
    return client


def ask(client, key, messages, digest, style):
    """One question -> its line of judgments.jsonl. A verdict that cannot be read is None."""
    reply = client.chat.completions.create(model=key[-1], messages=messages, **style.request)
    choice = reply.choices[0]
    listed = bool(choice.logprobs and choice.logprobs.content)
    verdict = {"digest": digest, "verdict": style.read(choice), "logprobs": listed}
    return dict(zip(KEY, key, strict=True)) | verdict | {"text": choice.message.content}


def ask_all(client, questions, style, path, workers):
    """Ask all, and append each verdict to judgments.jsonl as it comes. A question that the endpoint rejects
    (400, such as a prompt beyond its context) is counted and said, not written. ValueError if it fails."""
    import openai

    def message(error):
        return " ".join(str(error).replace(client.api_key, "[key]").split())[:300]

    pool, rejected = ThreadPoolExecutor(workers), []
    asked = [pool.submit(ask, client, key, *question, style) for key, question in questions.items()]
    try:
        with path.open("a", buffering=1) as file:  # by line: a kill loses no whole one
            for future in tqdm(as_completed(asked), "judge", len(asked)):
                try:
                    file.write(json.dumps(future.result()) + "\n")
                except openai.BadRequestError as error:
                    rejected.append(message(error))
    except openai.OpenAIError as error:
        raise ValueError(f"--judge-url failed: {message(error)}; start again for the rest") from None
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or a failure, no call that nobody reads
    if rejected:
        print(f"{len(rejected)} of {len(asked)} questions were rejected, the first with: {rejected[0]}")


def to_battles(judgments):
    """Verdicts as battles: Arena-Hard's strong ones three times, AlpacaEval's won by the likelier answer."""
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


def to_preferences(judgments):
    """AlpacaEval's verdicts as {model: {id: preference}}, 2 = the model wins: the mean of the two orders.
    A question without one of them is left out: the other alone would carry the judge's bias for a position.
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


def alpaca_eval_row(preferences, model, baseline):
    """A model's row of the table, from preferences {id: preference} and both sides' answers {id: row}."""
    values, difficulties = list(preferences.values()), [baseline[id].get("difficulty") for id in preferences]
    lengths = [[answers[id]["length"] for id in preferences] for answers in (model, baseline)]
    row = dict(zip(("winrate", "standard_error"), winrate(values), strict=True)) | {"questions": len(values)}
    row["with_difficulties"] = None not in difficulties
    try:
        both = length_controlled_winrate(values, *lengths, difficulties if row["with_difficulties"] else None)
    except ValueError as reason:
        print(f"no length-controlled win rate: {reason}")
        both = (None, None)
    return dict(zip(("length_controlled_winrate", "lc_standard_error"), both, strict=True)) | row


@dataclass
class Config:
    judge_url: str = HfArg(help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")
    judge_model: str = HfArg(help="The judge's name there.")
    out: str = HfArg(help="Folder of judgments.jsonl, which a second start completes, and result.json.")
    answers: list[str] = HfArg(
        help="FILE or NAME=FILE for each model, as `evaluate.py --n 1 --answers FILE` writes it."
    )
    baseline: str | None = HfArg(
        default=None,
        help="The answers that each is compared with; its rows may have AlpacaEval's `difficulty`.",
    )
    each_against_each: bool = HfArg(default=False, help="No baseline: compare all pairs, and rate all.")
    style: Literal["alpaca_eval", "arena_hard"] = HfArg(
        default="alpaca_eval", help="A probability in one token; or [[A>B]] after an explanation."
    )
    judge_prompt: str | None = HfArg(
        default=None, help="A file with another prompt, of {prompt}, {first} and {second}; no system message."
    )
    judge_max_tokens: Count | None = HfArg(
        default=None, help="Longest reply. Default: 1 for alpaca_eval, 4096 for arena_hard."
    )
    workers: Count = HfArg(default=8, help="Questions under way at the same time.")
    retries: Count = HfArg(default=6, help="Of one question, before the endpoint counts as down.")
    price_in: Coefficient | None = HfArg(default=None, help="Dollars per million prompt tokens.")
    price_out: Coefficient | None = HfArg(default=None, help="Dollars per million reply tokens.")
    seed: int = HfArg(default=0, help="Seed of the bootstrap.")


def prepare(config):
    """The answers {model: {id: row}}, the pairs (model, baseline) and the style; ValueErrors in one line."""
    if config.each_against_each == bool(config.baseline):
        raise ValueError("give either --baseline FILE or --each-against-each")
    answers = load_answers([*config.answers, *([config.baseline] if config.baseline else [])])
    *models, last = answers
    pairs = [(model, last) for model in models] if config.baseline else list(combinations(answers, 2))
    if not pairs:
        raise ValueError("--each-against-each: needs two or more files in --answers")
    style = STYLES[config.style]
    if config.judge_prompt:
        if not Path(config.judge_prompt).is_file():
            raise ValueError(f"--judge-prompt {config.judge_prompt}: no such file")
        style = style._replace(system="", prompt=Path(config.judge_prompt).read_text())
        for name in ("{prompt}", "{first}", "{second}"):
            if name not in style.prompt:
                raise ValueError(f"--judge-prompt {config.judge_prompt}: lacks {name}")
    if config.judge_max_tokens:
        style = style._replace(request=style.request | {"max_tokens": config.judge_max_tokens})
    return answers, pairs, style


def print_cost(missing, total, style, config):
    """What is about to be asked and may cost, before the first call."""
    characters = sum(len(m["content"]) for messages, _ in missing.values() for m in messages)
    prompt, reply = characters / CHARS_PER_TOKEN, len(missing) * style.request["max_tokens"]
    cost = f"about {prompt:,.0f} prompt tokens (characters / {CHARS_PER_TOKEN}), up to {reply:,} reply tokens"
    if None not in (config.price_in, config.price_out):
        cost += f", up to {(prompt * config.price_in + reply * config.price_out) / 1e6:,.2f} dollars"
    print(f"{len(missing)} of {total} verdicts are missing: {len(missing)} calls, {cost}", flush=True)


def judge(config):
    """Ask for what is missing. Returns the answers, the pairs, and all verdicts (rows of judgments.jsonl)."""
    answers, pairs, style = prepare(config)
    path = Path(config.out) / "judgments.jsonl"
    questions, there = ask_about(answers, pairs, config.judge_model, style), read_judgments(path)
    if any(key in questions and questions[key][1] != row["digest"] for key, row in there.items()):
        raise ValueError(f"{path}: is on other answers, or by another prompt; choose another --out")
    missing = {key: question for key, question in questions.items() if key not in there}
    print_cost(missing, len(questions), style, config)
    if missing:
        client = connect(config.judge_url, config.retries)
        path.parent.mkdir(parents=True, exist_ok=True)
        ask_all(client, missing, style, path, config.workers)
    return answers, pairs, [row for key, row in read_judgments(path).items() if key in questions]


def main(args=None):
    config = parse_flags(Config, args)
    with one_line_errors():
        answers, pairs, judgments = judge(config)
        readable = [row for row in judgments if row["verdict"] is not None]
        unreadable = len(judgments) - len(readable)
        if unreadable:
            print(f"{unreadable} of {len(judgments)} verdicts are unreadable, and left out")
        for model, baseline in pairs:
            if not any((row["model"], row["baseline"]) == (model, baseline) for row in readable):
                raise ValueError(f"--out {config.out}: has no readable verdict on {model} against {baseline}")
        if config.each_against_each or config.style == "arena_hard":
            battles = to_battles(readable)
            if config.each_against_each:
                name, rows = "rating", bradley_terry_intervals(battles, seed=config.seed)
            else:
                name, rows = "score", arena_hard_score(battles, pairs[0][1], seed=config.seed)
            table = {m: dict(zip((name, "low", "high"), row, strict=True)) for m, row in rows.items()}
        else:
            chosen = to_preferences(readable)
            table = {m: alpaca_eval_row(chosen[m], answers[m], answers[b]) for m, b in pairs}
    by_letter = sum(not row["logprobs"] for row in readable) if config.style == "alpaca_eval" else 0
    if by_letter:
        print(f"{by_letter} verdicts came without log-probs: each is 1 or 2, by the letter")

    for model, row in table.items():
        row["length"] = fmean(answer["length"] for answer in answers[model].values())
        values = (f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(f"{model:24s} {'  '.join(values)}")
    counts = {"verdicts": len(judgments), "unreadable": unreadable, "by_letter": by_letter}
    flags = {name: getattr(config, name) for name in ("style", "judge_model", "baseline", "judge_prompt")}
    result = {"models": table, **counts, **flags, **surroundings()}
    write_json(Path(config.out) / "result.json", result)


if __name__ == "__main__":
    main()
