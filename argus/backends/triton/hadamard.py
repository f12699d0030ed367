"""The orthonormal Hadamard transform (Sylvester's order) of numbers that lanes of a warp hold.

It is a sum and a difference along each bit of the index, in any order, so it does not matter which bits tell the lane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.lanes import _xor


@triton.jit
def _hadamard(x, N: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Transform N numbers a lane along all bits of their place and bits FIRST to LAST - 1 of the lane."""
    for k in tl.static_range(10):
        if (2 << k) <= N:
            # Along the lowest bit, which becomes the highest: after as many times as there are bits all are in their place.
            sums = ()
            differences = ()
            for i in tl.static_range(N // 2):
                sums = sums + (x[2 * i] + x[2 * i + 1],)
                differences = differences + (x[2 * i] - x[2 * i + 1],)
            x = sums + differences
    for k in tl.static_range(FIRST, LAST):
        sign = tl.where((tl.arange(0, 32) >> k) % 2 == 1, -1.0, 1.0)
        mixed = ()
        for i in tl.static_range(N):
            mixed = mixed + (x[i] * sign + _xor(x[i], 1 << k),)
        x = mixed
    ROOT: tl.constexpr = (N << (LAST - FIRST)) ** -0.5
    scaled = ()
    for i in tl.static_range(N):
        scaled = scaled + (x[i] * ROOT,)
    return scaled
