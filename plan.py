"""Estimate a run's memory, traffic, arithmetic and time from its config alone, before money is spent.

    python plan.py --model meta-llama/Llama-3.1-8B-Instruct --ranks 8 --activation-checkpointing
    python plan.py --model meta-llama/Llama-3.1-8B-Instruct --ranks 32 --generators 8   # the paper's machines
    python plan.py --model tiny/llama --device-tflops 0.05 --device-gb 8 --bandwidth 20 --dtype float32

The model is made on torch's meta device, which has shapes but no numbers. There autograd tells what a forward
keeps for backward; the rest is the arithmetic written out below. The shares of its peaks that a machine
reaches (--mfu, --bandwidth-share) are assumptions: measure yours (the metrics train_s and generate_s).
--generators are devices that only generate: the train scripts' --generator-devices, or servers behind
--generator-url.
"""

import copy
from dataclasses import dataclass
from typing import Literal

from flags import (
    TINY_MODEL,
    Count,
    EngineMemory,
    Every,
    Positive,
    Share,
    TrainFlags,
    one_line_errors,
    parse_flags,
)

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.hf_argparser import HfArg

from model import (
    LOGITS_AT_ONCE,
    blocks_of,
    checkpoint_activations,
    head_dim,
    load_config,
    meta_model,
    one_line,
)

GB = 1e9
COMPILED_KEEPS = 0.62  # share of saved activations left when compiled; measured on Llama (results/bench_gpu)
COPIES_OF_LOGITS = 5  # float32 tensors as large as a chunk of logits, at the peak of its backward (model.py)


@dataclass
class Config:
    model: str = HfArg(default=TINY_MODEL, help="A checkpoint's folder or Hub name; no weight is read.")
    algorithm: Literal["dpo", "grpo"] = HfArg(default="dpo", help="DPO trains on pairs, GRPO on all samples.")
    sync_every: Every = HfArg(default=Every(1), help="The dial.")
    ranks: Count = HfArg(default=1, help="Training processes, one a device.")
    generators: int = HfArg(default=0, help="Devices that only generate; 0: the ranks' own do both.")
    prompts_per_step: Count = HfArg(default=64, help="P, over all ranks.")
    samples_per_prompt: Count = HfArg(default=8, help="G.")
    pair_frac: Share = HfArg(default=0.6, help="DPO: share of the prompts that give a pair.")
    prompt_tokens: Count = HfArg(default=200, help="A prompt's mean length.")
    response_tokens: Count = HfArg(default=500, help="A response's mean length.")
    max_new_tokens: Count = HfArg(default=2048, help="A response's largest length: the batch waits for it.")
    micro_batch_tokens: Count = HfArg(default=16384, help="As in the train scripts.")
    activation_checkpointing: bool = HfArg(default=False, help="As in the train scripts.")
    compile: bool = HfArg(default=True, help="As in the train scripts, on a GPU.")
    dtype: Literal["float32", "bfloat16"] = HfArg(
        default="bfloat16", help="Of the forwards and of the engine."
    )
    device_gb: Positive = HfArg(default=141.0, help="Memory of a device; the default is an H200's, as below.")
    device_tflops: Positive = HfArg(default=989.0, help="Peak TFLOP/s of a device in that dtype, dense.")
    bandwidth: Positive = HfArg(default=4800.0, help="Memory bandwidth of a device, GB/s.")
    link: Positive = HfArg(default=50.0, help="Bandwidth between devices, GB/s each way.")
    mfu: Share = HfArg(default=0.4, help="Share of the peak that training reaches.")
    bandwidth_share: Share = HfArg(default=0.6, help="Share of the bandwidth that decoding reaches.")
    engine_memory: EngineMemory = HfArg(
        default=EngineMemory("0.4"), help="Of a rank's own engine, as in the train scripts."
    )
    reward_model: str | None = HfArg(
        default=None, help="A checkpoint that scores chat, sharded as the policy."
    )


def saved_for_backward(model: PreTrainedModel, tokens: int) -> int:
    """Bytes that a forward of token_logps over so many tokens keeps for backward, weights not counted.

    Rows have two tokens: on the meta device attention keeps a T x T matrix per row, which the kernels used in
    training do not, and at T = 2 it is negligible. The mask is passed in because building it reads values,
    which meta tensors lack.
    """
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}  # address: storage; kept alive, so that no other gets its address

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(tokens // 2, 2, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 2, 2, dtype=model.dtype, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    kept[hidden.untyped_storage()._cdata] = hidden.untyped_storage()
    return sum(storage.nbytes() for storage in kept.values())


def saved_in_a_block(model: PreTrainedModel, tokens: int) -> int:
    """Bytes that one block keeps for backward, over so many tokens, when nothing is recomputed."""
    config, kept = copy.deepcopy(model.config), []
    for layers in (1, 2):
        config.get_text_config().num_hidden_layers = layers
        config.get_text_config().layer_types = None
        kept.append(saved_for_backward(meta_model(config, model.dtype), tokens))
    return kept[1] - kept[0]


def count(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of weights: {"all", "blocks", "a block", "head"}; a tied head is the embedding."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    return {
        "all": sum(parameter.numel() for parameter in model.parameters()),
        "blocks": sum(blocks),
        "a block": max(blocks),
        "head": model.get_output_embeddings().weight.numel(),
    }


def memory(config: Config, model: PreTrainedModel, weights: dict[str, int]) -> dict[str, float]:
    """Bytes on each training rank, {what: bytes}, at the peak: in backward of a step's last micro-batch.

    bfloat16 stands for a GPU (model.load_sharded): FSDP even on one rank, and a reference in bfloat16.
    """
    size, on_gpu = getattr(torch, config.dtype).itemsize, config.dtype == "bfloat16"
    share = weights["all"] / config.ranks
    outside = weights["all"] - weights["blocks"]
    kept = COMPILED_KEEPS if on_gpu and config.compile else 1.0
    at_once = LOGITS_AT_ONCE["cuda" if on_gpu else "cpu"]
    chunk = min(at_once, config.micro_batch_tokens * model.config.get_text_config().vocab_size)
    held = {
        "master weights (float32)": 4 * share,
        "gradients (float32)": 4 * share,
        "Adam's two moments (float32)": 8 * share,
        f"reference ({config.dtype})": size * share,
        "activations of a micro-batch": saved_for_backward(model, config.micro_batch_tokens),
        "logits, a chunk at a time": COPIES_OF_LOGITS * 4 * chunk,
    }
    if config.activation_checkpointing:  # keeps the inputs of all blocks; recomputes one block at a time
        block = kept * saved_in_a_block(model, config.micro_batch_tokens)
        # The logits are freed before that.
        held["logits, or a block computed again"] = max(block, held.pop("logits, a chunk at a time"))
    else:
        held["activations of a micro-batch"] *= kept
    if config.ranks > 1 or on_gpu:  # a block and the next, the weights outside of blocks, a block's gradient
        held["gathered weights"] = size * (2 * weights["a block"] + outside) + (size + 4) * weights["a block"]
    if config.reward_model:
        with one_line(f"--reward-model {config.reward_model}"), torch.device("meta"):
            shapes = AutoConfig.from_pretrained(config.reward_model, trust_remote_code=False)
            scores = AutoModel.from_config(shapes)  # of any architecture, and without an output head
        held["reward model"] = size * sum(p.numel() for p in scores.parameters()) / config.ranks
    if not config.generators:
        if config.engine_memory.share:
            held["engine"] = config.engine_memory.share * config.device_gb * GB
        else:  # it is of the cache alone
            held["engine"] = config.engine_memory.cache + size * weights["all"]
    return held


def verdict(flags: TrainFlags, ranks: int, device_gb: float) -> str:
    """One line for the start of a run on GPUs: the memory that each needs, and remedies if it is too much."""
    config = Config(
        model=flags.model, ranks=ranks, generators=len(flags.generator_devices + flags.generator_url),
        micro_batch_tokens=flags.micro_batch_tokens, dtype=flags.dtype, device_gb=device_gb,
        activation_checkpointing=flags.activation_checkpointing, engine_memory=flags.engine_memory,
        reward_model=flags.reward_model, compile=flags.compile,
    )  # fmt: skip
    model = meta_model(load_config(config.model), getattr(torch, config.dtype))
    if config.activation_checkpointing:
        checkpoint_activations(model)
    held = memory(config, model, count(model))
    training = sum(size for what, size in held.items() if what != "engine") / GB
    engine = held.get("engine", 0) / GB
    said = (
        f"plan: {training + engine:.0f} GB of {device_gb:.0f} on each GPU, {engine:.0f} of them the engine's"
    )
    if training + engine < device_gb:
        return f"{said}: fits"
    if flags.engine_sleep and training < device_gb:
        return f"{said}: fits while the engine sleeps"
    remedies = ["--micro-batch-tokens", "--engine-memory", "more GPUs"]
    remedies = ([] if flags.activation_checkpointing else ["--activation-checkpointing"]) + remedies
    return f"{said}: does not fit; {', '.join(remedies[:-1])} or {remedies[-1]} would help"


def forward_flops(
    model: PreTrainedModel, weights: dict[str, int], rows: float, prompt: float, response: float
) -> float:
    """Floating-point operations of a forward over rows of prompt + response tokens, two per multiply-add."""
    text = model.config.get_text_config()
    width, tokens = text.num_attention_heads * head_dim(text), prompt + response
    attention = 2 * text.num_hidden_layers * width * tokens**2  # causal: half of 4 T^2 D per layer
    return rows * (2 * weights["blocks"] * tokens + 2 * weights["head"] * response + attention)


def step_costs(config: Config, model: PreTrainedModel, weights: dict[str, int]) -> dict[str, float]:
    """A step's costs: sequences trained, FLOPs, bytes that a sync moves, and seconds per phase."""
    text = model.config.get_text_config()
    P, G, size = config.prompts_per_step, config.samples_per_prompt, getattr(torch, config.dtype).itemsize
    trained = 2 * P * config.pair_frac if config.algorithm == "dpo" else P * G
    forward = forward_flops(model, weights, trained, config.prompt_tokens, config.response_tokens)
    # Backward costs two forwards, activation checkpointing one, and the reference one, but at steps that have
    # just made it the policy: DPO on mathematics syncs both at once.
    reference = 1 - 1 / config.sync_every if config.algorithm == "dpo" and not config.reward_model else 1
    flops = forward * (1 + 2 + reference + config.activation_checkpointing)
    train_s = flops / (config.ranks * config.device_tflops * 1e12 * config.mfu)

    engines = config.generators or config.ranks
    ahead = min(config.sync_every, 10)  # steps sampled together; 10 is --ahead's default
    rows = P * G * ahead / engines
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kv_bytes = 2 * size * text.num_hidden_layers * heads * head_dim(text)  # per token
    read = size * weights["all"] * config.max_new_tokens  # all weights, once per token of the longest
    mean_length = config.prompt_tokens + config.response_tokens / 2
    read += rows * config.response_tokens * kv_bytes * mean_length
    by_bandwidth = read / (config.bandwidth * 1e9 * config.bandwidth_share)
    prompt_flops = forward_flops(model, weights, rows / G, config.prompt_tokens, 0)
    decode_flops = forward_flops(model, weights, rows, 0, config.response_tokens)
    by_arithmetic = (prompt_flops + decode_flops) / (config.device_tflops * 1e12 * config.mfu)
    read_s, decode_s = by_bandwidth / ahead, by_arithmetic / ahead
    generate_s = max(read_s, decode_s)

    sync_bytes = size * weights["all"]
    sync_s = sync_bytes / (config.link * 1e9) / config.sync_every
    together = config.generators and config.sync_every > 1  # sampling overlaps with training
    step_s = sync_s + (max(train_s, generate_s) if together else train_s + generate_s)
    return {
        "sequences": trained,
        "flops": flops,
        "sync_bytes": sync_bytes,
        "train_s": train_s,
        "generate_s": generate_s,
        "read_s": read_s,
        "decode_s": decode_s,
        "sync_s": sync_s,
        "step_s": step_s,
    }


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        if config.generators < 0:
            raise ValueError(f"--generators {config.generators}: 0 or more")
        if config.prompts_per_step % config.ranks:
            raise ValueError(f"--prompts-per-step {config.prompts_per_step}: not a multiple of --ranks")
        model = meta_model(load_config(config.model), getattr(torch, config.dtype))
        if config.activation_checkpointing:
            checkpoint_activations(model)
        weights = count(model)
        held, costs = memory(config, model, weights), step_costs(config, model, weights)

    print(f"{config.model}: {weights['all'] / 1e9:.3g} billion weights, {config.dtype}")
    print(f"\nMemory of each of the {config.ranks} training ranks, GB of {config.device_gb:g}")
    for what, size in held.items():
        print(f"  {what:33} {size / GB:8.3g}")
    peak = sum(held.values()) / GB
    remedies = "more ranks, fewer --micro-batch-tokens, or --activation-checkpointing"
    print(f"  {'peak':33} {peak:8.3g}" + ("" if peak < config.device_gb else f": does not fit; {remedies}"))
    where = f"{config.generators} devices of their own" if config.generators else "the ranks' devices"
    print(f"\nA step of {config.algorithm}, --sync-every {config.sync_every:g}, generation on {where}")
    print(f"  {'sequences trained':33} {costs['sequences']:8.0f}")
    print(f"  {'training, TFLOP':33} {costs['flops'] / 1e12:8.3g}")
    print(f"  {'training, s':33} {costs['train_s']:8.3g}   at {100 * config.mfu:g} % of the peak")
    bound = f"{100 * config.bandwidth_share:g} % of the bandwidth"
    if costs["decode_s"] > costs["read_s"]:
        bound = f"{100 * config.mfu:g} % of the peak"
    print(f"  {'generation, s':33} {costs['generate_s']:8.3g}   at {bound}")
    print(f"  {'sync, GB to each engine':33} {costs['sync_bytes'] / GB:8.3g}")
    print(f"  {'sync, s, spread over its steps':33} {costs['sync_s']:8.3g}")
    print(f"  {'step, s':33} {costs['step_s']:8.3g}")


if __name__ == "__main__":
    main()
