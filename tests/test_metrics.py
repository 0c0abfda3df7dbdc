"""What a step measured: the glossary, and what the runs by hand (test_step_by_hand.py) do not reach."""

from pathlib import Path

import pytest
import torch

import metrics
from generate import Rollout

README = (Path(metrics.__file__).parent / "README.md").read_text()


def test_readme_shows_the_glossary():
    """A meaning that was changed in the code and not in README. Break: change a word in GLOSSARY."""
    assert metrics.as_markdown() in README


def test_seen_keeps_response_tokens_and_each_response_loss():
    """A mean over padding, or a loss share given to another response.

    Breaks: no [mask.bool()]; assign instead of index_add_: a response in two pairs keeps the last one's loss.
    """
    seen = metrics.Seen(3)
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    values = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 9.0]])
    seen.tokens(mask, log_ratio=values, kl=2 * values, entropy=3 * values)
    seen.loss(torch.tensor(4.0), [2, 0, 2], torch.tensor([1.0, 2.0, 3.0]))
    found = metrics.of_forwards(seen)
    assert (found["kl_ref"], found["policy_entropy"], found["loss"]) == (4.0, 6.0, 4.0)
    assert seen.loss_of.tolist() == [2.0, 0.0, 4.0]


@pytest.mark.parametrize(("step", "gap"), [(5, (2.0, 3.0)), (7, (None, None))])
def test_mismatch_is_measured_on_fresh_responses_only(step, gap):
    """Drift of the policy read as a mismatch between trainer and engine. Break: gaps at every staleness."""
    seen = metrics.Seen(1)
    seen.tokens(torch.ones(1, 2), torch.tensor([[-1.0, 3.0]]), torch.zeros(1, 2), torch.zeros(1, 2))
    rollouts = [Rollout("p", [1], [2, 3], [-1.0, -1.0], "stop", 5)]
    found = metrics.of_staleness(step, rollouts, seen)
    assert found == {"staleness": step - 5, "logp_gap": gap[0], "logp_gap_max": gap[1]}


def test_a_step_without_a_forward():
    """A loss of 0 where no prompt has a pair, or a mean of nothing. Break: no `if seen.losses`."""
    seen = metrics.Seen(2)
    assert metrics.of_forwards(seen) == {"loss": None, "policy_entropy": None, "kl_ref": None}
    assert set(metrics.of_pairs([], [], seen).values()) == {None}
    assert set(metrics.of_ratios(seen, 0.8, 1.2).values()) == {None}
