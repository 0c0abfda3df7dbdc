"""Our losses and gradients against those that TRL's own trainers gave (bench/trl_reference.sh): every digit
frozen in trl_reference.json, on a model whose weights are a formula."""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from bench.trl_reference import fingerprint, flat_gradient, formula_model
from generate import Rollout
from model import token_logps
from train_dpo import dpo_loss, locate_pairs
from train_grpo import (
    group_advantages,
    grpo_loss,
    kl_estimate,
    micro_batches,
    tis_loss,
    to_batch,
    token_weights,
)

ROOT = Path(__file__).parents[1]
REFERENCE = json.loads((ROOT / "tests" / "trl_reference.json").read_text())
BATCH = REFERENCE["batch"]
REWARDS = torch.tensor(BATCH["rewards"])  # (P, G)
P, G = REWARDS.shape
ROLLOUTS = [
    Rollout(str(p), BATCH["prompt_ids"][p], BATCH["response_ids"][p][g], BATCH["old_logps"][p][g], "stop", 0)
    for p in range(P)
    for g in range(G)
]
LENGTHS = torch.tensor([len(rollout.response_ids) for rollout in ROLLOUTS])  # (P * G,)
TEMPERATURE = REFERENCE["settings"]["temperature"]


def learn(loss_of, groups, temperature):
    """(loss, fingerprint of the gradient) of one step, over micro-batches as in the train scripts' Learn.

    loss_of: from rows and what the forwards gave for them to a micro-batch's share of the loss.
    """
    policy, reference, total = formula_model("policy"), formula_model("reference"), 0.0
    batches = list(micro_batches(groups, ROLLOUTS, max_tokens=40))
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


def check(case, loss, gradient):
    """Equal to 1e-5 of the loss, and of the gradient's norm in each direction."""
    assert loss == pytest.approx(case["loss"], rel=1e-5)
    assert gradient == pytest.approx(case["gradient"], abs=1e-5 * case["gradient"][0])


@pytest.mark.parametrize("name", REFERENCE["dpo"])
def test_dpo(name):
    """..."""
    case = REFERENCE["dpo"][name]
    ours = {"length_normalize": False, "nll_coef": 0.0, **case["ours"]}
    pairs = [(p, p * G + chosen, p * G + rejected) for p, chosen, rejected in case["pairs"]]
    needed = defaultdict(set)
    for p, *pair in pairs:
        needed[p] |= set(pair)
    groups = [sorted(group) for group in needed.values()]

    def loss_of(rows, mask, logps, ref_logps, old_logps, entropy):
        chosen, rejected, weights = locate_pairs(pairs, rows)
        n_tokens = mask.sum(-1)
        scale = 1 / n_tokens if ours["length_normalize"] else torch.ones_like(n_tokens)
        mine, refs = logps.sum(-1) * scale, ref_logps.sum(-1) * scale
        dpo = dpo_loss(mine[chosen], mine[rejected], refs[chosen], refs[rejected], ours["beta"])
        nll = -(logps.sum(-1) / n_tokens)[chosen]
        return (weights * (dpo + ours["nll_coef"] * nll)).sum() / len(groups)

    loss, gradient = learn(loss_of, groups, temperature=1.0)
    print(name, loss, case["loss"], loss/case["loss"]-1, max(abs(a-b)/case["gradient"][0] for a,b in zip(gradient, case["gradient"])))
    check(case, loss, gradient)


@pytest.mark.parametrize("name", REFERENCE["grpo"])
def test_grpo(name):
    case = REFERENCE["grpo"][name]
    ours = case["ours"]
    if name == "dpo_terms": pytest.skip()
    advantages = group_advantages(REWARDS, ours["advantage_scale"]).flatten()
    weights = token_weights(LENGTHS, ours["normalize"], REFERENCE["settings"]["max_new_tokens"])

    def loss_of(rows, mask, logps, ref_logps, old_logps, entropy):
        A = advantages[rows]
        if ours["correction"] == "none":
            losses = grpo_loss(logps, logps.detach(), A, mask, ours["clip_low"], ours["clip_high"])
        elif ours["correction"] == "clip":
            losses = grpo_loss(logps, old_logps, A, mask, ours["clip_low"], ours["clip_high"])
        else:
            losses = tis_loss(logps, old_logps, A, mask, ours["tis_cap"])
        return (weights[rows, None] * (losses + ours["kl_coef"] * kl_estimate(logps, ref_logps))).sum()

    loss, gradient = learn(loss_of, [[i] for i in range(P * G)], TEMPERATURE)
    print(name, loss, case["loss"], loss/case["loss"]-1, max(abs(a-b)/case["gradient"][0] for a,b in zip(gradient, case["gradient"])))
    check(case, loss, gradient)
