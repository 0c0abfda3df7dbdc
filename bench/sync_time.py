"""Time a sync against a plain copy of the weights, and record memory over many syncs (CPU, Linux).

    python bench/sync_time.py         # minutes; needs models/smollm2 (tiny/smollm2.py)

The plain copy is destination.copy_(source) for every parameter, from the float32 policy into tensors of the
engine's dtype; like a sync it includes the cast. Both are timed in turns in one fresh process, after the
first sync and its rehearsal. The sync's parts: load_weights, which pulls the weights, casts them and has vLLM
repack them; the reset of the prefix cache; score, the canary in the engine; and the rest, which is the canary
in the trainer. Packing is timed beside them because a CPU engine cannot avoid it: it puts every matrix once
into the layout of vLLM's matrix kernel (oneDNN's). Memory is VmRSS after each of many syncs, in another
process.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression, median

import torch
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only bench/ is there

from flags import (  # noqa: E402
    Count,
    OutFile,  # noqa: E402
    one_line_errors,
    parse_flags,
)

from bench.generation import POINTS, in_new_process  # noqa: E402
from bench.token_logps_memory import resident  # noqa: E402
from generate import Generator, load_generator  # noqa: E402
from metrics import Stopwatch  # noqa: E402
from model import load_policy  # noqa: E402
from run import surroundings, write_json  # noqa: E402
from sync import sync  # noqa: E402

PARTS = ("load_weights", "reset_prefix_cache", "score")  # methods of a generator
TIMED = ("plain copy", "packing", "sync", *PARTS, "trainer")
SETTLED = 20  # syncs after which memory must not grow
SHOWN = (1, 10, 50, 100, 200)


@dataclass
class Config:
    points: list[str] = HfArg(default_factory=lambda: list(POINTS), help="Of tiny and smollm2.")
    repeats: Count = HfArg(default=15, help="Timed syncs, and plain copies.")
    syncs: Count = HfArg(default=200, help="Syncs in a row for the memory, more than 20.")
    out: OutFile = HfArg(default="results/sync_time/numbers.json", help="Where the numbers are written.")


def load_both(name: str) -> tuple[PreTrainedModel, Generator]:
    """A policy and an engine of the same checkpoint, synced once."""
    path, _, dtype, *_ = POINTS[name]
    generator = load_generator("vllm", path, getattr(torch, dtype), torch.device("cpu"), max_model_len=128)
    policy = load_policy(path)
    sync(policy, generator, 0)
    return policy, generator


def watched(method: Callable, watch: Stopwatch, part: str) -> Callable:
    """A method that adds its seconds to a stopwatch."""

    def timed(*args):
        with watch(part):
            return method(*args)

    return timed


@torch.no_grad()
def times(name: str, repeats: int) -> dict[str, float]:
    """Medians in seconds, in this fresh process: the plain copy, packing, the whole sync and its parts."""
    from vllm._custom_ops import create_onednn_mm

    policy, generator = load_both(name)
    sources = list(policy.parameters())
    destinations = [torch.empty_like(p, dtype=generator.dtype) for p in sources]
    matrices = [destination for destination in destinations if destination.ndim == 2]
    methods = {part: getattr(generator, part) for part in PARTS}
    seconds = {what: [] for what in TIMED}
    for turn in range(repeats + 1):
        start = time.perf_counter()
        for source, destination in zip(sources, destinations, strict=True):
            destination.copy_(source)
        copied, start = time.perf_counter() - start, time.perf_counter()
        for matrix in matrices:
            create_onednn_mm(matrix.t(), 32)
        packed, watch = time.perf_counter() - start, Stopwatch()
        for part, method in methods.items():
            setattr(generator, part, watched(method, watch, part))
        start = time.perf_counter()
        sync(policy, generator, turn)
        whole = time.perf_counter() - start
        rest = whole - sum(watch.seconds.values())
        found = {"plain copy": copied, "packing": packed, "sync": whole, "trainer": rest, **watch.seconds}
        for what, value in found.items():
            seconds[what] += [value] if turn else []  # the first touches the destinations' pages
    return {
        "bytes": sum(d.numel() * d.element_size() for d in destinations),
        "tensors": len(destinations),
        **{what: median(values) for what, values in seconds.items()},
    }


def memory(name: str, syncs: int) -> list[int]:
    """Kilobytes resident after every sync, in this fresh process."""
    policy, generator = load_both(name)
    after = []
    for step in range(syncs):
        sync(policy, generator, step)
        after.append(resident("VmRSS") // 1024)
    return after


def slope(values: list[float]) -> float:
    """Least-squares slope of values at 0, 1, 2, ..."""
    return linear_regression(range(len(values)), values).slope


def over_copy(row: dict) -> dict[str, float]:
    """The seconds of each part over those of a plain copy."""
    return {what: row[what] / row["plain copy"] for what in ("packing", "load_weights", "sync")}


def as_markdown(rows: list[dict]) -> str:
    """One line per model for the seconds, and one for the memory."""
    lines = [
        f"| model | tensors | MB | {' | '.join(TIMED)} | load_weights / copy | sync / copy |",
        "|" + "---|" * (len(TIMED) + 5),
    ]
    for row in rows:
        cells = [row["point"], row["tensors"], f"{row['bytes'] / 1e6:.1f}"]
        cells += [f"{1e3 * row[head]:.2f} ms" for head in TIMED]
        cells += [f"{over_copy(row)[what]:.1f}" for what in ("load_weights", "sync")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    shown = [after for after in SHOWN if after <= len(rows[0]["resident_kb"])]
    lines += ["", f"| model | {' | '.join(f'after {s}' for s in shown)} | KB a sync, after {SETTLED} |"]
    lines.append("|" + "---|" * (len(shown) + 2))
    for row in rows:
        cells = [f"{row['resident_kb'][after - 1] / 1024:.1f} MiB" for after in shown]
        lines.append(f"| {row['point']} | {' | '.join(cells)} | {row['kb_per_sync']:.1f} |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        if config.syncs < SETTLED + 2:
            raise ValueError(f"--syncs {config.syncs}: takes at least {SETTLED + 2}")
        for name in config.points:
            if name not in POINTS or not Path(POINTS[name][0]).exists():
                raise ValueError(f"--points {name}: takes {' or '.join(POINTS)}, whose checkpoint is here")
    rows = []
    for name in config.points:
        row = {"point": name, **in_new_process(times, name, config.repeats)}
        row["over_copy"] = over_copy(row)
        after = in_new_process(memory, name, config.syncs)
        rows.append({**row, "resident_kb": after, "kb_per_sync": slope(after[SETTLED:])})
        print(as_markdown(rows[-1:]), flush=True)
    record = {"command": " ".join(sys.argv), "flags": asdict(config), **surroundings(), "points": rows}
    write_json(config.out, record)
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
