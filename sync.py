"""Copy the policy's weights into the generator, and prove that they arrived.

An engine keeps repacked, cached or slept copies of its weights, and every known way for a copy to fail is
silent: if an update misses one copy nothing crashes, and online training goes on as offline training. So
every sync ends with proofs, and one that fails stops the run with the numbers:

    what arrived is what the policy holds    names, and an exact checksum of every tensor's bytes, taken where
                                             the engine's own load_weights receives it. Does not see what the
                                             engine then does with it.
    the engine holds what arrived            the same checksum of the engine's own weights, fused ones in
                                             their parts. Does not see a weight that the engine keeps
                                             repacked, nor one that several GPUs hold in parts.
    its caches are empty                     the prefix cache reports that it was reset.
    it computes with them                    both sides give the canary, a fixed text, the same log-probs, up
                                             to rounding. Does not see a change smaller than rounding, as one
                                             step at a small learning rate is.

Therefore the first sync begins with a rehearsal: plainly different weights are copied, and the generator must
follow. Where weights are repacked, the rehearsal is the only proof that they are used, and is repeated.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from generate import Generator
from model import autocast, digests, full_weights, local, token_logps
from ranks import meet_within
from serve import Receipt

CANARY = "12 + 30 = 42, said the canary."

# A mean |trainer - generator| gap of the canary that is always allowed, in nats per token. Measured between
# correct forwards: 1e-6 to 1e-5 in float32, up to 6e-2 in bfloat16.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 0.2}

FOLLOWS = 1 / 4  # the gap that a copy may leave, over the gap that it was to close: a deaf engine leaves all

PATIENCE_S = 1800  # ranks arrive together, but at the start one may read its models from a slower disk


class SyncError(RuntimeError):
    """The generator does not hold the policy's weights."""


def sync(policy: PreTrainedModel, generator: Generator, step: int, prove_every: float = 100) -> float:
    """Copy the policy's weights into the generator, prove it, and make `step` the generator's version.

    prove_every: syncs between two rehearsals, where the engine repacks weights.
    Returns the canary's gap in nats per token. Raises SyncError with the numbers if any proof fails.
    """
    try:
        meet_within(PATIENCE_S)  # every rank holds a part of the weights
    except RuntimeError as error:
        raise SyncError(f"sync at step {step}: {str(error).splitlines()[0]}") from error
    what, due = f"sync at step {step}", generator.repacks and generator.since_rehearsal >= prove_every
    if generator.version is None or due:
        apart = rehearse(policy, generator, f"rehearsal of the {what}")
        gap = copy_and_prove(policy, generator, FOLLOWS * apart, what)
        # From now on: what rounding made of these weights, several times over, but no more than shows a copy.
        generator.tolerance = min(FOLLOWS * apart, max(TOLERANCE[generator.dtype], 4 * gap))
        generator.since_rehearsal = 0
    else:
        gap = copy_and_prove(policy, generator, generator.tolerance, what)
    generator.since_rehearsal += 1
    generator.stamp(step)
    return gap


def copy_and_prove(policy: PreTrainedModel, generator: Generator, allowed: float, what: str) -> float:
    """The copy and its proofs; `what` begins an error's message. Returns the canary's gap."""
    held = digests(policy, generator.dtype)  # {name: digest}
    prove_copy(held, generator.load_weights(full_weights(policy, generator.dtype)), generator, what)
    gap = canary_gap(policy, generator)
    if not gap <= allowed:  # written so that a NaN fails, too
        raise SyncError(
            f"{what}: trainer and generator disagree on the canary by {gap:.2e} nats per token (allowed: "
            f"{allowed:.0e}); the generator does not compute with the policy's weights"
        )
    return gap


def prove_copy(held: dict[str, int], receipts: list[Receipt], generator: Generator, what: str) -> None:
    """Compare what arrived with what was sent, {name: digest}; reset the caches. SyncError if a proof fails.

    receipts: what generator.load_weights returned.
    """
    generator.repacks = any(receipt.unseen for receipt in receipts)
    for receipt in receipts:
        other = [name for name, sum in held.items() if receipt.arrived.get(name, sum) != sum]
        faults = {
            "did not arrive": held.keys() - receipt.arrived.keys(),
            "are no weights of the policy's": receipt.arrived.keys() - held.keys(),
            "arrived as other bytes": other,
            "of the engine's own took no value": receipt.missing,
            "of the engine's own hold other bytes than arrived": receipt.unequal,
        }
        for fault, names in faults.items():
            if names:
                named = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                raise SyncError(f"{what}: of {len(held)} weights {len(names)} {fault}: {named}")
    if not generator.reset_prefix_cache():
        raise SyncError(f"{what}: the prefix cache still holds keys and values of the old weights")


def rehearse(policy: PreTrainedModel, generator: Generator, what: str) -> float:
    """Copy a plainly different model, prove that the generator follows, and undo the change in the policy.

    Every tensor is reversed along its last dimension (of a sharded tensor, each rank's part), which can be
    undone exactly and needs no memory. A generator that follows comes near the reversed policy, from where it
    was; how near rounding lets it come depends on the model, so it is judged by the ratio. Returns the
    canary's gap now: the generator is reversed, the policy is not.
    """
    reverse(policy)
    copy_and_prove(policy, generator, FOLLOWS * canary_gap(policy, generator), what)
    reverse(policy)
    return canary_gap(policy, generator)


@torch.no_grad()
def reverse(policy: nn.Module) -> None:
    """Reverse every weight along its last dimension, in place."""
    for parameter in policy.parameters():
        mine = local(parameter)
        mine.copy_(mine.flip(-1))


@torch.no_grad()
def canary_gap(policy: PreTrainedModel, generator: Generator) -> float:
    """Mean |trainer - generator| log-prob over the canary's tokens, at temperature 1 (nats).

    With several engines, on this rank or on others, the gap of the worst.
    """
    ids = generator.tokenizer.encode(CANARY, add_special_tokens=False)
    device = next(policy.parameters()).device
    with autocast(device, generator.dtype):
        ours = token_logps(policy, torch.tensor([ids], device=device))[0, 1:].cpu()  # (T - 1,)
    theirs = torch.tensor(generator.score(ids))  # (engines, T - 1)
    return (ours - theirs).abs().mean(-1).max().item()
