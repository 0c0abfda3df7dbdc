"""Copy the policy's weights into the generator, and prove that they arrived.

An engine keeps repacked, cached or sleeping copies of its weights, and every known failure is silent: if an
update misses one copy nothing crashes, and online training turns into offline training. So every sync ends
with proofs, and if one fails the run stops with the numbers:

    the policy's weights arrived     names, and an exact checksum of every tensor's bytes, taken where the
                                     engine's own load_weights receives it. Does not see what the engine does
                                     with it afterwards.
    the engine holds what arrived    the same checksum of the engine's own weights; fused weights are compared
                                     part by part. Does not see weights that the engine repacks or shards over
                                     several GPUs.
    its caches are empty             the prefix cache reports that it was reset.
    it computes with them            both sides give the canary, a fixed text, the same log-probs, up to
                                     rounding. Does not see a change smaller than rounding, such as one step
                                     at a small learning rate.

Therefore the first sync begins with a rehearsal: it copies clearly different weights, and the generator must
follow. Where the engine repacks weights, only the rehearsal proves that it uses them, so it is repeated.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from generate import Generator
from model import autocast, digests, full_weights, local, token_logps
from ranks import meet_within
from serve import Receipt

CANARY = "12 + 30 = 42, said the canary."

# The largest canary gap, mean |trainer - generator| in nats per token, that passes as rounding. Correct
# forwards differ by 1e-6 to 1e-5 in float32 and by up to 6e-2 in bfloat16 (measured). The rehearsal measures
# the gap that a missed copy leaves, and sync() lowers the limit below it where that is small.
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 0.2}

FOLLOWS = 1 / 4  # largest gap after a copy over the gap before it; an engine that ignores the copy has 1

PATIENCE_S = 1800  # ranks arrive together, but at the start one may read its models from a slower disk


class SyncError(RuntimeError):
    """The generator does not hold the policy's weights."""


def sync(policy: PreTrainedModel, generator: Generator, step: int, prove_every: float = 100) -> float:
    """Copy the policy's weights into the generator, prove it, and make `step` the generator's version.

    prove_every: syncs between two rehearsals, where the engine repacks weights.
    Returns the canary's gap in nats per token. Raises SyncError with the numbers if any proof fails.
    """
    what, due = f"sync at step {step}", generator.repacks and generator.since_rehearsal >= prove_every
    try:
        meet_within(PATIENCE_S)  # every rank holds a part of the weights
    except RuntimeError as error:
        raise SyncError(f"{what}: {str(error).splitlines()[0]}") from error
    if generator.version is None or due:
        apart = rehearse(policy, generator, f"rehearsal of the {what}")
        gap = copy_and_prove(policy, generator, FOLLOWS * apart, what)
        # Later syncs may leave several times this rounding gap, but never one that a missed copy could leave.
        generator.tolerance = min(FOLLOWS * apart, max(TOLERANCE[generator.dtype], 4 * gap))
        generator.since_rehearsal = 0
    else:
        gap = copy_and_prove(policy, generator, generator.tolerance, what)
    generator.since_rehearsal += 1
    generator.stamp(step)
    return gap


def copy_and_prove(policy: PreTrainedModel, generator: Generator, allowed: float, what: str) -> float:
    """Copy the weights and prove the copy; `what` begins error messages. Returns the canary's gap."""
    sent = digests(policy, generator.dtype)  # {name: digest}
    prove_copy(sent, generator.load_weights(full_weights(policy, generator.dtype)), generator, what)
    gap = canary_gap(policy, generator)
    if not gap <= allowed:  # written so that a NaN fails, too
        raise SyncError(
            f"{what}: trainer and generator disagree on the canary by {gap:.2e} nats per token (allowed: "
            f"{allowed:.0e}); the generator does not compute with the policy's weights"
        )
    return gap


def prove_copy(sent: dict[str, int], receipts: list[Receipt], generator: Generator, what: str) -> None:
    """Compare what arrived with what was sent, {name: digest}; reset the caches. SyncError if a proof fails.

    receipts: what generator.load_weights returned.
    """
    generator.repacks = any(receipt.unseen for receipt in receipts)
    for receipt in receipts:
        other = [name for name, sum in sent.items() if receipt.arrived.get(name, sum) != sum]
        faults = {
            "did not arrive": sent.keys() - receipt.arrived.keys(),
            "are no weights of the policy's": receipt.arrived.keys() - sent.keys(),
            "arrived as other bytes": other,
            "of the engine's own took no value": receipt.missing,
            "of the engine's own hold other bytes than arrived": receipt.unequal,
        }
        for fault, names in faults.items():
            if names:
                named = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                raise SyncError(f"{what}: of {len(sent)} weights {len(names)} {fault}: {named}")
    if not generator.reset_prefix_cache():
        raise SyncError(f"{what}: the prefix cache still holds keys and values of the old weights")


def rehearse(policy: PreTrainedModel, generator: Generator, what: str) -> float:
    """Copy a clearly different model, prove that the generator follows, and undo the change in the policy.

    Every tensor is reversed along its last dimension (each rank's part of a sharded tensor), which can be
    undone exactly and needs no memory. A generator that follows comes close to the reversed policy. How close
    depends on how the model rounds, so the gap is judged relative to the gap before the copy. Returns the
    canary's gap at the end, when the generator is reversed and the policy is not.
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

    With several engines, the largest gap of any.
    """
    ids = generator.tokenizer.encode(CANARY, add_special_tokens=False)
    device = next(policy.parameters()).device
    with autocast(device, generator.dtype):
        ours = token_logps(policy, torch.tensor([ids], device=device))[0, 1:].cpu()  # (T - 1,)
    theirs = torch.tensor(generator.score(ids))  # (engines, T - 1)
    return (ours - theirs).abs().mean(-1).max().item()
