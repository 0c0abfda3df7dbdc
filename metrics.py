"""A step's metrics: one function for each kind. docs/metrics.md says what each metric means.

Every function returns {key: number}, always with the same keys, and None where a step has nothing to measure.
Counts and means are over all ranks, so all ranks call these functions, in the same order. Seconds are each
rank's own; rank 0's are written. P: prompts per step; G: samples per prompt. A list with one entry per
response covers this rank's P * G.
"""

import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ranks import all_max, all_mean, all_sum
from rewards import Scorer

PAGE = Path(__file__).parent / "docs" / "metrics.md"  # what every metric means


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
        self.kept = defaultdict(list)  # {name: one tensor per micro-batch}

    def loss(self, loss: Tensor, responses: list[int], shares: Tensor) -> None:
        """A micro-batch's loss, and what each of N responses adds to it, up to a common factor: (N,)."""
        self.losses.append(loss.item())
        self.loss_of.index_add_(0, torch.tensor(responses, dtype=torch.long), shares.detach().cpu())

    def keep(self, **values: Tensor) -> None:
        """Values (N,), such as one per pair, under their names."""
        for name, value in values.items():
            self.kept[name].append(value.detach())

    def tokens(self, mask: Tensor, **values: Tensor) -> None:
        """The response tokens of (B, T) tensors."""
        self.keep(**{name: value[mask.bool()] for name, value in values.items()})

    def ratios(self, mask: Tensor, log_ratio: Tensor, out_of_bounds: Tensor) -> None:
        """The response tokens of GRPO's log ratios, all (B, T), and the responses' own."""
        self.tokens(mask, log_ratio=log_ratio, out_of_bounds=out_of_bounds)
        self.keep(response_log_ratio=(log_ratio * mask).sum(-1)[mask.any(-1)])  # no filler row

    def __getitem__(self, name: str) -> list[float]:
        return [number for tensor in self.kept[name] for number in tensor.tolist()]


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
    signed = seen["gap"]
    drift = all_mean(map(abs, signed))
    if staleness > 0:  # then it is no mismatch
        signed = []
    return {
        "staleness": staleness,
        "drift": drift,
        "logp_gap": drift if staleness == 0 else None,
        "logp_gap_max": all_max(map(abs, signed)),
        "logp_gap_clip": all_mean(not math.log(0.8) <= gap <= math.log(1.2) for gap in signed),
    }


def of_forwards(seen: Seen) -> dict:
    """The loss, and the policy's entropy and KL at the tokens learned from."""
    return {
        # Every rank makes the same number of forwards, so either all have losses or none has.
        "loss": all_sum(seen.losses) if seen.losses else None,
        "learned_tokens": int(all_sum([len(seen["entropy"])])),
        "policy_entropy": all_mean(seen["entropy"]),
        "kl_ref": all_mean(seen["kl"]),
    }


def of_pairs(pairs: list[tuple[int, int, int]], rollouts: list, seen: Seen) -> dict:
    """DPO's pairs (prompt, chosen, rejected), as indices into rollouts."""
    return {
        **{key: all_mean(seen[key]) for key in ("margin", "chosen_logp", "rejected_logp")},
        "chosen_length": all_mean(len(rollouts[chosen].response_ids) for _, chosen, _ in pairs),
        "rejected_length": all_mean(len(rollouts[rejected].response_ids) for _, _, rejected in pairs),
    }


def of_ratios(seen: Seen) -> dict:
    """GRPO's importance ratios."""
    ratios = torch.tensor(seen["log_ratio"]).exp().tolist()
    return {
        "ratio": all_mean(ratios),
        "ratio_max": all_max(ratios),
        "bound_frac": all_mean(seen["out_of_bounds"]),
        "ess": effective_share(seen["response_log_ratio"]),
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


@cache  # the page of a run asks for each key
def glossary() -> dict[str, str]:
    """{metric: its meaning}, from the table "Every metric" of docs/metrics.md."""
    table = PAGE.read_text(encoding="utf-8").split("## Every metric\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \| (.+) \|$", table, re.MULTILINE)
    return {key: meaning for keys, meaning in rows for key in re.findall("`(.+?)`", keys)}
