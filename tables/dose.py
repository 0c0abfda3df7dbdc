"""What offline loses against s = 10, by the share of good answers in the seed model (tables/dose.sh).

    python tables/dose.py --out results/dose/table.md

Writes a table of the doses, and beside it .json and .png.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tables/ is there

from flags import Count, OutFile, Positive, one_line_errors, parse_flags  # noqa: E402

from tables.figures import ROWS, load_pyplot, save  # noqa: E402
from tables.intervals import Estimate, shown, signed, verdict  # noqa: E402
from tables.report import accuracy, check_alike, difference, evaluations, markdown, read_row, save_table  # noqa: E402

DOSES = {  # share of worked and careful answers that the seed model was taught: the rows of its runs
    0.04: ("results/dose/seed-04", "results/dose/good-04-inf", "results/dose/good-04-10"),
    0.10: ("results/dose/seed-10", "results/dose/good-10-inf", "results/dose/good-10-10"),
    0.42: ("results/dose/seed-42", "results/dose/good-42-inf", "results/dose/good-42-10"),
}


@dataclass
class Config:
    out: OutFile = HfArg(help="A Markdown file; beside it .json and .png.")
    step: Count = HfArg(default=100, help="The step whose evaluations are compared.")
    margin: Positive = HfArg(default=1.0, help="As in tables/report.py.")


def plot(found: dict[float, dict[str, Estimate]], out: Path) -> None:
    """Draw the accuracies of each dose: {share: {row: estimate}}."""
    plt = load_pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    shares = [100 * share for share in found]
    for row in ("dpo-10", "dpo-inf", "seed"):
        name, colour = ROWS[row]
        estimates = [rows[row] for rows in found.values()]
        error = None if None in [e.half for e in estimates] else [100 * e.half for e in estimates]
        means = [100 * e.mean for e in estimates]
        axis.errorbar(shares, means, yerr=error, fmt="o-", capsize=4, color=colour, label=name)
    axis.set(xlabel="worked answers that the seed model was taught (%)", ylabel="accuracy (%)", xscale="log")
    axis.set_xticks(shares, [f"{share:g}" for share in shares])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    save(figure, out)


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        found, lines, every = {}, [], []
        numbers = {"accuracy": {}, "difference": {}}
        for share, rows in DOSES.items():
            seed, offline, semi = (evaluations(read_row(row)) for row in rows)
            lacking = [
                row for row, of in zip(rows[1:], (offline, semi), strict=True) if config.step not in of
            ]
            if lacking:
                raise ValueError(f"--step {config.step}: {', '.join(lacking)} has no such evaluation")
            offline, semi = offline[config.step], semi[config.step]
            every += [*seed[0].values(), *offline.values(), *semi.values()]
            names = f"{Path(rows[1]).name}:{Path(rows[2]).name}"
            gap = difference(offline, semi, names)
            found[share] = {"seed": accuracy(seed[0]), "dpo-inf": accuracy(offline), "dpo-10": accuracy(semi)}
            numbers["accuracy"][share] = {row: asdict(e) for row, e in found[share].items()}
            numbers["difference"][names] = {config.step: asdict(gap)}
            cells = [shown(estimate) for estimate in found[share].values()]
            says = verdict(gap, config.margin / 100)
            lines.append([f"{100 * share:g} %", *cells, signed(gap), says])
        check_alike(every, "tables/dose.py")
        heads = ["good answers taught", *(ROWS[row][0] for row in found[share]), "offline less s = 10", ""]
        note = f"Accuracy in percent at step {config.step}; 95 % intervals over training seeds and problems."
        out = Path(config.out)
        save_table([*markdown(heads, lines), "", note], numbers, out)
        plot(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
