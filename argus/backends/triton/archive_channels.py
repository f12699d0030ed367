"""Archiving pages whose scales are channels': keys of 2 to 8 bits. The method is told in ``archive_codes.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.codes import _field
from argus.backends.triton.lanes import _half, _halves, _load2, _load4
from argus.backends.triton.products import (
    TINY,
    _affine_rows,
    _beside,
    _extremes,
    _for_totals,
    _fused,
    _in_pairs,
    _operands,
    _own,
    _packed,
    _products,
    _quantized,
    _totals,
)
from argus.backends.triton.words import _put16, _put_some1, _put_some2, _transposed4


@triton.constexpr_function
def place(i, bits):
    """The bit at which codes of tokens 2 i and 2 i + 1 of every eight lie in their bytes: where their largest plane does."""
    natural = 0 if bits == 8 else i // 2 * 4 if bits & 4 else 2 * i
    return min(natural, 8 - bits)


@triton.jit
def _turned_plane(at, HALF: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """One plane of :func:`_turned_block`: D / 16 words, of each 2, 4 or 8 bits of a code as many times that."""
    NS: tl.constexpr = D // 32
    turned = ()
    for i in tl.static_range(1 if BITS <= 2 else BITS // 2):
        start = at
        if BITS > 1:
            start += 512 * (i * NS + HALF * (NS // 2))
        if D == 128:
            x = _load4(start)
            y = _load4(start + 64)
            turned = turned + _transposed4(x[0], x[1], y[0], y[1]) + _transposed4(x[2], x[3], y[2], y[3])
        else:
            x = _load2(start)
            y = _load2(start + 64)
            turned = turned + _transposed4(x[0], x[1], y[0], y[1])
    return turned


@triton.jit
def _turned_block(at, HALF: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """Axis channel: all planes of half of the channels, bytes of a word the tokens of one channel.

    A lane reads what the lanes of its tokens and of its channels hold, at `at` and four lanes on. Column n of run k, of D / 16,
    is channel ``(n % 2) D / 2 + (n / 4) D / 4 + HALF D / 8 + (n / 2 % 2) D / 16 + k``; two halves of one bit share words.
    """
    words = ()
    if BITS & 8:
        words = words + _turned_plane(at, HALF, 8, D)
    if BITS & 4:
        words = words + _turned_plane(at, HALF, 4, D)
    if BITS & 2:
        words = words + _turned_plane(at + (BITS & 4) * D * 8, HALF, 2, D)
    if BITS & 1:
        words = words + _turned_plane(at + (BITS & 6) * D * 8, HALF, 1, D)
    return words


@triton.jit
def _words(turned, k: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, K: tl.constexpr):
    """The codes of run k, each at its :func:`place`."""
    words = ()
    for i in tl.static_range(4):
        if BITS == 8:
            x = turned[i * K + k]
        else:
            x = 0
            if BITS & 4:
                x = _field(turned[i % 2 * K + k], i // 2 * 4, 4, place(i, BITS))
            if BITS & 2:
                x = x | _field(turned[(BITS & 4) // 2 * K + k], 2 * i, 2, place(i, BITS) + (BITS & 4))
            if BITS & 1:
                one = turned[((BITS & 4) // 2 + (BITS & 2) // 2) * K + k]
                x = x | _field(one, 2 * i + HALF, 1, place(i, BITS) + (BITS & 6))
        words = words + (x,)
    return words


@triton.jit
def _columns(turned, beside, k: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, K: tl.constexpr, SIGNED: tl.constexpr):
    """The codes of run k in pairs."""
    return _in_pairs(_words(turned, k, HALF, BITS, K), _words(beside, k, HALF, BITS, K), SIGNED)


@triton.jit
def _run(at, D: tl.constexpr):
    """D / 16 neighbouring FP16 numbers, two a word."""
    if D == 128:
        x = _load4(at)
    else:
        x = _load2(at)
    return x


@triton.jit
def _channel(g, t, D: tl.constexpr, R: tl.constexpr):
    """The channel of column 2 t of run 0, D / 2 before that of column 2 t + 1; the others of the half are D / 8 further.

    Of up to 4 rows, lanes 16 apart share a row, and each takes one half of the channels.
    """
    channel = t // 2 * (D // 4) + t % 2 * (D // 16)
    if R <= 4:
        channel += g // 4 * (D // 8)
    return channel


@triton.jit
def _put_rows(
    upper, lower, unit, g, t, codes_ptr, scale_ptr, zero_ptr, UNIT: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Quantize and store coefficients [half, run, column] of rows g and g + 8; what a number of 1 stands for is UNIT."""
    SHORT: tl.constexpr = R <= 4
    HALVES: tl.constexpr = 1 if SHORT else 2
    ROWS: tl.constexpr = 2 if R > 8 else 1
    RUNS: tl.constexpr = HALVES * (D // 16)
    low, high = _extremes(upper, lower, 2 * RUNS, ROWS, SHORT)
    first = g % (4 if SHORT else 8)
    own = _own(first, first + 8, ROWS)
    at_row = (unit * R + own) * 2
    inverse, least = _affine_rows(
        low, high, 0.0, scale_ptr.to(tl.int64) + at_row, zero_ptr.to(tl.int64) + at_row, (t < ROWS) & (own < R),
        UNIT, BITS, ROWS,
    )  # fmt: skip
    for r in tl.static_range(ROWS):
        row = first + 8 * r
        numbers = lower if r else upper
        codes = _quantized(numbers[0::2], numbers[1::2], inverse[r], least[r], RUNS)
        to = codes_ptr.to(tl.int64) + (unit * R + row) * (D // 2) + _channel(g, t, D, R)
        for HALF in tl.static_range(HALVES):
            if D == 128:
                _put_some2(to + HALF * (D // 8), codes[2 * HALF], codes[2 * HALF + 1], row < R)
            else:
                _put_some1(to + HALF * (D // 8), codes[HALF], row < R)


@triton.jit
def _channel_kernel(
    from_ptr, from_scale, from_zero, weights_ptr, mean_ptr, codes_ptr, scale_ptr, zero_ptr,
    D: tl.constexpr, R: tl.constexpr, FROM_BITS: tl.constexpr, SYMMETRIC: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Archive a page of one head whose scales are channels': ``c = scale * (W codes) / 64``."""
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    ROWS: tl.constexpr = 2 if R > 8 else 1
    SHORT: tl.constexpr = R <= 4
    K: tl.constexpr = D // 16
    COUNT: tl.constexpr = ((FROM_BITS & 8) // 2 + (FROM_BITS & 4) // 2 + (FROM_BITS & 2) // 2 + (FROM_BITS & 1)) * K
    first = g < 4
    # Channels of column g, which it reads: `codes.py` lays those of quarter t in lanes t.
    quarter = g % 2 * 2 + g // 4
    at = from_ptr.to(tl.int64) + unit * (8 * D * FROM_BITS) + (8 * t + quarter) * 16 + g // 2 % 2 * (512 if D == 128 else 8)
    a = _operands(weights_ptr.to(tl.int64) + lane * 16)
    # What a code of 1 counts for where its column is summed.
    LAST: tl.constexpr = place(3, FROM_BITS)
    counts = ()
    for i in tl.static_range(8):
        counts = counts + (tl.full((32,), 0x3C003C00 + 0x04000400 * (LAST - place(i // 2, FROM_BITS)), tl.int32),)
    counts = _for_totals(counts, g)
    ONE: tl.constexpr = TINY / 2**LAST
    zero = tl.zeros((32,), tl.float32)
    zero4 = (zero, zero, zero, zero)
    place_of = from_scale.to(tl.int64) + (unit * D + _channel(g, t, D, R)) * 2
    upper = ()
    lower = ()
    totals = ()
    for HALF in tl.static_range(1 if SHORT else 2):
        turned = _turned_block(at, HALF, FROM_BITS, D)
        beside = _beside(turned, COUNT)
        if SHORT:
            further = _turned_block(at, 1, FROM_BITS, D)
            beyond = _beside(further, COUNT)
        scales = _run(place_of + HALF * (D // 4), D) + _run(place_of + HALF * (D // 4) + D, D)
        for pair in tl.static_range(K // 2):
            b = _columns(turned, beside, 2 * pair, HALF, FROM_BITS, K, SYMMETRIC)
            other = _columns(turned, beside, 2 * pair + 1, HALF, FROM_BITS, K, SYMMETRIC)
            n0 = _products(a, b, zero4)
            n1 = _products(a, other, zero4)
            totals = totals + (_totals(b, other, counts, zero4),)
            if SHORT:
                b = _columns(further, beyond, 2 * pair, 1, FROM_BITS, K, SYMMETRIC)
                other = _columns(further, beyond, 2 * pair + 1, 1, FROM_BITS, K, SYMMETRIC)
                totals = totals + (_totals(b, other, counts, zero4),)
                m0 = _products(a, b, zero4)
                m1 = _products(a, other, zero4)
                n0 = (tl.where(first, n0[0], m0[0]), tl.where(first, n0[1], m0[1]))
                n1 = (tl.where(first, n1[0], m1[0]), tl.where(first, n1[1], m1[1]))
            low = _halves(scales[pair])
            high = _halves(scales[K // 2 + pair])
            upper = upper + (n0[0] * low[0], n0[1] * high[0], n1[0] * low[1], n1[1] * high[1])
            if ROWS == 2:
                lower = lower + (n0[2] * low[0], n0[3] * high[0], n1[2] * low[1], n1[3] * high[1])
    # Lanes keep the totals of every other pair of runs, of one run each.
    own = (unit * D + g % 2 * (D // 2) + g // 4 * (D // 4) + g // 2 % 2 * K + t) * 2
    own_scale = from_scale.to(tl.int64) + own
    own_zero = from_zero.to(tl.int64) + own
    own_mean = mean_ptr.to(tl.int64) + own
    for m in tl.static_range(D // 32):
        if SHORT:
            # Pairs of each half in turn.
            near = totals[2 * m % (K // 2) * 2 + 2 * m // (K // 2)]
            far = totals[(2 * m + 1) % (K // 2) * 2 + (2 * m + 1) // (K // 2)]
        else:
            near = totals[2 * m]
            far = totals[2 * m + 1]
        total = tl.where(t < 2, near, far) * (ONE / 64)
        further = (2 * m // (K // 2) * (D // 8) + 4 * m % K) * 2
        scale = _half(own_scale + further)
        if SYMMETRIC:
            mean = (total - 128.0) * scale
        else:
            mean = _fused(total, scale, _half(own_zero + further))
        _put16(own_mean + further, _packed(mean, mean), g >= 0)
    _put_rows(upper, lower, unit, g, t, codes_ptr, scale_ptr, zero_ptr, ONE / 64, D, R, BITS)
