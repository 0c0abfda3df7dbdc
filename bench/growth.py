"""Measure how the time and the memory of a GRPO step grow with P, G, T and the size of the model, on a CPU.

    python bench/growth.py            # a quarter of an hour on two cores

Every point is `python train_grpo.py` for a few steps with --sync-every 1. Seconds are those of metrics.jsonl,
the median of all steps but the first; memory is the peak of the process (Linux's ru_maxrss). One factor at a
time is doubled around a base. P and G are measured on tiny/llama. It stops by itself after a dozen tokens, so
T (--max-new-tokens) and size use Llamas with random weights and its tokenizer, which hardly ever stop.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, linear_regression, median
from typing import Any

from tqdm import tqdm
from transformers.hf_argparser import HfArg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, only bench/ is there

from flags import (  # noqa: E402
    Count,
    OutFile,  # noqa: E402
    parse_flags,
)

from run import read_metrics, surroundings, write_json  # noqa: E402
from tables.figures import load_pyplot  # noqa: E402
from tables.report import PHASES  # noqa: E402

BASE = {"P": 8, "G": 8, "T": 64}
FLAGS = {"P": "--prompts-per-step", "G": "--samples-per-prompt", "T": "--max-new-tokens"}
FACTORS = {"P": (8, 16, 32, 64), "G": (4, 8, 16, 32), "T": (16, 32, 64, 128), "size": (1, 4, 16)}
WIDTHS = {1: (128, 4), 4: (256, 5), 16: (512, 5)}  # about so many million weights: (width, layers)
TITLES = {
    "P": "P: prompts a step",
    "G": "G: samples a prompt",
    "T": "T: tokens a response",
    "size": "weights (millions)",
}


@dataclass
class Config:
    factors: list[str] = HfArg(default_factory=lambda: list(FACTORS), help="Of P, G, T and size.")
    steps: Count = HfArg(default=6, help="Steps a run; the first is not counted.")
    out: OutFile = HfArg(default="results/growth/numbers.json", help="The numbers; beside them, the figure.")


def make_llama(million: int, folder: Path) -> int:
    """Write a Llama with random weights and tiny's tokenizer; the number of its weights."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/llama")
    width, layers = WIDTHS[million]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, vocab_size=640, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    set_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def train(model: Path, sizes: dict[str, int], steps: int, folder: str) -> tuple[list[dict], int]:
    """One run of train_grpo.py: (metrics of its steps but the first, bytes at the peak of its memory)."""
    flags = [word for name, flag in FLAGS.items() for word in (flag, str(sizes[name]))]
    command = [sys.executable, "train_grpo.py", "--model", str(model), "--sync-every", "1", *flags]
    command += ["--steps", str(steps), "--run-dir", f"{folder}/run"]
    with Path(folder, "log.txt").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        # The usage of this child alone. It counts from the fork, so this process must stay the smaller one.
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()[-2000:]}")
    return read_metrics(f"{folder}/run")[1:], usage.ru_maxrss * 1024


def measure(factor: str, value: int, steps: int) -> dict[str, Any]:
    """One point: the seconds of each phase of a step, its tokens, the peak of memory."""
    sizes = {**BASE, **({factor: value} if factor in BASE else {})}
    with tempfile.TemporaryDirectory() as folder:
        model, x = ROOT / "tiny/llama", value
        if factor in ("T", "size"):
            model = Path(folder, "model")
            weights = make_llama(value if factor == "size" else 1, model)
            x = weights / 1e6 if factor == "size" else value
        metrics, peak = train(model, sizes, steps, folder)
    seconds = {phase: median(row[f"{phase}_s"] for row in metrics) for phase in PHASES}
    return {
        "factor": factor,
        **sizes,
        "x": x,
        **{f"{phase}_s": value for phase, value in seconds.items()},
        "step_s": median(row["step_s"] for row in metrics),
        "length": fmean(row["length"] for row in metrics),
        "peak_gb": peak / 1e9,
    }


def line(xs: list[float], ys: list[float]) -> tuple[float, float, float]:
    """The least-squares line through points: (intercept, slope, R^2); all on a line is 1."""
    slope, intercept = linear_regression(xs, ys)
    left = sum((b - intercept - slope * a) ** 2 for a, b in zip(xs, ys, strict=True))
    spread = sum((b - fmean(ys)) ** 2 for b in ys)
    return intercept, slope, 1 - left / spread if spread else 1.0


def fits_of(points: list[dict]) -> list[dict]:
    """A line for each factor and quantity, with the ratio of its last two points."""
    fits = []
    for factor in dict.fromkeys(point["factor"] for point in points):
        several = [point for point in points if point["factor"] == factor]
        xs = [point["x"] for point in several]
        for what in ("step_s", *(f"{phase}_s" for phase in PHASES), "peak_gb"):
            ys = [point[what] for point in several]
            intercept, slope, r2 = line(xs, ys)
            fits.append(
                {
                    "factor": factor,
                    "what": what,
                    "intercept": intercept,
                    "slope": slope,
                    "r2": r2,
                    "last_ratio": ys[-1] / ys[-2],
                    "last_x_ratio": xs[-1] / xs[-2],
                }
            )
    return fits


def plot(points: list[dict], fits: list[dict], out: Path) -> None:
    """One column per factor: above, seconds of a step and its phases; below, peak memory."""
    plt = load_pyplot()
    factors = list(dict.fromkeys(point["factor"] for point in points))
    figure, axes = plt.subplots(
        2, len(factors), figsize=(3.4 * len(factors), 5.2), layout="constrained", squeeze=False
    )
    for column, factor in zip(axes.T, factors, strict=True):
        several = [point for point in points if point["factor"] == factor]
        xs = [point["x"] for point in several]
        for axis, keys in zip(column, (["step_s", *(f"{p}_s" for p in PHASES)], ["peak_gb"]), strict=True):
            for key in keys:
                (fit,) = [f for f in fits if (f["factor"], f["what"]) == (factor, key)]
                label = key.removesuffix("_s") if key != "peak_gb" else None
                (dots,) = axis.plot(xs, [point[key] for point in several], "o", markersize=4, label=label)
                ends = [xs[0], xs[-1]]
                axis.plot(
                    ends, [fit["intercept"] + fit["slope"] * x for x in ends], color=dots.get_color(), lw=1
                )
            axis.set_ylim(0, 1.1 * max(point[key] for point in several for key in keys))
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel(TITLES[factor])
    axes[0][0].set_ylabel("seconds a step")
    axes[1][0].set_ylabel("peak memory (GB)")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def as_markdown(points: list[dict], fits: list[dict]) -> str:
    """The points, then the lines through them."""
    heads = ["step_s", *(f"{phase}_s" for phase in PHASES)]
    lines = [f"| factor | value | tokens a response | {' | '.join(heads)} | peak |", "|" + "---|" * 9]
    for point in points:
        cells = [point["factor"], f"{point['x']:.3g}", f"{point['length']:.1f}"]
        cells += [f"{point[head]:.3f}" for head in heads] + [f"{point['peak_gb']:.2f} GB"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| factor | what | line | R^2 | last step of the factor | its ratio |", "|" + "---|" * 6]
    for fit in fits:
        cells = [fit["factor"], f"`{fit['what']}`", f"{fit['intercept']:.3g} + {fit['slope']:.3g} x"]
        cells += [f"{fit['r2']:.3f}", f"x {fit['last_x_ratio']:.2f}", f"{fit['last_ratio']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    todo = [(factor, value) for factor in config.factors for value in FACTORS[factor]]
    points = [measure(*point, config.steps) for point in tqdm(todo, desc="growth")]
    fits, out = fits_of(points), Path(config.out)
    print(as_markdown(points, fits))
    record = {"command": " ".join(sys.argv), "flags": asdict(config), **surroundings()}
    write_json(out, {**record, "points": points, "fits": fits})
    plot(points, fits, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
