"""The rewards of answers at two temperatures, over training (tables/temperature.sh).

    python tables/temperature.py --runs results/temperature/{seed,dpo-1}-at-{0.6,1} --out table.md

A row is named ROW-at-TEMPERATURE; the seed model's is seed-at-TEMPERATURE. Writes a table, its .json
and curves.png.
"""

import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tables/ is there

from flags import OutFile, one_line_errors, parse_flags  # noqa: E402

from tables.figures import plot_curves, row_name  # noqa: E402
from tables.intervals import over  # noqa: E402
from tables.report import (  # noqa: E402
    SEED_ROW,
    check_alike,
    difference_lines,
    differences_of,
    markdown,
    read_row,
    save_table,
    with_interval,
)

REWARDS = ("reward", "true_reward")  # of an answer; the second where it is known


@dataclass
class Config:
    runs: list[str] = HfArg(help="Rows of an archive, ROW-at-TEMPERATURE, and seed-at-TEMPERATURE for each.")
    out: OutFile = HfArg(help="A Markdown file; beside it .json and curves.png.")


def course(run) -> dict[int, dict[str, list]]:
    """The rewards of a run's answers at each checkpoint: {step: {"reward": [one a request], ...}}."""
    return {
        int(step): {key: [row[key] for row in rows] for key in ("id", *REWARDS) if key in rows[0]}
        for step, rows in sorted(run.answers.items(), key=lambda item: int(item[0]))
    }


def courses(rows: list[str]) -> dict[str, dict[str, dict]]:
    """{ROW-at-TEMPERATURE: {training seed: course()}}, each from the seed model on.

    ValueError in one line if a temperature lacks its seed model, or its answers were not sampled alike.
    """
    runs = {Path(row).name: read_row(row) for row in rows}
    found = {}
    for label, several in runs.items():
        row, _, temperature = label.partition("-at-")
        seed = f"{SEED_ROW}-at-{temperature}"
        if row == SEED_ROW:
            continue
        if seed not in runs:
            raise ValueError(f"--runs: {label} needs {seed} beside it")
        check_alike([one for run in (*runs[seed], *several) for one in run.chat.values()], f"--runs {label}")
        found[label] = {run.seed: course(runs[seed][0]) | course(run) for run in several}
    every = [run for seeds in found.values() for run in seeds.values()]
    if any(run.keys() != every[0].keys() or len(run) < 3 for run in every):
        raise ValueError("--runs: takes the same two or more checkpoints of every run, and the seed model")
    if any(at["id"] != every[0][0]["id"] for run in every for at in run.values()):
        raise ValueError("--runs: not all answer the same requests; evaluate all alike")
    return found


def differences_to_tell(found: dict[str, dict[str, dict]], known: list[str]) -> dict[str, dict]:
    """Differences of the last checkpoint's rewards (report.differences_of): less the seed model's, less the
    first checkpoint's, and of each temperature less the higher ones.
    """

    def at(label, place):
        return {s: {key: run[[*run][place]][key] for key in known} for s, run in found[label].items()}

    differences = {}
    for label in found:
        for other, place in ((SEED_ROW, 0), ("first", 1)):
            two = {label: at(label, -1), other: at(label, place)}
            differences |= differences_of(two, [f"{label}:{other}"])
    for a, b in combinations(sorted(found), 2):
        if a.partition("-at-")[0] == b.partition("-at-")[0]:
            differences |= differences_of({a: at(a, -1), b: at(b, -1)}, [f"{a}:{b}"])
    return differences


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        found = courses(config.runs)
        runs = [run for seeds in found.values() for run in seeds.values()]
        known = [key for key in REWARDS if all(key in at for run in runs for at in run.values())]
        steps, lines = [*runs[0]], []  # courses() has checked that all runs have these
        for key in known:
            for label, seeds in found.items():
                cells = [row_name(label)[0], key, str(len(seeds))]
                for step in steps:
                    at = [run[step][key] for run in seeds.values()]
                    # before training there is one model, which was measured once
                    cells.append(with_interval(over(at)) if step else f"{fmean(at[0]):.2f}")
                lines.append(cells)
        differences = differences_to_tell(found, known)
        out = Path(config.out)
        note = (
            "Mean over training seeds ± half its 95 % interval, one answer to each request. Differences: of "
            "the last checkpoint. All intervals are of training seeds and requests."
        )
        heads = ["row", "reward", "seeds", *(f"step {step}" for step in steps)]
        table = [*markdown(heads, lines), "", *difference_lines(differences, "reward"), "", note]
        save_table(table, {"difference": differences}, out)
        rows = {
            label: [
                [{"step": step, **{key: fmean(at[key]) for key in known}} for step, at in run.items()]
                for run in seeds.values()
            ]
            for label, seeds in found.items()
        }
        plot_curves(rows, known, 1, out.with_name("curves.png"))


if __name__ == "__main__":
    main()
