"""How sure a mean over training seeds is, and a difference between two rows: 95 % intervals.

A row is trained with S seeds, and each of its models answers the same P problems. Both are samples:
another seed trains another model, another test set asks other problems. With d[s, p] the accuracy of seed s
on problem p, or the difference of two rows there, the half width of the interval around the mean over both is

    sqrt((t seeds)^2 + (1.96 problems)^2)

seeds: the standard error of the S seeds' means, with Student's t of S - 1 degrees of freedom, which is wide
for few: 12.7 for two, 4.3 for three, 2.8 for five. problems: what the choice of problems adds, the root of
the variance of the P problems' means over P, less the part of it that is scatter of single answers. (Two
crossed random effects; Miller 2024, arXiv 2411.00640, has the part of the problems.)
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

NORMAL = 1.959964  # the 97.5 % quantile of the normal distribution
# Student's t: the 97.5 % quantile of 1 to 30 degrees of freedom.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t. Beyond 30 degrees of freedom by two terms of its series (to 1e-3).

    >>> t975(4), round(t975(60), 3)
    (2.776, 2.0)
    """
    return T975[freedom - 1] if freedom <= len(T975) else NORMAL + (NORMAL**3 + NORMAL) / (4 * freedom)


@dataclass
class Estimate:
    """A mean, the half width of its 95 % interval (None for one seed), and the number of seeds."""

    mean: float
    half: float | None
    seeds: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def within(self, margin: float) -> bool:
        """Whether the whole interval lies within the margin around 0; never for one seed."""
        return self.half is not None and max(-self.low, self.high) <= margin


def over_seeds(values: list[float]) -> Estimate:
    """The mean of one number a seed, with the interval of the seeds alone.

    >>> over_seeds([1.0, 2.0, 3.0])
    Estimate(mean=2.0, half=2.484338..., seeds=3)
    """
    if len(values) == 1:
        return Estimate(values[0], None, 1)
    return Estimate(fmean(values), t975(len(values) - 1) * stdev(values) / len(values) ** 0.5, len(values))


def over_seeds_and_problems(values: list[list[float]]) -> Estimate:
    """The mean of d[s, p], S lists of P numbers, with the interval of seeds and problems (above)."""
    table = np.asarray(values, dtype=float)
    seeds, problems = table.shape
    if seeds == 1 or problems == 1:
        return over_seeds(table.mean(1).tolist())
    by_seed, by_problem = table.mean(1), table.mean(0)
    residual = table - by_seed[:, None] - by_problem + table.mean()
    of_residual = (residual**2).sum() / ((seeds - 1) * (problems - 1))
    of_seeds, of_problems = by_seed.var(ddof=1) / seeds, by_problem.var(ddof=1) / problems
    of_problems = max(0.0, of_problems - of_residual / (seeds * problems))
    half = (t975(seeds - 1) ** 2 * of_seeds + NORMAL**2 * of_problems) ** 0.5
    return Estimate(float(table.mean()), float(half), seeds)


def over(values: list[float] | list[list[float]]) -> Estimate:
    """over_seeds of one number a seed, or over_seeds_and_problems of one number a problem each."""
    return over_seeds_and_problems(values) if isinstance(values[0], list) else over_seeds(values)


def verdict(difference: Estimate, margin: float) -> str:
    """What an interval of a difference says: better, worse, the same within the margin, or cannot tell.

    >>> [verdict(Estimate(mean, 1.0, 5), 2.0) for mean in (3.0, -3.0, 0.5, 1.2)]
    ['better', 'worse', 'same', 'better']
    >>> verdict(Estimate(0.5, 2.0, 5), 2.0)
    'cannot tell'
    """
    if difference.half is None:
        return "cannot tell"
    if difference.low > 0:
        return "better"
    if difference.high < 0:
        return "worse"
    return "same" if difference.within(margin) else "cannot tell"


def direction(difference: Estimate) -> str:
    """What an interval says of a number that is neither good nor bad: higher, lower, or cannot tell.

    An interval of width 0, where all seeds are equal, decides nothing: the next seed need not be.
    """
    says = verdict(difference, 0.0) if difference.half else "cannot tell"
    return {"better": "higher", "worse": "lower"}.get(says, says)


def seeds_needed(difference: Estimate, margin: float, most: int = 1000) -> int | None:
    """The fewest seeds whose interval would tell, if mean and scatter stay: without 0, or within the margin.

    None if no number up to `most` would. The whole interval is taken to be the seeds' part, which shrinks
    with their number; the problems' part does not: where that is large, more problems are needed, too.

    >>> seeds_needed(Estimate(1.0, 2.0, 5), margin=0.5)
    13
    """
    if difference.half is None:
        return None
    scatter = difference.half * difference.seeds**0.5 / t975(difference.seeds - 1)  # of one seed
    for seeds in range(2, most + 1):
        half = t975(seeds - 1) * scatter / seeds**0.5
        if abs(difference.mean) > half or abs(difference.mean) + half <= margin:
            return seeds
    return None


def crossing(steps: list[float], values: list[float], level: float) -> float | None:
    """The first place where a curve reaches a level, between its points on a line; None if it never does.

    >>> crossing([0, 10, 20], [0.0, 0.4, 0.8], 0.5)
    12.5
    """
    if values[0] >= level:
        return steps[0]
    points = list(zip(steps, values, strict=True))
    for (x, y), (next_x, next_y) in zip(points, points[1:], strict=False):
        if y < level <= next_y:
            return x + (level - y) / (next_y - y) * (next_x - x)
    return None


def shown(estimate: Estimate, scale: float = 100.0) -> str:
    """Estimate(0.883, 0.005, 5) -> "88.3 ± 0.5"; a single seed has no interval."""
    mean = f"{scale * estimate.mean:.1f}"
    return mean if estimate.half is None else f"{mean} ± {scale * estimate.half:.1f}"


def places(half: float | None) -> int:
    """Decimals that show two digits of an interval's half width.

    >>> places(0.123), places(4.5), places(67.0), places(None)
    (2, 1, 0, 2)
    """
    return max(0, 1 - math.floor(math.log10(half))) if half else 2


def signed(estimate: Estimate, scale: float = 100.0, digits: int = 1) -> str:
    """A difference and its interval: "+1.2 [-0.3, 2.7]". Zero has no minus."""
    ends = [] if estimate.half is None or math.isnan(estimate.half) else [estimate.low, estimate.high]
    mean, *ends = (round(scale * number, digits) + 0.0 for number in (estimate.mean, *ends))
    interval = f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""
    return f"{mean:+.{digits}f}{interval}"
