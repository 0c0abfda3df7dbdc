"""GRPO's advantages, losses and normalisers: by hand, by finite differences, and as REINFORCE."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from model import token_logps
from train_grpo import (
    dppo_loss,
    group_advantages,
    grpo_loss,
    kl_estimate,
    seq_mis_loss,
    seq_tis_loss,
    tis_loss,
    token_weights,
)

LOW, HIGH, CAP, DELTA = 0.2, 0.3, 2.0, 0.2


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


# Three responses of 2, 3 and 2 tokens, whose ratios multiply to 1.5, 3 and 0.25; the last column is masked.
RATIOS = torch.tensor([[3.0, 0.5, 1, 9], [2.0, 1.5, 1.0, 9], [0.5, 0.5, 1, 9]], dtype=torch.float64)
MASK = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "weights"), [(seq_tis_loss, (1.5, 2, 0.25)), (seq_mis_loss, (1.5, 0, 0.25))]
)
def test_sequences_are_weighed_by_a_number(loss, weights):
    """A weight of tokens, a mean for the product, one that is differentiated, too, or a mask the other way.

    Breaks: no sum(-1); mean(-1); drop the detach; old_logps - logps; no mask in the sum, or in the loss;
    ratio < cap; the cap in place of 0.
    """
    old, A = torch.full_like(RATIOS, -4.0), torch.tensor([0.75, -0.25, 0.5])
    _, gradient = value_and_gradient(loss, old + RATIOS.log(), old, A, MASK, CAP)
    assert torch.allclose(gradient, -(torch.tensor(weights) * A)[:, None].double() * MASK)


@pytest.mark.parametrize("loss", [seq_tis_loss, seq_mis_loss, tis_loss, dppo_loss])
def test_a_ratio_beyond_floats_is_cut_like_any_other(loss):
    """exp overflows at 88 nats, which a long response reaches: inf or NaN. Breaks: ratio * (ratio <= cap); no
    clamp in dppo_loss."""
    old = torch.full((2, 4), -100.0)
    _, gradient = value_and_gradient(loss, torch.zeros(2, 4), old, torch.ones(2), torch.ones(2, 4), CAP)
    assert gradient.isfinite().all()


def test_a_sequence_weight_makes_old_responses_count_as_fresh_ones():
    """In an exact toy: the gradient of the policy's expected reward from responses of another policy.

    Two tokens of three kinds, where the first decides what the second is drawn from; every response weighed
    by how often the old policy samples it. With a response's whole ratio the sum is the true gradient; with a
    ratio a token it is not, and without any still less. Breaks: tis_loss's weight in seq_tis_loss.
    """
    torch.manual_seed(0)
    old_logits = torch.randn(4, 3, dtype=torch.float64)  # of the first token, and of the second after each
    logits = (old_logits + 0.5 * torch.randn(4, 3, dtype=torch.float64)).requires_grad_()
    pairs, rewards = torch.cartesian_prod(torch.arange(3), torch.arange(3)), torch.randn(9).double()

    def logps_under(logits):  # (9, 2)
        table = logits.log_softmax(-1)
        return torch.stack([table[0, pairs[:, 0]], table[1 + pairs[:, 0], pairs[:, 1]]], 1)

    logps, old_logps, mask = logps_under(logits), logps_under(old_logits), torch.ones(9, 2)
    sampled = old_logps.sum(-1).exp()[:, None]  # how often the old policy gives each response
    (truth,) = torch.autograd.grad(-(logps.sum(-1).exp() * rewards).sum(), logits, retain_graph=True)
    errors = []
    for losses in (
        seq_tis_loss(logps, old_logps, rewards, mask, 1e9),
        tis_loss(logps, old_logps, rewards, mask, 1e9),
        grpo_loss(logps, logps.detach(), rewards, mask, LOW, HIGH),
    ):
        (found,) = torch.autograd.grad((sampled * losses).sum(), logits, retain_graph=True)
        errors.append(((found - truth).norm() / truth.norm()).item())
    assert errors[0] < 1e-6 and 0.05 < errors[1] < errors[2]


def test_the_trust_region_by_hand():
    """A mask of ratios, a mask on both sides, or one for the wrong sign of the advantage.

    Probabilities before 0.5, 0.5, 0.01, 0.8, 0.3 and after 0.75, 0.2, 0.04, 0.7, 0.45: the first two have
    moved by more than 0.2, up and down; the third has quadrupled, but by 0.03 alone. A > 0 drops the first,
    A < 0 the second. Breaks: ratio outside 1 +- delta for moved(); no `further`; < 0 for > 0; keep inverted;
    a ratio that is not detached; no mask.
    """
    old = torch.tensor([[0.5, 0.5, 0.01, 0.8, 0.3]] * 2, dtype=torch.float64).log()
    new = torch.tensor([[0.75, 0.2, 0.04, 0.7, 0.45]] * 2, dtype=torch.float64).log()
    mask = torch.tensor([[1.0, 1, 1, 1, 0]] * 2)
    _, gradient = value_and_gradient(dppo_loss, new, old, torch.tensor([2.0, -2.0]), mask, DELTA)
    expected = torch.tensor([[0, -0.8, -8, -1.75, 0], [3, 0, 8, 1.75, 0]], dtype=torch.float64)
    assert torch.allclose(gradient, expected)


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


LOSSES = {
    "clip": (grpo_loss, LOW, HIGH),
    "tis": (tis_loss, CAP),
    "seq_tis": (seq_tis_loss, CAP),
    "seq_mis": (seq_mis_loss, CAP),
    "dppo": (dppo_loss, DELTA),
}


@pytest.mark.parametrize("name", LOSSES)
def test_fresh_responses_give_reinforce_with_a_baseline(policy, name):
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
    loss, *limits = LOSSES[name]
    found = gradients(policy, loss(logps, logps.detach(), A, mask, *limits).sum())
    assert (found - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 1


@pytest.mark.parametrize("scale", ["none", "std"])
def test_equal_rewards_leave_the_model_alone(policy, scale):
    """All right or all wrong, also under stale log-probs: no loss and no gradient, not even a rounding's.

    Break: `advantages + 1e-8` in either loss.
    """
    ids, mask = batch()
    A = group_advantages(torch.ones(1, 4), scale).flatten()
    logps = token_logps(policy, ids, mask)
    for loss, *limits in LOSSES.values():
        losses = loss(logps, logps.detach() - 0.1, A, mask, *limits)
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
