"""Whole runs of both scripts against the same runs by hand: one pair, one response, one token at a time.

The runs go through the real loop. Engine and grader are stubs: responses and rewards come from SCRIPT.
"""

import copy
import math
from collections import defaultdict
from itertools import product
from statistics import fmean

from flags import parse_flags

import pytest
import torch
from conftest import Grader
from transformers import AutoModelForCausalLM

import train_dpo
import train_grpo
from data import Prompt
from model import token_logps
from run import read_metrics

# What is answered to each problem; right where it says yes. Four pairs, three pairs, and none.
SCRIPT = {
    "What?": ["yes", "no, not at all, not in any way", "yes, and then some", "no"],
    "And what of this, the second of three?": ["no", "no, no", "yes, in far more words than no has", "nope"],
    "What else?": ["no", "nothing", "no, never, not in a hundred years", "not"],
}
PROMPTS = [Prompt(id=q, task="math", messages=[{"role": "user", "content": q}], answer="") for q in SCRIPT]
RIGHT, WRONG = (
    [len(text) + 1 for texts in SCRIPT.values() for text in texts if ("yes" in text) == right]
    for right in (True, False)
)  # tokens: a byte each, and the stop
EACH_STEP = {"pair_frac": 2 / 3, "right_length": fmean(RIGHT), "wrong_length": fmean(WRONG)}

# Two steps: in the first the policy equals the reference. With an epsilon far above every gradient, Adam is
# plain descent with momentum at a rate of lr / eps, so that the weights show the gradient's size.
FLAGS = [
    *("--steps", "2", "--sync-every", "inf", "--prompts-per-step", "3", "--samples-per-prompt", "4"),
    *("--engine", "transformers", "--lr", "1e6", "--adam-eps", "1e8", "--grad-clip", "1e9"),
]


@pytest.fixture
def both_ways(scripted, monkeypatch, checkpoints, tmp_path):
    """Run a script and the same by hand, compare metrics and weights. Returns the rows of each forward."""

    def call(script, by_hand, *flags):
        engines, rows = scripted([(PROMPTS, 1)], SCRIPT, noise=0.3), []

        def counted(model, input_ids, *rest, **named):
            rows.append(len(input_ids))
            return token_logps(model, input_ids, *rest, **named)

        monkeypatch.setattr("rewards.MathVerifier", Grader)
        monkeypatch.setattr(script, "token_logps", counted)
        args = [*FLAGS, *flags, "--model", checkpoints["llama"], "--run-dir", str(tmp_path / "run")]
        script.main(args)
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export" / "2")

        seed = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float64)
        policy, config, groups = copy.deepcopy(seed), parse_flags(script.Config, args), engines[0].groups
        optimizer = torch.optim.AdamW(policy.parameters(), config.lr, eps=config.adam_eps, weight_decay=0)
        for metrics, step in zip(read_metrics(tmp_path / "run"), (groups[:3], groups[3:]), strict=True):
            fresh = metrics["step"] == 0  # the policy sampled these itself
            loss, seen = by_hand(policy, seed, step, config, fresh)
            loss.backward()
            norm = torch.cat([p.grad.flatten() for p in policy.parameters()]).norm()
            expected = {"loss": loss.item(), "grad_norm": norm.item(), **seen, **EACH_STEP}
            found = {key: metrics[key] for key in expected}
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
            optimizer.step()
            optimizer.zero_grad()
        before, ours, theirs = (
            torch.cat([p.detach().double().flatten() for p in model.parameters()])
            for model in (seed, exported, policy)
        )
        assert (ours - theirs).norm() < 1e-3 * (theirs - before).norm()
        return rows

    return call


def tokens(model, rollout, temperature):
    """Log-prob of each response token, and entropy of the distribution that it is from: (n,), (n,)."""
    start, ids = len(rollout.prompt_ids), rollout.prompt_ids + rollout.response_ids
    logp = (model(torch.tensor([ids])).logits[0, start - 1 : -1] / temperature).log_softmax(-1)  # (n, V)
    return logp[range(len(logp)), rollout.response_ids], -(logp.exp() * logp).sum(-1)


def k3(logp, ref):
    """Schulman's estimate of the KL divergence to the reference, from one token or from several."""
    return (ref - logp).exp() - 1 - (ref - logp)


def clipped(logp, old_logp, advantage, low, high):
    """PPO's loss of one token, by cases."""
    ratio = (logp - old_logp).exp()
    if advantage > 0 and ratio > 1 + high:
        return -(1 + high) * advantage
    if advantage < 0 and ratio < 1 - low:
        return -(1 - low) * advantage
    return -ratio * advantage


def dpo_by_hand(policy, reference, groups, config, fresh):
    """All pairs, or the first right and the first wrong response, with every other term (paper section 3).

    Returns the loss, and the metrics that the models have a part in.
    """
    prompts, entropies, grpo, seen = [], [], [], defaultdict(list)
    for group in groups:
        rewards = ["yes" in text for text in SCRIPT[group[0].prompt_id]]
        right = [i for i, reward in enumerate(rewards) if reward]
        pairs = list(product(right, [i for i, reward in enumerate(rewards) if not reward]))
        if not pairs:
            continue
        if config.pairing == "bestworst":
            pairs = pairs[:1]
        ours, entropy = zip(*[tokens(policy, rollout, config.temperature) for rollout in group], strict=True)
        refs = [tokens(reference, rollout, config.temperature)[0].detach() for rollout in group]
        size = torch.mean if config.length_normalize else torch.sum
        losses = []
        for chosen, rejected in pairs:
            margin = size(ours[chosen]) - size(refs[chosen]) - size(ours[rejected]) + size(refs[rejected])
            losses.append((1 + (-config.beta * margin).exp()).log() - config.nll_coef * ours[chosen].mean())
            seen["margin"].append(margin.item())
            for who, i in (("chosen", chosen), ("rejected", rejected)):
                seen[f"{who}_logp"].append(ours[i].sum().item())
                seen[f"{who}_length"].append(len(ours[i]))
        prompts.append(sum(losses) / len(losses))
        for i in range(len(group)) if config.grpo_coef else {i for pair in pairs for i in pair}:
            advantage = rewards[i] - sum(rewards) / len(group)
            old_logps = ours[i].tolist() if fresh else group[i].logps
            terms = zip(ours[i], old_logps, strict=True)
            grpo.append(sum(clipped(logp, old, advantage, 0.2, 0.2) for logp, old in terms))
            entropies += entropy[i]
            seen["kl_ref"] += k3(ours[i], refs[i]).tolist()
            seen["policy_entropy"] += entropy[i].tolist()
    dpo, entropy, grpo = (sum(terms) / len(terms) for terms in (prompts, entropies, grpo))
    loss = dpo - config.entropy_coef * entropy + config.grpo_coef * grpo
    return loss, {key: fmean(values) for key, values in seen.items()}


def grpo_by_hand(policy, reference, groups, config, fresh):
    """The sum over the tokens of all responses, each divided as --normalize says; returns as above."""
    lengths = [len(rollout.response_ids) for group in groups for rollout in group]
    loss, seen = 0, defaultdict(list)
    for group in groups:
        rewards = ["yes" in text for text in SCRIPT[group[0].prompt_id]]
        mean = sum(rewards) / len(group)
        deviation = (sum((reward - mean) ** 2 for reward in rewards) / (len(group) - 1)) ** 0.5
        for rollout, reward in zip(group, rewards, strict=True):
            advantage = (reward - mean) / (deviation + 1e-4 if config.advantage_scale == "std" else 1)
            divisor = {
                "token": sum(lengths),
                "sequence": len(lengths) * len(rollout.response_ids),
                "constant": len(lengths) * config.max_new_tokens.of("math"),
            }[config.normalize]
            logps, entropy = tokens(policy, rollout, config.temperature)
            refs = tokens(reference, rollout, config.temperature)[0].detach()
            at_hand = fresh and config.correction in ("none", "clip")
            old_logps = logps.tolist() if at_hand else rollout.logps
            whole = (logps.sum() - sum(old_logps)).exp().item()  # the response's ratio
            seen["weights"].append(whole)
            for logp, ref, old in zip(logps, refs, old_logps, strict=True):
                ratio = (logp - old).exp().item()
                if config.correction == "clip":
                    term = clipped(logp, old, advantage, config.clip_low, config.clip_high)
                    bound = ratio < 1 - config.clip_low or ratio > 1 + config.clip_high
                elif config.correction == "tis":
                    term = -min(ratio, config.tis_cap) * advantage * logp
                    bound = ratio > config.tis_cap
                elif config.correction in ("seq_tis", "seq_mis"):
                    bound = whole > config.tis_cap
                    weight = (
                        min(whole, config.tis_cap) if config.correction == "seq_tis" else whole * (not bound)
                    )
                    term = -weight * advantage * logp
                elif config.correction == "dppo":
                    p, before = logp.exp().item(), math.exp(old)
                    bound = abs(p - before) > config.dppo_delta
                    away = (p > before) if advantage > 0 else (p < before)
                    term = -(not (bound and away)) * ratio * advantage * logp
                else:  # the value of a ratio of 1, the gradient of -advantage * logp
                    term = -advantage * (1 + logp - logp.detach())
                    bound = False
                loss = loss + (term + config.kl_coef * k3(logp, ref)) / divisor
                seen["ratio"].append(ratio)
                seen["bound_frac"].append(bound)
            seen["kl_ref"] += k3(logps, refs).tolist()
            seen["policy_entropy"] += entropy.tolist()
    weights = seen.pop("weights")
    ess = sum(weights) ** 2 / (len(weights) * sum(weight**2 for weight in weights))
    seen = {"ratio_max": [max(seen["ratio"])], "ess": [ess], "learned_tokens": [sum(lengths)], **seen}
    return loss, {key: fmean(values) for key, values in seen.items()}


ALL_PAIRS = "--pairing all --nll-coef 0.5 --entropy-coef 0.5"
ONE_PAIR = "--pairing bestworst --length-normalize --temperature 0.7 --beta 2"
COMBINED = "--pairing bestworst --grpo-coef 0.5 --entropy-coef 0.5"
NONE = "--correction none --normalize token --kl-coef 0.5"
TIS = "--correction tis --tis-cap 1.1 --normalize sequence --advantage-scale std --kl-coef 0.5"
SEQ_TIS = "--correction seq_tis --tis-cap 1.1 --normalize token --kl-coef 0.5"
SEQ_MIS = "--correction seq_mis --tis-cap 1.1 --normalize constant --kl-coef 0.5"
DPPO = "--correction dppo --dppo-delta 0.001 --normalize token --kl-coef 0.5"
CLIP = "--correction clip --clip-high 0.4 --normalize constant --kl-coef 0.5 --temperature 0.7"
CUT, WHOLE = 150, 16384  # tokens in a micro-batch: two or three responses, or all of a step's


@pytest.mark.parametrize("limit", [CUT, WHOLE])
@pytest.mark.parametrize(("flags", "responses"), [(ALL_PAIRS, 8), (ONE_PAIR, 4), (COMBINED, 8)])
def test_dpo_step_by_hand(both_ways, flags, responses, limit):
    """A term that is lost, scaled by the cut of the batch, or fed with another's rows.

    Breaks, each alone: `/ len(rows)` for `/ len(groups)`, `/ all_tokens` or `/ all_rows`; weights of 1; nll
    of the rejected, or not per token; detach entropy, or its sign; swap ours and refs; no scale for refs; no
    temperature for one of the models; the advantages of other rows; grpo of the paired responses alone;
    old log-probs of the sampler at the first step, or the policy's at the second; no reference there. In
    the metrics: rejected for chosen, or `ours` for logps.sum(-1), in one of the logps; all pairs of a
    micro-batch but the first; no [mask.bool()]; score == 0 for score == 1; a margin of `ours`.
    """
    rows = both_ways(train_dpo, dpo_by_hand, *flags.split(), "--micro-batch-tokens", str(limit))
    # Each once a step through the policy, and once through the reference where that is not the policy.
    assert sum(rows) == (2 + 1) * responses
    assert len(rows) > 2 + 1 if limit == CUT else len(rows) == 2 + 1


@pytest.mark.parametrize("limit", [CUT, WHOLE])
@pytest.mark.parametrize("flags", [NONE, TIS, CLIP, SEQ_TIS, SEQ_MIS, DPPO])
def test_grpo_step_by_hand(both_ways, flags, limit):
    """A correction, a normaliser or a KL term that is another, or that depends on the cut of the batch.

    Breaks, each alone: `per_token[: len(part), None]`; `advantages[: len(part)]`; token_weights of a
    micro-batch's lengths; detach kl; sampler_logps for logps.detach(), or logps.detach() for tis; no
    --advantage-scale; no reference at the second step; no temperature
    for one of the models; swap clip_low and clip_high; a cap of 2; the policy's own log-probs at the first
    step of seq_tis or dppo. In the metrics: log_ratio for its exp; the last ratio for the largest; swap low
    and high; clip's bounds for tis; the bounds of tokens for seq_tis; no [mask.bool()]; a token's ratio in
    ess, or no square.
    """
    rows = both_ways(train_grpo, grpo_by_hand, *flags.split(), "--micro-batch-tokens", str(limit))
    assert sum(rows) == (2 + 1) * 12
    assert len(rows) > 2 + 1 if limit == CUT else len(rows) == 2 + 1
