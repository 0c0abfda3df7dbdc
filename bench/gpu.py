"""Measure one model on one GPU, in one process with one engine: called by bench/gpu.sh.

    python bench/gpu.py --model models/smollm2 --parts engine sync mismatch steps
    python bench/gpu.py --model random-1b --parts training sync

    engine     tokens a second of VLLMGenerator.sample beside bare llm.generate on the same ids and engine:
               with the same seeds and log-probs, and with vLLM's default sampling; in calls of 512 and of
               5,120 requests
    sync       seconds of sync() beside vLLM's reload alone and a plain copy of the same weights
    mismatch   |trainer - engine| log-prob of sampled tokens one sync ago, by the trainer's kind of forward
    steps      seconds a step, by part, of train_dpo.py at s = 1 and 10, and of train_grpo.py at s = 1:
               their main(), with the engine of this process
    training   the Learn section alone, 16 rows of 1,024 tokens (bench/train_flops.py): share of the matmul
               rate and peak memory, with a reference (GRPO) and without (online DPO)

Every part writes results/bench_gpu/PART-MODEL.json as soon as it is measured; one that does not end within
--part-s seconds, or fails, writes why. On a CPU, --dry runs everything at tiny sizes.
"""

import gc
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only bench/ is there

from flags import (  # noqa: E402
    Count,
    EngineMemory,
    OutFolder,
    one_line_errors,
    parse_flags,
)

import life  # noqa: E402
import train_dpo  # noqa: E402
import train_grpo  # noqa: E402
from batch import micro_batches, to_batch  # noqa: E402
from bench import train_flops  # noqa: E402
from data import Prompt, load_prompts  # noqa: E402
from generate import Generator, encode_prompts, load_generator, request_seed  # noqa: E402
from model import (  # noqa: E402
    autocast,
    full_weights,
    load_config,
    load_sharded,
    load_tokenizer,
    token_logps,
)
from ranks import init_ranks  # noqa: E402
from run import read_metrics, surroundings, write_json  # noqa: E402
from sync import sync  # noqa: E402

G = 8  # samples a prompt
MAX_MODEL_LEN = 512


@dataclass
class Config:
    model: str = HfArg(default="models/smollm2", help="A checkpoint, or random-1b.")
    tokenizer: str = HfArg(default="models/smollm2", help="Whose tokenizer a random model's engine gets.")
    data: str = HfArg(default="models/one_digit.jsonl", help="Problems with answers.")
    parts: list[str] = HfArg(default_factory=lambda: ["engine"], help="In this order: see above.")
    part_s: Count = HfArg(default=180, help="Seconds that a part may take.")
    engine_memory: EngineMemory = HfArg(default=EngineMemory("0.4"), help="As in the train scripts.")
    dry: bool = HfArg(default=False, help="Tiny sizes, for a CPU.")
    out: OutFolder = HfArg(default="results/bench_gpu", help="Folder of the results.")


@contextmanager
def limited(seconds: int):
    """TimeoutError if the block takes longer, as soon as Python is back from a library."""

    def late(number, frame):
        raise TimeoutError(f"over its {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def timed(function: Callable, device: torch.device) -> tuple[float, Any]:
    """Seconds of a call, including its work on the GPU, and its result."""
    train_flops.synchronize(device)
    start = time.perf_counter()
    result = function()
    train_flops.synchronize(device)
    return time.perf_counter() - start, result


class Bench:
    """One model, its engine and the parts; an engine is started when a part first needs it."""

    few, many = 8, 30  # steps of a run, at s = 1 and above

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.prompts: list[Prompt] = load_prompts(config.data) if Path(config.data).exists() else []
        self.dtype = torch.bfloat16
        self._engine, self.start_s, self.folder = None, None, tempfile.TemporaryDirectory()

    @cached_property
    def path(self) -> str:
        """The model's checkpoint; a random one, with a tokenizer and a head of its size, is written first."""
        if self.config.model not in train_flops.RANDOM:
            return self.config.model
        shape, path = train_flops.RANDOM[self.config.model], f"{self.folder.name}/{self.config.model}"
        smaller = LlamaConfig(
            **{**shape.to_dict(), "vocab_size": load_config(self.config.tokenizer).vocab_size}
        )
        with torch.device(self.device):
            AutoModelForCausalLM.from_config(smaller, dtype=self.dtype).save_pretrained(path)
        load_tokenizer(self.config.tokenizer).save_pretrained(path)
        return path

    def engine(self) -> Generator:
        if self._engine is None:
            self.start_s, self._engine = timed(
                lambda: load_generator(
                    "vllm", self.path, self.dtype, self.device, MAX_MODEL_LEN,
                    memory=self.config.engine_memory,
                ),
                self.device,
            )  # fmt: skip
        return self._engine

    def policy(self, trained: bool = True):
        return load_sharded(train_flops.flags(self.path, self.device), self.device, trained)

    def some_prompts(self, count: int) -> list[Prompt]:
        return list(islice(cycle(self.prompts), count))

    # --- The parts: each returns a dictionary for its file ---

    def measure_engine(self) -> dict[str, Any]:
        generator, calls = self.engine(), []
        sizes, limit = ((2, 4), 8) if self.config.dry else ((64, 640), 128)
        for P in sizes:
            ways = self.ways_to_sample(generator, P, limit)
            for turn in range(3 if sizes[0] == P else 2):  # the first warms up
                for way, call in ways.items():
                    generator.reset_prefix_cache()
                    seconds, lengths = timed(call, self.device)
                    if turn:
                        tokens = sum(lengths)
                        call = {"way": way, "requests": P * G, "tokens": tokens, "seconds": seconds}
                        calls.append({**call, "tokens_per_s": tokens / seconds})
        return {"engine_start_s": self.start_s, "max_tokens": limit, "calls": calls}

    def ways_to_sample(self, generator: Generator, P: int, limit: int) -> dict[str, Callable]:
        """{way: a call that returns the lengths of G responses to each of P prompts}."""
        sampling, prompts = generator.vllm.SamplingParams, self.some_prompts(P)
        ids = [{"prompt_token_ids": row} for row in encode_prompts(generator.tokenizer, prompts)]
        seeds = [request_seed(0, number, prompt.id) for number, prompt in enumerate(prompts)]
        as_ours = {
            "logprobs": 0,
            "flat_logprobs": True,
            "detokenize": False,
            "logit_bias": generator.never or None,
        }

        def ours():
            groups = generator.sample(prompts, G, 1.0, 1.0, limit, seeds)
            return [len(rollout.response_ids) for group in groups for rollout in group]

        def bare(params):
            outputs = generator.llm.generate(ids, params, use_tqdm=False)
            return [len(response.token_ids) for output in outputs for response in output.outputs]

        same = [sampling(n=G, max_tokens=limit, seed=seed, **as_ours) for seed in seeds]
        return {
            "ours": ours,
            "bare, the same settings": lambda: bare(same),
            "bare, default sampling": lambda: bare([sampling(n=G, max_tokens=limit)] * P),
        }

    def measure_sync(self) -> dict[str, Any]:
        generator, policy, repeats = self.engine(), self.policy(), 2 if self.config.dry else 7
        first_s, _ = timed(lambda: sync(policy, generator, 0), self.device)
        copies = [torch.empty_like(weight) for _, weight in full_weights(policy, self.dtype)]

        def plain_copy():
            for copy, (_, weight) in zip(copies, full_weights(policy, self.dtype), strict=True):
                copy.copy_(weight)

        def reload():  # vLLM's own, without a proof
            weights = full_weights(policy, self.dtype)
            generator.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

        ways = {
            "plain copy": plain_copy,
            "vLLM's reload": reload,
            "sync": lambda: sync(policy, generator, 1),
            "load_weights, with its proof": lambda: generator.load_weights(full_weights(policy, self.dtype)),
            "prefix cache": generator.reset_prefix_cache,
            "canary, engine": lambda: generator.score(list(range(12))),
        }
        seconds = {name: [] for name in ways}
        for turn in range(repeats + 1):
            for name, call in ways.items():
                taken, _ = timed(call, self.device)
                seconds[name] += [taken] if turn else []
        medians = {name: median(values) for name, values in seconds.items()}
        size = sum(copy.nbytes for copy in copies)
        return {"bytes": size, "first_sync_s": first_s, "seconds": medians, "all": seconds}

    @torch.no_grad()
    def measure_mismatch(self) -> dict[str, Any]:
        generator, policy = self.engine(), self.policy()
        sync(policy, generator, 0)
        prompts = self.some_prompts(2 if self.config.dry else 64)
        seeds = [request_seed(1, 0, prompt.id) for prompt in prompts]
        groups = generator.sample(prompts, G, 1.0, 1.0, 8 if self.config.dry else 128, seeds)
        rollouts = [rollout for group in groups for rollout in group]
        lengths = [len(rollout.ids) for rollout in rollouts]
        whole = self.policy(trained=False)
        forwards = {
            "bfloat16 as trained": (policy, lambda: autocast(self.device, self.dtype)),
            "bfloat16 weights": (whole, lambda: autocast(self.device, torch.float32)),
        }
        found = {}
        for name, (model, context) in forwards.items():
            gaps = []
            for part in micro_batches([[i] for i in range(len(rollouts))], lengths, 16384):
                input_ids, mask, sampler_logps = to_batch([rollouts[i] for i in part], self.device)
                with context():
                    gap = token_logps(model, input_ids, mask) - sampler_logps
                gaps.append(gap[mask.bool()].double())
            gaps = torch.cat(gaps)
            size, ratio = gaps.abs().sort().values, gaps.exp()
            found[name] = {
                "tokens": len(gaps),
                "mean": size.mean().item(),
                "bias": gaps.mean().item(),
                "p99": size[99 * len(size) // 100].item(),
                "largest": size[-1].item(),
                "share_clipped": ((ratio < 0.8) | (ratio > 1.2)).double().mean().item(),
            }
        return found

    def measure_steps(self) -> dict[str, Any]:
        P, tokens, few, many = (2, 8, 2, 4) if self.config.dry else (64, 64, self.few, self.many)
        runs = [("DPO", train_dpo, 1, few), ("GRPO", train_grpo, 1, few), ("DPO", train_dpo, 10, many)]
        found = {}
        for name, script, s, steps in runs:
            words = f"--model {self.path} --data {self.config.data} --dtype bfloat16 --steps {steps}"
            words += f" --sync-every {s} --prompts-per-step {P} --samples-per-prompt {G} --lr 1e-6"
            words += f" --max-new-tokens {tokens}"
            try:
                with self.borrowed_engine(), tempfile.TemporaryDirectory() as folder:
                    script.main([*words.split(), "--run-dir", f"{folder}/run"])
                    rows = read_metrics(f"{folder}/run")
            except TimeoutError as error:  # keep what was measured before
                found[f"{name}, s = {s}"] = {"not measured": str(error)}
                break
            # Skip the first window, which compiles and rehearses, if there is a second one.
            warm = rows[max(s, 2) :] or rows
            keys = [key for key in rows[0] if key.endswith("_s") and key != "graded_per_s"]
            found[f"{name}, s = {s}"] = {
                "command": f"{Path(script.__file__).name} {words}",
                "steps": len(warm),
                **{key: sum(row[key] for row in warm) / len(warm) for key in keys},
                "tokens": sum(row["tokens"] for row in warm) / len(warm),
                "bound_frac": max(row.get("bound_frac") or 0 for row in rows if row["staleness"] == 0),
                "logp_gap_clip": max(row["logp_gap_clip"] or 0 for row in rows),
                "rows": rows,
            }
        return found

    @contextmanager
    def borrowed_engine(self):
        """Let the train scripts' main() use this process's engine, without closing it or the ranks."""
        generator = self.engine()
        generator.version = None
        kept = life.load_generator, life.Life.close
        life.load_generator = lambda *_, **__: generator
        life.Life.close = lambda run: (run.run.close(), run.scorer.close())
        try:
            yield
        finally:
            life.load_generator, life.Life.close = kept
            gc.collect()

    def measure_training(self) -> dict[str, Any]:
        dry = self.config.dry
        settings = train_flops.Config(
            rows=16, prompt_tokens=8 if dry else 128, response_tokens=8 if dry else 896,
            micro_batch_tokens=64 if dry else 16384, steps=1 if dry else 5, square=64 if dry else 8192,
        )  # fmt: skip
        found, torch_memory = {}, torch.cuda if self.device.type == "cuda" else None
        with tempfile.TemporaryDirectory() as folder:
            path = train_flops.checkpoint_of(self.config.model, folder)
            flags = train_flops.flags(path, self.device)
            policy, reference = load_sharded(flags, self.device), load_sharded(flags, self.device, False)
        optimizer = torch.optim.AdamW(
            policy.parameters(), 1e-6, weight_decay=0.0, fused=self.device.type == "cuda"
        )
        blocks, head = train_flops.parameters(policy)
        rollouts = train_flops.make_rollouts(settings, policy.config.vocab_size)
        length = settings.prompt_tokens + settings.response_tokens
        rates = train_flops.measure_rates(policy, 16 * length, 16 * settings.response_tokens,
                                          settings.square, self.device)  # fmt: skip
        for name, model in (("GRPO, with a reference", reference), ("online DPO, without", None)):
            if torch_memory:
                torch_memory.reset_peak_memory_stats()
            steps = [
                train_flops.train_step(policy, model, optimizer, rollouts, settings, self.device)
                for _ in range(settings.steps + 2)
            ][2:]
            seconds = {phase: median(step[phase] for step in steps) for phase in steps[0]}
            tokens, responses = 16 * length, 16 * settings.response_tokens
            needed = (8 if model else 6) * (blocks * tokens + head * responses)
            found[name] = {
                "seconds": seconds,
                "needed_flops": needed,
                "share_of_rate": needed / seconds["step_s"] / max(rates.values()),
                "learning_flops_per_s": 6 * (blocks * tokens + head * responses)
                / (seconds["policy_s"] + seconds["backward_s"]),
                "peak_gb": torch_memory.max_memory_allocated() / 1e9 if torch_memory else None,
                "steps": steps,
            }  # fmt: skip
        graphs = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        rates = {" x ".join(map(str, shape)): rate for shape, rate in rates.items()}
        return {
            "parameters": {"blocks": blocks, "head": head},
            "flags": asdict(flags),
            "matmul_flops_per_s": rates,
            "compiled_graphs": graphs,
            **found,
        }


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    _, _, device = init_ranks()
    bench = Bench(config, device)
    with one_line_errors():
        for part in config.parts:
            if not hasattr(bench, f"measure_{part}"):
                raise ValueError(f"--parts {part}: takes engine, sync, mismatch, steps, training")
    for part in config.parts:
        start = time.perf_counter()
        try:
            with limited(config.part_s):
                found = getattr(bench, f"measure_{part}")()
        except Exception as error:  # the next part can be measured all the same
            traceback.print_exc()
            found = {"not measured": f"{type(error).__name__}: {error}"}
        record = {
            "command": " ".join(sys.argv),
            **surroundings(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "seconds": time.perf_counter() - start,
            "part": part,
            "model": config.model,
            "found": found,
        }
        write_json(f"{config.out}/{part}-{Path(config.model).name}.json", record)
        print(f"gpu: {part} of {config.model}: {record['seconds']:.0f} s", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
