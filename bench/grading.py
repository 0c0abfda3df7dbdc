r"""Compare grader/as_meant.py with Math-Verify alone (the paper's way) on real problems and answers.

    python bench/grading.py --data FOLDER          # some minutes on 2 cores

FOLDER has math/ (PROBLEMS below, .jsonl or .json, in data.py's formats) and math_grading/ (.jsonl files: a
gold, an answer and whether it is right). Missing files are skipped.

Each response is graded both ways. "Right" means the expected reward: 1 for a problem's own solution or gold,
0 for the gold of the next problem, and the label of a graded case.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only bench/ is there

from flags import Count, parse_flags  # noqa: E402

from data import gold_answer, read_file  # noqa: E402
from grader import MathVerifier  # noqa: E402
from run import surroundings, write_json, write_lines  # noqa: E402

Case = tuple[str, str, float]  # response, gold, and the reward that it should get
PROBLEMS = (
    "math500",
    "math_train",
    "gsm8k_train",
    "gsm8k_test",
    "numina_cot_samples",
    "numina15_olympiads_1k",
)
PEOPLE = "answers as people and models write them"  # cases with whole responses, after public bug reports
WAYS = ("%s.", r"\boldsymbol{%s}", r"\text{The answer is } %s", "**%s**", r"\boxed{%s}\,")
WAYS_OF_NUMBERS = (r"%s\text{ units}", r"\$%s", r"%s euros", r"x = %s", r"\text{%s hours}")


@dataclass
class Config:
    data: str = HfArg(help="The folder with math/ and math_grading/.")
    workers: Count = HfArg(default=2, help="Grader processes of each of the two pools, which work in turn.")
    out: str = HfArg(default="results/grading/numbers.json", help="Where the numbers are written.")
    changed: str | None = HfArg(default=None, help="JSON lines: every case whose reward changed, to look at.")


def boxed(answer: str) -> str:
    return rf"The final answer is $\boxed{{{answer}}}$. I hope it is correct."


def problems(path: Path) -> Iterator[tuple[str | None, str]]:
    """(solution, gold) of each row that has a gold."""
    for _, row in read_file(path):
        answer = row.get("reference_answer") or row.get("answer")
        _, gold = gold_answer(row | {"answer": answer})
        if gold is not None:
            yield row.get("solution"), gold


def sets(folder: Path) -> Iterator[tuple[str, list[Case]]]:
    """The rows of the table: a name, and what to grade."""
    for name in PROBLEMS:
        path = next((folder / "math").glob(f"{name}.json*"), None)
        if path is None:
            continue
        rows = list(problems(path))
        golds = [gold for _, gold in rows]
        solutions = [(solution, gold, 1.0) for solution, gold in rows if solution]
        if solutions:
            yield f"{name}: its solutions", solutions
        yield f"{name}: golds in a box", [(boxed(gold), gold, 1.0) for gold in golds]
        written = [(boxed(way % gold), gold, 1.0) for gold in dict.fromkeys(golds) for way in WAYS]
        yield f"{name}: golds in other ways", written
        numbers = [gold for gold in dict.fromkeys(golds) if gold.isdecimal()]
        behind = [(boxed(way % gold), gold, 1.0) for gold in numbers for way in WAYS_OF_NUMBERS]
        behind += [(boxed(spaced(gold)), gold, 1.0) for gold in numbers if len(gold) > 3]
        yield f"{name}: whole numbers with words, signs and spaces", behind
        pairs = list(zip(golds, golds[1:], strict=False))
        yield f"{name}: the next problem's gold", [(boxed(b), a, 0.0) for a, b in pairs if a != b]
    for path in sorted((folder / "math_grading").glob("*.jsonl")):
        whole = any("response" in case for _, case in read_file(path))
        yield PEOPLE if whole else path.stem, list(graded(path))


def spaced(number: str) -> str:
    r"""12345 -> 12\,345."""
    return f"{int(number):,}".replace(",", r"\,")


def graded(path: Path) -> Iterator[Case]:
    """Cases with labels, without those of other graders' tests that set special options."""
    for _, case in read_file(path):
        if "response" in case:
            yield case["response"], case["gold"], float(case["expected"])
        elif case["form"] == "text":
            if not case.get("config"):
                yield case["pred"], case["gold"], float(case["expected"])
        elif not case.get("config"):
            yield f"${case['pred']}$", case["gold"], float(case["expected"])
            yield boxed(case["pred"]), case["gold"], float(case["expected"])


def measure(name: str, cases: list[Case], pools: tuple[MathVerifier, ...]) -> tuple[dict, list[dict]]:
    """The row of a set, and what changed in it; pools: before and after."""
    responses, golds, should = zip(*cases, strict=True)
    items = list(zip(responses, golds, strict=True))
    before, after = (pool.score(items) for pool in pools)
    golds = list(dict.fromkeys(golds))
    unusable = [{golds[i] for i in pool.unparsable(golds)} for pool in pools]
    changed = [
        {"set": name, "gold": gold, "response": response[-300:], "reward": now, "as it should": now == wanted}
        for (response, gold), was, now, wanted in zip(items, before, after, should, strict=True)
        if was != now
    ]
    row = {
        "set": name,
        "responses": len(cases),
        "right before": sum(map(float.__eq__, before, should)),
        "right after": sum(map(float.__eq__, after, should)),
        "made right": sum(one["as it should"] for one in changed),
        "made wrong": sum(not one["as it should"] for one in changed),
        "golds": len(golds),
        "unusable before": len(unusable[0]),
        "unusable after": len(unusable[1]),
    }
    of_golds = sorted(unusable[0] ^ unusable[1])
    return row, changed + [{"set": name, "gold": gold, "usable": gold in unusable[0]} for gold in of_golds]


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    table, changed, seconds = [], [], [0.0, 0.0]
    pools = MathVerifier(config.workers, strict=True), MathVerifier(config.workers)
    with pools[0], pools[1]:
        for pool in pools:
            pool.score([(boxed("5"), "5")] * config.workers)  # all have started
        for name, cases in sets(Path(config.data)):
            row, found = measure(name, cases, pools)
            table.append(row)
            changed += found
            seconds = [s + len(cases) / pool.per_s for s, pool in zip(seconds, pools, strict=True)]
            print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
    if not table:
        raise SystemExit(f"grading.py: --data {config.data}: has none of the files that --help names")
    responses = sum(row["responses"] for row in table)
    per_s = dict(zip(["before", "after"], (responses / s for s in seconds), strict=True))
    write_json(config.out, {"sets": table, "responses per second and worker": per_s, **surroundings()})
    if config.changed:
        write_lines(config.changed, changed)


if __name__ == "__main__":
    main()
