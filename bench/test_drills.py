"""How the drills read what they measure."""

import random
from statistics import median

import pytest

from bench.bad_inputs import last_line
from bench.poison import KINDS, batches
from bench.soak import summary


def test_a_leak_shows_in_its_slope():
    """A leak hidden by start-up memory, or divided by the wrong unit.

    Breaks: points for late; 1 * slope.
    """
    starts = [(minute, 5.0 * minute, 9) for minute in range(30)]
    steady = [(minute, 150 + 0.1 * (minute - 30), 9) for minute in range(30, 121)]
    row = summary("trainer", 1, starts + steady)
    assert row["mb_an_hour"] == pytest.approx(6) and row["minutes"] == [0, 120]
    assert row["mb_at_the_end"] > row["mb_after_a_quarter"] > 149
    assert summary("grader", 2, [(7, 50.0, 9)])["mb_an_hour"] is None  # seen once


def test_every_poisoned_response_is_given():
    """A kind that never comes, or one that is the same text each time. Break: range(0, count - 1, size)."""
    given = batches(random.Random(0), 3)
    assert sum(len(items) for _, items in given) == sum(count for count, _ in KINDS.values()) == 1000
    assert {kind for kind, _ in given} == set(KINDS)
    assert all(1 <= len(items) <= 3 for _, items in given) and median(len(i) for _, i in given) >= 2
    assert all(isinstance(text, str) for _, items in given for item in items for text in item)


def test_the_last_line_is_not_a_progress_bar():
    """A table of progress bars. Break: no re.search."""
    said = (
        "train_dpo: 1\rtrain_dpo:  50%|###  | 3/6 [00:01<00:01, 2.6it/s, loss=1]\n\ntrain_dpo.py: --lr: no\n"
    )
    assert last_line(said) == "train_dpo.py: --lr: no"
    assert last_line(said + "train_dpo: 100%|#####| 6/6 [00:02<00:00, 2.6it/s]") == "train_dpo.py: --lr: no"
    assert last_line("") == ""
