r"""Have an LLM judge compare answers: AlpacaEval's length-controlled win rate, Arena-Hard's score, Elo.

    python -m judge --answers online.jsonl offline.jsonl --baseline gpt4.jsonl --style alpaca_eval \
        --judge-url http://127.0.0.1:8000/v1 --judge-model NAME --out judged
    python -m judge --answers seed.jsonl online.jsonl offline.jsonl --each-against-each --style arena_hard ...

Start it from the repository's folder. The judge is any OpenAI-compatible endpoint; its key is the environment
variable OPENAI_API_KEY. The number of calls and their largest cost are printed before the first one. A second
start with the same --out asks only for the missing verdicts.

An answers file, FILE or NAME=FILE, comes from `evaluate.py --n 1 --answers FILE`, or from a benchmark's own
answers by `python -m judge.answers`.
"""

import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from flags import Coefficient, Count, OutFolder, one_line_errors, parse_flags, program, why_not

from transformers.hf_argparser import HfArg

from judge.answers import Answers, load_answers
from judge.prompts import STYLES, Style
from judge.verdicts import (
    Key,
    Question,
    Verdict,
    ask_about,
    ask_all,
    connect,
    read_judgments,
    to_battles,
    to_preferences,
)
from judge.winrates import arena_hard_score, bradley_terry_intervals, length_controlled_winrate, winrate
from run import read_text, surroundings, write_json

CHARS_PER_TOKEN = 4  # a common rough figure for English
LACKING = 0.1  # share of verdicts that may be missing or unreadable; above it the command ends with status 1
Pairs = list[tuple[str, str]]  # (model, baseline)


@dataclass
class Config:
    judge_url: str = HfArg(help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.")
    judge_model: str = HfArg(help="The judge's name there.")
    out: OutFolder = HfArg(help="Folder of judgments.jsonl, which a second start completes, and result.json.")
    answers: list[str] = HfArg(
        help="FILE or NAME=FILE for each model, as `evaluate.py --n 1 --answers FILE` writes it."
    )
    baseline: str | None = HfArg(
        default=None,
        help="The answers that each model is compared with; its rows may have AlpacaEval's `difficulty`.",
    )
    each_against_each: bool = HfArg(
        default=False, help="Compare every pair of models instead, and rate them all on the Elo scale."
    )
    style: Literal["alpaca_eval", "arena_hard"] = HfArg(
        default="alpaca_eval",
        help="alpaca_eval reads a probability from one token; arena_hard reads [[A>B]] after an explanation.",
    )
    judge_prompt: str | None = HfArg(
        default=None,
        help="A file with another prompt, with {prompt}, {first} and {second}; no system message.",
    )
    judge_max_tokens: Count | None = HfArg(
        default=None, help="Longest reply. Default: 1 for alpaca_eval, 4096 for arena_hard."
    )
    workers: Count = HfArg(default=8, help="Questions asked at the same time.")
    retries: Count = HfArg(default=12, help="Retries of one question; 12 take a minute.")
    timeout: Count = HfArg(default=600, help="Seconds to wait for one reply.")
    price_in: Coefficient | None = HfArg(default=None, help="Dollars per million prompt tokens.")
    price_out: Coefficient | None = HfArg(default=None, help="Dollars per million reply tokens.")
    seed: int = HfArg(default=0, help="Seed of the bootstrap.")


def prepare(config: Config) -> tuple[Answers, Pairs, Style]:
    """Load the answers, pair the models, build the style; ValueError, in one line, for a bad flag or file."""
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
        style = style._replace(system="", prompt=read_text(config.judge_prompt))
        for name in ("{prompt}", "{first}", "{second}"):
            if name not in style.prompt:
                raise ValueError(f"--judge-prompt {config.judge_prompt}: lacks {name}")
    if config.judge_max_tokens:
        style = style._replace(request=style.request | {"max_tokens": config.judge_max_tokens})
    return answers, pairs, style


def print_cost(missing: dict[Key, Question], total: int, style: Style, config: Config) -> None:
    """Print how many calls are about to be made, and what they may cost."""
    characters = sum(len(m["content"]) for messages, _ in missing.values() for m in messages)
    prompt, reply = characters / CHARS_PER_TOKEN, len(missing) * style.request["max_tokens"]
    cost = f"about {prompt:,.0f} prompt tokens (characters / {CHARS_PER_TOKEN}), up to {reply:,} reply tokens"
    if None not in (config.price_in, config.price_out):
        cost += f", up to {(prompt * config.price_in + reply * config.price_out) / 1e6:,.2f} dollars"
    print(f"{len(missing)} of {total} verdicts are missing: {len(missing)} calls, {cost}", flush=True)


def collect(config: Config) -> tuple[Answers, Pairs, list[Verdict], int]:
    """Ask for the missing verdicts; return answers, pairs, verdicts, and how many are still missing."""
    answers, pairs, style = prepare(config)
    path, failures = Path(config.out) / "judgments.jsonl", ""
    if problem := why_not(path, folder=False):
        raise ValueError(f"--out {path}: {problem}")
    questions, there = ask_about(answers, pairs, config.judge_model, style), read_judgments(path)
    if any(key in questions and questions[key][1] != row["digest"] for key, row in there.items()):
        raise ValueError(f"{path}: is on other answers, or by another prompt; choose another --out")
    missing = {key: question for key, question in questions.items() if key not in there}
    print_cost(missing, len(questions), style, config)
    if missing:
        client = connect(config.judge_url, config.retries, config.timeout)
        path.parent.mkdir(parents=True, exist_ok=True)
        failures = ask_all(client, missing, style, path, config.workers)
    judgments = [row for key, row in read_judgments(path).items() if key in questions]
    lacking = len(questions) - len(judgments)
    if lacking:
        said = f"{lacking} of {len(questions)} verdicts are missing: {failures}"
        if not judgments:
            raise ValueError(f"--judge-url {config.judge_url}: {said}")
        print(f"{program()}: {said}", file=sys.stderr)
    return answers, pairs, judgments, lacking


def alpaca_eval_row(
    name: str,
    preferences: dict[str, float],
    model: dict[str, dict[str, Any]],
    baseline: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Return a model's row of the table from its preferences {id: preference} and both answers {id: row}.

    Difficulties are used if every question has one. If length control is not possible it is None, and a
    printed line gives the reason.
    """
    values, difficulties = list(preferences.values()), [baseline[id].get("difficulty") for id in preferences]
    lengths = [[answers[id]["length"] for id in preferences] for answers in (model, baseline)]
    row = dict(zip(("winrate", "standard_error"), winrate(values), strict=True)) | {"questions": len(values)}
    row["with_difficulties"] = None not in difficulties
    try:
        both = length_controlled_winrate(values, *lengths, difficulties if row["with_difficulties"] else None)
    except ValueError as reason:
        print(f"{name}: no length-controlled win rate: {reason}")
        both = (None, None)
    return dict(zip(("length_controlled_winrate", "lc_standard_error"), both, strict=True)) | row


def make_table(config: Config, answers: Answers, pairs: Pairs, readable: list[Verdict]) -> dict[str, dict]:
    """Return each model's row of result.json; ValueError if a pair has too few readable verdicts."""
    for model, baseline in pairs:
        if not any((row["model"], row["baseline"]) == (model, baseline) for row in readable):
            raise ValueError(f"--out {config.out}: has no readable verdict on {model} against {baseline}")
    if config.style == "alpaca_eval" and not config.each_against_each:
        chosen = to_preferences(readable)
        for model, baseline in pairs:
            if len(chosen[model]) < 2:
                found = f"{len(chosen[model])} with readable verdicts in both orders"
                raise ValueError(
                    f"--out {config.out}: a win rate needs two or more questions; {model} against {baseline} "
                    f"has {found}; start again for those that are missing, or take another judge"
                )
        return {m: alpaca_eval_row(m, chosen[m], answers[m], answers[b]) for m, b in pairs}
    battles = to_battles(readable)
    if config.each_against_each:
        name, rows = "rating", bradley_terry_intervals(battles, seed=config.seed)
    else:
        name, rows = "score", arena_hard_score(battles, pairs[0][1], seed=config.seed)
    return {m: dict(zip((name, "low", "high"), row, strict=True)) for m, row in rows.items()}


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        answers, pairs, judgments, missing = collect(config)
        readable = [row for row in judgments if row["verdict"] is not None]
        unreadable = len(judgments) - len(readable)
        if unreadable:
            odd = [row for row in judgments if row["verdict"] is None]
            cut = sum(row.get("finish_reason") == "length" for row in odd)
            why = f"{cut} cut off at --judge-max-tokens; the first: {odd[0].get('text')!a:.80}"
            print(f"{unreadable} of {len(judgments)} verdicts are unreadable, and left out ({why})")
        table = make_table(config, answers, pairs, readable)
    by_letter = sum(not row["logprobs"] for row in readable) if config.style == "alpaca_eval" else 0
    if by_letter:
        print(f"{by_letter} verdicts came without log-probs: each is 1 or 2, by the letter")

    for model, row in table.items():
        row["length"] = fmean(answer["length"] for answer in answers[model].values())
        values = (f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print(f"{model:24s} {'  '.join(values)}")
    counts = {"verdicts": len(judgments), "missing": missing, "unreadable": unreadable}
    flags = {name: getattr(config, name) for name in ("style", "judge_model", "baseline", "judge_prompt")}
    result = {"models": table, **counts, "by_letter": by_letter, **flags, **surroundings()}
    write_json(Path(config.out) / "result.json", result)
    if missing + unreadable > LACKING * (missing + len(judgments)):
        problem = f"more than {LACKING:.0%} of the verdicts are missing or unreadable"
        sys.exit(f"{program()}: {problem}; the table, and {config.out}/result.json, are of the others alone")


if __name__ == "__main__":
    main()
