"""Archiving pages whose scales are channels': keys. The method is told in ``archive_codes.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.codes import _field
from argus.backends.triton.lanes import _halves, _load2, _load4
from argus.backends.triton.products import (
    UNIT,
    _float_at,
    _fused,
    _packed,
    _products,
    _put_run,
    _quantized,
    _shared_sums,
    _sums,
)
from argus.backends.triton.words import _transposed4


@triton.jit
def _turned_plane(at, HALF: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """One plane of :func:`_turned_block`: D / 16 words, of each 2, 4 or 8 bits of a code as many times that."""
    NS: tl.constexpr = D // 32
    turned = ()
    for i in tl.static_range(1 if BITS <= 2 else BITS // 2):
        if BITS == 1:
            place = at
        else:
            place = at + 512 * (i * NS + HALF * (NS // 2))
        if D == 128:
            x = _load4(place)
            y = _load4(place + 64)
            turned = turned + _transposed4(x[0], x[1], y[0], y[1]) + _transposed4(x[2], x[3], y[2], y[3])
        else:
            x = _load2(place)
            y = _load2(place + 64)
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
def _columns(turned, k: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, K: tl.constexpr):
    """The codes of run k as B operands."""
    words = ()
    for i in tl.static_range(4):
        if BITS == 8:
            x = turned[i * K + k]
        else:
            x = 0
            if BITS & 4:
                x = _field(turned[i % 2 * K + k], i // 2 * 4, 4, 0)
            if BITS & 2:
                x = x | _field(turned[(BITS & 4) // 2 * K + k], 2 * i, 2, BITS & 4)
            if BITS & 1:
                x = x | _field(turned[((BITS & 4) // 2 + (BITS & 2) // 2) * K + k], 2 * i + HALF, 1, BITS & 6)
        words = words + (x,)
    return words


@triton.jit
def _run(at, D: tl.constexpr):
    """D / 16 neighbouring FP16 numbers, two a word."""
    if D == 128:
        x = _load4(at)
    else:
        x = _load2(at)
    return x


@triton.jit
def _channel_kernel(
    from_ptr, from_scale, from_zero, weights_ptr, mean_ptr, codes_ptr, scale_ptr, zero_ptr,
    D: tl.constexpr, R: tl.constexpr, FROM_BITS: tl.constexpr, SYMMETRIC: tl.constexpr, NARROW: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Archive a page of one head whose scales are channels'.

    A row of ones counts codes beside the projection, so a mean is ``zero + scale * count / 64``, rounded to float32 once, as
    the mean of decoded numbers is: these are exact unless a zero is some 2^13 times its scale.
    """
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    WIDE: tl.constexpr = R > 8
    ROWS: tl.constexpr = 2 if WIDE else 1
    # Of up to 4 rows, lanes 16 apart share a row, and each takes one half of the channels.
    SHORT: tl.constexpr = R <= 4
    M: tl.constexpr = 3 if WIDE else 1 if SHORT else 2
    K: tl.constexpr = D // 16
    first = g < 4
    # Channels of column g, which it reads: `codes.py` lays those of quarter t in lanes t.
    quarter = g % 2 * 2 + g // 4
    at = from_ptr.to(tl.int64) + unit * (8 * D * FROM_BITS) + (8 * t + quarter) * 16 + g // 2 % 2 * (512 if D == 128 else 8)
    base = weights_ptr.to(tl.int64)
    a = ()
    for i in tl.static_range(2 * M):
        a = a + _load4(base + i * 512 + lane * 16)
    facts = base + M * 1024
    share = _float_at(facts + UNIT + lane * 0)
    inverse_share = _float_at(facts + UNIT + 4 + lane * 0)
    none = tl.zeros((32,), tl.int32)
    ones = tl.full((32,), 0x01010101, tl.int32)
    many = (ones, ones, ones, ones, ones, ones, ones, ones)
    row_sums = ()
    for r in tl.static_range(ROWS):
        row_sums = row_sums + (_float_at(facts + (g % (4 if SHORT else 8) + 8 * r) * 4),)
    # Channels of columns 2 t and, D / 2 further, 2 t + 1.
    channel = t // 2 * (D // 4) + t % 2 * (D // 16)
    upper = ()
    lower = ()
    for HALF in tl.static_range(1 if SHORT else 2):
        turned = _turned_block(at, HALF, FROM_BITS, D)
        if SHORT:
            further = _turned_block(at, 1, FROM_BITS, D)
            place = (unit * D + channel + g // 4 * (D // 8)) * 2
        else:
            place = (unit * D + channel + HALF * (D // 8)) * 2
        scales = _run(from_scale.to(tl.int64) + place, D) + _run(from_scale.to(tl.int64) + place + D, D)
        if not SYMMETRIC:
            zeros = _run(from_zero.to(tl.int64) + place, D) + _run(from_zero.to(tl.int64) + place + D, D)
        means = ((), ())
        for pair in tl.static_range(K // 2):
            b0 = _columns(turned, 2 * pair, HALF, FROM_BITS, K)
            b1 = _columns(turned, 2 * pair + 1, HALF, FROM_BITS, K)
            if SHORT:
                d0 = _columns(further, 2 * pair, 1, FROM_BITS, K)
                d1 = _columns(further, 2 * pair + 1, 1, FROM_BITS, K)
                n0 = _shared_sums(a, b0, d0, none, first, SYMMETRIC, NARROW)
                n1 = _shared_sums(a, b1, d1, none, first, SYMMETRIC, NARROW)
            else:
                n0 = _sums(a, b0, none, SYMMETRIC, WIDE, NARROW, not WIDE)
                n1 = _sums(a, b1, none, SYMMETRIC, WIDE, NARROW, not WIDE)
            if WIDE:
                low0 = _products(many, 0, b0, (none, none, none, none), SYMMETRIC)
                low1 = _products(many, 0, b1, (none, none, none, none), SYMMETRIC)
            else:
                low0 = n0
                low1 = n1
            columns = ()
            for e in tl.static_range(2):
                s = _halves(scales[e * (K // 2) + pair])
                s0 = s[0] * (1.0 / 64)
                s1 = s[1] * (1.0 / 64)
                if SYMMETRIC:
                    mean = _packed(low0[2 + e].to(tl.float32) * s0, low1[2 + e].to(tl.float32) * s1)
                    m = _halves(mean)
                    columns = columns + ((s0, s1, m[0] * -1.0, m[1] * -1.0),)
                else:
                    z = _halves(zeros[e * (K // 2) + pair])
                    mean = _packed(_fused(low0[2 + e].to(tl.float32), s0, z[0]), _fused(low1[2 + e].to(tl.float32), s1, z[1]))
                    m = _halves(mean)
                    columns = columns + ((s0, s1, z[0] - m[0], z[1] - m[1]),)
                if e == 0:
                    means = (means[0] + (mean,), means[1])
                else:
                    means = (means[0], means[1] + (mean,))
            for k in tl.static_range(2):
                for e in tl.static_range(2):
                    n = n1 if k else n0
                    upper = upper + (n[e] * columns[e][k] + columns[e][2 + k] * row_sums[0],)
                    if WIDE:
                        lower = lower + (n[2 + e] * columns[e][k] + columns[e][2 + k] * row_sums[1],)
        for e in tl.static_range(2):
            to = mean_ptr.to(tl.int64) + place + e * D
            _put_run(to, means[e], (g % 4 if SHORT else g) == 2 * HALF + e, K // 2)
    for r in tl.static_range(ROWS):
        row = g % (4 if SHORT else 8) + 8 * r
        place = (unit * R + row) * 2
        numbers = lower if r else upper
        # Numbers are [half, run, column]: four of a column make a word.
        ordered = ()
        for i in tl.static_range(K // 4 if SHORT else K // 2):
            for e in tl.static_range(2):
                ordered = ordered + (
                    numbers[8 * i + e], numbers[8 * i + 2 + e], numbers[8 * i + 4 + e], numbers[8 * i + 6 + e],
                )  # fmt: skip
        codes = _quantized(
            ordered, 0.0, share, inverse_share, scale_ptr.to(tl.int64) + place, zero_ptr.to(tl.int64) + place,
            (t == 0) & (row < R), 2 * K if SHORT else 4 * K, BITS, SHORT,
        )  # fmt: skip
        to = codes_ptr.to(tl.int64) + (unit * R + row) * (D // 2) + channel
        if SHORT:
            to += g // 4 * (D // 8)
        for HALF in tl.static_range(1 if SHORT else 2):
            if D == 128:
                two = (codes[4 * HALF] | (codes[4 * HALF + 1] << 4), codes[4 * HALF + 2] | (codes[4 * HALF + 3] << 4))
            else:
                two = (codes[2 * HALF] | (codes[2 * HALF + 1] << 4),)
            _put_run(to + HALF * (D // 8), two, row < R, K // 4)
