"""Lloyd-Max codebooks of the standard normal distribution (Lloyd 1982, Max 1960), computed."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from math import erf, exp, inf, pi, sqrt

STILL = 1e-10
"""A codebook is done when no level moves further than this in one step."""


def density(x: float) -> float:
    """The standard normal density."""
    return exp(-x * x / 2) / sqrt(2 * pi)


def below(x: float) -> float:
    """The standard normal distribution function."""
    return (1 + erf(x / sqrt(2))) / 2


def mean_between(low: float, high: float) -> float:
    """The mean of the part of a standard normal that lies between two bounds."""
    return (density(low) - density(high)) / (below(high) - below(low))


@cache
def codebook(bits: int) -> tuple[float, ...]:
    """The ``2 ** bits`` levels that quantize a standard normal number with the least mean squared error, in order.

    Lloyd's iteration: bounds midway between levels, then each level the mean of what lies between its bounds.
    """
    count = 1 << bits
    levels = [3 * (2 * i + 1 - count) / count for i in range(count)]
    moved = inf
    while moved > STILL:
        bounds = [-inf, *((a + b) / 2 for a, b in pairwise(levels)), inf]
        better = [mean_between(low, high) for low, high in pairwise(bounds)]
        moved = max(abs(a - b) for a, b in zip(levels, better, strict=True))
        levels = better
    return tuple(levels)


def distortion(bits: int) -> float:
    """The mean squared error of :func:`codebook` on standard normal numbers: one less the levels' mean square."""
    levels = codebook(bits)
    bounds = [-inf, *((a + b) / 2 for a, b in pairwise(levels)), inf]
    weights = [below(high) - below(low) for low, high in pairwise(bounds)]
    return 1 - sum(weight * level * level for weight, level in zip(weights, levels, strict=True))
