"""What an accuracy costs: rows of runs against the tokens that they generate and learn from, and compute.

    python tables/costs.py --runs results/table1/dpo-{inf,100,10,1} results/table1/grpo \\
        --out results/efficiency/costs.png

Beside the figure: .md, the cost of reaching some accuracies, and .json, its numbers for each seed. With
--seconds, a file of bench/step_seconds.py, there is a panel of time, too.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tables/ is there

from flags import OutFile, one_line_errors, parse_flags  # noqa: E402

from tables.archive import Run  # noqa: E402
from tables.figures import plot_costs, row_name  # noqa: E402
from tables.intervals import crossing  # noqa: E402
from tables.report import accuracy, check_alike, evaluations, markdown, read_row, save_table  # noqa: E402

COSTS = {  # what its axis says
    "generated": "thousand response tokens generated",
    "learned": "thousand response tokens learned from",
    "compute": "compute (thousand token forwards)",
}
SECONDS = {"seconds": "seconds, one device for both", "apart": "seconds, generator apart"}
LEVELS = (0.4, 0.6, 0.75)  # accuracies whose cost is named


@dataclass
class Config:
    runs: list[str] = HfArg(help="Rows, as for tables/report.py, evaluated at several steps.")
    out: OutFile = HfArg(help="The figure; beside it .md and .json.")
    seconds: str | None = HfArg(
        default=None,
        help="A JSON file {row: {seconds: of a step, apart: of a step}}; missing: no panel, and a line.",
    )


def costs_at(run: Run, step: int, a_step: dict[str, float]) -> dict[str, float]:
    """What a run's first steps took: {cost: number}. a_step: {"seconds": of a step, ...} of its row, or {}.

    compute: forwards of a response token, each of some 2 FLOPs a parameter: one to generate it, three to
    learn from it (a backward is two), and one of the reference where that is not the policy of this very
    step. Prompts are left out.
    """
    done, every = run.metrics[:step], float(run.config["flags"]["sync_ref_every"])
    generated = sum(row["tokens"] for row in done)
    learned = sum(row["learned_tokens"] for row in done)
    of_reference = sum(row["learned_tokens"] for row in done if row["step"] % every != 0)
    compute = generated + 3 * learned + of_reference
    times = {kind: step * a_step[kind] for kind in SECONDS if kind in a_step}
    return {"generated": generated, "learned": learned, "compute": compute, **times}


def to_reach(runs: list[Run], level: float, cost: str, a_step: dict[str, float]) -> list[float | None]:
    """What each run takes to reach an accuracy, read off between evaluations on a line; None: it does not."""
    found = []
    for run in runs:
        steps = sorted(int(step) for step in run.evaluations if step.isdigit())
        paid = [step if cost == "step" else costs_at(run, step, a_step).get(cost) for step in steps]
        reached = [run.evaluations[str(step)]["accuracy"] for step in steps]
        found.append(None if None in paid else crossing(paid, reached, level))
    return found


def write_costs(rows: dict[str, list[Run]], seconds: dict[str, dict[str, float]], out: Path) -> None:
    """Draw the accuracies of {label: runs} against their costs; write what LEVELS take."""
    rows = {label: [run for run in runs if run.metrics] for label, runs in rows.items()}
    costs = COSTS | {
        kind: title for kind, title in SECONDS.items() if any(kind in s for s in seconds.values())
    }
    points, reached, lines = {}, {}, []
    for label, runs in rows.items():
        row, a_step = evaluations(runs), seconds.get(label, {})
        points[label] = [
            {
                "accuracy": accuracy(several),
                **{
                    cost: fmean(costs_at(run, step, a_step).get(cost, 0.0) for run in runs) / scale(cost)
                    for cost in costs
                },
            }
            for step, several in row.items()
        ]
        reached[label] = {
            f"{level:g}": {cost: to_reach(runs, level, cost, a_step) for cost in ("step", *costs)}
            for level in LEVELS
        }
        for level in LEVELS:
            found = reached[label][f"{level:g}"]
            count = sum(value is not None for value in found["step"])
            cells = [row_name(label)[0], f"{100 * level:g} %", f"{count} of {len(runs)}"]
            bound = "at most " * (min(row) in found["step"])  # reached before it was first evaluated
            means = {
                cost: None if None in values else fmean(values) / scale(cost)
                for cost, values in found.items()
            }
            lines.append(cells + ["" if mean is None else f"{bound}{mean:.0f}" for mean in means.values()])
    plot_costs(points, costs, out)
    heads = ["row", "accuracy", "seeds that reach it", "steps", *costs]
    note = (
        "Mean over training seeds; tokens and compute in thousands. Read off on a straight line between two "
        "evaluations, so without an interval. Empty where a seed does not reach the accuracy, or no time was "
        "measured. at most: it was reached before the first evaluation. Seconds: steps times one timing of a "
        "step."
    )
    save_table([*markdown(heads, lines), "", note], reached, out.with_suffix(".md"))


def scale(cost: str) -> int:
    """What a cost is shown in: thousands of tokens; steps and seconds as they are."""
    return 1000 if cost in COSTS else 1


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        rows = {Path(row).name: read_row(row) for row in config.runs}
        every = [e for runs in rows.values() for row in evaluations(runs).values() for e in row.values()]
        check_alike(every, "--runs")
        for label, runs in rows.items():
            if not any(run.metrics for run in runs) or not evaluations(runs):
                raise ValueError(f"--runs {label}: needs runs with metrics that were evaluated")
            if any("learned_tokens" not in run.metrics[0] for run in runs):
                raise ValueError(f"--runs {label}: its metrics have no learned_tokens; older code made them")
        timed = config.seconds and Path(config.seconds).exists()
        if config.seconds and not timed:
            print(
                f"--seconds {config.seconds}: not there, so no panel of time (bench/step_seconds.py makes it)"
            )
        seconds = json.loads(Path(config.seconds).read_text(encoding="utf-8")) if timed else {}
        write_costs(rows, seconds, Path(config.out))


if __name__ == "__main__":
    main()
