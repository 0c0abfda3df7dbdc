"""Measure how much of a machine's bfloat16 matmul rate a GRPO step reaches, and where the rest goes.

    python bench/train_flops.py      # some minutes on 2 cores

On a CPU the models are SmolLM2 and a Llama of 100M random parameters, on a GPU one of 1.2B.

The step is the Learn section of train_grpo.py with everything on, by the project's functions:
load_sharded, micro_batches, to_batch, token_logps with entropies, the reference's forward, grpo_loss,
kl_estimate, what metrics.Seen keeps, clip_gradients and AdamW. The rollouts are random ids without padding;
nothing is sampled. Seconds are the median of --steps steps after one that warms up.

What counts as arithmetic, in a step of T tokens, R of them response tokens, for a model with B parameters in
its blocks (all but embedding and output head) and H in the head (a tied embedding counts once, as the head,
because a lookup takes no arithmetic):

    6 N T   the usual count of a forward (2 N T) and backward (4 N T): N = B + H. It takes the head for every
            token, though token_logps makes no logits of a prompt
    8 N T   that and the reference's forward
    needed  8 (B T + H R): as 8 N T, with the head for response tokens alone
    run     8 B T + 10 H R: that and the logits that token_logps makes a second time in backward

No count includes attention's products of queries, keys and values. The rate is the best among the products of
the model's layers on a micro-batch and one large square product, before the steps and after. "At the model's
shapes" is the rate of these layers alone: forward products only, each as often as it occurs.
"""

import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python bench/...py` puts only bench/ there

from flags import (  # noqa: E402
    Count,
    OutFile,  # noqa: E402
    one_line_errors,
    parse_flags,
)

from batch import micro_batches, to_batch  # noqa: E402
from generate import Rollout  # noqa: E402
from metrics import Seen, Stopwatch  # noqa: E402
from model import (  # noqa: E402
    autocast,
    choose_attention,
    clip_gradients,
    load_config,
    load_sharded,
    token_logps,
)
from ranks import init_ranks  # noqa: E402
from run import surroundings, write_json  # noqa: E402
from train_grpo import Config as Flags  # noqa: E402
from train_grpo import group_advantages, grpo_loss, kl_estimate, token_weights  # noqa: E402

GROUP = 8  # G
ON_GPU = torch.cuda.is_available()
Shape = tuple[int, int, int]  # of a product: (rows, in) x (in, out)
RANDOM = {  # models of random weights, by name
    "random-100m": LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "random-1b": LlamaConfig(  # Llama 3.2 1B's
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True,
    ),
}  # fmt: skip


@dataclass
class Config:
    models: list[str] = HfArg(
        default_factory=lambda: ["random-1b"] if ON_GPU else ["models/smollm2", "random-100m"],
        help="Checkpoints, or random-100m, random-1b.",
    )
    rows: Count = HfArg(default=32, help="Responses in a step.")
    prompt_tokens: Count = HfArg(default=64, help="Tokens of every prompt.")
    response_tokens: Count = HfArg(default=192, help="Tokens of every response.")
    micro_batch_tokens: Count | None = HfArg(default=None, help="As in train_grpo.py, with its defaults.")
    steps: Count = HfArg(default=3, help="Steps that are measured, after one that is not.")
    square: Count = HfArg(default=4096, help="Rows and columns of the square product.")
    out: OutFile = HfArg(default="results/train_flops/numbers.json", help="Where the numbers are written.")


# --- What is counted ---


def parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(B, H): parameters of the blocks, and of the output head."""
    head = model.get_output_embeddings().weight
    outside = {id(head), id(model.get_input_embeddings().weight)}
    return sum(p.numel() for p in model.parameters() if id(p) not in outside), head.numel()


def step_flops(blocks: int, head: int, tokens: int, response_tokens: int) -> dict[str, int]:
    """The arithmetic of a step by each count of the docstring above.

    >>> step_flops(blocks=10, head=1, tokens=4, response_tokens=2)
    {'6NT': 264, '8NT': 352, 'needed': 336, 'run': 340}
    """
    return {
        "6NT": 6 * (blocks + head) * tokens,
        "8NT": 8 * (blocks + head) * tokens,
        "needed": 8 * (blocks * tokens + head * response_tokens),
        "run": 8 * blocks * tokens + 10 * head * response_tokens,
    }


# --- The rate ---


def matmul_rate(rows: int, into: int, out: int, device: torch.device, seconds: float = 0.5) -> float:
    """FLOP/s of the (rows, into) x (into, out) product in bfloat16: the best of as many as fit `seconds`."""
    x, weight = (torch.randn(n, into, device=device, dtype=torch.bfloat16) for n in (rows, out))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * into * out / best


def products(model: PreTrainedModel, tokens: int, response_tokens: int) -> dict[Shape, int]:
    """{(rows, in, out): how often} of the layers' products in a forward over a micro-batch."""
    counted, head = {}, model.get_output_embeddings()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            shape = (response_tokens if layer is head else tokens, layer.in_features, layer.out_features)
            counted[shape] = counted.get(shape, 0) + 1
    return counted


def measure_rates(
    model: PreTrainedModel, tokens: int, response_tokens: int, square: int, device: torch.device
) -> dict[Shape, float]:
    """{(rows, in, out): FLOP/s} of the model's products, and of the square one."""
    shapes = [*products(model, tokens, response_tokens), (square, square, square)]
    return {shape: matmul_rate(*shape, device) for shape in tqdm(shapes, desc="matmul rate", leave=False)}


def rate_of_layers(counted: dict[Shape, int], rates: dict[Shape, float]) -> float:
    """FLOP/s of all products one after the other: {shape: how often}, {shape: FLOP/s} -> FLOP/s.

    >>> rate_of_layers({(1, 1, 1): 3, (1, 1, 2): 1}, {(1, 1, 1): 2.0, (1, 1, 2): 4.0})
    2.5
    """
    work = {shape: 2 * shape[0] * shape[1] * shape[2] * often for shape, often in counted.items()}
    return sum(work.values()) / sum(flops / rates[shape] for shape, flops in work.items())


# --- The step ---


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def flags(path: str, device: torch.device, **others: Any) -> Flags:
    """A run's flags in bfloat16, with the defaults of its device."""
    attention = choose_attention(None, device, "bfloat16")
    return Flags(
        model=str(path), dtype="bfloat16", attention=attention, compile=device.type == "cuda", **others
    )


def checkpoint_of(name: str, folder: str) -> str:
    """The folder of a checkpoint; one of random weights is written first."""
    if name not in RANDOM:
        return name
    torch.manual_seed(0)
    with torch.device("cuda" if ON_GPU else "cpu"):  # a CPU takes a minute for a billion random numbers
        model = AutoModelForCausalLM.from_config(RANDOM[name], dtype=torch.bfloat16)
    model.save_pretrained(f"{folder}/{name}")
    return f"{folder}/{name}"


def make_rollouts(config: Config, vocabulary: int) -> list[Rollout]:
    """Responses of random ids to random prompts, GROUP to a group."""
    torch.manual_seed(0)
    rollouts = []
    for row in range(config.rows):
        # A separate prompt: a shared one could be computed once (model.shared_hidden).
        prompt = torch.randint(vocabulary, (config.prompt_tokens,)).tolist()
        response = torch.randint(vocabulary, (config.response_tokens,)).tolist()
        logps = [0.0] * len(response)  # the first step puts the policy's here
        rollouts.append(Rollout(str(row // GROUP), prompt, response, logps, "length", 0))
    return rollouts


def train_step(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    optimizer: torch.optim.Optimizer,
    rollouts: list[Rollout],
    config: Config,
    device: torch.device,
) -> dict[str, float]:
    """One step of train_grpo.py's Learn: {phase: seconds}, with the total as step_s.

    Without a reference it costs what a step of online DPO costs, whose reference is the policy.
    """
    watch, seen, response_logps = Stopwatch(), Seen(len(rollouts)), {}

    @contextmanager
    def timed(phase):
        synchronize(device)
        with watch(phase):
            yield
            synchronize(device)

    rewards = torch.arange(len(rollouts), dtype=torch.float32).view(-1, min(GROUP, len(rollouts))) % 2
    advantages = group_advantages(rewards).flatten().to(device)  # (rows,)
    n_tokens = torch.full((len(rollouts),), config.response_tokens, device=device)
    all_tokens = int(n_tokens.sum())
    per_token = token_weights(n_tokens, "constant", config.response_tokens, len(rollouts), all_tokens)
    groups, lengths = [[i] for i in range(len(rollouts))], [len(rollout.ids) for rollout in rollouts]
    for part in micro_batches(groups, lengths, config.micro_batch_tokens):
        input_ids, mask, sampler_logps = to_batch([rollouts[i] for i in part], device)  # (B, T) each
        with autocast(device, torch.bfloat16):
            with timed("policy_s"):
                logps, entropy = token_logps(policy, input_ids, mask, 1.0, True, False)
            ref_logps = logps.detach()
            if reference is not None:
                with torch.no_grad(), timed("reference_s"):
                    ref_logps = token_logps(reference, input_ids, mask, 1.0)
        kl = kl_estimate(logps, ref_logps)  # (B, T)
        losses = grpo_loss(logps, sampler_logps, advantages[part], mask, 0.2, 0.2)
        losses = per_token[part, None] * (losses + 0.001 * kl)  # (B, T)
        loss = losses.sum()
        with timed("backward_s"):
            loss.backward()
        seen.loss(loss, part, losses.abs().sum(-1))
        seen.tokens(mask, gap=logps - sampler_logps, kl=kl, entropy=entropy)
        response_logps |= {i: logps.detach()[b, -config.response_tokens :] for b, i in enumerate(part)}
    with timed("optimizer_s"):
        clip_gradients(policy, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = watch.total()
    for i, logps in response_logps.items():  # the next step's ratios are near 1, as in training
        rollouts[i].logps = logps.tolist()
    return {**watch.seconds, "rest_s": seconds - sum(watch.seconds.values()), "step_s": seconds}


def measure(name: str, config: Config, device: torch.device) -> dict[str, Any]:
    """One model: its parameters, rates, seconds by phase, and shares of the rate by each count."""
    with tempfile.TemporaryDirectory() as folder:
        settings = flags(checkpoint_of(name, folder), device)
        policy, reference = load_sharded(settings, device), load_sharded(settings, device, trained=False)
    blocks, head = parameters(policy)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, eps=1e-8, weight_decay=0.0, fused=fused)
    rollouts = make_rollouts(config, policy.config.vocab_size)

    length = config.prompt_tokens + config.response_tokens
    at_once = min(config.rows, max(1, config.micro_batch_tokens // length))  # rows of a micro-batch
    shapes = at_once * length, at_once * config.response_tokens
    before = measure_rates(policy, *shapes, config.square, device)
    steps = [
        train_step(policy, reference, optimizer, rollouts, config, device)
        for _ in tqdm(range(config.steps + 1), desc=name, leave=False)
    ][1:]
    after = measure_rates(policy, *shapes, config.square, device)
    rates = {shape: max(before[shape], after[shape]) for shape in before}
    rate = max(rates.values())

    seconds = {phase: median(step[phase] for step in steps) for phase in steps[0]}
    tokens, response_tokens = config.rows * length, config.rows * config.response_tokens
    flops = step_flops(blocks, head, tokens, response_tokens)
    return {
        "model": name,
        "parameters": {"blocks": blocks, "head": head},
        "tokens": tokens,
        "response_tokens": response_tokens,
        "seconds": seconds,
        "steps": steps,
        "matmul_flops_per_s": {" x ".join(map(str, shape)): value for shape, value in rates.items()},
        "rate": rate,
        "rate_of_layers": rate_of_layers(products(policy, *shapes), rates),
        "flops": flops,
        "share_of_rate": {count: done / seconds["step_s"] / rate for count, done in flops.items()},
    }


def as_markdown(points: list[dict]) -> str:
    """Two tables: shares of the rate, and where the seconds go."""
    counts, phases = list(points[0]["share_of_rate"]), list(points[0]["seconds"])
    lines = [
        "| model | parameters | matmul rate | at the model's shapes | "
        + " | ".join(f"{count}, of the rate" for count in counts)
        + " | tokens/s |",
        "|" + "---|" * (len(counts) + 5),
    ]
    for point in points:
        cells = (
            point["model"],
            f"{sum(point['parameters'].values()) / 1e6:.0f}M",
            f"{point['rate'] / 1e9:.0f} GFLOP/s",
            f"{point['rate_of_layers'] / 1e9:.0f} GFLOP/s",
            *(f"{point['share_of_rate'][count]:.2f}" for count in counts),
            f"{point['tokens'] / point['seconds']['step_s']:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    names = [phase.removesuffix("_s") for phase in phases]
    lines += ["", f"| seconds | {' | '.join(names)} |", "|" + "---|" * (len(phases) + 1)]
    for point in points:
        cells = (point["model"], *(f"{point['seconds'][phase]:.2f}" for phase in phases))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    _, _, device = init_ranks()
    config.micro_batch_tokens = config.micro_batch_tokens or (16384 if device.type == "cuda" else 2048)
    with one_line_errors():
        if config.rows % GROUP:
            raise ValueError(f"--rows {config.rows}: takes a multiple of {GROUP}, the responses to a prompt")
        for name in config.models:
            if name not in RANDOM:
                load_config(name)  # raises if the path is no usable model
    points = [measure(name, config, device) for name in config.models]
    print(as_markdown(points))
    record = {
        "command": " ".join(sys.argv),
        "flags": asdict(config),
        **surroundings(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "points": points,
    }
    write_json(config.out, record)


if __name__ == "__main__":
    main()
