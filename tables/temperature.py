"""The rewards of answers at two temperatures, over training (tables/temperature.sh).

    python tables/temperature.py --runs results/temperature/{seed,dpo-1}-at-{0.6,1} --out table.md

A row is named ROW-at-TEMPERATURE; the seed model's is seed-at-TEMPERATURE. Writes a table, its .json
and curves.png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tables/ is there

from flags import OutFile, one_line_errors, parse_flags  # noqa: E402

from tables.figures import plot_curves, row_name  # noqa: E402
from tables.intervals import over_seeds  # noqa: E402
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


def course(run) -> list[dict]:
    """A run's mean rewards at each checkpoint, by step: [{"step": int, "reward": float, ...}, ...]."""
    return [
        {"step": int(step), **{key: fmean(row[key] for row in rows) for key in REWARDS if key in rows[0]}}
        for step, rows in sorted(run.answers.items(), key=lambda item: int(item[0]))
    ]


def courses(rows: list[str]) -> dict[str, dict[str, list[dict]]]:
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
        found[label] = {run.seed: course(runs[seed][0]) + course(run) for run in several}
    return found


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        found = courses(config.runs)
        steps = sorted({row["step"] for seeds in found.values() for rows in seeds.values() for row in rows})
        known = [key for key in REWARDS if all(key in seeds[s][0] for seeds in found.values() for s in seeds)]
        lines, differences = [], {}
        for key in known:
            for label, seeds in found.items():
                cells = [row_name(label)[0], key, str(len(seeds))]
                for step in steps:
                    at = [row[key] for rows in seeds.values() for row in rows if row["step"] == step]
                    # before training there is one model, which was measured once
                    cells.append(with_interval(over_seeds(at)) if step else f"{at[0]:.2f}")
                lines.append(cells)
        for label, seeds in found.items():
            of = {  # at the last checkpoint and before training, whose answers are the same for all
                name: {seed: {key: rows[i][key] for key in known} for seed, rows in seeds.items()}
                for name, i in ((label, -1), ("seed", 0))
            }
            differences |= differences_of(of, [f"{label}:seed"])
        out = Path(config.out)
        note = (
            "Mean over training seeds ± half its 95 % interval, one answer to each request. Differences: the "
            "last checkpoint less the seed model at that temperature; 95 % intervals over training seeds."
        )
        heads = ["row", "reward", "seeds", *(f"step {step}" for step in steps)]
        table = [*markdown(heads, lines), "", *difference_lines(differences, "reward"), "", note]
        save_table(table, {"difference": differences}, out)
        rows = {label: list(seeds.values()) for label, seeds in found.items()}
        plot_curves(rows, known, 1, out.with_name("curves.png"))


if __name__ == "__main__":
    main()
