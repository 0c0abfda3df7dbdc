"""Measure the tokens per second of our rollouts beside bare vLLM on the same token ids.

    python bench/generation.py        # ten minutes on two cores; needs models/smollm2 (tiny/smollm2.py)

Ours is VLLMGenerator.sample: chat template, seeds, log-probs, n samples a prompt. Bare is
vllm.LLM(...).generate on the ids of the same prompts, with the same sampling parameters, in three ways:

- same engine: our settings, in the caller's process, so that only our own code differs;
- defaults: what a user writes, with two settings that it needs to run here: no chunked prefill, because the
  CPU sampler crashes on a chunked seeded request, and a limit to the cache, because the default takes 92 % of
  the memory;
- no seeds: our engine without seeds and log-probs, which training needs and a plain user does not.

Every way runs in fresh processes, the ways in turns. The engine's start and the first call are not counted;
before each call the prefix cache is emptied, as sync() does. Only produced tokens count.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only bench/ is there

from flags import (  # noqa: E402
    Count,
    OutFile,  # noqa: E402
    one_line_errors,
    parse_flags,
)

from run import surroundings, write_json  # noqa: E402

# name: checkpoint, prompts, dtype, P, samples a prompt, longest response, longest prompt and response
POINTS = {
    "tiny": ("tiny/llama", "tiny", "float32", 64, 8, 64, 256),
    "smollm2": ("models/smollm2", "models/one_digit.jsonl", "bfloat16", 8, 8, 48, 256),
}
WAYS = ("ours", "same engine", "defaults", "no seeds")


@dataclass
class Config:
    points: list[str] = HfArg(default_factory=lambda: list(POINTS), help="Of tiny and smollm2.")
    rounds: Count = HfArg(default=2, help="Fresh processes of each way.")
    calls: Count = HfArg(default=3, help="Timed calls in each.")
    out: OutFile = HfArg(default="results/generation/numbers.json", help="Where the numbers are written.")


def in_new_process(function: Callable, *args: Any) -> Any:
    """function(*args) in a new process, with the C library's defaults, so that timings are a user's."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *args).result()


def measure(
    way: str,
    path: str,
    data: str,
    dtype: str,
    P: int,
    n: int,
    max_tokens: int,
    max_model_len: int,
    calls: int,
) -> tuple[list[tuple[int, float]], list[list[int]]]:
    """[(tokens, seconds)] of the calls after a first one, and the last one's ids; in this fresh process."""
    import torch

    from data import load_prompts
    from generate import encode_prompts, load_generator, request_seed
    from model import load_tokenizer
    from serve import engine_settings

    dtype = getattr(torch, dtype)
    prompts = load_prompts(data)[:P]
    seeds = [request_seed(0, 0, prompt.id) for prompt in prompts]
    if way == "ours":
        generator = load_generator("vllm", path, dtype, torch.device("cpu"), max_model_len)
        llm = generator.llm

        def call():
            groups = generator.sample(prompts, n, 1.0, 1.0, max_tokens, seeds)
            return [rollout.response_ids for group in groups for rollout in group]

    else:
        if way == "defaults":
            settings = {"model": path, "dtype": dtype, "max_model_len": max_model_len}
            settings |= {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": 0.1}  # 0.1: of its check
            settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192}
        else:
            settings = engine_settings(path, dtype, max_model_len, gpu_memory=0.1)
            os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            torch._dynamo.config.disable = True
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        import vllm

        llm = vllm.LLM(**settings)
        ids = encode_prompts(load_tokenizer(path), prompts)
        params = [
            vllm.SamplingParams(
                n=n, max_tokens=max_tokens, **({} if way == "no seeds" else {"seed": seed, "logprobs": 0})
            )
            for seed in seeds
        ]

        def call():
            outputs = llm.generate([{"prompt_token_ids": i} for i in ids], params, use_tqdm=False)
            return [list(response.token_ids) for output in outputs for response in output.outputs]

    timed = []
    for _ in range(1 + calls):
        llm.reset_prefix_cache()
        start = time.perf_counter()
        responses = call()
        timed.append((sum(map(len, responses)), time.perf_counter() - start))
    llm.llm_engine.engine_core.shutdown()
    return timed[1:], responses


def measure_point(name: str, rounds: int, calls: int) -> dict[str, Any]:
    """Tokens per second of every way, the median over all its calls, and whether all gave the same tokens."""
    speeds, responses = {way: [] for way in WAYS}, {}
    for turn in range(rounds):
        for way in WAYS[turn % 2 :] + WAYS[: turn % 2]:
            timed, responses[way] = in_new_process(measure, way, *POINTS[name], calls)
            speeds[way] += [tokens / seconds for tokens, seconds in timed]
            print(f"{name:8} {way:12} {median(speeds[way]):7.0f} tokens/s", flush=True)
    return {
        "point": name,
        "tokens": sum(map(len, responses["ours"])),
        "tokens_per_s": {way: median(values) for way, values in speeds.items()},
        "ours_over": {way: median(speeds["ours"]) / median(speeds[way]) for way in WAYS[1:]},
        "same_tokens_as": {way: responses[way] == responses["ours"] for way in WAYS[1:3]},
        "all_calls": speeds,
    }


def as_markdown(rows: list[dict]) -> str:
    """One line per way and point: tokens per second, and ours over it."""
    lines = ["| model | way | tokens/s | lowest, highest | ours over it |", "|" + "---|" * 5]
    for row in rows:
        for way, speed in row["tokens_per_s"].items():
            calls = row["all_calls"][way]
            ratio = f"{row['ours_over'][way]:.2f}" if way in row["ours_over"] else ""
            spread = f"{min(calls):.0f}, {max(calls):.0f}"
            lines.append(f"| {row['point']} | {way} | {speed:.0f} | {spread} | {ratio} |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        for name in config.points:
            if name not in POINTS:
                raise ValueError(f"--points {name}: takes {' or '.join(POINTS)}")
            if not Path(POINTS[name][0]).exists():
                raise ValueError(f"--points {name}: no {POINTS[name][0]} here (tiny/smollm2.py makes it)")
    rows = [measure_point(name, config.rounds, config.calls) for name in config.points]
    print(as_markdown(rows))
    record = {"command": " ".join(sys.argv), "flags": asdict(config), **surroundings(), "points": rows}
    write_json(config.out, record)


if __name__ == "__main__":
    main()
