"""Compare the peak memory of a training step with plan.py's estimate, on a CPU (Linux).

    python bench/plan_memory.py        # a minute; the largest model takes 3 GB

A step is two micro-batches of DPO, forward and backward, and Adam's update, after one such step has allocated
gradients and moments. Each point is a fresh process whose C library gives freed tensors back at once. The
result is the peak of resident memory minus what was held before the first weight was made.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only bench/ is there

from flags import OutFile, parse_flags  # noqa: E402

import plan  # noqa: E402
from bench.token_logps_memory import GB, in_fresh_process, resident  # noqa: E402
from model import checkpoint_activations, meta_model, token_logps  # noqa: E402
from run import surroundings, write_json  # noqa: E402

# (name, config, tokens of a micro-batch, activation checkpointing)
SHAPE = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000}
POINTS = [
    ("Llama, untied", LlamaConfig, {**SHAPE, "tie_word_embeddings": False}, 2048, False),
    ("the same, longer", LlamaConfig, {**SHAPE, "tie_word_embeddings": False}, 8192, False),
    ("the same, checkpointing", LlamaConfig, {**SHAPE, "tie_word_embeddings": False}, 8192, True),
    ("Qwen3, tied", Qwen3Config, {**SHAPE, "tie_word_embeddings": True}, 4096, False),
]


@dataclass
class Config:
    out: OutFile = HfArg(default="results/plan/numbers.json", help="Where the numbers are written.")


def planned(kind: type[PreTrainedConfig], shape: dict, tokens: int, checkpointing: bool) -> int:
    """Bytes at the peak, by plan.memory."""
    flags = plan.Config(dtype="float32", micro_batch_tokens=tokens, activation_checkpointing=checkpointing)
    model = meta_model(kind(**shape), torch.float32)
    if checkpointing:
        checkpoint_activations(model)
    held = plan.memory(flags, model, plan.count(model))
    return sum(size for what, size in held.items() if what != "engine")


def measured(kind: type[PreTrainedConfig], shape: dict, tokens: int, checkpointing: bool) -> int:
    """Bytes at the peak of a step, in this fresh process."""
    torch.zeros(8, 8) @ torch.zeros(8, 8)  # loads libraries, which are not the model's
    before = resident("VmRSS")
    policy, reference = (AutoModelForCausalLM.from_config(kind(**shape)).eval() for _ in range(2))
    reference.requires_grad_(False)
    if checkpointing:
        checkpoint_activations(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    ids = torch.randint(shape["vocab_size"], (tokens // 256, 256))
    for step in range(2):
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts again from VmRSS
        for _ in range(2):
            logps, entropy = token_logps(policy, ids, with_entropy=True)
            with torch.no_grad():
                ref_logps = token_logps(reference, ids)
            ((logps - ref_logps).sum() + entropy.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident("VmHWM") - before


def main(args: list[str] | None = None) -> None:
    config, rows = parse_flags(Config, args), []
    for name, *point in POINTS:
        said, was = planned(*point) / GB, in_fresh_process(measured, *point) / GB
        rows.append(
            {
                "model": name,
                "tokens": point[2],
                "planned_gb": said,
                "measured_gb": was,
                "planned_over_measured": said / was,
            }
        )
        print(
            f"{name:24} {point[2]:6} tokens: planned {said:.2f} GB, measured {was:.2f} GB, {said / was:.2f}"
        )
    write_json(config.out, {"points": rows, **surroundings()})


if __name__ == "__main__":
    main()
