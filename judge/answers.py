"""Files of answers to be judged. This command makes one from the answers that a benchmark publishes.

    python -m judge.answers --answers alpaca_eval.json --out baseline.jsonl [--difficulties F.csv]

It reads AlpacaEval's file (a list of {"instruction", "output"}) or Arena-Hard's (a conversation a line); the
result is for `python -m judge --baseline`. Each line of an answers file has a question's id, its prompt, the
response, and the response's length in characters. `evaluate.py --n 1 --answers FILE` writes the same.
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flags import OutFile, one_line_errors, parse_flags

from transformers.hf_argparser import HfArg

from data import prompt_id, read_file, request_text
from run import read_lines, write_lines

Answers = dict[str, dict[str, dict[str, Any]]]  # {model: {question's id: row}}


def split_name(file: str) -> tuple[str, str]:
    """Split FILE or MODEL=FILE into (model, path). Both may hold "=": the longest path that exists counts."""
    parts = file.split("=")
    for i in range(len(parts)):
        if (path := Path("=".join(parts[i:])).expanduser()).is_file():
            return "=".join(parts[:i]) or path.stem, str(path)
    raise ValueError(f"{file}: no such file")


def load_answers(files: Iterable[str | Path]) -> Answers:
    """Load answers files as {model: {id: row}}; each is FILE, for a model of the file's name, or MODEL=FILE.

    ValueError, in one line, for a file that is absent or malformed, two files for one model, or files that
    answer different questions.
    """
    answers, paths = {}, []
    for file in map(str, files):
        model, path = split_name(file)
        paths.append(path)
        if model in answers:
            raise ValueError(f"{path}: a second {model}; write NAME={path}")
        rows = read_lines(path)
        for name, kind in {"id": str, "prompt": str, "response": str, "length": int}.items():
            fits = [isinstance(row.get(name), kind) for row in rows]
            if not all(fits):
                problem = (
                    f'each line needs "{name}", a {kind.__name__}; object {fits.index(False) + 1} has none'
                )
                raise ValueError(f"{path}: {problem} (`python -m judge.answers` converts a benchmark's file)")
        answers[model] = {row["id"]: row for row in rows}
        if not rows or len(answers[model]) < len(rows):
            problem = "two lines have one id; evaluate with --n 1" if rows else "no answers"
            raise ValueError(f"{path}: {problem}")
    questions = [{(row["id"], row["prompt"]) for row in rows.values()} for rows in answers.values()]
    for path, asked in zip(paths, questions, strict=True):
        if different := asked ^ questions[0]:
            raise ValueError(f"{path}: answers other questions than {paths[0]}, such as {min(different)[0]}")
    return answers


def read_answers(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a benchmark's own answers, AlpacaEval's or Arena-Hard's, as rows of an answers file.

    ValueError, in one line, for a row without a prompt or an answer.
    """
    for where, row in read_file(path):
        prompt = request_text(row, where)
        answer = row.get("output") if isinstance(row, dict) else None
        if answer is None and isinstance(row, dict):
            turns = row.get("messages") or row.get("conversation") or []
            turns = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "assistant"]
            answer = turns[0].get("content") if turns else None
        if isinstance(answer, dict):  # Arena-Hard's
            answer = answer.get("answer")
        if not isinstance(answer, str):
            raise ValueError(f"{where}: no answer in 'output', nor in a message of the assistant")
        yield {"id": prompt_id(prompt), "prompt": prompt, "response": answer, "length": len(answer)}


def read_difficulties(path: str) -> list[float]:
    """Read the column instruction_difficulty of a .csv file; ValueError, in one line, if there is none."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [float(row["instruction_difficulty"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        problem = "not a .csv file with a column of numbers, instruction_difficulty"
        raise ValueError(f"--difficulties {path}: {problem}") from error


@dataclass
class Config:
    answers: str = HfArg(help="A benchmark's answers: AlpacaEval's or Arena-Hard's file.")
    out: OutFile = HfArg(help="File for `python -m judge`, one JSON object a line.")
    difficulties: str | None = HfArg(
        default=None, help="AlpacaEval's instruction_difficulty: a .csv file, its rows in the answers' order."
    )


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        rows = list(read_answers(Path(config.answers)))
        if config.difficulties:
            values = read_difficulties(config.difficulties)
            if len(values) != len(rows):
                raise ValueError(f"--difficulties: {len(values)} for {len(rows)} answers")
            rows = [row | {"difficulty": value} for row, value in zip(rows, values, strict=True)]
        write_lines(config.out, rows)
    print(f"{config.out}: {len(rows)} answers")


if __name__ == "__main__":
    main()
