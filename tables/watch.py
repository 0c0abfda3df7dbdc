"""Watch a run in the terminal while it goes on, or look at it afterwards.

    python tables/watch.py runs/demo               refreshed every 5 seconds, until the last step
    python tables/watch.py runs/demo --once        printed once, as it is where the output is no terminal

A curve covers the run so far, between the lowest and the highest value beside it. With more steps than
columns a column is the mean of several steps. The mean of a saw-tooth is flat, so staleness is never
averaged: its curve then covers the last steps alone.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tables/ is there

from flags import Positive, one_line_errors, parse_flags  # noqa: E402

from run import read_config, read_json  # noqa: E402

CURVES = {  # key: its label; a key that the run does not have is left out
    "reward": "reward",
    "math_reward": "  of math",
    "chat_reward": "  of chat",
    "staleness": "staleness",
    "entropy": "entropy",
    "policy_entropy": "policy entropy",
    "length": "length",
    "loss": "loss",
}
PARTS = {  # of a step's seconds; what is left of step_s is "the rest"
    "trainer_idle_s": "wait for responses",
    "score_s": "score",
    "train_s": "train",
    "sync_s": "sync",
}
LEVELS = "▁▂▃▄▅▆▇█"
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"
UP, CLEAR_BELOW = "\x1b[{}F", "\x1b[J"  # to the start of the line so many lines above


@dataclass
class Config:
    run: str = HfArg(help="The run's directory; without the flag's name if it comes first.")
    every: Positive = HfArg(default=5.0, help="Seconds between two refreshes.")
    once: bool = HfArg(default=False, help="Print once and end.")


def run_first(args: list[str] | None) -> list[str]:
    """The command line (None: this program's) with --run written out: the first word may do without it."""
    args = sys.argv[1:] if args is None else args
    return ["--run", *args] if args and not args[0].startswith("-") else args


# --- What is on disk so far ---


def whole_lines(path: Path) -> list[dict]:
    """A .jsonl file's objects while it is written: a last line without a line end is not there yet.

    ValueError names the file and the line of anything else that is no JSON object.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {number}: not JSON") from None
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
    return rows


def metrics_so_far(directory: Path) -> list[dict]:
    """A run's metrics up to now, a dictionary a step. ValueError in one line if there is no run."""
    if not (directory / "metrics.jsonl").exists():
        raise ValueError(f"--run {directory}: not a run directory (it has no metrics.jsonl)")
    rows = whole_lines(directory / "metrics.jsonl")
    if any("step" not in row for row in rows):
        raise ValueError(f"{directory}/metrics.jsonl: a line without a step, so it is not a run's")
    return rows


def measured(directory: Path) -> list[tuple[int, str, str]]:
    """A run's evaluations by step: (step, its file in the run's directory, the result in words)."""
    found = []
    for path in [*directory.glob("validation/*/*.json"), *directory.glob("eval/*.json")]:
        step = path.parent.name if path.parent.name != "eval" else path.name.partition(".")[0]
        step = "0" if step == "seed" else step
        if step.isdigit() and (words := result(read_json(path))):
            found.append((int(step), str(path.relative_to(directory)), words))
    return sorted(found)


def result(evaluation: dict) -> str | None:
    """An evaluation in words, as in "accuracy 61.2 ± 0.8 %"; None if it holds no result."""
    key = "accuracy" if "accuracy" in evaluation else "reward"
    if evaluation.get(key) is None:
        return None
    scale, digits, unit = (100, 1, " %") if key == "accuracy" else (1, 3, "")
    values = [evaluation[key], evaluation.get("standard_error")]
    shown = " ± ".join(f"{scale * value:.{digits}f}" for value in values if value is not None)
    return f"{key} {shown}{unit}"


# --- In words and bars ---


def sparkline(values: list[float | None], lowest: float, highest: float) -> str:
    """One character a value, from ▁ for the lowest to █ for the highest; a blank for None.

    >>> sparkline([0, None, 7, 14], 0, 14)
    '▁ ▄█'
    """
    span = (highest - lowest) or 1
    return "".join(
        " " if value is None else LEVELS[int((value - lowest) / span * (len(LEVELS) - 1) + 0.5)]
        for value in values
    )


def squeezed(values: list[float | None], width: int) -> list[float | None]:
    """The values in at most so many blocks of equal length, each block's mean; None where a block has none.

    >>> squeezed([1, 3, None, None, 6], 3)
    [2.0, None, 6.0]
    """
    size = max(1, -(-len(values) // width))
    blocks = [values[start : start + size] for start in range(0, len(values), size)]
    given = [[value for value in block if value is not None] for block in blocks]
    return [fmean(block) if block else None for block in given]


def parts_of(row: dict) -> dict[str, float]:
    """The seconds of a step by part."""
    seconds = {label: row.get(key) or 0.0 for key, label in PARTS.items()}
    return {**seconds, "the rest": max(0.0, (row.get("step_s") or 0.0) - sum(seconds.values()))}


def in_words(seconds: float) -> str:
    """75.2 -> "1 min 15 s"; from an hour on, hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def step_seconds(rows: list[dict], flags: dict) -> float:
    """Mean seconds of the last 20 steps or more, whole windows: the first step of each samples for all."""
    period = int(min(float(flags.get("sync_every", 1)), float(flags.get("ahead", 1))))
    return fmean(row.get("step_s") or 0.0 for row in rows[-period * -(-20 // period) :])


def view(directory: Path, columns: int, now: float) -> tuple[list[str], bool]:
    """The lines to show, none longer than so many columns, and whether the run has come to its end.

    now: seconds since the epoch. ValueError in one line if the directory holds no run.
    """
    rows, config = metrics_so_far(directory), read_config(directory)
    flags, evaluations = config["flags"], measured(directory)
    lines = [f"{directory}   {config.get('command', '')}"]
    if not rows:
        return [line[:columns] for line in [*lines, "no step yet"]], False
    done, steps = len(rows), flags.get("steps", len(rows))
    age = now - (directory / "metrics.jsonl").stat().st_mtime
    # The last step is followed by an evaluation where --eval-every asks for one.
    ended = done >= steps and (
        flags.get("eval_every", "inf") == "inf" or (directory / "validation" / str(steps)).exists()
    )
    seconds = step_seconds(rows, flags)
    left = f"about {in_words(seconds * (steps - done))} left" if done < steps else "finished"
    lines += [f"step {done} of {steps}, {left}"]
    lines += [
        f"sync every {flags.get('sync_every')}, {seconds:.2f} s a step, the last {in_words(age)} ago",
        "",
    ]
    lines.append(f"{'':16}{'now':>9}{'lowest':>9}{'highest':>9}")
    room = max(10, columns - 45)
    for key, label in CURVES.items():
        values = [row.get(key) for row in rows]
        given = [value for value in values if value is not None]
        if not given:
            continue
        now_low_high = "".join(f"{value:9.3g}" for value in (given[-1], min(given), max(given)))
        curve = values[-room:] if key == "staleness" else squeezed(values, room)
        lines.append(f"{label:16}{now_low_high}  {sparkline(curve, min(given), max(given))}")
    lines += ["", f"{'seconds a step':20}{'mean':>9}{'share':>7}"]
    parts = [parts_of(row) for row in rows]
    whole = sum(sum(one.values()) for one in parts) or 1
    for label in parts[0]:
        total = sum(one[label] for one in parts)
        bar = "█" * round(total / whole * room)
        lines.append(f"{label:20}{total / done:9.2f}{total / whole:7.0%}  {bar}")
    speed = rows[-1].get("tokens_per_s")
    lines += ["", f"{'tokens a second':20}{f'{speed:9.0f}' if speed else '        -'}"]
    newest = [f"step {step}: {words} ({name})" for step, name, words in evaluations[-1:]]
    lines.append(f"{'newest evaluation':20}  {newest[0] if newest else 'none'}")
    return [line[:columns].rstrip() for line in lines], ended


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, run_first(args))
    live, shown = sys.stdout.isatty() and not config.once, 0
    try:
        while True:
            with one_line_errors():
                lines, ended = view(Path(config.run), shutil.get_terminal_size().columns, time.time())
            if live:
                lines = [f"{BOLD}{lines[0]}{PLAIN}", *lines[1:]]
                print(UP.format(shown) if shown else "", end=CLEAR_BELOW)  # over what was shown before
            print("\n".join(lines), flush=True)
            shown = len(lines)
            if ended or not live:
                return
            time.sleep(config.every)
    except KeyboardInterrupt:  # of the watching: the run goes on
        print()


if __name__ == "__main__":
    main()
