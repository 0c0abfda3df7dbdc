"""Rollouts as padded rows, and how they are cut into micro-batches."""

import math
import random

from batch import groups_to_share, micro_batches, to_batch
from generate import Rollout
from model import load_policy


def rollout(prompt, response):
    return Rollout("x", prompt, response, [-0.5] * len(response), "stop", 0)


def lengths_of(rollouts):
    return [len(rollout.ids) for rollout in rollouts]


def test_batch_masks_by_length_and_keeps_the_stop_token():
    """pad == eos: a mask made from ids drops the stop token, and the model never learns to stop.

    Break: mask where input_ids != 0 (0 is both the padding and, here, the stop token).
    """
    rows = [rollout([5, 6], [7, 0]), rollout([5], [0])]
    input_ids, mask, logps = to_batch(rows, "cpu")
    assert input_ids.tolist() == [[5, 6, 7, 0], [5, 0, 0, 0]]
    assert mask.tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert logps.tolist() == [[0, 0, -0.5, -0.5], [0, -0.5, 0, 0]]


def test_micro_batches_lose_nothing_and_keep_to_the_limit():
    """A group that is lost, doubled or torn at a micro-batch's edge; padding not counted.

    Breaks: drop the last `yield batch`; `batch = []` after the addition; sum instead of the longest.
    """
    rng = random.Random(0)
    rollouts = [rollout([1] * rng.randint(1, 9), [2] * rng.randint(1, 30)) for _ in range(90)]
    indices = rng.sample(range(90), 80)  # not all have a part in the loss
    groups = [indices[i : i + size] for i, size in zip(range(0, 80, 4), [1, 2, 3, 4] * 5, strict=True)]
    batches = list(micro_batches(groups, lengths_of(rollouts), 300))
    for group in groups:
        assert sum(set(group) <= set(batch) for batch in batches) == 1  # whole, in one batch
    assert sorted(sum(batches, [])) == sorted(sum(groups, []))
    sizes = [to_batch([rollouts[i] for i in batch], "cpu")[0].numel() for batch in batches]
    assert max(sizes) <= 300 and len(batches) < len(groups) / 2
    assert sorted(micro_batches(groups, lengths_of(rollouts), 1)) == sorted(groups)


def test_little_is_padded():
    """Short and long responses in one batch, half of it padding. Break: no sorted() in micro_batches.

    Lengths as GSM8K has them: lognormal, the questions' and the answers' deviations those of its files, the
    medians with the prompt's wording and a model's longer answers.
    """
    rng = random.Random(0)
    rollouts = []
    for _ in range(64):
        prompt = [1] * (60 + int(rng.lognormvariate(math.log(55), 0.38)))
        rollouts += [rollout(prompt, [2] * int(rng.lognormvariate(math.log(150), 0.48))) for _ in range(8)]
    real = sum(lengths_of(rollouts))
    batches = micro_batches([[i] for i in range(len(rollouts))], lengths_of(rollouts), 2048)
    padded = sum(to_batch([rollouts[i] for i in batch], "cpu")[0].numel() for batch in batches)
    assert real < padded < real / 0.95


def test_a_prompt_is_shared_where_that_saves_work(checkpoints):
    """Long responses made one row of all of them, or each short one with its prompt. Break: return the groups
    whatever sharing_pays says."""
    policy = load_policy(checkpoints["llama"])
    short = [rollout([1] * 50, [2] * 5) for _ in range(4)]
    long = [rollout([3] * 5, [2] * 400) for _ in range(4)]
    groups = groups_to_share(policy, short + long, 4)
    assert groups == [[0, 1, 2, 3], [4], [5], [6], [7]]
