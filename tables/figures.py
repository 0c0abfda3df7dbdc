"""Draw what report.py reads: curves over steps, accuracies with intervals, accuracy against cost.

A row has one name and one colour in every figure: the dial from red (offline) to blue (online), GRPO green.
"""

import math
from pathlib import Path
from statistics import fmean
from types import ModuleType

from tables import paper
from tables.intervals import Estimate

TITLES = {  # a metric: what its axis says
    "reward": "mean reward of the samples",
    "true_reward": "true reward of the samples",
    "math_reward": "reward in mathematics",
    "chat_reward": "reward in chat",
    "entropy": "sampler's entropy (nats a token)",
    "policy_entropy": "policy's entropy (nats a token)",
    "length": "response length (tokens)",
    "right_length": "length of right responses (tokens)",
    "wrong_length": "length of wrong responses (tokens)",
    "staleness": "staleness (steps)",
    "logp_gap": "|trainer - generator| (nats a token)",
    "margin": "margin of the pairs (nats)",
    "chosen_logp": "log-prob of the chosen (nats)",
    "chosen_length": "length of the chosen (tokens)",
    "rejected_length": "length of the rejected (tokens)",
    "kl_ref": "KL to the reference (nats a token)",
    "pair_frac": "share of prompts with a pair",
    "ratio_max": "largest ratio of a token",
    "bound_frac": "share of tokens out of bounds",
    "ess": "effective share of the responses",
    "grad_norm": "norm of the gradient",
}
LOGARITHMIC = {"logp_gap", "kl_ref", "ratio_max"}

CORRECTIONS = {  # of GRPO on stale responses: its colour
    "none": "#d95f02", "clip": "#66a61e", "tis": "#e6ab02", "seq_tis": "#7570b3", "seq_mis": "#a6761d",
    "dppo": "#e7298a",
}  # fmt: skip
ROWS = {  # the folder of a row's runs: its name in figures and tables, its colour, and a line that is not "-"
    "seed": ("seed model", "#777777"),
    "first": ("its first checkpoint", "#777777"),
    "right": ("right answers", "#2b3a8c"),
    "wrong": ("wrong answers", "#bdbdbd"),
    "dpo-inf": ("offline", "#b2182b"),
    "dpo-100": ("s = 100", "#ef8a62"),
    "dpo-10": ("s = 10", "#74add1"),
    "dpo-5": ("s = 5", "#4575b4"),
    "dpo-1": ("online", "#2b3a8c"),
    "grpo": ("GRPO, s = 1", "#1b7837"),
    "grpo-4": ("GRPO, groups of 4", "#a6dba0"),
    "grpo-12": ("GRPO, groups of 12", "#00441b"),
    "math": ("mathematics only", "#2b3a8c"),
    "chat-only": ("chat only", "#d6604d"),
    "math-fixed": ("mathematics only, reference fixed", "#2b3a8c", "--"),
    "both": ("both tasks", "#8856a7"),
    "both-10": ("both tasks, s = 10", "#9ebcda"),
    "both-grpo": ("both tasks, GRPO", "#1b7837"),
    "chat-then-math": ("chat, then mathematics", "#c994c7"),
    "ref-1": ("offline, reference synced", "#8856a7"),
    "ref-100": ("offline, reference reset at 100", "#c994c7"),
    "nll": ("offline, with NLL", "#998ec3"),
    "nll-1": ("online, with NLL", "#8856a7"),
    "fixed-reference": ("online, reference fixed", "#8856a7"),
    "group-dpo": ("online, GroupDPO", "#8856a7"),
    "group-dpo-grpo": ("online, GroupDPO + GRPO", "#c994c7", "--"),
    "nll-10": ("s = 10, with NLL", "#fdae61"),
    "group-dpo-10": ("s = 10, GroupDPO", "#8856a7"),
    "group-dpo-grpo-10": ("s = 10, GroupDPO + GRPO", "#c994c7", "--"),
    "entropy-5e-4-10": ("s = 10, entropy bonus 5e-4", "#bcbddc"),
    "entropy-1e-1-10": ("s = 10, entropy bonus 0.1", "#6a51a3"),
    "fast": ("online, fast", "#74add1"),
    "fast-fixed": ("online, fast, reference fixed", "#8856a7"),
    "fast-fixed-eps": ("online, fast, reference fixed, epsilon 1e-4", "#d6604d"),
    "grpo-sequence": ("GRPO, by response length", "#a6dba0"),
    "drift-0.015": ("sync on drift", "#8856a7"),
    "none": ("s = 10, no correction", CORRECTIONS["none"]),
    "clip": ("s = 10, clip", CORRECTIONS["clip"]),
    "tis": ("s = 10, tis", CORRECTIONS["tis"]),
    "entropy-5e-4": ("entropy bonus 5e-4", "#bcbddc"),
    "entropy-1e-2": ("entropy bonus 1e-2", "#9e9ac8"),
    "entropy-1e-1": ("entropy bonus 0.1", "#6a51a3"),
}


def row_name(label: str) -> tuple[str, str | None, str]:
    """A row's name in words, its colour (None: not fixed) and the style of its line.

    >>> row_name("results/table1/dpo-inf"), row_name("qwen-dpo-10"), row_name("inf-seq_tis")
    (('offline', '#b2182b', '-'), ('Qwen, s = 10', '#74add1', '--'), ('offline, seq_tis', '#7570b3', '-'))
    >>> row_name("dpo-1-at-0.6")
    ('online, temperature 0.6', '#2b3a8c', '-')
    """
    label = label.rpartition("/")[2]
    if label in ROWS:
        return (*ROWS[label], "-")[:3]
    row, _, temperature = label.partition("-at-")  # tables/temperature.sh
    if row in ROWS and temperature:
        name, colour = ROWS[row][:2]
        return f"{name}, temperature {temperature}", colour, "-" if temperature == "0.6" else "--"
    first, _, rest = label.partition("-")
    if first == "qwen" and rest in ROWS:
        return f"Qwen, {ROWS[rest][0]}", ROWS[rest][1], "--"
    if rest in CORRECTIONS and f"dpo-{first}" in ROWS:
        how = rest.replace("none", "no correction")
        return f"{ROWS[f'dpo-{first}'][0]}, {how}", CORRECTIONS[rest], "-" if first == "inf" else "--"
    share, _, s = rest.partition("-")
    if first == "good" and f"dpo-{s}" in ROWS:  # good-42-inf: tables/dose.sh
        return f"{int(share)} % good, {ROWS[f'dpo-{s}'][0]}", ROWS[f"dpo-{s}"][1], "-"
    return label, None, "-"


def load_pyplot() -> ModuleType:
    """matplotlib.pyplot, for files only: no screen is needed. It is slow to import, so not on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def save(figure, out: Path) -> None:
    """At twice the pixels of a page's width, so that text of 11 points stays readable on a page."""
    figure.savefig(out, dpi=140)
    load_pyplot().close(figure)


def panel_grid(plt: ModuleType, count: int, height: float = 3.2):
    """A figure of `count` panels in rows of three: (figure, list of axes)."""
    across = 2 if count == 4 else min(count, 3)
    down = math.ceil(count / across)
    figure, axes = plt.subplots(
        down, across, figsize=(4.2 * across, height * down + 0.5), layout="constrained", squeeze=False
    )
    flat = [axis for row in axes for axis in row]
    for axis in flat[count:]:
        axis.set_visible(False)
    for axis in flat:
        axis.grid(alpha=0.25)
    return figure, flat[:count]


def one_legend(figure) -> None:
    """One legend for all panels, above them: a row may be missing in some of them."""
    named = {}
    for axis in figure.axes:
        for line, name in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(name, line)
    if named:
        lines, names = named.values(), named.keys()
        inches = 0.7 + 0.085 * max(map(len, names))  # of the longest entry; a wider legend would be cut off
        columns = max(1, min(len(names), int(figure.get_figwidth() / inches)))
        figure.legend(lines, names, loc="outside upper center", ncols=columns, frameon=False)


# --- Curves ---


def smoothed(metrics: list[dict], key: str, width: int) -> list[tuple[float, float]]:
    """The points (step, value) of a metric: the middle of each block of `width` steps, and its mean there.

    The middle is the same in every run, whichever steps have a value; a block without any has no point.
    """
    points = []
    for start in range(0, len(metrics), width):
        block = metrics[start : start + width]
        values = [row[key] for row in block if row[key] is not None]
        if values:
            points.append(((block[0]["step"] + block[-1]["step"]) / 2, fmean(values)))
    return points


def plot_curves(rows: dict[str, list[list[dict]]], panels: list[str], smooth: int, out: Path) -> None:
    """Draw metrics of several rows, {label: [metrics of each run]}, against the step.

    A row's line is the mean over its runs, in a band from the lowest to the highest. Staleness is never
    smoothed: its saw-tooth is what it shows.
    """
    plt = load_pyplot()
    figure, axes = panel_grid(plt, len(panels))
    for axis, key in zip(axes, panels, strict=True):
        width = 1 if key == "staleness" else smooth
        for label, runs in rows.items():
            name, colour, style = row_name(label)
            values = {}  # step: its value in each run
            for metrics in runs:
                for step, value in smoothed(metrics, key, width):
                    values.setdefault(step, []).append(value)
            steps = sorted(values)
            few = len(steps) < len(runs[0]) / width  # measured at some steps only: show where
            if not steps:  # a run of the other task
                continue
            means = [fmean(values[step]) for step in steps]
            (line,) = axis.plot(
                steps, means, style, label=name, color=colour, linewidth=1.4, marker="." if few else None
            )
            if len(runs) > 1:
                low, high = ([pick(values[step]) for step in steps] for pick in (min, max))
                axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=TITLES.get(key, key), xlabel="step")
        axis.title.set_fontsize(11)
        if key in LOGARITHMIC:
            axis.set_yscale("log")
    one_legend(figure)
    save(figure, out)


# --- Accuracies ---


def plot_table(table: dict[str, dict[int, Estimate]], beside: str | None, out: Path) -> None:
    """Draw each row's accuracy at its last step, {label: {step: estimate}}.

    beside: the name of the paper's table to draw beside them, or None.
    """
    plt = load_pyplot()
    columns = paper.COLUMNS.get(beside, ())
    figure, axes = panel_grid(plt, 1 + len(columns), height=3.6)
    names = [row_name(label) for label in table]
    for x, (row, (_, colour, _)) in enumerate(zip(table.values(), names, strict=True)):
        estimate = row[max(row)]
        error = None if estimate.half is None else 100 * estimate.half
        axes[0].errorbar(x, 100 * estimate.mean, yerr=error, fmt="o", color=colour, capsize=4)
    last = sorted({max(row) for row in table.values()} - {0})
    axes[0].set_title(f"here, step {' or '.join(map(str, last))}: 95 % intervals", fontsize=11)
    for axis, column in zip(axes[1:], range(len(columns)), strict=True):
        for x, (label, (_, colour, _)) in enumerate(zip(table, names, strict=True)):
            if label in paper.ROWS[beside]:
                center, error = paper.ROWS[beside][label][column]
                axis.errorbar(x, center, yerr=error, fmt="s", color=colour, capsize=4)
        axis.set_title(f"paper, {columns[column]}: its error bars", fontsize=11)
    plain = [name for name, _, _ in names]
    ours = [  # with the step, where rows end at different ones
        f"{name} ({max(row)})" if len(last) > 1 and max(row) else name
        for name, row in zip(plain, table.values(), strict=True)
    ]
    for axis in axes:
        axis.set_xticks(range(len(names)), ours if axis is axes[0] else plain, rotation=35, ha="right")
        axis.set_xlim(-0.5, len(names) - 0.5)
        axis.set_ylabel("accuracy (%)")
    save(figure, out)


def plot_costs(rows: dict[str, list[dict]], costs: dict[str, str], out: Path) -> None:
    """Draw accuracy against what it cost: {label: [{cost: number, "accuracy": Estimate}, ...]} by step.

    costs: {cost: what its axis says}; a row without one is left out of that panel.
    """
    plt = load_pyplot()
    from matplotlib.ticker import LogLocator

    figure, axes = panel_grid(plt, len(costs))
    for axis, (cost, title) in zip(axes, costs.items(), strict=True):
        for label, points in rows.items():
            name, colour, style = row_name(label)
            points = [point for point in points if point.get(cost)]
            if not points:
                continue
            x, estimates = [point[cost] for point in points], [point["accuracy"] for point in points]
            means = [100 * estimate.mean for estimate in estimates]
            axis.plot(x, means, style, marker="o", markersize=4, color=colour, label=name)
            if estimates[0].half is not None:
                low, high = (
                    [100 * pick(e) for e in estimates] for pick in (lambda e: e.low, lambda e: e.high)
                )
                axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(xlabel=title, ylabel="accuracy (%)", xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.xaxis.set_minor_formatter("")
    one_legend(figure)
    save(figure, out)
