"""The lines that the benches fit to their measurements."""

import pytest

from bench.growth import FACTORS, PHASES, WIDTHS, fits_of, line
from bench.sync_time import slope


def test_a_leak_has_the_slope_it_leaks_by():
    """A leak that is divided by something and so looks flat. Break: divide it by 2."""
    assert slope([100, 103, 106, 109]) == pytest.approx(3)
    assert slope([7, 9, 7, 9, 7]) == 0  # going up and down is no leak


def test_a_bend_is_not_a_straight_line():
    """An R^2 of 1 whatever the points are. Break: left = 0."""
    assert line([1, 2, 4, 8], [3, 5, 9, 17]) == pytest.approx((1, 2, 1))
    assert line([1, 2, 4, 8], [1, 4, 16, 64])[2] < 0.97
    assert line([1, 2, 4], [5, 5, 5]) == (5, 0, 1)  # nothing to explain, and nothing to divide by


def test_the_last_doubling_is_of_one_factor():
    """A ratio across two factors, or of the wrong end. Break: ys[1] / ys[0]; or `several = points`."""
    points = [
        {"factor": factor, "x": x, "peak_gb": 1.0, "step_s": x**power, **{f"{p}_s": x for p in PHASES}}
        for factor, power in (("P", 2), ("G", 1))
        for x in (1, 2, 6)
    ]
    (fit,) = [f for f in fits_of(points) if (f["factor"], f["what"]) == ("P", "step_s")]
    assert (fit["last_x_ratio"], fit["last_ratio"]) == (3, 9)
    assert set(FACTORS["size"]) == set(WIDTHS)
