"""A step's metrics: one function for each kind, and the glossary of all of them.

    python metrics.py      prints the glossary as the table in docs/metrics.md

Every function returns {key: number}, always with the same keys, and None where a step has nothing to measure.
Counts and means are over all ranks, so all ranks call these functions, in the same order. Seconds are each
rank's own; rank 0's are written. P: prompts per step; G: samples per prompt. A list with one entry per
response covers this rank's P * G.
"""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ranks import all_max, all_mean, all_sum
from rewards import Scorer

GLOSSARY = {  # one or more keys: their meaning
    "step": (
        "from 0; one optimizer step each. In DPO a step without any pair leaves the weights alone; in GRPO "
        "a step whose groups all agree has advantages of 0"
    ),
    "loss": (
        "what the step minimises, all terms; with DPO alone log 2 where policy and reference are equal; "
        "with GRPO near 0 (with importance weights: the mean of -w A log p)"
    ),
    "reward": "mean over the P x G sampled responses; dropped ones do not count",
    "true_reward": (
        "after `tiny/chat.py --truth runs/NAME` alone: the true reward of the responses to chat that "
        "`rollouts/` keeps"
    ),
    "staleness": "`step` minus the step whose weights sampled the responses",
    "drift": (
        "mean \\|policy - sampler\\| log-prob of the response tokens learned from, in nats; at staleness 0 "
        "only rounding. After a step where it passes `--sync-when`, the weights are synced"
    ),
    "logp_gap": (
        "mean \\|trainer - generator\\| log-prob of the response tokens learned from; only at staleness 0, "
        "where both hold the same weights"
    ),
    "logp_gap_p99, logp_gap_max": (
        "the gap that 99 % of the tokens do not exceed, on the worst rank, and the largest, likewise"
    ),
    "logp_gap_clip": (
        "share of the tokens whose gap alone is a ratio outside 1 +- 0.2, likewise: what rounding would make "
        "PPO's clip drop"
    ),
    "sync_gap": "the mean gap of the canary, at steps that sync",
    "pair_frac": (
        "share of prompts whose responses do not all get the same reward, so that there is something to learn"
    ),
    "length": "mean response length",
    "right_length, wrong_length": "mean length of responses to mathematics with reward 1 and with reward 0",
    "chosen_length, rejected_length": "DPO: mean length over the pairs",
    "truncated_frac": "share of responses cut at `--max-new-tokens`",
    "entropy": (
        "minus the mean log-prob of all sampled tokens: an unbiased estimate of the generator's next-token "
        "entropy. Offline it cannot fall: the generator is the seed model"
    ),
    "policy_entropy": (
        "next-token entropy of the policy, over the vocabulary, at the response tokens learned from"
    ),
    "kl_ref": (
        "mean over the response tokens learned from of the k3 estimate `exp(d) - d - 1`, `d = log ref - log "
        "policy`, at most 20. It estimates the KL divergence only where the policy sampled the tokens: "
        "offline it explodes on rejected ones"
    ),
    "margin": (
        "DPO: mean over pairs of the policy's gain over the reference, chosen minus rejected; per token "
        "with `--length-normalize`"
    ),
    "chosen_logp, rejected_logp": "DPO: mean over pairs of the log-prob of a whole response under the policy",
    "ratio": (
        "GRPO: mean importance ratio of the tokens: the policy over the weights that sampled; on policy 1, "
        "but for rounding, which `none` and `clip` leave out"
    ),
    "ratio_max": "GRPO: the largest ratio of a token",
    "bound_frac": (
        "GRPO: share of tokens out of `--correction`'s bounds: those of the clip, above the cap, in a "
        "response above it, or moved by more than `--dppo-delta`"
    ),
    "ess": (
        "GRPO: effective sample size as a share of the responses, (sum w)^2 / (n sum w^2), w the ratio of a "
        "whole response: 1 on policy, but for rounding; near 0 an exact correction would learn from a few"
    ),
    "grad_norm": "norm of the gradient before it is clipped; `null` if not finite, or without any pair",
    "skipped_steps": (
        "steps so far whose gradient was not finite, which left the weights alone; three in a row end the run"
    ),
    "parse_failures": "responses so far in the run in which Math-Verify found no answer at all; they score 0",
    "grader_restarts": (
        "graders replaced so far, because a text took them too long or killed them; it scores 0"
    ),
    "graded_per_s": "responses a second that each grader scored, at its last call",
    "reward_dropped": (
        "with `--reward`: responses so far without a reward, as the function returned None for them or took "
        "too long for their batch; they are in no pair and no mean"
    ),
    "reward_truncated": "responses so far that were cut to fit the reward model",
    "math_reward, chat_reward": "the mean reward of each task, where both are trained",
    "math_pair_frac, chat_pair_frac": "`pair_frac` of each task",
    "math_length, chat_length": "`length` of each task",
    "math_loss_share, chat_loss_share": "each task's share of the summed absolute losses",
    "tokens": "response tokens sampled for this step",
    "learned_tokens": (
        "response tokens learned from: in DPO of the responses in pairs (with `--grpo-coef` of all to those "
        "prompts), in GRPO of all"
    ),
    "tokens_per_s": "response tokens of all steps so far, over their seconds",
    "sync_s, trainer_idle_s, score_s, train_s": (
        "seconds of the trainer: copying weights, waiting for responses, scoring, learning; the first step "
        "of a window includes the sampling time of the whole call"
    ),
    "step_s": "seconds of the whole step",
    "generate_s, generator_idle_s": (
        "of the same seconds, those in which responses were, and were not, being sampled; on a shared "
        "device the trainer waits while the generator samples"
    ),
}


class Stopwatch:
    """Seconds of each phase of a step: `with watch("train_s"): ...`; times under one name add up.

    busy: the generator's clock of sampling, which runs in the background if the generator is separate.
    """

    def __init__(self, busy=None):
        self.seconds, self.start, self.busy = {}, time.perf_counter(), busy
        self.sampled_before = busy.seconds() if busy else 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.start


class Seen:
    """Values from a step's forwards, collected over its micro-batches.

    Kept per token or pair, and reduced once, so that no mean depends on how the batch was split.
    """

    def __init__(self, responses: int):
        self.losses = []  # of each micro-batch
        self.loss_of = torch.zeros(responses)  # (P * G,), each response's part
        self.gaps, self.kl, self.entropy = [], [], []  # one tensor per micro-batch, of its response tokens
        self.log_ratios, self.bounds = [], []  # likewise
        self.response_log_ratios = []  # one tensor per micro-batch, of its responses
        self.margin, self.chosen_logp, self.rejected_logp = [], [], []  # one per micro-batch, of its pairs

    def loss(self, loss: Tensor, responses: list[int], shares: Tensor) -> None:
        """A micro-batch's loss, and the shares (N,) of it that N responses contribute."""
        self.losses.append(loss.item())
        self.loss_of.index_add_(0, torch.tensor(responses, dtype=torch.long), shares.detach().cpu())

    def tokens(self, mask: Tensor, gap: Tensor, kl: Tensor, entropy: Tensor) -> None:
        """Keep the response tokens of (B, T) tensors: log policy - log sampler, KL estimate, entropy."""
        of_response = mask.bool()
        for seen, values in ((self.gaps, gap), (self.kl, kl), (self.entropy, entropy)):
            seen.append(values.detach()[of_response])

    def ratios(self, mask: Tensor, log_ratio: Tensor, out_of_bounds: Tensor) -> None:
        """Keep the response tokens of GRPO's log ratios, all (B, T), and the responses' own."""
        of_response, log_ratio = mask.bool(), log_ratio.detach()
        self.log_ratios.append(log_ratio[of_response])
        self.bounds.append(out_of_bounds[of_response])
        self.response_log_ratios.append((log_ratio * mask).sum(-1)[of_response.any(-1)])  # no filler row

    def pairs(self, margin: Tensor, chosen_logp: Tensor, rejected_logp: Tensor) -> None:
        """All (N,), one entry per pair."""
        self.margin.append(margin.detach())
        self.chosen_logp.append(chosen_logp.detach())
        self.rejected_logp.append(rejected_logp.detach())


def _flat(tensors):
    return [number for tensor in tensors for number in tensor.tolist()]


def has_pair(rewards: Tensor) -> list[bool]:
    """For each response, whether its prompt's responses differ in reward: rewards (P, G) -> P * G."""
    return [len({*given(group)}) > 1 for group in rewards.tolist() for _ in group]


def given(rewards: Iterable[float]) -> list[float]:
    """The rewards without those of dropped responses, which are NaN."""
    return [reward for reward in rewards if not math.isnan(reward)]


def of_rollouts(prompts: list, rollouts: list, rewards: Tensor) -> dict:
    """The sampled responses, and their rewards (P, G). prompts, rollouts: one entry per response."""
    lengths, scores = [len(r.response_ids) for r in rollouts], rewards.flatten().tolist()
    verified = [(n, s) for n, s, p in zip(lengths, scores, prompts, strict=True) if p.task == "math"]
    return {
        "reward": all_mean(given(scores)),
        "pair_frac": all_mean(has_pair(rewards)),
        "length": all_mean(lengths),
        "right_length": all_mean(n for n, score in verified if score == 1),
        "wrong_length": all_mean(n for n, score in verified if score == 0),
        "truncated_frac": all_mean(r.finish_reason == "length" for r in rollouts),
        "entropy": -all_mean(logp for r in rollouts for logp in r.logps),
        "tokens": int(all_sum(lengths)),
    }


def of_staleness(step: int, rollouts: list, seen: Seen) -> dict:
    """The age of the weights that sampled, and how far the policy is from them: at age 0 only by rounding."""
    staleness = step - rollouts[0].version  # the same for all: see generate.Window.take
    signed = _flat(seen.gaps)
    drift = all_mean(map(abs, signed))
    if staleness > 0:  # then it is no mismatch
        signed = []
    gaps = sorted(map(abs, signed))
    return {
        "staleness": staleness,
        "drift": drift,
        "logp_gap": drift if staleness == 0 else None,
        "logp_gap_p99": all_max(gaps[99 * len(gaps) // 100 :][:1]),
        "logp_gap_max": all_max(gaps[-1:]),
        "logp_gap_clip": all_mean(not math.log(0.8) <= gap <= math.log(1.2) for gap in signed),
    }


def of_forwards(seen: Seen) -> dict:
    """The loss, and the policy's entropy and KL at the tokens learned from."""
    return {
        # Every rank makes the same number of forwards, so either all have losses or none has.
        "loss": all_sum(seen.losses) if seen.losses else None,
        "learned_tokens": int(all_sum(len(values) for values in seen.entropy)),
        "policy_entropy": all_mean(_flat(seen.entropy)),
        "kl_ref": all_mean(_flat(seen.kl)),
    }


def of_pairs(pairs: list[tuple[int, int, int]], rollouts: list, seen: Seen) -> dict:
    """DPO's pairs (prompt, chosen, rejected), as indices into rollouts."""
    return {
        "margin": all_mean(_flat(seen.margin)),
        "chosen_logp": all_mean(_flat(seen.chosen_logp)),
        "rejected_logp": all_mean(_flat(seen.rejected_logp)),
        "chosen_length": all_mean(len(rollouts[chosen].response_ids) for _, chosen, _ in pairs),
        "rejected_length": all_mean(len(rollouts[rejected].response_ids) for _, _, rejected in pairs),
    }


def of_ratios(seen: Seen) -> dict:
    """GRPO's importance ratios."""
    ratios = _flat(log_ratio.exp() for log_ratio in seen.log_ratios)
    return {
        "ratio": all_mean(ratios),
        "ratio_max": all_max(ratios),
        "bound_frac": all_mean(_flat(seen.bounds)),
        "ess": effective_share(_flat(seen.response_log_ratios)),
    }


def effective_share(log_weights: list[float]) -> float | None:
    """(sum w)^2 / (n sum w^2) over all ranks' weights w (Kish 1965): 1 if all are equal, 1 / n if one is all.

    The largest logarithm is subtracted first: the result is the same, and exp() cannot overflow.
    """
    largest = all_max(log_weights)
    weights = [math.exp(log_weight - largest) for log_weight in log_weights]
    mean, mean_square = all_mean(weights), all_mean(weight**2 for weight in weights)
    return mean and mean**2 / mean_square


def by_task(tasks: list[str], prompts: list, rollouts: list, rewards: Tensor, seen: Seen) -> dict:
    """Metrics of each of the run's tasks; {} if there is only one."""
    if len(tasks) == 1:
        return {}
    scores, differ, losses = rewards.flatten().tolist(), has_pair(rewards), seen.loss_of.tolist()
    metrics, all_losses = {}, all_sum(losses)
    for task in tasks:
        mine = [i for i, prompt in enumerate(prompts) if prompt.task == task]
        metrics |= {
            f"{task}_reward": all_mean(given(scores[i] for i in mine)),
            f"{task}_pair_frac": all_mean(differ[i] for i in mine),
            f"{task}_length": all_mean(len(rollouts[i].response_ids) for i in mine),
            f"{task}_loss_share": all_sum(losses[i] for i in mine) / all_losses if all_losses else None,
        }
    return metrics


def of_run(counts: dict, scorer: Scorer) -> dict:
    """Over all steps of the run so far; life.Life keeps the counts."""
    return {
        "skipped_steps": counts["skipped"],
        "tokens_per_s": counts["tokens"] / counts["seconds"],
        **scorer.counts(),  # parse_failures, grader_restarts, reward_dropped, reward_truncated
        "graded_per_s": scorer.graded_per_s(),
    }


def of_time(watch: Stopwatch) -> dict:
    """Seconds of the step: of the trainer by phase, and of the generator."""
    generate_s = watch.busy.seconds() - watch.sampled_before
    total = watch.total()
    return {
        **watch.seconds,  # sync_s, trainer_idle_s, score_s, train_s
        "generate_s": generate_s,
        "generator_idle_s": total - generate_s,
        "step_s": total,
    }


def as_markdown() -> str:
    """The glossary as docs/metrics.md shows it."""
    rows = [
        f"| {', '.join(f'`{key}`' for key in keys.split(', '))} | {meaning} |"
        for keys, meaning in GLOSSARY.items()
    ]
    return "\n".join(["| key | meaning |", "|---|---|", *rows])


if __name__ == "__main__":
    print(as_markdown())
