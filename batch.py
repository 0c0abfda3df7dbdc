"""Rollouts as padded rows, in micro-batches."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model import sharing_pays


def to_batch(rollouts: list, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Rollouts as right-padded tensors: input_ids, response_mask and sampler_logps, (B, T) each.

    The mask comes from lengths, so a response's own stop token is trained even where padding has the same id.
    An empty list gives one row of padding, whose mask is 0.
    """
    rows = max(1, len(rollouts))
    longest = max((len(r.ids) for r in rollouts), default=2)
    input_ids = torch.zeros(rows, longest, dtype=torch.long)
    response_mask = torch.zeros(rows, longest)
    sampler_logps = torch.zeros(rows, longest)
    for row, r in enumerate(rollouts):
        start, end = len(r.prompt_ids), len(r.ids)
        input_ids[row, :end] = torch.tensor(r.ids)
        response_mask[row, start:end] = 1
        sampler_logps[row, start:end] = torch.tensor(r.logps)
    return input_ids.to(device), response_mask.to(device), sampler_logps.to(device)


def groups_to_share(policy: PreTrainedModel, rollouts: list, G: int) -> list[list[int]]:
    """Group the responses to a prompt, as indices into rollouts, where computing the prompt once saves work.

    Otherwise each response is its own group, which needs less padding.
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


def micro_batches(groups: Iterable[list[int]], lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Split groups of indices into batches of at most max_tokens tokens, padding included.

    lengths: tokens in each index's row. A group is never split; one over the limit is a batch by itself.
    Groups of similar length go together, which keeps padding small.

    >>> list(micro_batches([[0, 1], [2], [3]], lengths=[8, 9, 3, 4], max_tokens=10))
    [[2, 3], [0, 1]]
    """

    def longest(group):
        return max(lengths[index] for index in group)

    batch = []
    for group in sorted(groups, key=longest):
        if batch and (len(batch) + len(group)) * longest(group) > max_tokens:
            yield batch
            batch = []
        batch = batch + group
    if batch:
        yield batch
