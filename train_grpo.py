"""Train a language model by GRPO on its own responses, from on-policy to off-policy by one flag.

    torchrun train_grpo.py --sync-every 1

Each step samples G responses to each of P prompts, scores them, takes as a response's advantage its reward
less the mean of its group, and takes one optimizer step on the clipped policy-gradient loss. Every
`--sync-every` steps the trained weights are copied into the generator: 1 is on-policy, as in the paper; above
1 the responses are stale, and `--correction` says what is done about it. The reference model stays the seed
model, unless `--sync-ref-every` says otherwise.

The sibling of train_dpo.py: `diff train_dpo.py train_grpo.py` shows what the two algorithms do not share. The
defaults train the embedded tiny model on a laptop. The paper's (arXiv 2506.21495, Table 4) are, for
mathematics: --lr 1e-6 --grad-clip 0.1 --kl-coef 0.001 --prompts-per-step 64 --max-new-tokens 2048, on
Llama-3.1-8B-Instruct; its Adam epsilon cannot be read in our copy.
"""

import math
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from checkpoint import Checkpoints
from data import MixedIterator, load_held_out, load_sources
from evaluate import publish
from generate import check_engine, fit_tasks, load_generator, sample_ahead
from model import (
    TINY_MODEL,
    check_attention,
    checkpoint_activations,
    clip_gradients,
    copy_weights,
    load_policy,
    load_tokenizer,
    shard,
    sharing_pays,
    token_logps,
)
from ranks import init_ranks, largest, mean, same_number, total
from rewards import Scorer
from run import (
    Coefficient,
    Count,
    Every,
    Limits,
    Positive,
    Run,
    Share,
    Stop,
    Stopwatch,
    by_task,
    check_run_dir,
    check_same_run,
    one_line_errors,
    parse_flags,
)
from sync import sync


@dataclass
class Config:
    model: str = HfArg(default=TINY_MODEL, help="A Hugging Face checkpoint: a folder, or a name on the Hub.")
    data: list[str] = HfArg(
        default_factory=lambda: ["tiny"],
        help="Prompts: tiny, a .jsonl, .json or .parquet file, or a Hub name. Several in one run, with their "
        "shares of a step: math=tiny:2 chat=tiny:1.",
    )
    reward_model: str | None = HfArg(
        default=None, help="A checkpoint that scores chat; answers to math are verified, whatever it is."
    )
    run_dir: str = HfArg(default="runs/grpo", help="Where the run is written: new, empty, or --resume.")
    resume: bool = HfArg(default=False, help="Go on with the run in --run-dir from its newest checkpoint.")
    seed: int = HfArg(default=0, help="Seed of the prompts' order and of the samples.")
    steps: Count = HfArg(default=100, help="Optimizer steps.")
    sync_every: Every = HfArg(
        default=Every(1),
        help="The dial: steps between two copies of the policy's weights into the generator; or inf.",
    )
    sync_ref_every: Every = HfArg(
        default=Every("inf"),
        help="Steps between two copies into the reference; inf keeps the seed model, the paper's choice.",
    )
    prompts_per_step: Count = HfArg(default=32, help="P: prompts in a step, over all ranks.")
    samples_per_prompt: Count = HfArg(default=8, help="G: responses to each prompt.")
    max_new_tokens: Limits = HfArg(
        default=Limits("64"), help="A response is cut after so many tokens; by task: math=2048,chat=1024."
    )
    temperature: Positive = HfArg(default=1.0, help="Of sampling, and of every log-prob in training.")
    advantage_scale: Literal["none", "std"] = HfArg(
        default="none",
        help="std: divide advantages by their group's standard deviation (the original GRPO). Default: no.",
    )
    correction: Literal["none", "clip", "tis"] = HfArg(
        default="clip",
        help="For responses of older weights: none takes them for fresh; clip is PPO's clipped ratio; tis "
        "weighs tokens by the ratio, truncated at --tis-cap.",
    )
    clip_low: Share = HfArg(default=0.2, help="With clip: no gradient that takes a ratio below 1 - this.")
    clip_high: Positive = HfArg(default=0.2, help="With clip: nor above 1 + this; DAPO uses 0.28.")
    tis_cap: Positive = HfArg(default=2.0, help="With tis: the largest weight of a token, at least 1.")
    normalize: Literal["token", "sequence", "constant"] = HfArg(
        default="constant",
        help="Divide a token's loss by the tokens in the step (token: DAPO), in its response (sequence: the "
        "original GRPO), or by --max-new-tokens (constant: Dr. GRPO, no division by length).",
    )
    kl_coef: Coefficient = HfArg(default=0.001, help="Times the KL divergence to the reference.")
    dtype: Literal["float32", "bfloat16"] | None = HfArg(
        default=None,
        help="Of the forwards, here and in the generator; master weights are float32 always. "
        "Default: bfloat16 on a GPU, float32 on a CPU.",
    )
    lr: Positive = HfArg(default=2e-4, help="Learning rate, constant.")
    adam_eps: Positive = HfArg(
        default=1e-8,
        help="Adam's epsilon; gradients are small here, so a large one stalls learning.",
    )
    grad_clip: Positive = HfArg(default=1.0, help="Largest norm of the gradient.")
    micro_batch_tokens: Count | None = HfArg(
        default=None,
        help="Tokens in one forward and backward, padding included. Default: 16384 on a GPU, 2048 on a CPU.",
    )
    activation_checkpointing: bool = HfArg(
        default=False, help="Compute activations again in backward: less memory, a quarter more arithmetic."
    )
    attention: Literal["sdpa", "flash_attention_2"] = HfArg(
        default="sdpa",
        help="flash_attention_2, on GPUs in bfloat16 where flash-attn is installed, computes no padding.",
    )
    engine: Literal["vllm", "transformers"] = HfArg(
        default="vllm", help="transformers is slow, and for where vLLM does not install."
    )
    engine_memory: Share = HfArg(default=0.4, help="Share of the trainer's GPU that the engine may take.")
    engine_sleep: bool = HfArg(
        default=False, help="Leave that memory to the trainer while nothing is sampled; waking takes time."
    )
    generator_devices: list[str] = HfArg(
        default_factory=list,
        help="Generate on these GPUs of this machine instead, one vLLM server each: 6 7; or cpu.",
    )
    generator_url: list[str] = HfArg(
        default_factory=list, help="Generate on vLLM servers that run already: python serve.py starts one."
    )
    ahead: Count = HfArg(default=10, help="Sample up to so many steps ahead, never past the next sync.")
    save_every: Every = HfArg(
        default=Every("inf"),
        help="Every so many steps, write a checkpoint to resume from, and an export to use; an export at the "
        "end, too.",
    )
    keep: Count = HfArg(
        default=2, help="Checkpoints to keep, the newest. Each is three to five times the float32 weights."
    )
    eval_every: Every = HfArg(
        default=Every("inf"),
        help="Every so many steps, and at the end, export a checkpoint and measure it on held-out prompts; "
        "best/ names the best one.",
    )


# --- The algorithm: pure functions ---


def group_advantages(rewards, scale="none"):
    """How much better each response is than its group: rewards (P, G) -> advantages (P, G).

    none: the reward less the group's mean (Liu et al. 2025, Dr. GRPO; the paper).
    std: that over the group's standard deviation (Shao et al. 2024, the original GRPO) plus 1e-4 (as in TRL).
    Easy and hard prompts, whose rewards hardly differ, then weigh as much as the others.
    A group whose responses all have the same reward gets zeros: there is nothing to learn from it.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    rewards = rewards - rewards[..., :1]  # equal rewards become 0, which their rounded mean may miss
    centered = rewards - rewards.mean(-1, keepdim=True)
    if scale == "none":
        return centered
    return centered / (rewards.std(-1, keepdim=True) + 1e-4)


def grpo_loss(logps, old_logps, advantages, response_mask, clip_low, clip_high):
    """PPO's clipped loss of each token (Schulman et al. 2017, equation 7), without any normaliser: (B, T).

    logps, old_logps, response_mask: (B, T), nats, under the policy and under the weights that sampled.
    advantages: (B,), one a response. With r = exp(logps - old_logps) a token's loss is
    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): where the policy has moved past the bound in the
    direction that A asks for, the gradient is zero. Where logps equal old_logps, it is -A grad logps.
    """
    advantages = advantages.reshape(-1, 1)  # (B, 1)
    ratio = (logps - old_logps).exp()  # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.min(ratio * advantages, clipped * advantages) * response_mask


def tis_loss(logps, old_logps, advantages, response_mask, cap):
    """The policy gradient under truncated importance sampling, a loss a token: (B, T); arguments as above.

    The weight min(r, cap) of a token corrects for the policy that sampled it. It is a number, not a function
    of the policy: the gradient is -min(r, cap) A grad logps (Yao et al. 2025; Espeholt et al. 2018).
    """
    weight = (logps - old_logps).exp().clamp(max=cap).detach()  # (B, T)
    return -weight * advantages.reshape(-1, 1) * logps * response_mask


def kl_estimate(logps, ref_logps):
    """The k3 estimate of KL(policy, reference) from each token: r - 1 - log r, r = reference / policy.

    Never negative, and unbiased where the policy sampled the tokens (Schulman 2020, "Approximating KL
    divergence"). As a loss, as in the GRPO paper, its mean gradient there is that of KL(reference, policy).
    Beyond 20 nats, a factor of 5e8, r stays as it is: it would overflow.
    """
    log_ratio = (ref_logps - logps).clamp(max=20)
    return log_ratio.exp() - 1 - log_ratio


def token_weights(lengths, how, max_new_tokens, rows, tokens):
    """What each token of a response weighs in the loss of a step: lengths (B,) of responses -> (B,).

    token: 1 / (tokens of the step): each token counts the same, long responses more (Yu et al. 2025, DAPO,
    within a group; over the batch in TRL and here).
    sequence: 1 / (rows * length): each response counts the same, so a token of a long one less, and long
    wrong ones are punished less (Shao et al. 2024, the original GRPO).
    constant: 1 / (rows * max_new_tokens): the gradient of the expected reward (Liu et al. 2025, Dr. GRPO).
    max_new_tokens is a number, or (B,) where tasks differ. rows, tokens: of the whole step, over all ranks.
    """
    divisor = {
        "token": tokens * torch.ones_like(lengths),
        "sequence": rows * lengths,
        "constant": rows * max_new_tokens * torch.ones_like(lengths),
    }[how]
    return 1 / divisor


# --- The batch ---


def to_batch(rollouts, device):
    """Rollouts as right-padded tensors: input_ids (B, T), response_mask (B, T), old_logps (B, T).

    The mask is made from lengths, so a response's own stop token is trained even where padding has the same
    id. No rollouts make a row of padding alone, whose mask is 0.
    """
    rows = max(1, len(rollouts))
    longest = max((len(r.prompt_ids) + len(r.response_ids) for r in rollouts), default=2)
    input_ids = torch.zeros(rows, longest, dtype=torch.long)
    response_mask = torch.zeros(rows, longest)
    old_logps = torch.zeros(rows, longest)
    for row, r in enumerate(rollouts):
        start, end = len(r.prompt_ids), len(r.prompt_ids) + len(r.response_ids)
        input_ids[row, :end] = torch.tensor(r.prompt_ids + r.response_ids)
        response_mask[row, start:end] = 1
        old_logps[row, start:end] = torch.tensor(r.logps)
    return input_ids.to(device), response_mask.to(device), old_logps.to(device)


def groups_to_share(policy, rollouts, G):
    """The responses to a prompt, as indices into rollouts, together if that saves forwards of the prompt.

    Else each is a group of its own, which leaves less to pad.
    """
    groups = []
    for first in range(0, len(rollouts), G):
        group = list(range(first, first + G))
        prompt = len(rollouts[first].prompt_ids)
        responses = sum(len(rollouts[i].response_ids) for i in group)
        shared = prompt + responses
        pays = sharing_pays(policy, (G, prompt + responses / G), shared, shared)
        groups += [group] if pays else [[i] for i in group]
    return groups


def micro_batches(groups, rollouts, max_tokens):
    """Split groups of indices into rollouts into batches of at most max_tokens tokens, padding included.

    Yields lists of indices. A group stays whole, and alone if it is over the limit. Groups of like length
    stand together, so that little is padded.
    """

    def longest(group):
        return max(len(rollouts[i].prompt_ids) + len(rollouts[i].response_ids) for i in group)

    batch = []
    for group in sorted(groups, key=longest):
        if batch and (len(batch) + len(group)) * longest(group) > max_tokens:
            yield batch
            batch = []
        batch = batch + group
    if batch:
        yield batch


def main(args=None):
    # --- Set up ---
    config = parse_flags(Config, args)
    with one_line_errors():
        if config.tis_cap < 1:
            raise ValueError(f"--tis-cap {config.tis_cap:g}: a cap below 1 would shrink fresh tokens, too")
        if config.samples_per_prompt < 2:
            raise ValueError("--samples-per-prompt 1: a group takes at least 2")
        rank, world, device = init_ranks()
        if rank == 0:
            check_run_dir(config)
        config.dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        config.micro_batch_tokens = config.micro_batch_tokens or (16384 if device.type == "cuda" else 2048)
        elsewhere = config.generator_devices, config.generator_url
        check_engine(config.engine, config.engine_sleep, *elsewhere)
        check_attention(config.attention, config.dtype)
        tokenizer = load_tokenizer(config.model)
        sources = load_sources(config.data)  # [(prompts of one task, weight)]
        tasks = sorted({prompts[0].task for prompts, _ in sources})
        held_out = load_held_out(config.data, sources) if config.eval_every < math.inf else {}
        every = [prompts for prompts, _ in sources] + list(held_out.values())
        max_model_len = fit_tasks(config.model, tokenizer, every, config.max_new_tokens)
        if rank == 0:
            check_same_run(config)
        scorer = Scorer(tasks, config.reward_model, device)
        sources = [(scorer.usable(prompts), weight) for prompts, weight in sources]
        batches = MixedIterator(sources, config.prompts_per_step, config.seed, rank, world)
    if len(tasks) > 1 and config.advantage_scale == "none":
        print(
            "train_grpo: --advantage-scale none with two tasks: larger rewards make larger advantages; "
            "watch math_loss_share and chat_loss_share, or use std"
        )
    if config.correction == "none" and config.sync_every > 1:
        print(
            f"train_grpo: --correction none with --sync-every {config.sync_every:g}: responses of older "
            "weights are learned from as if the policy had just sampled them; the gradient is biased"
        )
    dtype = getattr(torch, config.dtype)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    on_device = config.engine_memory, config.engine_sleep
    with one_line_errors():
        generator = load_generator(
            config.engine, config.model, dtype, device, max_model_len, *on_device, *elsewhere
        )
    policy = load_policy(config.model, attention=config.attention)
    if config.activation_checkpointing:
        checkpoint_activations(policy)
    policy = shard(policy, device, dtype)
    # Read again, not copied: several ranks hold the policy in parts by now, so never two whole models.
    reference = load_policy(config.model, attention=config.attention).requires_grad_(False)
    reference = shard(reference, device, dtype)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, eps=config.adam_eps, weight_decay=0.0)
    low, high = {  # the bounds of a token's ratio; what lies outside is counted as bound_frac
        "none": (0, math.inf),
        "clip": (1 - config.clip_low, 1 + config.clip_high),
        "tis": (0, config.tis_cap),
    }[config.correction]
    # What a resumed run goes on with, besides weights. sampled: the coming steps' batches, never past the
    # next sync. counts: over the steps so far.
    start, sampled, counts = 0, deque(), {"tokens": 0, "seconds": 0.0, "skipped": 0, "skipped_in_a_row": 0}
    checkpoints = Checkpoints(config, policy, optimizer, reference, generator, scorer)
    with one_line_errors():
        if config.resume:
            start, sampled, counts = checkpoints.load(batches) or (start, sampled, counts)
        run = Run(config, rank, start)
    stop = Stop()  # at SIGTERM or Ctrl-C, after the step
    if start:  # for which a run that was cut may have had no time
        publish(run, policy, tokenizer, start, held_out, config)

    progress = tqdm(range(start, config.steps), desc="train_grpo", initial=start, total=config.steps)
    for step in progress:
        watch, generated_before = Stopwatch(), generator.busy.seconds()

        # --- Sync: the dial ---
        sync_gap = None
        with watch("sync_s"):
            if step % config.sync_every == 0:  # offline syncs once: 0 % inf is 0, and 1 % inf is 1
                sync_gap = largest([sync(policy, generator, step)])
                checkpoints.note_sync()
            if step % config.sync_ref_every == 0:
                copy_weights(policy, reference)

        # --- Sample: until the next sync the generator is frozen, so its steps can be sampled ahead ---
        with watch("trainer_idle_s"):
            if not sampled or generator.elsewhere:
                until_sync = config.sync_every - step % config.sync_every
                end = step + int(min(config.ahead, until_sync, config.steps - step))
                sampled.extend(sample_ahead(generator, batches, range(step + len(sampled), end), config))
            batch = sampled.popleft().result()  # [(prompt, [rollout] * G)] * P
        rollouts = [rollout for _, group in batch for rollout in group]  # P * G
        (staleness,) = {step - rollout.version for rollout in rollouts}
        assert staleness < config.sync_every, f"step {step}: responses of weights {staleness} steps old"

        # --- Score ---
        with watch("score_s"):
            asked = [prompt for prompt, group in batch for _ in group]  # P * G
            responses = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
            scores = scorer.score(asked, responses)  # P * G
            rewards = torch.tensor(scores).view(len(batch), config.samples_per_prompt)  # (P, G)

        # --- Compare: each response with its group ---
        advantages = group_advantages(rewards, config.advantage_scale).flatten().to(device)  # (P * G,)
        lengths = [len(r.response_ids) for r in rollouts]  # P * G
        groups = groups_to_share(policy, rollouts, config.samples_per_prompt)
        limits = torch.tensor([config.max_new_tokens.of(prompt.task) for prompt in asked], device=device)

        # --- Learn: one optimizer step on the weighted sum over all response tokens ---
        seen = defaultdict(list)  # what the forwards showed, one number a token
        loss_shares = torch.zeros(len(rollouts))  # (P * G,), each response's, absolute
        with watch("train_s"):
            all_rows, tokens = total([len(rollouts)]), int(total(lengths))
            here = torch.tensor(lengths, device=device)  # (P * G,)
            weights = token_weights(here, config.normalize, limits, all_rows, tokens)  # (P * G,)
            # Where rows is [], a forward is made for the other ranks' sake: what is taken by rows is then
            # empty, and adds 0 to sums (a mean would be NaN).
            for rows in same_number(micro_batches(groups, rollouts, config.micro_batch_tokens)):
                input_ids, mask, old_logps = to_batch([rollouts[i] for i in rows], device)  # (B, T) each
                with autocast:
                    logps, entropy = token_logps(policy, input_ids, mask, config.temperature, True, False)
                    with torch.no_grad():
                        ref_logps = token_logps(reference, input_ids, mask, config.temperature)
                kl = kl_estimate(logps, ref_logps)  # (B, T), as the three before it; 0 on the prompt
                A = advantages[rows]  # (B,)
                if config.correction == "none":  # a ratio of 1, with the gradient of one
                    losses = grpo_loss(logps, logps.detach(), A, mask, config.clip_low, config.clip_high)
                elif config.correction == "clip":
                    losses = grpo_loss(logps, old_logps, A, mask, config.clip_low, config.clip_high)
                else:
                    losses = tis_loss(logps, old_logps, A, mask, config.tis_cap)
                losses = weights[rows, None] * (losses + config.kl_coef * kl)  # (B, T)
                loss = losses.sum()
                loss.backward()

                log_ratio = (logps.detach() - old_logps)[mask.bool()]  # one a response token
                seen["kl_ref"] += kl.detach()[mask.bool()].tolist()
                seen["logp_gap"] += log_ratio.abs().tolist()
                seen["ratio"] += log_ratio.exp().tolist()
                seen["policy_entropy"] += entropy.detach()[mask.bool()].tolist()
                seen["loss"].append(loss.item())
                loss_shares[rows] = losses.detach().abs().sum(-1).cpu()
            if all_rows:
                grad_norm = clip_gradients(policy, config.grad_clip)
                finite = math.isfinite(grad_norm)  # on all ranks, or on none
                if finite:
                    optimizer.step()
                optimizer.zero_grad()
                counts["skipped"] += not finite
                counts["skipped_in_a_row"] = 0 if finite else counts["skipped_in_a_row"] + 1

        # --- Record: README defines every key; None where a step has nothing to measure ---
        counts["tokens"], counts["seconds"] = counts["tokens"] + tokens, counts["seconds"] + watch.total()
        generated_s = generator.busy.seconds() - generated_before
        has_pair = [min(group) < max(group) for group in rewards.tolist() for _ in group]  # P * G
        verified = [i for i, prompt in enumerate(asked) if prompt.task == "math"]
        metrics = {
            "step": step,
            "loss": total(seen["loss"]) if all_rows else None,
            "reward": mean(scores),
            "staleness": staleness,
            "logp_gap": mean(seen["logp_gap"]) if staleness == 0 else None,
            "logp_gap_max": largest(seen["logp_gap"]) if staleness == 0 else None,
            "sync_gap": sync_gap,
            "pair_frac": mean(has_pair),
            "length": mean(lengths),
            "right_length": mean(lengths[i] for i in verified if scores[i] == 1),
            "wrong_length": mean(lengths[i] for i in verified if scores[i] == 0),
            "truncated_frac": mean(r.finish_reason == "length" for r in rollouts),
            "entropy": -mean(logp for r in rollouts for logp in r.logps),
            "policy_entropy": mean(seen["policy_entropy"]),
            "kl_ref": mean(seen["kl_ref"]),
            "ratio": mean(seen["ratio"]),
            "ratio_max": largest(seen["ratio"]),
            "bound_frac": mean(not low <= ratio <= high for ratio in seen["ratio"]),
            "grad_norm": grad_norm if all_rows else None,
            "skipped_steps": counts["skipped"],
            **scorer.counts(),  # parse_failures, grader_restarts, reward_truncated
            "graded_per_s": scorer.graded_per_s(),
            "tokens": tokens,
            "tokens_per_s": counts["tokens"] / counts["seconds"],
            **by_task(tasks, asked, scores, has_pair, lengths, loss_shares.tolist()),
            **watch.seconds,  # sync_s, trainer_idle_s, score_s, train_s
            "generate_s": generated_s,
            "generator_idle_s": watch.total() - generated_s,
            "step_s": watch.total(),
        }
        run.log(metrics)
        run.save_rollouts(step, asked, rollouts, responses, scores)
        progress.set_postfix(reward=f"{metrics['reward']:.2f}", staleness=staleness, loss=metrics["loss"])

        if counts["skipped_in_a_row"] >= 3:
            raise FloatingPointError(
                f"step {step}: the third gradient in a row that is not finite; {checkpoints.remedy()}"
            )
        due = (step + 1) % config.save_every == 0
        if due:
            checkpoints.save(step + 1, batches, sampled, counts)
        if not stop.asked():  # else the resumed run does it
            publish(run, policy, tokenizer, step + 1, held_out, config)
        if stop.asked():
            if not due:
                checkpoints.save(step + 1, batches, sampled, counts)
            print(f"train_grpo: stopped after step {step}; the same command with --resume goes on")
            break

    stop.close()
    run.close()
    scorer.close()
    generator.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
