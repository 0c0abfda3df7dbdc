"""Copy the policy's weights into the generator, and prove that they arrived.

An engine keeps repacked, cached or slept copies of its weights, and every known way for a copy to fail is
silent: if an update misses one copy nothing crashes, and online training goes on as offline training. So
every sync ends with proofs, and one that fails stops the run: every rank came, every name was sent and taken,
the prefix cache was reset, and both sides give the canary, a fixed text, the same log-probs. One step at a
small learning rate moves the canary less than bfloat16 rounds it, so the first sync is preceded by a
rehearsal with weights that are plainly different.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from generate import Generator
from model import autocast, full_weights, token_logps
from ranks import meet_within

CANARY = "12 + 30 = 42, said the canary."

# The largest mean |trainer - generator| gap of the canary that counts as agreement, in nats per token.
# Measured between correct forwards: 1e-6 to 1e-5 in float32, up to 6e-2 in bfloat16.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 0.2}

PATIENCE_S = 1800  # ranks arrive together, but at the start one may read its models from a slower disk


class SyncError(RuntimeError):
    """The generator does not hold the policy's weights."""


def sync(policy: PreTrainedModel, generator: Generator, step: int) -> float:
    """Copy the policy's weights into the generator, prove it, and make `step` the generator's version.

    Returns the canary's gap in nats per token. Raises SyncError with the numbers if any proof fails.
    """
    try:
        meet_within(PATIENCE_S)  # every rank holds a part of the weights
    except RuntimeError as error:
        raise SyncError(f"sync at step {step}: {str(error).splitlines()[0]}") from error
    if generator.version is None:
        rehearse(policy, generator)
    gap = copy_and_prove(policy, generator, TOLERANCE[generator.dtype], f"sync at step {step}")
    generator.stamp(step)
    return gap


def copy_and_prove(policy: PreTrainedModel, generator: Generator, tolerance: float, what: str) -> float:
    """The copy and its proofs; `what` begins an error's message. Returns the canary's gap."""
    sent = set()

    def noted(pairs):
        for name, weight in pairs:
            sent.add(name)
            yield name, weight

    loaded, expected = generator.load_weights(noted(full_weights(policy, generator.dtype)))
    ours = {name for name, _ in policy.named_parameters()}
    if sent != ours or loaded != expected:
        missing = sorted((ours - sent) | (expected - loaded))
        raise SyncError(
            f"{what}: {len(sent)} of {len(ours)} weights were sent, and the generator took {len(loaded)} of "
            f"its {len(expected)}; missing {', '.join(missing[:3])}"
        )
    if not generator.reset_prefix_cache():
        raise SyncError(f"{what}: the prefix cache still holds keys and values of the old weights")
    gap = canary_gap(policy, generator)
    if not gap <= tolerance:  # written so that a NaN fails, too
        raise SyncError(
            f"{what}: trainer and generator disagree on the canary by {gap:.2e} nats per token (allowed: "
            f"{tolerance:.0e}); the generator does not compute with the policy's weights"
        )
    return gap


def rehearse(policy: PreTrainedModel, generator: Generator) -> None:
    """Copy a plainly different model, prove that the generator follows, and undo the change.

    Every tensor is reversed along its last dimension (of a sharded tensor, each rank's part), which can be
    undone exactly and needs no memory. The real weights that follow then differ plainly, too: a generator
    that ignores the second copy is caught by it.
    """
    reverse(policy)
    moved, tolerance = canary_gap(policy, generator), TOLERANCE[generator.dtype]
    if moved < 5 * tolerance:
        raise SyncError(
            f"rehearsal of the first sync: reversed weights move the canary by {moved:.2e} nats only"
        )
    if generator.dtype == torch.bfloat16:
        tolerance = moved / 10  # a reversed model computes nonsense, and rounding moves that further
    copy_and_prove(policy, generator, tolerance, "rehearsal of the first sync")
    reverse(policy)


@torch.no_grad()
def reverse(policy: nn.Module) -> None:
    """Reverse every weight along its last dimension, in place."""
    for parameter in policy.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.copy_(local.flip(-1))


@torch.no_grad()
def canary_gap(policy: PreTrainedModel, generator: Generator) -> float:
    """Mean |trainer - generator| log-prob over the canary's tokens, at temperature 1 (nats).

    With several engines, the gap of the worst.
    """
    ids = generator.tokenizer.encode(CANARY, add_special_tokens=False)
    device = next(policy.parameters()).device
    with autocast(device, generator.dtype):
        ours = token_logps(policy, torch.tensor([ids], device=device))[0, 1:].cpu()  # (T - 1,)
    theirs = torch.tensor(generator.score(ids))  # (engines, T - 1)
    return (ours - theirs).abs().mean(-1).max().item()
