"""Train a language model by DPO on its own responses, from offline to online by one flag.

    torchrun train_dpo.py --sync-every 10

Each step samples G responses to each of P prompts, scores them, pairs a right response with a wrong one (in
chat the best with the worst), and takes one optimizer step on the DPO loss. Every `--sync-every` steps the
trained weights are copied into the generator: 1 is online, 10 or 100 semi-online, inf offline. As in the
paper, the reference model is synced as often on mathematics and stays the seed model in chat, unless
`--sync-ref-every` says otherwise.

The defaults train the embedded tiny model on a laptop. The paper's settings for mathematics, on
Llama-3.1-8B-Instruct (arXiv 2506.21495, Table 4), are --lr 1e-6 --adam-eps 1e-4 --grad-clip 0.1
--prompts-per-step 64 --max-new-tokens 2048.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Literal

from flags import Coefficient, Every, OutFolder, Positive, TrainFlags, one_line_errors, parse_flags

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.hf_argparser import HfArg

import metrics
from batch import micro_batches, to_batch
from data import Prompt, tasks_of
from generate import decode
from life import Life, load, prepare
from model import autocast, clip_gradients, copy_weights, load_sharded, token_logps
from ranks import all_max, all_sum, pad_to_same_count
from sync import sync
from train_grpo import group_advantages, grpo_loss, kl_estimate


@dataclass
class Config(TrainFlags):
    """DPO's own flags. flags.TrainFlags has the shared ones, such as the dial, --sync-every."""

    run_dir: OutFolder = HfArg(default="runs/dpo", help="Where the run is written: new, empty, or --resume.")
    sync_ref_every: Every | None = HfArg(
        default=None,
        help="Steps between two copies of the policy into the reference; inf keeps the seed model. Default, "
        "as in the paper: the same as --sync-every; inf where there is chat.",
    )
    pairing: Literal["random", "bestworst", "all"] | None = HfArg(
        default=None,
        help="How math responses make pairs. random: draw a right and a wrong one; bestworst: take the "
        "highest and the lowest reward; all: pair every right one with every wrong one (GroupDPO). "
        "Default: random; bestworst with --reward and in chat.",
    )
    beta: Positive = HfArg(
        default=0.1,
        help="DPO's beta: how much a nat of log-prob, relative to the reference, weighs.",
    )
    length_normalize: bool = HfArg(
        default=False,
        help="Take the mean of a response's log-probs in the DPO loss, not their sum; needs a larger --beta.",
    )
    nll_coef: Coefficient = HfArg(
        default=0.0,
        help="Weight of the chosen responses' negative log-likelihood per token; the paper tries 1.",
    )
    entropy_coef: Coefficient = HfArg(
        default=0.0, help="Weight of a bonus, the next token's mean entropy; the paper tries 1e-4 to 5e-4."
    )
    grpo_coef: Coefficient = HfArg(
        default=0.0,
        help="Weight of GRPO's loss over all responses to the paired prompts; paper: 0.01, 0.001.",
    )
    lr: Positive = HfArg(default=5e-5, help="Learning rate, constant.")
    adam_eps: Positive = HfArg(
        default=1e-8,
        help="Adam's epsilon; a large one (1e-4) is the paper's remedy for instability.",
    )


# --- The algorithm: pure functions ---


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """DPO's loss per pair (paper section 3; Rafailov et al. 2023, equation 7). All tensors (B,).

    Arguments are sums of log-probs (nats) over a response's tokens, under the policy and under the reference;
    means with --length-normalize.
    A policy that equals its reference has a margin of 0 and a loss of log 2 = 0.693.
    """
    chosen_gain = chosen_logps - ref_chosen_logps
    rejected_gain = rejected_logps - ref_rejected_logps
    return -F.logsigmoid(beta * (chosen_gain - rejected_gain))


def pick_pairs(
    rewards: Tensor | list[list[float]], how: str = "random", rng: random.Random | None = None
) -> list[tuple[int, int, int]]:
    """The pairs to learn from: rewards (P, G) -> [(prompt, chosen, rejected), ...], indices into rewards.

    random: one right response (reward 1) and one wrong (reward 0), drawn at random (the paper, verifiable
    tasks).
    bestworst: the highest reward against the lowest (the paper, reward models).
    all: every right response with every wrong one (GroupDPO).
    A prompt whose responses all have the same reward gives no pair. NaN marks a response that the user's own
    reward function dropped; it is in no pair.

    >>> pick_pairs([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]], how="all")
    [(0, 1, 0), (0, 1, 2)]
    """
    rng, pairs = rng or random.Random(), []
    for prompt, group in enumerate(torch.as_tensor(rewards).tolist()):
        scored = [i for i, reward in enumerate(group) if not math.isnan(reward)]
        if len({group[i] for i in scored}) < 2:
            continue
        if how == "bestworst":
            pairs.append((prompt, max(scored, key=group.__getitem__), min(scored, key=group.__getitem__)))
            continue
        if not {group[i] for i in scored} <= {0.0, 1.0}:
            raise ValueError(f"--pairing {how} needs rewards of 0 and 1; use bestworst for a scalar reward")
        right = [i for i, reward in enumerate(group) if reward == 1.0]
        wrong = [i for i, reward in enumerate(group) if reward == 0.0]
        candidates = list(product(right, wrong))
        pairs += [(prompt, *pair) for pair in (candidates if how == "all" else [rng.choice(candidates)])]
    return pairs


def pair_up(prompts: list[Prompt], rewards: Tensor, how: str, seed: str) -> list[tuple[int, int, int]]:
    """A step's pairs: P prompts, rewards (P, G) -> [(prompt, chosen, rejected), ...].

    chosen and rejected are indices into the step's P * G responses; prompt p has p * G to p * G + G - 1.
    In chat, `how` is always bestworst. The draw depends on the seed and the prompt, not on the process.
    """
    G, pairs = rewards.shape[1], []
    for p, prompt in enumerate(prompts):
        rng = random.Random(f"{seed}/{prompt.id}")
        picked = pick_pairs(rewards[p : p + 1], "bestworst" if prompt.task == "chat" else how, rng)
        pairs += [(p, p * G + chosen, p * G + rejected) for _, chosen, rejected in picked]
    return pairs


def responses_of(pairs: list[tuple[int, int, int]], G: int, whole_groups: bool) -> list[list[int]]:
    """The responses that the loss needs, in one group per prompt that has a pair.

    A group holds the responses in the prompt's pairs; with whole_groups, for GRPO's term, all G responses.
    """
    needed = {}  # prompt: its responses
    for p, chosen, rejected in pairs:
        needed.setdefault(p, set()).update(range(p * G, p * G + G) if whole_groups else (chosen, rejected))
    return [sorted(group) for group in needed.values()]


def locate_pairs(
    pairs: list[tuple[int, int, int]], part: list[int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Locate pairs in a micro-batch: rows of the chosen, rows of the rejected, and weights, all (N,).

    pairs: the step's [(prompt, chosen, rejected), ...], indices of responses; part: the response in each row
    of the micro-batch. A pair weighs 1 / (pairs of its prompt), so that every prompt counts the same. A
    response has one row even if it is in several pairs: GroupDPO runs the model once per response.
    """
    row_of = {index: row for row, index in enumerate(part)}
    pairs_of = Counter(p for p, _, _ in pairs)
    located = [(row_of[c], row_of[r], 1 / pairs_of[p]) for p, c, r in pairs if c in row_of]
    chosen, rejected, weights = (torch.tensor([pair[i] for pair in located], device=device) for i in range(3))
    return chosen.long(), rejected.long(), weights  # long(), because an empty tensor is float


def main(args: list[str] | None = None) -> None:
    # --- Set up ---
    config = parse_flags(Config, args)
    G = config.samples_per_prompt
    with one_line_errors():
        if G < 2:
            raise ValueError(f"--samples-per-prompt {G}: a pair takes at least 2")
        tasks = tasks_of(config.data)  # math, chat, or both
        if config.pairing is None:
            config.pairing = "bestworst" if config.reward or tasks == ["chat"] else "random"
        if tasks == ["chat"] and config.pairing != "bestworst":
            raise ValueError(f"--pairing {config.pairing}: is for math; chat pairs the best with the worst")
        if config.sync_ref_every is None:  # the paper's choice
            config.sync_ref_every = config.sync_every if tasks == ["math"] else Every("inf")
        device = prepare(config)  # joins the ranks, and checks what needs no model
        tokenizer, held_out, scorer, window = load(config, tasks, device)  # the window has the generator
    generator, dtype = window.generator, getattr(torch, config.dtype)
    policy = load_sharded(config, device)
    reference = load_sharded(config, device, trained=False)
    optimizer = torch.optim.AdamW(
        policy.parameters(), config.lr, eps=config.adam_eps, weight_decay=0.0, fused=device.type == "cuda"
    )
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
                copy_weights(policy, reference)  # DPO's loss then reads log 2, but its gradient is not zero

        # --- Sample: the window may sample coming steps ahead, but never past the next sync ---
        with watch("trainer_idle_s"):
            batch = window.take(step)  # [(prompt, [rollout] * G)] * P
        prompts = [prompt for prompt, group in batch for _ in group]  # P * G, one per response
        rollouts = [rollout for _, group in batch for rollout in group]  # P * G

        # --- Score ---
        with watch("score_s"):
            responses = decode(tokenizer, rollouts)  # P * G
            rewards = torch.tensor(scorer.score(prompts, responses)).view(-1, G)  # (P, G)

        # --- Pair: indices of responses; prompt p has p * G to p * G + G - 1 ---
        with one_line_errors():  # --pairing random and all need rewards of 0 and 1
            pairs = pair_up(prompts[::G], rewards, config.pairing, f"pairs/{config.seed}/{step}")
        groups = responses_of(pairs, G, whole_groups=config.grpo_coef > 0)  # the responses to train on
        advantages = group_advantages(rewards).flatten().to(device)  # (P * G,)

        # --- Learn: one optimizer step, on the mean loss over the prompts that have a pair ---
        seen = metrics.Seen(len(rollouts))
        on_policy = rollouts[0].version == step  # then GRPO's ratio is exactly 1
        with watch("train_s"):
            # Counts over all ranks, since FSDP sums their gradients. Without any pair: no forward, no step.
            all_groups, all_rows = all_sum([len(groups)]), all_sum(len(group) for group in groups)
            all_tokens = all_sum(len(rollouts[i].response_ids) for group in groups for i in group)
            row_lengths = [len(rollout.ids) for rollout in rollouts]
            for part in pad_to_same_count(micro_batches(groups, row_lengths, config.micro_batch_tokens)):
                # part: indices of responses, in whole groups. An empty part is a dummy forward on padding:
                # FSDP needs the same count on every rank. Empty sums are 0; means would be NaN.
                input_ids, mask, sampler_logps = to_batch([rollouts[i] for i in part], device)  # (B, T) each
                chosen, rejected, pair_weights = locate_pairs(pairs, part, device)  # rows: (N,) each
                n_tokens = mask.sum(-1).clamp(min=1)  # (B,)
                with autocast(device, dtype):
                    logps, entropy = token_logps(  # (B, T) each, 0 where mask is 0
                        policy, input_ids, mask, config.temperature, with_entropy=True,
                        entropy_grad=config.entropy_coef > 0,
                    )  # fmt: skip
                    ref_logps = logps.detach()  # (B, T), right if the reference was synced at this step
                    if not reference_is_policy:
                        with torch.no_grad():
                            ref_logps = token_logps(reference, input_ids, mask, config.temperature)
                scale = 1 / n_tokens if config.length_normalize else torch.ones_like(n_tokens)  # (B,)
                ours, refs = logps.sum(-1) * scale, ref_logps.sum(-1) * scale  # (B,), (B,)

                # dpo and nll: (N,), one per pair; grpo: (B, T), one per token
                dpo = dpo_loss(ours[chosen], ours[rejected], refs[chosen], refs[rejected], config.beta)
                nll = -(logps.sum(-1) / n_tokens)[chosen]
                old_logps = logps.detach() if on_policy else sampler_logps  # (B, T)
                grpo = grpo_loss(logps, old_logps, advantages[part], mask, clip_low=0.2, clip_high=0.2)
                pair_losses = pair_weights * (dpo + config.nll_coef * nll)  # (N,)
                loss = (
                    pair_losses.sum() / all_groups
                    - config.entropy_coef * entropy.sum() / all_tokens
                    + config.grpo_coef * grpo.sum() / all_rows
                )
                loss.backward()

                gains = ours - refs  # (B,)
                seen.loss(loss, [part[row] for row in chosen.tolist()], pair_losses)
                kl = kl_estimate(logps.detach(), ref_logps)  # (B, T)
                seen.tokens(mask, gap=logps - sampler_logps, kl=kl, entropy=entropy)
                seen.keep(margin=gains[chosen] - gains[rejected])
                seen.keep(chosen_logp=logps.sum(-1)[chosen], rejected_logp=logps.sum(-1)[rejected])
            grad_norm = clip_gradients(policy, config.grad_clip) if all_groups else None
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
                **metrics.of_pairs(pairs, rollouts, seen),
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
