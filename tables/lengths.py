"""Figure 9 (a): how long right and wrong answers are at a run's first checkpoint (tables/figure9.sh).

    python tables/lengths.py --runs results/figure9/first --out results/figure9/lengths.png

A row's runs are evaluations of one checkpoint each, with its answers. Beside the figure: .md and .json, the
difference of the mean lengths, right less wrong, over training seeds.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tables/ is there

from flags import OutFile, one_line_errors, parse_flags  # noqa: E402

from tables.figures import load_pyplot, save  # noqa: E402
from tables.report import difference_lines, differences_of, read_row, save_table  # noqa: E402


@dataclass
class Config:
    runs: str = HfArg(help="A row of an archive: evaluations of one checkpoint each, with its answers.")
    out: OutFile = HfArg(help="The figure; beside it .md and .json.")


def lengths(row: str) -> dict[str, dict[str, list[int]]]:
    """{"right": {training seed: [characters of each answer]}, "wrong": ...} of a row's runs.

    ValueError in one line for a run that has not one checkpoint's answers, or no right or no wrong one.
    """
    found = {"right": {}, "wrong": {}}
    for run in read_row(row):
        if len(run.answers) != 1:
            raise ValueError(
                f"--runs {row}: {run.name} has not one checkpoint's answers (evaluate.py --answers)"
            )
        (answers,) = run.answers.values()
        for kind, reward in (("right", 1.0), ("wrong", 0.0)):
            found[kind][run.seed] = [answer["length"] for answer in answers if answer["reward"] == reward]
            if not found[kind][run.seed]:
                raise ValueError(f"--runs {row}: {run.name} has no {kind} answer to compare")
    return found


def plot(found: dict[str, dict[str, list[int]]], out: Path) -> None:
    """Draw the distribution of all seeds' lengths, right and wrong answers one over the other."""
    plt = load_pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    pooled = [[length for seed in found[kind].values() for length in seed] for kind in ("wrong", "right")]
    colours = ["#bdbdbd", "#2b3a8c"]
    axis.hist(pooled, bins=40, stacked=True, color=colours, label=["wrong answers", "right answers"])
    axis.set(xlabel="length of an answer (characters)", ylabel="answers")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    save(figure, out)


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        found = lengths(config.runs)
        means = {
            kind: {seed: {"characters": fmean(values)} for seed, values in seeds.items()}
            for kind, seeds in found.items()
        }
        differences = differences_of(means, ["right:wrong"])
        share = fmean(
            len(found["right"][seed]) / len(found["right"][seed] + found["wrong"][seed])
            for seed in found["right"]
        )
        said = f"{100 * share:.1f} % of the answers are right"
        note = f"Means over training seeds, with 95 % intervals over them; {said}."
        out = Path(config.out)
        table = [*difference_lines(differences, "answers"), "", note]
        save_table(table, {"difference": differences, "right": share}, out.with_suffix(".md"))
        plot(found, out)


if __name__ == "__main__":
    main()
