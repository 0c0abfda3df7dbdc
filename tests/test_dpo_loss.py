"""DPO's loss, the pairing rules and the batches: numbers by hand, gradients by finite differences."""

import math
import random
from contextlib import suppress

import pytest
import torch

from train_dpo import dpo_loss, locate_pairs, pick_pairs


def test_policy_equal_to_reference_costs_log_2():
    """A sign or a role mixed up in the margin. Break: add ref_chosen_logps instead of subtracting it."""
    logps = torch.tensor([-3.0, -50.0])
    other = torch.tensor([-7.0, -2.0])
    assert torch.allclose(dpo_loss(logps, other, logps, other, beta=0.1), torch.full((2,), math.log(2)))


def test_loss_by_hand():
    """beta outside the sigmoid, or chosen and rejected swapped. Break: swap the two gains.

    beta 0.1, gains +2 (chosen) and -3 (rejected): margin 5, loss -log sigmoid(0.5) = log(1 + e^-0.5) =
    0.474077.
    """
    loss = dpo_loss(
        torch.tensor([-8.0]), torch.tensor([-15.0]), torch.tensor([-10.0]), torch.tensor([-12.0]), 0.1
    )
    assert loss.item() == pytest.approx(0.4740769841801067, rel=1e-6)


def test_gradient_against_finite_differences():
    """A detach or an in-place write inside the loss. Break: detach chosen_gain."""
    torch.manual_seed(0)
    arguments = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *a: dpo_loss(*a, 0.7), arguments)


def test_loss_pushes_chosen_up_and_rejected_down():
    """The classic flipped sign, which trains a model to be wrong. Break: negate the margin.

    At margin 0 the gradient is -beta / 2 on the chosen and +beta / 2 on the rejected log-prob.
    """
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.05) and rejected.grad.item() == pytest.approx(0.05)


def test_loss_far_from_the_reference():
    """A sigmoid that underflows: an infinite loss and no gradient, where offline training arrives.

    Break: -torch.sigmoid(x).log() for -F.logsigmoid(x). At margins of -2000 and 2000 the loss is 200 and 0.
    """
    chosen = torch.tensor([-3000.0, -1000.0], requires_grad=True)
    loss = dpo_loss(chosen, torch.tensor([-1000.0, -3000.0]), torch.zeros(2), torch.zeros(2), beta=0.1)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([200, 0]) and chosen.grad.tolist() == pytest.approx([-0.1, 0])


def test_group_dpo_is_the_mean_over_pairs():
    """GroupDPO that weighs prompts by their pairs, mixes rows up, or depends on how the batch is cut.

    Breaks: a weight of 1, or of 1 / len(pairs); row_of from sorted(rows); swap the chosen and the rejected.

    Prompts 0, 1 and 2 have 4, 3 and no pairs. 8 responses have a row, where 7 pairs would have 14.
    """
    torch.manual_seed(0)
    ours, refs = torch.randn(2, 12, dtype=torch.float64)
    ours.requires_grad_()
    picked = pick_pairs([[1.0, 0, 1, 0], [0.0, 0, 1, 0], [1.0, 1, 1, 1]], "all")
    pairs = [(p, 4 * p + chosen, 4 * p + rejected) for p, chosen, rejected in picked]

    def one(c, r):
        return dpo_loss(ours[c], ours[r], refs[c], refs[r], 0.7)

    expected = (one(0, 1) + one(0, 3) + one(2, 1) + one(2, 3)) / 4 + (one(6, 4) + one(6, 5) + one(6, 7)) / 3

    def in_batches(ours, *batches):
        total = 0
        for rows in batches:
            chosen, rejected, weights = locate_pairs(pairs, rows)
            x, y = ours[rows], refs[rows]
            total += (weights * dpo_loss(x[chosen], x[rejected], y[chosen], y[rejected], 0.7)).sum()
        return total

    whole, cut = [[3, 1, 7, 5, 0, 6, 4, 2]], [[6, 4, 7, 5], [2, 3, 1, 0]]
    (gradient,) = torch.autograd.grad(expected, ours)
    for batches in (whole, cut):
        total = in_batches(ours, *batches)
        assert total.item() == pytest.approx(expected.item(), rel=1e-6)
        assert torch.allclose(torch.autograd.grad(total, ours)[0], gradient, rtol=1e-6)
    assert torch.autograd.gradcheck(lambda x: in_batches(x, *cut), ours)


ALL_RIGHT, ALL_WRONG, MIXED = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]


@pytest.mark.parametrize("how", ["random", "bestworst", "all"])
def test_groups_without_a_preference_give_no_pair(how):
    """All-right and all-wrong groups trained on as if they held a preference.

    Break: drop the best == worst test.
    """
    assert pick_pairs(torch.tensor([ALL_RIGHT, ALL_WRONG]), how) == []


def test_random_pairs_are_right_against_wrong_and_cover_all():
    """Always the first right response, or a pair across prompts.

    Break: replace rng.choice(every) by every[0].
    """
    rewards, rng = torch.tensor([ALL_WRONG, [1.0, 0.0, 1.0, 0.0][:3], MIXED]), random.Random(0)
    draws = [pick_pairs(rewards, "random", rng) for _ in range(200)]
    assert all(len(pairs) == 2 for pairs in draws)  # one a prompt, where there is one
    assert {pair for pairs in draws for pair in pairs} == {(1, 0, 1), (1, 2, 1), (2, 1, 0), (2, 1, 2)}


def test_random_pairs_repeat_with_the_seed():
    """A hidden source of randomness would make two runs with one seed differ.

    Break: ignore the rng argument.
    """
    rewards = torch.tensor([[1.0, 0.0] * 8] * 8)
    first, second = (pick_pairs(rewards, "random", random.Random("3/7")) for _ in range(2))
    assert first == second != pick_pairs(rewards, "random", random.Random("3/8"))


def test_bestworst_takes_the_extremes_and_skips_ties():
    """The lowest score chosen, or a group of ties made into a pair. Break: swap max and min."""
    assert pick_pairs([[0.5, -2.0, 3.0, 3.0], [0.7, 0.7, 0.7, 0.7]], "bestworst") == [(0, 2, 1)]


@pytest.mark.parametrize("how", ["bestworst", "random", "all"])
def test_no_response_is_paired_with_itself(how):
    """Comparisons with NaN are all false, so min() and max() may be one response. Break: best == worst."""
    for group in ([math.nan, 0.0, 1.0], [1.0, math.nan, 0.0], [math.nan] * 3, [0.0, 1.0, math.nan]):
        with suppress(ValueError):
            assert all(chosen != rejected for _, chosen, rejected in pick_pairs([group], how))


def test_all_pairs_every_right_with_every_wrong():
    """GroupDPO that loses pairs. Break: zip(right, wrong) instead of product."""
    assert pick_pairs([[1.0, 0.0, 1.0, 0.0]], "all") == [(0, 0, 1), (0, 0, 3), (0, 2, 1), (0, 2, 3)]


def test_random_refuses_scalar_rewards():
    """A reward model's scores read as right and wrong. Break: drop the check."""
    with pytest.raises(ValueError, match="bestworst"):
        pick_pairs([[0.3, 0.9]], "random")
