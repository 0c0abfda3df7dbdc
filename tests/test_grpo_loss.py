"""GRPO's advantages, losses and normalisers: by hand, by finite differences, and as REINFORCE."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from model import token_logps
from train_grpo import group_advantages, grpo_loss, kl_estimate, tis_loss, token_weights

LOW, HIGH, CAP = 0.2, 0.3, 2.0


def value_and_gradient(loss, *arguments):
    """Of the sum of a loss over tokens, by its first argument: values (B, T), gradients (B, T)."""
    logps, *rest = arguments
    logps = logps.clone().requires_grad_()
    values = loss(logps, *rest)
    (gradient,) = torch.autograd.grad(values.sum(), logps)
    return values.detach(), gradient


def test_clipping_by_hand():
    """A bound that binds on the wrong side, or two bounds mixed up.

    Breaks: max for min; swap clip_low and clip_high; the clipped term alone; a ratio upside down; no mask.

    r = 1.5, 0.5, 1.1, 0.9 under bounds 0.8 and 1.3: for A = 2 only r = 1.5 has gone too far, for A = -2 only
    r = 0.5. There the gradient is zero, elsewhere -r A. The last column is masked.
    """
    ratio, mask = torch.tensor([[1.5, 0.5, 1.1, 0.9, 0.9]] * 2), torch.tensor([[1.0, 1, 1, 1, 0]] * 2)
    old = torch.full((2, 5), -1.5)
    values, gradient = value_and_gradient(
        grpo_loss, old + ratio.log(), old, torch.tensor([2.0, -2.0]), mask, LOW, HIGH
    )
    assert torch.allclose(values, torch.tensor([[-2.6, -1.0, -2.2, -1.8, 0], [3.0, 1.6, 2.2, 1.8, 0]]))
    assert torch.allclose(gradient, torch.tensor([[0.0, -1.0, -2.2, -1.8, 0], [3.0, 0, 2.2, 1.8, 0]]))


def test_gradients_against_finite_differences():
    """A detach in a loss. Breaks: detach ratio; detach log_ratio in kl_estimate, or its exp() alone."""
    torch.manual_seed(0)
    logps, old, ref = -3 * torch.rand(3, 4, 5, dtype=torch.float64)
    A, mask = torch.randn(4), torch.rand(4, 5).round()
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, old, A, mask, LOW, HIGH), logps.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref), logps)


def test_tis_weighs_by_a_number():
    """A weight that is differentiated, too, or a ratio upside down.

    Breaks: drop the detach; old_logps - logps; clamp(min=cap); no clamp; no mask. The third column is masked.
    """
    ratio = torch.tensor([[0.5, 1.0, 1.9, 2.1, 7.0]] * 2, dtype=torch.float64)
    old, mask = torch.full_like(ratio, -4.0), torch.ones_like(ratio)
    mask[:, 2] = 0
    A = torch.tensor([0.75, -0.25])
    _, gradient = value_and_gradient(tis_loss, old + ratio.log(), old, A, mask, CAP)
    weight = torch.tensor([0.5, 1.0, 0, CAP, CAP], dtype=torch.float64)
    assert torch.allclose(gradient, torch.stack([-0.75 * weight, 0.25 * weight]))


def test_correction_none_has_the_gradient_of_a_ratio_of_1():
    """How the loop asks for no correction: a ratio of logps to themselves, detached, is never clipped.

    Breaks: a ratio of old_logps - logps; the clamp's bounds both above 1.
    """
    torch.manual_seed(0)
    logps, A = -5 * torch.rand(2, 6), torch.tensor([1.5, -0.5])
    values, gradient = value_and_gradient(
        lambda x: grpo_loss(x, x.detach(), A, torch.ones(2, 6), LOW, HIGH), logps
    )
    assert torch.equal(values, -A[:, None].expand(2, 6)) and torch.equal(gradient, values)


def test_kl_estimate_is_the_kl_divergence_in_the_mean():
    """Another estimate in the place of k3, or k3 of the KL divergence the other way round.

    Breaks: swap logps and ref_logps in log_ratio; `log_ratio**2 / 2`; drop the - 1.

    Over all tokens, weighed by the policy's probabilities, k3 is the KL divergence itself. Its gradient by
    the policy's log-prob is 1 - reference / policy.
    """
    torch.manual_seed(0)
    logps, ref_logps = (2 * torch.randn(2, 50, dtype=torch.float64)).log_softmax(-1)
    values, gradient = value_and_gradient(kl_estimate, logps, ref_logps)
    kl = (logps.exp() * (logps - ref_logps)).sum()
    assert (logps.exp() * values).sum().item() == pytest.approx(kl.item(), rel=1e-9) and kl > 1
    assert values.min() >= 0 and kl_estimate(logps, logps).abs().max() == 0
    assert torch.allclose(gradient, 1 - ref_logps.exp() / logps.exp())


def test_advantages_by_hand():
    """A mean over the batch, not the group. Breaks: rewards.mean(); std(correction=0); drop the 1e-4."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [3.0, 5.0, 3.0, 5.0]])
    centered = torch.tensor([[0.75, -0.25, -0.25, -0.25], [-1.0, 1.0, -1.0, 1.0]])
    assert torch.allclose(group_advantages(rewards), centered)
    deviations = torch.tensor([[0.25**0.5], [(4 / 3) ** 0.5]])  # squares summed, over G - 1
    assert torch.allclose(group_advantages(rewards, "std"), centered / (deviations + 1e-4), rtol=1e-6)


@pytest.mark.parametrize("scale", ["none", "std"])
def test_equal_rewards_give_exactly_zero(scale):
    """The mean of equal numbers rounds, and a division by almost nothing makes a gradient of what is left.

    Break: center by the mean alone. Twelve rewards of -7.3 then have advantages of 0.005 each under std.
    """
    for size in range(2, 17):
        for reward in (0.0, 1.0, 0.1, 1 / 3, -7.3):
            assert not group_advantages(torch.full((2, size), reward), scale).any(), (size, reward)


@pytest.fixture(scope="module")
def policy(checkpoints):
    return AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32)


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def batch():
    """(input_ids, response_mask), (4, 12) each."""
    torch.manual_seed(0)
    mask = torch.zeros(4, 12)
    for row, (start, end) in enumerate([(3, 12), (4, 7), (5, 10), (6, 12)]):
        mask[row, start:end] = 1
    return torch.randint(0, 256, (4, 12)), mask


@pytest.mark.parametrize("loss", ["clip", "tis"])
def test_fresh_responses_give_reinforce_with_a_baseline(policy, loss):
    """On-policy GRPO is nothing but REINFORCE: -(reward - mean) grad log p, token by token, in a plain loop.

    Breaks: advantages.roll(1); twice the advantages where they are positive; response_mask.roll(1).
    """
    ids, mask = batch()
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    expected = 0
    for row in range(4):
        logp = policy(ids[row : row + 1]).logits[0].log_softmax(-1)  # (T, V)
        for t in range(1, 12):
            if mask[row, t]:
                expected = expected - (rewards[row] - 0.5) * logp[t - 1, ids[row, t]]
    expected = gradients(policy, expected)

    logps = token_logps(policy, ids, mask)
    A = group_advantages(rewards[None]).flatten()
    if loss == "clip":
        losses = grpo_loss(logps, logps.detach(), A, mask, LOW, HIGH)
    else:
        losses = tis_loss(logps, logps.detach(), A, mask, CAP)
    found = gradients(policy, losses.sum())
    assert (found - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 1


@pytest.mark.parametrize("scale", ["none", "std"])
def test_equal_rewards_leave_the_model_alone(policy, scale):
    """All right or all wrong, also under stale log-probs: no loss and no gradient, not even a rounding's.

    Break: `advantages + 1e-8` in either loss.
    """
    ids, mask = batch()
    A = group_advantages(torch.ones(1, 4), scale).flatten()
    logps = token_logps(policy, ids, mask)
    for losses in (
        grpo_loss(logps, logps.detach() + 0.1, A, mask, LOW, HIGH),
        tis_loss(logps, logps.detach() - 0.1, A, mask, CAP),
    ):
        assert losses.abs().max() == 0
        policy.zero_grad()
        losses.sum().backward(retain_graph=True)
        assert all(p.grad.abs().max() == 0 for p in policy.parameters())


def test_token_weights_by_hand():
    """A normaliser under another's name. Breaks: swap two names; leave out rows; lengths.sum() for tokens.

    Four responses of 1, 2, 2 and 5 tokens, 10 together; at most 20 each.
    """
    lengths, step = torch.tensor([1, 2, 2, 5]), {"rows": 4, "tokens": 10}
    assert token_weights(lengths, "token", 20, **step).tolist() == pytest.approx([0.1] * 4)
    by_sequence = token_weights(lengths, "sequence", 20, **step).tolist()
    assert by_sequence == pytest.approx([1 / 4, 1 / 8, 1 / 8, 1 / 20])
    assert token_weights(lengths, "constant", 20, **step).tolist() == pytest.approx([1 / 80] * 4)
    half = token_weights(lengths[:2], "token", 20, **step)  # another rank has the other two
    assert half.tolist() == pytest.approx([0.1] * 2)
