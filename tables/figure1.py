"""Draw the paper's figure 1: one training step with its sync, and the syncs along the steps of a run.

    python tables/figure1.py --out results/dial/diagram.png

Nothing here was measured. Left: the weights of the policy are copied into the generator before a step whose
number is a multiple of s. Right, for four settings of the dial: a tick is a sync, the height of the area is
how many steps old the generator's weights are.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tables/ is there

from flags import OutFile, one_line_errors, parse_flags  # noqa: E402

from tables.figures import load_pyplot, row_name, save  # noqa: E402

STEPS = 40
DIAL = {"dpo-inf": math.inf, "dpo-10": 10, "dpo-5": 5, "dpo-1": 1}  # rows of the right side: their s
BOXES = {  # left side: where the centre of a box is, and its text
    "generator": (0.18, 0.78, "generator\nold weights"),
    "responses": (0.78, 0.78, "responses\nG for each prompt"),
    "rewards": (0.78, 0.22, "rewards\nverifier or model"),
    "policy": (0.18, 0.22, "policy\none optimizer step"),
}
ARROWS = [  # from, to, what it says, and where it says so
    ("generator", "responses", "sample", (0.48, 0.83)),
    ("responses", "rewards", "score", (0.81, 0.50)),
    ("rewards", "policy", "pairs or groups", (0.48, 0.27)),
    ("policy", "generator", "sync, if\nstep % s == 0", (0.21, 0.50)),
]


def draw_step(axes) -> None:
    """One training step: four boxes in a circle, and the sync that closes it."""
    axes.set(xlim=(0, 1), ylim=(0, 1), title="a training step")
    axes.axis("off")
    for x, y, text in BOXES.values():
        box = {"boxstyle": "round,pad=0.6", "facecolor": "#eef1f8", "edgecolor": "#2b3a8c"}
        axes.text(x, y, text, ha="center", va="center", bbox=box)
    for start, end, text, (x, y) in ARROWS:
        (x1, y1, _), (x2, y2, _) = BOXES[start], BOXES[end]
        gap = 0.19 if y1 == y2 else 0.15  # from the centre of a box to its edge
        dx, dy = ((x2 > x1) - (x2 < x1)) * gap, ((y2 > y1) - (y2 < y1)) * gap
        color = "#b2182b" if start == "policy" else "#444444"
        arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (x2 - dx, y2 - dy), (x1 + dx, y1 + dy), arrowprops=arrow)
        axes.text(x, y, text, color=color, ha="left" if y == 0.5 else "center", va="center")


def draw_dial(axes) -> None:
    """The staleness over the steps, a band for each setting, and a tick at each sync."""
    steps = range(STEPS + 1)
    for at, (label, s) in enumerate(DIAL.items()):
        name, color, _ = row_name(label)
        staleness = [step % s for step in steps]
        low = 1.4 * (len(DIAL) - 1 - at)
        axes.fill_between(
            steps, low, [low + age / STEPS for age in staleness], step="post", color=color, alpha=0.4
        )
        syncs = [step for step in steps if step % s == 0]
        axes.plot(syncs, [low - 0.12] * len(syncs), "|", color=color, markersize=9, markeredgewidth=2)
        axes.text(-1.5, low + 0.15, name, color=color, ha="right", va="center")
    axes.set(title="how old the generator's weights are", xlabel="step", yticks=[], xlim=(-0.5, STEPS))
    axes.spines["left"].set_visible(False)


@dataclass
class Config:
    out: OutFile = HfArg(default="results/dial/diagram.png", help="The figure.")


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    plt = load_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    draw_step(left)
    draw_dial(right)
    with one_line_errors():
        save(figure, Path(config.out))
    print(f"figure 1: {config.out}")


if __name__ == "__main__":
    main()
