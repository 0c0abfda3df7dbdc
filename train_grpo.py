"""Train a language model by GRPO on its own responses, from on-policy to off-policy by one flag.

    torchrun train_grpo.py --sync-every 1

Each step samples G responses to each of P prompts, scores them, subtracts its group's mean from each reward
to get the advantages, and takes one optimizer step on the clipped policy-gradient loss. Every `--sync-every`
steps the trained weights are copied into the generator: 1 is on-policy, as in the paper; above 1 the
responses are stale, and `--correction` chooses how to correct for it. The reference model stays the seed
model, unless `--sync-ref-every` says otherwise.

`diff train_dpo.py train_grpo.py` shows where the two algorithms differ. The defaults train the embedded tiny
model on a laptop. The paper's settings for mathematics, on Llama-3.1-8B-Instruct (arXiv 2506.21495, Table 4),
are --lr 1e-6 --grad-clip 0.1 --kl-coef 0.001 --prompts-per-step 64 --max-new-tokens 2048; its Adam epsilon
cannot be read in our copy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from flags import Coefficient, Every, OutFolder, Positive, Share, TrainFlags, one_line_errors, parse_flags

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

import metrics
from batch import groups_to_share, micro_batches, to_batch
from data import tasks_of
from generate import decode
from life import Life, load, prepare
from model import autocast, clip_gradients, copy_weights, load_sharded, token_logps
from ranks import all_max, all_sum, pad_to_same_count
from sync import sync


@dataclass
class Config(TrainFlags):
    """GRPO's own flags. flags.TrainFlags has the shared ones, such as the dial, --sync-every."""

    run_dir: OutFolder = HfArg(default="runs/grpo", help="Where the run is written: new, empty, or --resume.")
    sync_ref_every: Every = HfArg(
        default=Every("inf"),
        help="Steps between two copies of the policy into the reference; inf keeps the seed model.",
    )
    advantage_scale: Literal["none", "std"] = HfArg(
        default="none",
        help="std: divide advantages by their group's standard deviation, as the original GRPO does.",
    )
    correction: Literal["none", "clip", "tis", "seq_tis", "seq_mis", "dppo"] = HfArg(
        default="clip",
        help="How to correct for responses that older weights sampled. none: treat them as fresh; clip: "
        "PPO's clipped ratio; tis: weigh each token by its ratio, at most --tis-cap; seq_tis: weigh each "
        "response; seq_mis: drop responses above the cap; dppo: drop tokens whose probability moved by more "
        "than --dppo-delta.",
    )
    clip_low: Share = HfArg(default=0.2, help="With clip: no gradient pushes a ratio below 1 - this.")
    clip_high: Positive = HfArg(default=0.2, help="With clip: nor above 1 + this; DAPO uses 0.28.")
    tis_cap: Positive = HfArg(
        default=2.0, help="The largest weight of a token (tis) or a response (seq_tis, seq_mis); at least 1."
    )
    dppo_delta: Share = HfArg(default=0.2, help="With dppo: how far a token's probability may move.")
    normalize: Literal["token", "sequence", "constant"] = HfArg(
        default="constant",
        help="Divide a token's loss by the tokens in the step (token: DAPO), in its response (sequence: the "
        "original GRPO), or by --max-new-tokens (constant: Dr. GRPO, no division by length).",
    )
    kl_coef: Coefficient = HfArg(default=0.001, help="Weight of the KL divergence to the reference.")
    lr: Positive = HfArg(default=2e-4, help="Learning rate, constant.")
    adam_eps: Positive = HfArg(
        default=1e-8,
        help="Adam's epsilon; gradients are small here, so a large one stalls learning.",
    )


# --- The algorithm: pure functions ---


def group_advantages(rewards: Tensor, scale: str = "none") -> Tensor:
    """How much better each response is than its group: rewards (P, G) -> advantages (P, G).

    none: the reward minus the group's mean (Liu et al. 2025, Dr. GRPO; the paper).
    std: that divided by the group's standard deviation (Shao et al. 2024, the original GRPO) plus 1e-4 (as in
    TRL). Easy and hard prompts, whose rewards hardly differ, then weigh as much as the others.
    A group whose responses all have the same reward gets zeros: there is nothing to learn from it. NaN marks
    a response that the user's own reward function dropped: it gets 0, and the group's mean leaves it out.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    dropped = rewards.isnan()
    # Subtract one of them first: exact zero for equal rewards; mean() can round.
    rewards = rewards - rewards.nanmedian(-1, keepdim=True).values
    centered = (rewards - rewards.nanmean(-1, keepdim=True)).masked_fill(dropped, 0.0)
    if scale == "none":
        return centered
    others = (~dropped).sum(-1, keepdim=True) - 1
    deviation = (centered.square().sum(-1, keepdim=True) / others.clamp(min=1)).sqrt()
    return centered / (deviation + 1e-4)


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """PPO's clipped loss per token (Schulman et al. 2017, equation 7), not normalised: (B, T).

    logps, old_logps, response_mask: (B, T), nats, under the policy and under the weights that sampled.
    advantages: (B,), one per response. With r = exp(logps - old_logps) a token's loss is
    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): where the policy has moved past the bound in the
    direction that A favours, the gradient is zero. Where logps equal old_logps, it is -A grad logps.
    """
    advantages = advantages.reshape(-1, 1)  # (B, 1)
    ratio = (logps - old_logps).exp()  # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.min(ratio * advantages, clipped * advantages) * response_mask


def tis_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, response_mask: Tensor, cap: float
) -> Tensor:
    """The policy gradient with truncated importance sampling, per token: (B, T); arguments as above.

    A token's weight min(r, cap) corrects for the policy that sampled it. The weight is detached, so the
    gradient is -min(r, cap) A grad logps (Yao et al. 2025; Espeholt et al. 2018).
    """
    weight = (logps - old_logps).exp().clamp(max=cap).detach()  # (B, T)
    return -weight * advantages.reshape(-1, 1) * logps * response_mask


def sequence_ratio(logps: Tensor, old_logps: Tensor, response_mask: Tensor) -> Tensor:
    """The importance ratio of whole responses, the product of their tokens' ratios: (B, T) each -> (B, 1).

    The ratio is detached. A token's own ratio corrects for how likely the token is, but not for how likely
    its prefix is: only the product makes an old response count as a fresh one.
    """
    return ((logps - old_logps) * response_mask).sum(-1, keepdim=True).exp().detach()


def seq_tis_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, response_mask: Tensor, cap: float
) -> Tensor:
    """tis_loss with one weight per response, min(its ratio, cap): (B, T) (Liu, Li et al. 2025, Seq-TIS)."""
    weight = sequence_ratio(logps, old_logps, response_mask).clamp(max=cap)  # (B, 1)
    return -weight * advantages.reshape(-1, 1) * logps * response_mask


def seq_mis_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, response_mask: Tensor, cap: float
) -> Tensor:
    """seq_tis_loss that drops a response whose ratio exceeds the cap: (B, T) (as above, Seq-MIS)."""
    ratio = sequence_ratio(logps, old_logps, response_mask)  # (B, 1)
    return -ratio.masked_fill(ratio > cap, 0.0) * advantages.reshape(-1, 1) * logps * response_mask


def dppo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, response_mask: Tensor, delta: float
) -> Tensor:
    """DPPO's loss per token, with its mask of binary total variation: (B, T); arguments as above.

    The gradient is -M r A grad logps with r = exp(logps - old_logps), at most 20: a rare token that has
    become likely would otherwise outweigh all others. M is 0 if the token's probability p = exp(logps) has
    moved too far, |p - old p| > delta, and A would move it further: A > 0 and r > 1, or A < 0 and r < 1.
    Otherwise M is 1 (Qi et al. 2026, arXiv 2602.04879, equations 11 to 13). So a rare token may double its
    probability, which PPO's clip forbids.
    """
    advantages = advantages.reshape(-1, 1)  # (B, 1)
    ratio = (logps - old_logps).exp().clamp(max=20).detach()  # (B, T)
    further = advantages * (ratio - 1) > 0  # A would move the token further the way it has moved
    keep = ~(further & moved(logps, old_logps, delta))
    return -(keep * ratio) * advantages * logps * response_mask


def moved(logps: Tensor, old_logps: Tensor, delta: float) -> Tensor:
    """The tokens whose probability has moved by more than delta: (B, T)."""
    return (logps.detach().exp() - old_logps.exp()).abs() > delta


def kl_estimate(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The k3 estimate of KL(policy, reference) from each token: r - 1 - log r, r = reference / policy.

    Never negative, and unbiased if the policy sampled the tokens (Schulman 2020, "Approximating KL
    divergence"). Used as a loss, as in the GRPO paper, its mean gradient is then that of KL(reference,
    policy). log r is clamped at 20 nats, a factor of 5e8, so that r does not overflow.
    """
    log_ratio = (ref_logps - logps).clamp(max=20)
    return log_ratio.exp() - 1 - log_ratio


def token_weights(lengths: Tensor, how: str, max_new_tokens: int | Tensor, rows: int, tokens: int) -> Tensor:
    """Weight each token of a response in the step's loss: lengths (B,) of responses -> weights (B,).

    token: 1 / (tokens of the step): each token counts the same, so long responses count more (Yu et al. 2025,
    DAPO, within a group; over the batch in TRL and here).
    sequence: 1 / (rows * length): each response counts the same. A token of a long response counts less, so
    long wrong responses are punished less (Shao et al. 2024, the original GRPO).
    constant: 1 / (rows * max_new_tokens): the gradient of the expected reward (Liu et al. 2025, Dr. GRPO).
    max_new_tokens is a number, or (B,) if tasks differ. rows, tokens: counts over the whole step, all ranks.
    """
    divisor = {
        "token": tokens * torch.ones_like(lengths),
        "sequence": rows * lengths,
        "constant": rows * max_new_tokens * torch.ones_like(lengths),
    }[how]
    return 1 / divisor


def choose_loss(config: Config) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The loss that --correction names, (logps, old_logps, advantages, response_mask) -> (B, T)."""
    clipped = partial(grpo_loss, clip_low=config.clip_low, clip_high=config.clip_high)
    return {
        # The ratio is 1, but still has a gradient.
        "none": lambda logps, old_logps, A, mask: clipped(logps, logps.detach(), A, mask),
        "clip": clipped,
        "tis": partial(tis_loss, cap=config.tis_cap),
        "seq_tis": partial(seq_tis_loss, cap=config.tis_cap),
        "seq_mis": partial(seq_mis_loss, cap=config.tis_cap),
        "dppo": partial(dppo_loss, delta=config.dppo_delta),
    }[config.correction]


def out_of_bounds(config: Config, logps: Tensor, old_logps: Tensor, response_mask: Tensor) -> Tensor:
    """The tokens past --correction's bound, whatever the sign of their advantage: (B, T)."""
    ratio = (logps - old_logps).exp()
    if config.correction == "clip":
        return (ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)
    if config.correction == "tis":
        return ratio > config.tis_cap
    if config.correction in ("seq_tis", "seq_mis"):  # all tokens of a response
        return (sequence_ratio(logps, old_logps, response_mask) > config.tis_cap).expand_as(ratio)
    if config.correction == "dppo":
        return moved(logps, old_logps, config.dppo_delta)
    return torch.zeros_like(ratio, dtype=torch.bool)


def warn(config: Config, tasks: list[str]) -> None:
    """Print one line where these flags change the gradient in a way that a user may not expect."""
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


def main(args: list[str] | None = None) -> None:
    # --- Set up ---
    config = parse_flags(Config, args)
    G = config.samples_per_prompt
    with one_line_errors():
        if G < 2:
            raise ValueError(f"--samples-per-prompt {G}: a group takes at least 2")
        if config.tis_cap < 1:
            raise ValueError(f"--tis-cap {config.tis_cap:g}: a cap below 1 would shrink fresh tokens, too")
        tasks = tasks_of(config.data)  # math, chat, or both
        device = prepare(config)  # joins the ranks, and checks what needs no model
        warn(config, tasks)
        tokenizer, held_out, scorer, window = load(config, tasks, device)  # the window has the generator
    generator, dtype = window.generator, getattr(torch, config.dtype)
    policy = load_sharded(config, device)
    reference = load_sharded(config, device, trained=False)
    optimizer = torch.optim.AdamW(
        policy.parameters(), config.lr, eps=config.adam_eps, weight_decay=0.0, fused=device.type == "cuda"
    )
    token_losses = choose_loss(config)
    run = Life(config, held_out, scorer, window, policy, reference, optimizer)  # new, or resumed

    for step in run.steps():
        watch, sync_gap = metrics.Stopwatch(generator.busy), None

        # --- Sync: the dial. Copy the policy into the generator; sync() raises if the copy did not arrive ---
        with watch("sync_s"):
            # inf: only at step 0, since 0 % inf is 0 and 1 % inf is 1
            if step % config.sync_every == 0 or run.drift > config.sync_when:
                gap = sync(policy, generator, step, config.prove_every)  # nats a token, on a fixed text
                sync_gap = all_max([gap])
                run.note_sync()  # on a resume before the next sync, the generator gets these weights back
            reference_is_policy = step % config.sync_ref_every == 0
            if reference_is_policy:
                copy_weights(policy, reference)

        # --- Sample: the window may sample coming steps ahead, but never past the next sync ---
        with watch("trainer_idle_s"):
            batch = window.take(step)  # [(prompt, [rollout] * G)] * P
        prompts = [prompt for prompt, group in batch for _ in group]  # P * G, one per response
        rollouts = [rollout for _, group in batch for rollout in group]  # P * G

        # --- Score ---
        with watch("score_s"):
            responses = decode(tokenizer, rollouts)  # P * G
            rewards = torch.tensor(scorer.score(prompts, responses)).view(-1, G)  # (P, G)

        # --- Compare: each response with its group ---
        advantages = group_advantages(rewards, config.advantage_scale).flatten().to(device)  # (P * G,)
        groups = groups_to_share(policy, rollouts, G)  # kept together where that saves work

        # --- Learn: one optimizer step on the weighted sum over all response tokens ---
        seen = metrics.Seen(len(rollouts))
        # The ratio compares the policy with the weights that sampled. While these are the same, it is 1 but
        # for rounding, and "none" and "clip" take exactly 1: clip must not drop a token for rounding. The
        # other corrections keep the sampler's log-probs, so that they correct for rounding, too.
        on_policy = rollouts[0].version == step and config.correction in ("none", "clip")
        with watch("train_s"):
            lengths = [len(r.response_ids) for r in rollouts]  # P * G
            limits = torch.tensor([config.max_new_tokens.of(p.task) for p in prompts], device=device)
            # Counts over all ranks, since FSDP sums their gradients.
            all_rows, all_tokens = all_sum([len(rollouts)]), int(all_sum(lengths))
            n_tokens = torch.tensor(lengths, device=device)  # (P * G,); per_token likewise
            per_token = token_weights(n_tokens, config.normalize, limits, all_rows, all_tokens)
            row_lengths = [len(rollout.ids) for rollout in rollouts]
            for part in pad_to_same_count(micro_batches(groups, row_lengths, config.micro_batch_tokens)):
                # part: indices of responses, in whole groups. An empty part is a dummy forward on padding:
                # FSDP needs the same count on every rank. Empty sums are 0; means would be NaN.
                input_ids, mask, sampler_logps = to_batch([rollouts[i] for i in part], device)  # (B, T) each
                with autocast(device, dtype):
                    logps, entropy = token_logps(  # (B, T) each, 0 where mask is 0
                        policy, input_ids, mask, config.temperature, with_entropy=True, entropy_grad=False
                    )
                    ref_logps = logps.detach()  # (B, T), right if the reference was synced at this step
                    if not reference_is_policy:
                        with torch.no_grad():
                            ref_logps = token_logps(reference, input_ids, mask, config.temperature)
                kl = kl_estimate(logps, ref_logps)  # (B, T)

                A = advantages[part]  # (B,)
                old_logps = logps.detach() if on_policy else sampler_logps  # (B, T)
                losses = token_losses(logps, old_logps, A, mask)  # (B, T)
                losses = per_token[part, None] * (losses + config.kl_coef * kl)  # (B, T)
                loss = losses.sum()
                loss.backward()

                seen.loss(loss, part, losses.abs().sum(-1))
                seen.tokens(mask, gap=logps - sampler_logps, kl=kl, entropy=entropy)
                seen.ratios(mask, logps - old_logps, out_of_bounds(config, logps, old_logps, mask))
            grad_norm = clip_gradients(policy, config.grad_clip)
            if run.note_gradient(grad_norm):
                optimizer.step()
            optimizer.zero_grad()

        # --- Record: docs/metrics.md defines every key; log() adds those over the run so far ---
        run.log(
            {
                "step": step,
                **metrics.of_staleness(step, rollouts, seen),
                "sync_gap": sync_gap,
                **metrics.of_rollouts(prompts, rollouts, rewards),
                **metrics.of_forwards(seen),
                **metrics.of_ratios(seen),
                "grad_norm": grad_norm,
                **metrics.by_task(tasks, prompts, rollouts, rewards, seen),
                **metrics.of_time(watch),
            }
        )
        run.save_rollouts(step, prompts, rollouts, responses, rewards.flatten().tolist())
        if run.after(step):  # saves, exports, evaluates if due; True at SIGTERM or Ctrl-C
            break

    run.close()


if __name__ == "__main__":
    main()
