"""What a step measured: what the runs by hand (test_step_by_hand.py) do not reach."""

import pytest
import torch

import metrics
from generate import Rollout


def test_seen_keeps_response_tokens_and_each_response_loss():
    """A mean over padding, or a loss share given to another response.

    Breaks: no [mask.bool()]; assign instead of index_add_: a response in two pairs keeps the last one's loss.
    """
    seen = metrics.Seen(3)
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    values = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 9.0]])
    seen.tokens(mask, gap=values, kl=2 * values, entropy=3 * values)
    seen.loss(torch.tensor(4.0), [2, 0, 2], torch.tensor([1.0, 2.0, 3.0]))
    found = metrics.of_forwards(seen)
    assert (found["kl_ref"], found["policy_entropy"], found["loss"]) == (4.0, 6.0, 4.0)
    assert seen.loss_of.tolist() == [2.0, 0.0, 4.0]


@pytest.mark.parametrize("step", [5, 7])
def test_mismatch_is_measured_on_fresh_responses_only(step):
    """Drift of the policy read as a mismatch between trainer and engine; a clipped share that counts one
    side. Breaks: gaps at every staleness; abs() in logp_gap_clip; no abs() in logp_gap_max."""
    seen = metrics.Seen(1)
    gaps = torch.tensor([[0.1] * 97 + [0.19, -0.21, -3.0]])  # log 1.2 is 0.182, log 0.8 is -0.223
    seen.tokens(torch.ones(1, 100), gap=gaps)
    rollouts = [Rollout("p", [1], [2, 3], [-1.0, -1.0], "stop", 5)]
    found = metrics.of_staleness(step, rollouts, seen)
    expected = (0.131, 3.0, 0.02) if step == 5 else (None,) * 3
    assert found.pop("staleness") == step - 5
    assert found.pop("drift") == pytest.approx(0.131)  # at every age
    assert list(found) == ["logp_gap", "logp_gap_max", "logp_gap_clip"]
    for ours, theirs in zip(found.values(), expected, strict=True):
        assert ours == (theirs if theirs is None else pytest.approx(theirs))


def test_a_step_without_a_forward():
    """A loss of 0 where no prompt has a pair, or a mean of nothing. Break: no `if seen.losses`."""
    seen = metrics.Seen(2)
    nothing = {"loss": None, "policy_entropy": None, "kl_ref": None}
    assert metrics.of_forwards(seen) == {**nothing, "learned_tokens": 0}
    assert set(metrics.of_pairs([], [], seen).values()) == {None}
    assert set(metrics.of_ratios(seen).values()) == {None}
