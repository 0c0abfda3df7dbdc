"""Intervals over training seeds and problems: by hand, and how often they hold the truth."""

import numpy as np
import pytest

from tables.intervals import (
    NORMAL,
    Estimate,
    crossing,
    over_seeds,
    over_seeds_and_problems,
    seeds_needed,
    t975,
    verdict,
)


def test_student_t_against_simulation():
    """A quantile in another place of the table. Breaks: T975[freedom]; 90 % for 95.

    Of (mean - truth) / standard error over samples of five and of forty normal numbers.
    """
    rng = np.random.default_rng(0)
    for seeds in (3, 5, 40):
        drawn = rng.normal(size=(200_000, seeds))
        t = drawn.mean(1) / (drawn.std(1, ddof=1) / seeds**0.5)
        assert np.mean(abs(t) > t975(seeds - 1)) == pytest.approx(0.05, abs=0.003)


def test_the_interval_of_seeds_by_hand():
    """Breaks: no square root; the population's deviation; the normal's 1.96."""
    estimate = over_seeds([0.5, 0.6, 0.7])
    assert (estimate.mean, estimate.seeds) == (pytest.approx(0.6), 3)
    assert estimate.half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert over_seeds([0.5]).half is None


def test_the_interval_of_seeds_and_problems_by_hand():
    """A part that is lost, or scatter of single answers counted twice.

    Breaks: problems left out; no residual; seeds and problems swapped; 1.96 for t.

    Two seeds, three problems, d = seed's part + problem's part exactly, so there is no residual: seeds -0.1
    and 0.1, problems -0.3, 0 and 0.3.
    """
    d = [[seed + problem for problem in (-0.3, 0.0, 0.3)] for seed in (-0.1, 0.1)]
    estimate = over_seeds_and_problems(d)
    of_seeds, of_problems = 0.02 / 2, 0.09 / 3
    assert estimate.mean == pytest.approx(0)
    assert estimate.half == pytest.approx((12.706**2 * of_seeds + NORMAL**2 * of_problems) ** 0.5)
    # With answers that scatter alone, problems add nothing to what the seeds show already.
    rng = np.random.default_rng(1)
    alone = rng.normal(size=(5, 2000))
    assert over_seeds_and_problems(alone).half == pytest.approx(over_seeds([*alone.mean(1)]).half, rel=0.1)


@pytest.mark.parametrize(
    ("seed", "problem", "answer"), [(0.01, 0.2, 0.3), (0.03, 0.05, 0.3), (0.0, 0.1, 0.3)]
)
def test_intervals_hold_the_truth_nineteen_times_in_twenty(seed, problem, answer):
    """An interval that is too narrow where the seeds, or the problems, are what scatters.

    Breaks: of_problems = 0 (the first case fails); NORMAL for t975 (the second fails).
    """
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        d = rng.normal(0, seed, (5, 1)) + rng.normal(0, problem, (1, 300)) + rng.normal(0, answer, (5, 300))
        estimate = over_seeds_and_problems(d)
        held += abs(estimate.mean) <= estimate.half
    assert 0.935 <= held / 1000 <= 0.985


def test_verdicts():
    """`same` where the interval is wide, or `better` where it holds 0. Breaks: > for <= margin; mean > 0."""
    says = {
        (1.0, 0.5): "better", (-1.0, 0.5): "worse", (0.5, 0.5): "same", (0.6, 0.7): "cannot tell",
        (0.0, 1.0): "same", (0.0, 1.1): "cannot tell", (0.3, 0.2): "better",
    }  # fmt: skip
    assert {key: verdict(Estimate(*key, 5), 1.0 if key != (0.6, 0.7) else 1.2) for key in says} == says
    assert verdict(Estimate(5.0, None, 1), 1.0) == "cannot tell"


def test_seeds_needed_are_as_many_as_decide():
    """One seed fewer that would do, or one more that would not. Breaks: seeds - 2; no square root."""
    estimate = Estimate(1.0, 2.0, 5)
    needed, scatter = seeds_needed(estimate, 0.1), 2.0 * 5**0.5 / 2.776
    assert t975(needed - 1) * scatter / needed**0.5 < 1.0 <= t975(needed - 2) * scatter / (needed - 1) ** 0.5
    nothing = Estimate(0.0, 2.0, 5)  # can be proved the same, never better
    needed = seeds_needed(nothing, 1.0)
    assert t975(needed - 1) * scatter / needed**0.5 <= 1.0 < t975(needed - 2) * scatter / (needed - 1) ** 0.5
    assert seeds_needed(nothing, 1e-6) is None and seeds_needed(Estimate(1.0, None, 1), 1.0) is None


def test_where_a_curve_crosses_a_level():
    """The point after it, or a later crossing. Breaks: next_x for the line; the last crossing."""
    assert crossing([25, 50, 100], [0.1, 0.5, 0.3], 0.4) == pytest.approx(43.75)
    assert crossing([25, 50], [0.5, 0.6], 0.4) == 25 and crossing([25, 50], [0.1, 0.3], 0.4) is None
