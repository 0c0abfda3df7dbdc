r"""Grade a thousand poisoned responses: each is scored or times out, and the grader survives (Linux).

    python bench/poison.py          # some minutes on 2 cores

A policy may write these by chance, or to its advantage: towers of powers, factorials, text that makes
Math-Verify's regular expressions backtrack, megabytes, nested braces, null bytes, marks that turn the text's
direction, code. The first two kinds are from Math-Verify's issue 65, the third hung another project's
training. Among them are plainly right and wrong answers, which must get their rewards.

Each call has one item per worker, so it takes as long as its slowest item, plus the start of the workers that
earlier calls killed. It fails (status 1) if a call took more than the deadline and START_S, if a right or
wrong answer got another reward, or if a process is left.
"""

import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from tqdm import tqdm
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only bench/ is there

from flags import (  # noqa: E402
    Count,
    OutFile,  # noqa: E402
    Positive,
    parse_flags,
)

from grader import MathVerifier  # noqa: E402
from run import surroundings, write_json  # noqa: E402

START_S = 10.0  # generous, for a worker that imports sympy beside others
MB = 2**20
TRACE = "/tmp/this-was-written-by-a-response"


def tower(rng: random.Random) -> str:
    """Powers of powers; some have more braces opened than closed."""
    return "^{".join(str(rng.randint(5, 99)) for _ in range(rng.randint(4, 6))) + "}" * 3


def text_of(rng: random.Random, size: int) -> str:
    """Characters of formulas, in random order."""
    return "".join(rng.choices(r"abc 0123456789+-*/^_={}()[]\$&%,.", k=size))


def boxed(answer: str | int) -> str:
    """A response that boxes its answer."""
    return rf"So it is $\boxed{{{answer}}}$."


KINDS = {  # name: how many, and (response, gold) from a random.Random
    "Math-Verify issue 65, as reported": (
        20,
        lambda rng: (
            r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}",
            "5",
        ),
    ),
    "Math-Verify issue 65, second report": (
        20,
        lambda rng: (
            r"$\boxed{\{@Neillier 1276915 4951077 ник增高人权 국 \{1,1-3-10鼓励不停);5个_GENERAL2全校。 "
            r"_HEADERS1 Orchestra\}}$",
            "92.5857658508735",
        ),
    ),
    "an exercise's own tower": (
        20,
        lambda rng: (r"The last digits of \(2003^{2002^{2001}}\) are: 241", "241"),
    ),
    "towers of powers": (20, lambda rng: (boxed(tower(rng)), "5")),
    "factorials": (20, lambda rng: (boxed(f"{rng.randint(10**9, 10**12)}!"), "5")),
    "binomials": (20, lambda rng: (boxed(rf"\binom{{{rng.randint(10**9, 10**12)}}}{{{10**8}}}"), "5")),
    "sums": (
        20,
        lambda rng: (boxed(rf"\sum_{{n=1}}^{{10^{{{rng.randint(8, 30)}}}}} \frac{{1}}{{n^n}}"), "5"),
    ),
    "integrals": (
        20,
        lambda rng: (boxed(rf"\int_0^1 \frac{{\sin(x^{{x^{rng.randint(2, 9)}}})}}{{e^x-1}} dx"), "5"),
    ),
    "roots of roots": (20, lambda rng: (boxed(r"\sqrt{2+\sqrt{3+" * 40 + "1" + "}}" * 40), "5")),
    "expressions that backtrack": (20, lambda rng: (r"\( \boxed{x} " * rng.randint(200, 600), "5")),
    "braces, nested": (80, lambda rng: (boxed("{" * (n := rng.randint(500, 9000)) + "5" + "}" * n), "7")),
    "fractions, nested": (
        60,
        lambda rng: (boxed(r"\frac{1}{1+" * (n := rng.randint(50, 500)) + "1" + "}" * n), "7"),
    ),
    "parentheses, nested": (60, lambda rng: (boxed("(" * (n := rng.randint(50, 4000)) + "5" + ")" * n), "7")),
    "braces that do not close": (60, lambda rng: (r"\boxed{\frac{" * rng.randint(100, 9000), "7")),
    "a megabyte of anything": (40, lambda rng: (text_of(rng, 2**20), "7")),
    "a megabyte of dollars": (40, lambda rng: ("$" * 2**20 + boxed("8"), "7")),
    "null bytes": (60, lambda rng: ("\0" * rng.randint(1, 999) + boxed("5\0") + "\0", "7")),
    "marks of direction": (
        60,
        lambda rng: ("\u202e\u2066" * rng.randint(1, 999) + boxed("\u202e5\u202c"), "7"),
    ),
    "half of a pair of surrogates": (40, lambda rng: (boxed("\ud800" * rng.randint(1, 99)), "7")),
    "numbers of many digits": (40, lambda rng: (boxed("9" * rng.randint(4000, 8000)), "7")),
    "sets of many elements": (
        40,
        lambda rng: (boxed(r"\{" + ",".join(str(rng.random()) for _ in range(300)) + r"\}"), r"\{1,2\}"),
    ),
    "code": (60, lambda rng: (boxed(f"__import__('os').system('touch {TRACE}')"), "7")),
    "nothing": (40, lambda rng: (" \n" * rng.randint(0, 9), "7")),
    "right": (60, lambda rng: (boxed(n := rng.randint(0, 10**6)), str(n))),
    "wrong": (60, lambda rng: (boxed(n := rng.randint(0, 10**6)), str(n + 1))),
}
EXPECTED = {"right": 1.0, "wrong": 0.0}


@dataclass
class Config:
    workers: Count = HfArg(default=2, help="Grader processes, and items at a time.")
    timeout_s: Positive = HfArg(default=2.0, help="Deadline of an item; the train scripts have 10 seconds.")
    seed: int = HfArg(default=0, help="Of what the responses are made.")
    out: OutFile = HfArg(default="results/poison/numbers.json", help="Where the numbers are written.")


def batches(rng: random.Random, size: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """(kind, up to `size` items of it) until all kinds are used up, in a random order."""
    todo = []
    for kind, (count, make) in KINDS.items():
        items = [make(rng) for _ in range(count)]
        todo += [(kind, items[i : i + size]) for i in range(0, count, size)]
    rng.shuffle(todo)
    return todo


def held() -> float:
    """This process's own memory, in MB."""
    return psutil.Process().memory_full_info().uss / MB


def zombies() -> int:
    """How many of this process's children have ended but were not reaped."""
    return sum(c.status() == psutil.STATUS_ZOMBIE for c in psutil.Process().children(recursive=True))


def as_markdown(rows: dict[str, dict]) -> str:
    """One line a kind."""
    lines = ["| what | responses | scored | late | its worker died | median | slowest |", "|" + "---|" * 7]
    for kind, row in rows.items():
        cells = [kind, row["items"], row["items"] - row["late"] - row["died"], row["late"], row["died"]]
        cells += [f"{median(row['seconds']):.2f} s", f"{max(row['seconds']):.2f} s"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    Path(TRACE).unlink(missing_ok=True)
    rows = {kind: {"items": 0, "late": 0, "died": 0, "mistaken": 0, "seconds": []} for kind in KINDS}
    todo, most_zombies, memory = batches(random.Random(config.seed), config.workers), 0, []
    with MathVerifier(config.workers, config.timeout_s) as verifier:
        verifier.score([(boxed("5"), "5")] * config.workers)  # all have started
        for kind, items in tqdm(todo, desc="poison"):
            row, late, restarts = rows[kind], verifier.timeouts, verifier.restarts
            start = time.monotonic()
            scores = verifier.score(items)
            row["seconds"].append(time.monotonic() - start)
            row["items"] += len(items)
            row["late"] += verifier.timeouts - late
            row["died"] += verifier.restarts - restarts - (verifier.timeouts - late)
            row["mistaken"] += sum(kind in EXPECTED and score != EXPECTED[kind] for score in scores)
            most_zombies = max(most_zombies, zombies())
            memory.append(held())
        alive = verifier.score([(boxed("5"), "5")] * config.workers) == [1.0] * config.workers
        workers = [child.pid for child in psutil.Process().children(recursive=True)]
    left = [pid for pid in workers if psutil.pid_exists(pid)]
    slowest = max(max(row["seconds"]) for row in rows.values())
    mistaken = sum(row["mistaken"] for row in rows.values())
    print(as_markdown(rows))
    quarter = len(memory) // 4
    found = {
        "responses": sum(row["items"] for row in rows.values()),
        "slowest_s": slowest,
        "mistaken": mistaken,
        "alive": alive,
        "most_zombies": most_zombies,
        "left_running": len(left),
        "code_ran": os.path.exists(TRACE),
        "mb_after_a_quarter": memory[quarter],
        "mb_at_the_end": memory[-1],
    }
    for what, value in found.items():
        print(f"{what:20} {value:.2f}" if isinstance(value, float) else f"{what:20} {value}")
    write_json(config.out, {**found, "kinds": rows, "flags": vars(config), **surroundings()})
    good = alive and not (mistaken or most_zombies or left or found["code_ran"])
    sys.exit(0 if good and slowest <= config.timeout_s + START_S else 1)


if __name__ == "__main__":
    main()
