"""Compare the peak memory of token_logps, forward and backward, with one log_softmax over all logits.

    python bench/token_logps_memory.py                 # results/memory/: minutes on a CPU, up to 8 GB
    python bench/token_logps_memory.py --device cuda   # where torch counts the bytes itself

The model is a Llama without layers, with a frozen embedding and an output head, so that nearly all
activations are the head's. Every token is a response token. The result is the peak minus what was held before
the call. Weights and their gradient do not count, because a small call before has made them; hidden states
(B x T x D) and the copies of the head's gradient that autograd adds up do count.

On a CPU the peak is that of resident memory (Linux's VmHWM, the same as getrusage's ru_maxrss), each point in
a fresh process whose C library gives freed tensors back at once (MALLOC_MMAP_THRESHOLD_), so that glibc's
free memory does not count. The plain way is run only up to --plain-gb; above, its peak is that of the longest
T that was run at the same V, times the ratio of the Ts, and marked with ~.
"""

import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python bench/...py` puts only bench/ there

from flags import (  # noqa: E402
    Count,
    OutFile,  # noqa: E402
    Positive,
    one_line_errors,
    parse_flags,
)

from bench.generation import in_new_process  # noqa: E402
from model import token_logps  # noqa: E402
from run import surroundings, write_json  # noqa: E402

PLAIN_COPIES = 5  # (B, T, V) floats that the plain way holds at its peak, about; only to keep to --plain-gb
GB = 1e9


@dataclass
class Config:
    batch: Count = HfArg(default=8, help="B: rows.")
    lengths: list[Count] = HfArg(default_factory=lambda: [64, 256, 1024], help="T: tokens a row, several.")
    vocabularies: list[Count] = HfArg(
        default_factory=lambda: [32000, 128256],
        help="V: vocabulary entries, several; 128256 is Llama 3's.",
    )
    hidden: Count = HfArg(default=64, help="D: size of a hidden state, an even number.")
    dtype: Literal["float32", "bfloat16"] = HfArg(
        default="float32", help="bfloat16: under autocast, as in training."
    )
    device: Literal["cpu", "cuda"] = HfArg(default="cpu", help="cpu needs Linux.")
    plain_gb: Positive = HfArg(default=8, help="Do not run the plain way where it would need more.")
    out: OutFile = HfArg(default="results/memory/numbers.json", help="Where the numbers are written.")


def plain_logps(
    model: PreTrainedModel, input_ids: Tensor, with_entropy: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The same as token_logps, by a log_softmax over all logits at once."""
    all_logps = model(input_ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)  # (B, T - 1, V)
    logps = all_logps.gather(-1, input_ids[:, 1:, None]).squeeze(-1)  # (B, T - 1)
    return (logps, -(all_logps.exp() * all_logps).sum(-1)) if with_entropy else logps


def forward_backward(
    way: str, model: PreTrainedModel, input_ids: Tensor, with_entropy: bool, dtype: str
) -> None:
    """One call of `way` ("chunked" or "plain") under a loss that needs all that it returns."""
    with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        if way == "plain":
            result = plain_logps(model, input_ids, with_entropy)
        else:
            result = token_logps(model, input_ids, with_entropy=with_entropy)
    logps, entropies = result if with_entropy else (result, torch.zeros(()))
    (logps.sum() + entropies.sum()).backward()


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (its peak) of this process, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def measure(
    way: str,
    batch: int,
    length: int,
    vocabulary: int,
    with_entropy: bool,
    hidden: int,
    dtype: str,
    device: str,
) -> tuple[int, float]:
    """(bytes, seconds) of a forward and backward, over the (batch, length) tokens, in this fresh process.

    Seconds are of CPU time, over all threads, so that other work on the machine does not count; on a GPU they
    are wall-clock.
    """
    shape = {"hidden_size": hidden, "intermediate_size": 1, "num_hidden_layers": 0, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape)).to(device)
    model.get_input_embeddings().requires_grad_(False)  # its gradient is another of the head's size
    input_ids = torch.randint(vocabulary, (batch, length), device=device)
    forward_backward(way, model, input_ids[:1, :2], with_entropy, dtype)  # makes the gradient

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        forward_backward(way, model, input_ids, with_entropy, dtype)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, time.perf_counter() - start

    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts again from VmRSS
    before, start = resident("VmRSS"), time.process_time()
    forward_backward(way, model, input_ids, with_entropy, dtype)
    return resident("VmHWM") - before, time.process_time() - start


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """function(*args) in a new process, whose peak is of this call alone."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # bytes; read when a process starts
    return in_new_process(function, *args)


def measure_all(config: Config) -> list[dict]:
    """One dictionary for each V, T, with and without entropies: peaks and seconds of both ways."""
    rows, run = [], {}  # run: (V, with_entropy): the plain way's (T, bytes) at the longest T that was run
    points = list(product(config.vocabularies, (True, False), sorted(config.lengths)))
    for V, with_entropy, T in tqdm(points, desc="token_logps_memory"):
        rest = (config.batch, T, V, with_entropy, config.hidden, config.dtype, config.device)
        logits = config.batch * T * V * 4  # bytes
        ours, ours_s = in_fresh_process(measure, "chunked", *rest)
        if logits * PLAIN_COPIES <= config.plain_gb * GB:
            plain, plain_s = in_fresh_process(measure, "plain", *rest)
            run[V, with_entropy] = T, plain
        else:
            run_T, run_bytes = run.get((V, with_entropy), (T, math.nan))
            plain, plain_s = run_bytes * T / run_T, None
        rows.append(
            {
                "V": V,
                "B": config.batch,
                "T": T,
                "with_entropy": with_entropy,
                "logits_gb": logits / GB,
                "token_logps_gb": ours / GB,
                "token_logps_s": ours_s,
                "plain_gb": None if math.isnan(plain) else plain / GB,
                "plain_s": plain_s,  # None: not run, plain_gb is extrapolated
            }
        )
    return rows


def as_markdown(rows: list[dict]) -> str:
    """The rows as a table; ~ marks a peak that was not measured but extrapolated."""
    lines = [
        "| V | (B, T) | entropy | logits, once | peak, plain | peak, `token_logps` | seconds, plain | "
        "seconds, `token_logps` |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        plain = "not run" if row["plain_gb"] is None else f"{row['plain_gb']:.2f} GB"
        cells = (
            row["V"],
            f"({row['B']}, {row['T']})",
            "yes" if row["with_entropy"] else "no",
            f"{row['logits_gb']:.2f} GB",
            plain if row["plain_s"] or row["plain_gb"] is None else f"~ {plain}",
            f"{row['token_logps_gb']:.2f} GB",
            f"{row['plain_s']:.1f}" if row["plain_s"] else "",
            f"{row['token_logps_s']:.1f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; use --device cpu")
        if config.device == "cpu" and not Path("/proc/self/clear_refs").exists():
            raise ValueError("--device cpu: needs Linux, whose /proc tells a process's peak memory")
        if config.hidden % 2:
            raise ValueError(f"--hidden {config.hidden}: takes an even number (rotary embeddings)")
    rows = measure_all(config)
    print(as_markdown(rows))
    record = {"command": " ".join(sys.argv), "flags": asdict(config), **surroundings(), "points": rows}
    write_json(config.out, record)


if __name__ == "__main__":
    main()
