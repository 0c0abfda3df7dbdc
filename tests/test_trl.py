"""Our losses and gradients against those of TRL's own trainers, which bench/trl_reference.sh ran and froze in
trl_reference.json. The batch is in that file, and the model's weights are a formula."""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from batch import micro_batches, to_batch
from bench.trl_reference import fingerprint, flat_gradient, formula_model
from generate import Rollout
from model import token_logps
from train_dpo import dpo_loss, locate_pairs
from train_grpo import (
    group_advantages,
    grpo_loss,
    kl_estimate,
    tis_loss,
    token_weights,
)

ROOT = Path(__file__).parents[1]
REFERENCE = json.loads((ROOT / "tests" / "trl_reference.json").read_text())
SETTINGS, BATCH = REFERENCE["settings"], REFERENCE["batch"]
REWARDS = torch.tensor(BATCH["rewards"])  # (P, G)
P, G = REWARDS.shape
ROLLOUTS = [
    Rollout(str(p), BATCH["prompt_ids"][p], BATCH["response_ids"][p][g], BATCH["old_logps"][p][g], "stop", 0)
    for p in range(P)
    for g in range(G)
]
LENGTHS = torch.tensor([len(rollout.response_ids) for rollout in ROLLOUTS])  # (P * G,)
DPO_TERMS = "dpo_terms"  # TRL's GRPO trainer on what train_dpo.py adds to DPO's loss
DPO, GRPO = REFERENCE["dpo"], {name: case for name, case in REFERENCE["grpo"].items() if name != DPO_TERMS}


def learn(groups, temperature, loss_of):
    """(loss, fingerprint of the gradient) of one step, over micro-batches like the train scripts' Learn.

    loss_of(rows, mask, logps, ref_logps, old_logps, entropy) is a micro-batch's share of the loss; rows are
    indices into ROLLOUTS, the others (B, T).
    """
    policy, reference, total = formula_model("policy"), formula_model("reference"), 0.0
    batches = list(micro_batches(groups, [len(rollout.ids) for rollout in ROLLOUTS], max_tokens=40))
    assert len(batches) > 1
    for rows in batches:
        input_ids, mask, old_logps = to_batch([ROLLOUTS[i] for i in rows], "cpu")
        logps, entropy = token_logps(policy, input_ids, mask, temperature, with_entropy=True)
        with torch.no_grad():
            ref_logps = token_logps(reference, input_ids, mask, temperature)
        loss = loss_of(rows, mask, logps, ref_logps, old_logps, entropy)
        loss.backward()
        total += loss.item()
    return total, fingerprint(flat_gradient(policy))


def near(number):
    return pytest.approx(number, rel=1e-5)


def near_gradient(frozen):
    """To 1e-5 of the gradient's norm, in the norm and in each direction."""
    return pytest.approx(frozen, rel=0, abs=1e-5 * frozen[0])


@pytest.mark.parametrize("name", DPO)
def test_dpo(name):
    """A sign, a mask, a mean over the wrong thing: here with the pairs, the prompts' weights and the lengths.

    Break: rejected_gain - chosen_gain in dpo_loss; or a weight of 1 a pair in locate_pairs (group_dpo).
    """
    case = DPO[name]
    flags = {"length_normalize": False, "nll_coef": 0.0, **case["ours"]}
    pairs = [(p, p * G + chosen, p * G + rejected) for p, chosen, rejected in case["pairs"]]
    needed = defaultdict(set)  # prompt: its responses that the loss needs
    for p, chosen, rejected in pairs:
        needed[p] |= {chosen, rejected}

    def loss_of(rows, mask, logps, ref_logps, old_logps, entropy):
        chosen, rejected, weights = locate_pairs(pairs, rows)  # (N,) each
        n_tokens = mask.sum(-1)  # (B,)
        scale = 1 / n_tokens if flags["length_normalize"] else 1
        ours, refs = logps.sum(-1) * scale, ref_logps.sum(-1) * scale  # (B,), (B,)
        dpo = dpo_loss(ours[chosen], ours[rejected], refs[chosen], refs[rejected], flags["beta"])
        nll = -(logps.sum(-1) / n_tokens)[chosen]
        return (weights * (dpo + flags["nll_coef"] * nll)).sum() / len(needed)

    loss, gradient = learn([sorted(group) for group in needed.values()], 1.0, loss_of)
    assert loss == near(case["loss"]) and gradient == near_gradient(case["gradient"])


@pytest.mark.parametrize("name", GRPO)
def test_grpo(name):
    """Clipping on one side only, a ratio upside down, a normaliser of the micro-batch instead of the step.

    Break: swap clip_low and clip_high in grpo_loss; or the two log-probs in kl_estimate; or divide by lengths
    alone in token_weights' sequence; or drop .detach() in tis_loss.
    """
    case = GRPO[name]
    flags = case["ours"]
    advantages = group_advantages(REWARDS, flags["advantage_scale"]).flatten()  # (P * G,)
    step = {"rows": len(LENGTHS), "tokens": LENGTHS.sum()}
    weights = token_weights(LENGTHS, flags["normalize"], SETTINGS["max_new_tokens"], **step)  # (P * G,)

    def loss_of(rows, mask, logps, ref_logps, old_logps, entropy):
        A = advantages[rows]  # (B,)
        if flags["correction"] == "tis":
            losses = tis_loss(logps, old_logps, A, mask, flags["tis_cap"])
        else:
            old = old_logps if flags["correction"] == "clip" else logps.detach()
            losses = grpo_loss(logps, old, A, mask, flags["clip_low"], flags["clip_high"])
        return (weights[rows, None] * (losses + flags["kl_coef"] * kl_estimate(logps, ref_logps))).sum()

    loss, gradient = learn([[i] for i in range(P * G)], SETTINGS["temperature"], loss_of)
    assert gradient == near_gradient(case["gradient"])
    # TRL multiplies the weight by a ratio of 1, tis_loss by log-probs: other values of the same gradient.
    assert name == "vllm_token_truncate" or loss == near(case["loss"])


def test_what_dpo_adds_to_its_loss():
    """The GRPO term, a sum over a response's tokens, and the entropy bonus with the wrong sign or none.

    Break: return zeros as token_logps' entropies; or detach them.
    """
    case = REFERENCE["grpo"][DPO_TERMS]
    flags = case["ours"]
    advantages = group_advantages(REWARDS).flatten()  # (P * G,)

    def loss_of(rows, mask, logps, ref_logps, old_logps, entropy):
        grpo = grpo_loss(logps, old_logps, advantages[rows], mask, clip_low=0.2, clip_high=0.2)
        bonus = flags["entropy_coef"] * entropy.sum() / LENGTHS.sum()
        return flags["grpo_coef"] * grpo.sum() / len(ROLLOUTS) - bonus

    loss, gradient = learn([[i] for i in range(P * G)], SETTINGS["temperature"], loss_of)
    assert loss == near(case["loss"]) and gradient == near_gradient(case["gradient"])


@pytest.mark.parametrize("scale", ["none", "std"])
def test_advantages(scale):
    """The standard deviation of a population instead of a sample, or another epsilon; a tie that is not zero.

    Break: correction=0 in std; or 1e-6 for 1e-4.
    """
    ours = group_advantages(REWARDS, scale).flatten().tolist()
    assert ours == near(REFERENCE["advantages"][scale])
    assert ours[-G:] == [0.0] * G


def test_batch_reaches_every_side_of_the_bounds():
    """A batch in which nothing is clipped, so that the tests above prove nothing. Break: formula_model("old")
    as the policy."""
    advantages = group_advantages(REWARDS).flatten()
    input_ids, mask, old_logps = to_batch(ROLLOUTS, "cpu")
    with torch.no_grad():
        logps = token_logps(formula_model("policy"), input_ids, mask, SETTINGS["temperature"])
    ratio = (logps - old_logps).exp()  # (B, T)
    for sign in (1, -1):
        ratios = ratio[(sign * advantages > 0)[:, None] & mask.bool()]  # of tokens that A has this sign for
        assert (ratios < 0.8).any() and (ratios > 1.5).any() and ((ratios > 0.8) & (ratios < 1.3)).any()


def test_reference_is_of_the_pinned_versions():
    """Pins that were raised, and numbers that were not made again. Break: change trl's pin in its lock."""
    lock = (ROOT / "bench" / "requirements-trl.txt").read_text()
    pins = dict(re.findall(r"^([a-z][\w.-]*)==([\w.]+)", lock, re.M))
    made_by = {name: number.partition("+")[0] for name, number in REFERENCE["versions"].items()}
    assert made_by == {name: pins[name] for name in ("trl", "torch", "transformers")}
