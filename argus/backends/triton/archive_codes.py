"""One kernel from integer codes to their Johnson-Lindenstrauss archive: a warp takes a page of a head, 64 tokens, in registers.

Coefficients are ``c = w (x - mean)`` with ``w = W / P``, up to 16 rows, and pages are ``x = scale * code + zero``. What must be
multiplied are codes, so ``n = v @ codes`` is taken on integer tensor cores, exactly, with ``v`` three signed bytes a number,
in fixed point. Scales of channels (axis ``channel``) multiply sums: ``c = scale * n + (zero - mean) * sum(w)``, and ``v`` is
``w``, which all pages share. Scales of tokens go into the page's own ``v = w * scale``: ``c = n + w zero - mean * sum(w)``.

A lane holds columns 2 t and 2 t + 1 of products (lane ``4 g + t``), so groups of coefficients, which run along channels, are
shared by the four lanes of a row. Its tokens are ``16 t + 8 (c / 2) + 4 s + 2 h + c % 2`` for byte ``c`` of word ``(s, h)``, as
``layout.py`` has it for axis ``token``. For axis ``channel`` lanes read words of other lanes and turn 4 x 4 bytes of them.
Of more than 8 rows a lane holds rows ``g`` and ``g + 8``; of up to 4, lanes 16 apart hold one row's halves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from argus.backends.base import PREFIX, Affine, Payload, Projected
from argus.backends.triton import convert, tuning
from argus.backends.triton.codec import _affine, shape_of
from argus.backends.triton.codes import _field, _load_block, _place, _word
from argus.backends.triton.fragments import FEW, PAGE, SMALL, Weights
from argus.backends.triton.lanes import _bytes, _halves, _halves8, _load1, _load2, _load4, _mma, _mma_right, _xor
from argus.backends.triton.recode import _as_floats
from argus.backends.triton.words import _lane_word, _put16, _put_some1, _put_some2, _put_some4, _rounded, _traded, _transposed4

UNIT = tl.constexpr(64)
"""Bytes after the first sum of a row at which what a unit stands for lies, in what :func:`weights` lays."""


@triton.jit
def _limbs(x0, x1, x2, x3, OVER: tl.constexpr):
    """Words of the high, middle and low signed bytes of four numbers below 2^22 in size, rounded.

    OVER: 2^23, or half as much again where numbers have signs, which adds 64 to their high bytes; and 0x8080, which adds 128
    to the others, taken off again.
    """
    return tl.inline_asm_elementwise(
        """{ .reg .b32 p, q, r, s;
        prmt.b32 p, $3, $4, 0x5140; prmt.b32 q, $5, $6, 0x5140; prmt.b32 r, $3, $4, 0x0062; prmt.b32 s, $5, $6, 0x0062;
        prmt.b32 $0, r, s, 0x5410; prmt.b32 r, p, q, 0x7632; prmt.b32 s, p, q, 0x5410;
        xor.b32 $1, r, 0x80808080; xor.b32 $2, s, 0x80808080; }""",
        "=r,=r,=r,f,f,f,f", [x0 + OVER, x1 + OVER, x2 + OVER, x3 + OVER],
        dtype=(tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _packed(a, b):
    """Two numbers rounded to FP16, in a word."""
    return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], tl.int32, True, 1)


@triton.jit
def _fused(a, b, c):
    """``a * b + c``, rounded once wherever it runs."""
    return tl.inline_asm_elementwise("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], tl.float32, True, 1)


@triton.jit
def _products(a, M: tl.constexpr, b, c, SIGNED: tl.constexpr):
    """`c` plus operand M of `a`, 16 rows of 64 tokens, times the codes of 8 channels."""
    for s in tl.static_range(2):
        row = (a[8 * M + 4 * s], a[8 * M + 4 * s + 1], a[8 * M + 4 * s + 2], a[8 * M + 4 * s + 3])
        if SIGNED:
            c = _mma(row, b[2 * s], b[2 * s + 1], c, True)
        else:
            c = _mma_right(row, b[2 * s], b[2 * s + 1], c)
    return c


@triton.jit
def _sums(a, b, none, SIGNED: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr, COUNTED: tl.constexpr):
    """A lane's sums for 8 channels: rows g (WIDE: and g + 8), columns 2 t and 2 t + 1; last those of rows of ones, if COUNTED.

    Sums of higher bytes begin those of lower ones, down to the lowest if NARROW: then whole sums are an int32. (They could be
    added after, but then sums of many columns are held at a time.)
    """
    empty = (none, none, none, none)
    if WIDE:
        c = _products(a, 0, b, empty, SIGNED)
        c = _products(a, 1, b, (c[0] << 8, c[1] << 8, c[2] << 8, c[3] << 8), SIGNED)
    else:
        c = _products(a, 0, b, empty, SIGNED)
        c = ((c[0] << 8) + c[2], (c[1] << 8) + c[3], c[2], c[3])
    if NARROW and not WIDE and not COUNTED:
        low = _products(a, 1, b, (c[0] << 8, c[1] << 8, c[2], c[3]), SIGNED)
    elif WIDE and NARROW:
        low = _products(a, 2, b, (c[0] << 8, c[1] << 8, c[2] << 8, c[3] << 8), SIGNED)
    else:
        low = _products(a, 2 if WIDE else 1, b, empty, SIGNED)
    sums = ()
    for i in tl.static_range(4 if WIDE else 2):
        if NARROW and (WIDE or not COUNTED):
            one = low[i].to(tl.float32)
        elif NARROW:
            one = ((c[i] << 8) + low[i]).to(tl.float32)
        else:
            one = low[i].to(tl.float32) + c[i].to(tl.float32) * 256.0
        sums = sums + (one,)
    return sums + (low[2], low[3])


@triton.jit
def _shared_sums(a, b, other, none, first, SIGNED: tl.constexpr, NARROW: tl.constexpr):
    """:func:`_sums` of up to 4 rows: for one of two times 8 channels, `first` tells which; last those of rows of ones.

    The operand's rows are high, low, and middle bytes, and ones, four of each, so two lanes hold what a sum takes.
    """
    c = _products(a, 0, b, (none, none, none, none), SIGNED)
    d = _products(a, 0, other, (none, none, none, none), SIGNED)
    sums = ()
    counts = ()
    for e in tl.static_range(2):
        got = _traded(tl.where(first, (d[e] << 8) + d[2 + e], c[e]), 16)
        top = tl.where(first, (c[e] << 8) + c[2 + e], got)
        low = tl.where(first, got, d[e])
        if NARROW:
            sums = sums + (((top << 8) + low).to(tl.float32),)
        else:
            sums = sums + (top.to(tl.float32) * 256.0 + low.to(tl.float32),)
        counts = counts + (tl.where(first, _traded(c[2 + e], 16), d[2 + e]),)
    return sums + counts


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
def _float_at(at):
    return _load1(at).to(tl.float32, bitcast=True)


@triton.jit
def _least(x, N: tl.constexpr, LARGEST: tl.constexpr, SHORT: tl.constexpr):
    """The smallest, or largest, of N numbers of each of the four lanes of a row, SHORT: of eight; N a power of two."""
    for level in tl.static_range(6):
        if (N >> level) > 1:
            y = ()
            for i in tl.static_range(N >> (level + 1)):
                if LARGEST:
                    y = y + (tl.maximum(x[2 * i], x[2 * i + 1]),)
                else:
                    y = y + (tl.minimum(x[2 * i], x[2 * i + 1]),)
            x = y
    z = x[0]
    for i in tl.static_range(3 if SHORT else 2):
        other = _xor(z, 16 if i == 2 else 1 << i)
        if LARGEST:
            z = tl.maximum(z, other)
        else:
            z = tl.minimum(z, other)
    return z


@triton.jit
def _quantized(
    x, offset, unit, inverse_unit, scale_at, zero_at, held, N: tl.constexpr, BITS: tl.constexpr, SHORT: tl.constexpr
):  # fmt: skip
    """Words of codes of N numbers a lane, a row each four lanes or eight; their scale and zero are stored where `held`.

    offset: of the row, to be added to `x`. unit: what a number of 1 stands for, a power of two.
    """
    low = (_least(x, N, False, SHORT) + offset) * unit
    scale, zero = _affine(low, (_least(x, N, True, SHORT) + offset) * unit, (1 << BITS) - 1)
    _put16(scale_at, scale.to(tl.int16, bitcast=True).to(tl.int32), held)
    _put16(zero_at, zero.to(tl.int16, bitcast=True).to(tl.int32), held)
    step = scale.to(tl.float32)
    step = tl.where(step == 0.0, 1.0, step)
    inverse = 1.0 / step * unit
    step = step * inverse_unit
    least = zero.to(tl.float32) * inverse_unit - offset
    s, y, z = (step, step, step, step), (inverse, inverse, inverse, inverse), (least, least, least, least)
    words = ()
    for i in tl.static_range(N // 4):
        words = words + (_rounded(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3], s, y, z),)
    return words


@triton.jit
def _put_run(at, w, held, N: tl.constexpr):
    """Store N neighbouring words where `held`."""
    if N == 4:
        _put_some4(at, w[0], w[1], w[2], w[3], held)
    elif N == 2:
        _put_some2(at, w[0], w[1], held)
    else:
        _put_some1(at, w[0], held)


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


@triton.jit
def _scaled(base, lane, s, ROWS: tl.constexpr):
    """Bytes of the page's projection: ``[row half, word, byte]``, from `s`, the scales of a lane's tokens."""
    limbs = ()
    for r in tl.static_range(ROWS):
        for w in tl.static_range(4):
            x = _as_floats(_load4(base + (4 * r + w) * 512 + lane * 16))
            limbs = limbs + _limbs(x[0] * s[2 * w], x[1] * s[2 * w + 1], x[2] * s[2 * w + 8], x[3] * s[2 * w + 9], 12615808.0)
    return limbs


@triton.constexpr_function
def _tile_place(tile, narrow, bits, dim):
    """The bit at which codes of 8 channels lie in their bytes when they are multiplied: 0, or where most of them lie anyway."""
    return 0 if narrow else _place(tile // 2 * 8 + 7, bits, dim)


@triton.constexpr_function
def _tile_unit(tile, narrow, bits, dim):
    """One over what that bit stands for."""
    return 2.0 ** -_tile_place(tile, narrow, bits, dim)


@triton.jit
def _token_kernel(
    from_ptr, from_scale, from_zero, weights_ptr, mean_ptr, codes_ptr, scale_ptr, zero_ptr,
    D: tl.constexpr, R: tl.constexpr, FROM_BITS: tl.constexpr, SYMMETRIC: tl.constexpr, NARROW: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Archive a page of one head whose scales are tokens'. NARROW: of at most 3 bits.

    Means are ``(sum(scale * code) + sum(zero)) / 64`` in float64, whose first sum is an exact one of integers: scales are 22
    bits of the power of two above the largest, which is all that they have unless they are 2^12 times smaller. Lanes take
    four channels each, and tell the others of a row's lanes.
    """
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    WIDE: tl.constexpr = R > 8
    ROWS: tl.constexpr = 2 if WIDE else 1
    # Of up to 4 rows, lanes 16 apart share a row, and each takes every other 8 channels.
    SHORT: tl.constexpr = R <= 4
    SETS: tl.constexpr = D // 64
    none = tl.zeros((32,), tl.int32)
    words = _load_block(from_ptr.to(tl.int64) + unit * (8 * D * FROM_BITS), lane, FROM_BITS, D)
    tokens = from_scale.to(tl.int64) + (unit * 64 + t * 16) * 2
    s = _halves8(_load4(tokens)) + _halves8(_load4(tokens + 16))
    every = unit * 64 + tl.arange(0, 64)
    largest = tl.max(tl.load(from_scale + every).to(tl.int16, bitcast=True).to(tl.int32), 0)
    largest = largest.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    # A scale that is not finite makes means NaN.
    spoiled = largest * 0.0
    largest = tl.maximum(largest, 6e-8)
    # The powers of two above the largest scale, and one over it.
    above = (largest.to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    power = above.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - above).to(tl.float32, bitcast=True)
    near = ()
    for i in tl.static_range(16):
        near = near + (s[i] * inverse,)
    base = weights_ptr.to(tl.int64)
    facts = base + ROWS * 2048
    zeros = ()
    if not SYMMETRIC:
        tokens = from_zero.to(tl.int64) + (unit * 64 + t * 16) * 2
        z = _halves8(_load4(tokens)) + _halves8(_load4(tokens + 16))
    for r in tl.static_range(ROWS):
        zero = tl.zeros((32,), tl.float32)
        if not SYMMETRIC:
            for w in tl.static_range(4):
                x = _as_floats(_load4(base + (4 * r + w) * 512 + lane * 16))
                for c in tl.static_range(4):
                    zero += x[c] * z[2 * w + c // 2 * 8 + c % 2]
            zero += _xor(zero, 1)
            zero += _xor(zero, 2)
        zeros = zeros + (zero * inverse,)
    # Of scales alone, rows 0 to 3 their low bytes, 4 to 7 the middle ones, 8 to 15 the high ones.
    first = g < 4
    scales = ()
    others = ()
    for w in tl.static_range(4):
        high, middle, low = _limbs(
            near[2 * w] * 4194304.0, near[2 * w + 1] * 4194304.0, near[2 * w + 8] * 4194304.0, near[2 * w + 9] * 4194304.0,
            8421504.0,
        )  # fmt: skip
        scales = scales + (tl.where(first, low, middle), high)
        others = others + (middle,)
    limbs = _scaled(base, lane, near, ROWS)
    a = ()
    for m in tl.static_range(3 if WIDE else 1 if SHORT else 2):
        for ks in tl.static_range(2):
            for i in tl.static_range(4):
                # Word (ks, i / 2) of the upper half, i even, or of the lower; see :func:`_sums` and :func:`_shared_sums`.
                if WIDE:
                    one = limbs[12 * (i % 2) + 6 * ks + 3 * (i // 2) + m]
                elif i % 2 == 0:
                    one = limbs[6 * ks + 3 * (i // 2) + 2 * m]
                elif m == 0:
                    one = limbs[6 * ks + 3 * (i // 2) + 1]
                else:
                    # No one asks for these rows; a register of their own spares copies.
                    one = others[2 * ks + i // 2]
                if m == 0 and (WIDE or i % 2 == 0):
                    # They have 64 added to them.
                    one = (one + 0x40404040) ^ -0x7F7F7F80
                if SHORT and i % 2 == 0:
                    one = tl.where(first, one, limbs[6 * ks + 3 * (i // 2) + 2])
                a = a + (one,)
    before = (none, none, none, none)
    upper = ()
    lower = ()
    kept = ()
    for j in tl.static_range(D // 8):
        b = ()
        for w in tl.static_range(4):
            b = b + (_word(words, j // 2 * 8 + 2 * w + j % 2, FROM_BITS, D, _tile_place(j, NARROW, FROM_BITS, D)),)
        if not SHORT:
            sums = _sums(a, b, none, SYMMETRIC, WIDE, NARROW, False)
        elif j % 2:
            sums = _shared_sums(a, before, b, none, first, SYMMETRIC, NARROW)
        before = b
        if j % 2 or not SHORT:
            for e in tl.static_range(2):
                upper = upper + (sums[e] * _tile_unit(j, NARROW, FROM_BITS, D),)
                if WIDE:
                    lower = lower + (sums[2 + e] * _tile_unit(j, NARROW, FROM_BITS, D),)
        count = _products(scales, 0, b, (none, none, none, none), SYMMETRIC)
        if j % 4 == 0:
            held = count
        else:
            mine = g % 4 == j % 4
            held = (
                tl.where(mine, count[0], held[0]), tl.where(mine, count[1], held[1]),
                tl.where(mine, count[2], held[2]), tl.where(mine, count[3], held[3]),
            )  # fmt: skip
        if j % 4 == 3:
            kept = kept + held
    if not SYMMETRIC:
        total = tl.sum(tl.load(from_zero + every).to(tl.float64), 0) * (1.0 / 64)
    means = ()
    for k in tl.static_range(SETS):
        two = ()
        # Lanes with g < 4 keep the channels of 4 k and on, the others those of 4 SETS more, and give what they know of theirs.
        times = power * (1.0 / (4194304.0 * 64)) + spoiled + tl.zeros((32,), tl.float32)
        if not NARROW:
            pair = k * 2 + g // 4 * (2 * SETS) + g // 2 % 2
            for i in tl.static_range(D // 16):
                times = tl.where(pair == i, times * _tile_unit(2 * i, False, FROM_BITS, D), times)
        for e in tl.static_range(2):
            here, there = kept[4 * k + e], kept[4 * (k + SETS) + e]
            mine = tl.where(first, here, there)
            theirs = _traded(tl.where(first, there, here), 16)
            low = tl.where(first, mine, theirs)
            middle = tl.where(first, theirs, mine)
            high = tl.where(first, kept[4 * k + 2 + e], kept[4 * (k + SETS) + 2 + e])
            one = ((middle << 8) + low).to(tl.float64) + high.to(tl.float64) * 65536.0
            one = one * times.to(tl.float64)
            if not SYMMETRIC:
                one += total
            two = two + (one.to(tl.float32),)
        mean = _packed(two[0], two[1])
        means = means + (mean,)
        tile = 4 * k + g // 4 * (4 * SETS) + g % 4
        _put_some1(mean_ptr.to(tl.int64) + (unit * D + tile * 8 + 2 * t) * 2, mean, g >= 0)
    unit_of = power * _float_at(facts + UNIT + lane * 0)
    inverse_unit = inverse * _float_at(facts + UNIT + 4 + lane * 0)
    row_sums = ()
    for r in tl.static_range(ROWS):
        row_sums = row_sums + (_float_at(facts + (g % (4 if SHORT else 8) + 8 * r) * 4) * inverse,)
    odd = t % 2
    join = tl.where(odd == 0, 0x5410, 0x3276)
    upper_rest = ()
    lower_rest = ()
    PER: tl.constexpr = 2 if SHORT else 1
    own = t
    if SHORT:
        own = t + g // 4 * 4
    for j in tl.static_range(0, D // 8, PER):
        m = _halves(_lane_word(means[j // 4 % SETS], own + (j % 4 * 4 + j // (4 * SETS) * 16)))
        for e in tl.static_range(2):
            upper_rest = upper_rest + (upper[2 * j // PER + e] - m[e] * row_sums[0],)
            if WIDE:
                lower_rest = lower_rest + (lower[2 * j + e] - m[e] * row_sums[1],)
    for r in tl.static_range(ROWS):
        row = g % (4 if SHORT else 8) + 8 * r
        place = (unit * R + row) * 2
        held = row < R
        codes = _quantized(
            lower_rest if r else upper_rest, zeros[r], unit_of, inverse_unit,
            scale_ptr.to(tl.int64) + place, zero_ptr.to(tl.int64) + place, (t == 0) & held, D // 4 // PER, BITS, SHORT,
        )  # fmt: skip
        # Bytes of two columns a lane: those of one of two tiles go to each of two lanes, whose neighbours they are.
        to = codes_ptr.to(tl.int64) + (unit * R + row) * (D // 2) + t // 2 * 4 + odd * (8 * PER)
        if SHORT:
            to += g // 4 * 8
        for i in tl.static_range(D // 32 // PER):
            two = codes[i] | (codes[i + D // 32 // PER] << 4)
            _put_some1(to + 16 * PER * i, _bytes(two, _traded(two, 1), join), held)


def archive_codes(payload: Payload, source: Affine, form: Projected, kept: Weights) -> Payload | None:
    """Pages of 64 tokens in fragment order, archived in 4-bit codes along channels; None: there is no kernel.

    Parameters
    ----------
    payload : dict of str to Tensor
        What `source` keeps of pages ``[n, B, H, P, D]``.
    source : Affine
    form : Projected
    kept : Weights

    Returns
    -------
    dict of str to Tensor or None
    """
    inner = form.inner
    page, dim = shape_of(payload, source)
    rows = page // form.ratio
    if not convert.ASSEMBLED or not isinstance(inner, Affine) or page != PAGE or dim not in (64, 128) or not 1 <= rows <= 16:
        return None
    if inner.bits != 4 or inner.axis != "token" or inner.group not in (None, dim) or inner.symmetric or inner.centred:
        return None
    whole = source.group in (None, page if source.axis == "channel" else dim)
    if not whole or (source.symmetric and source.bits < 8):
        return None
    held = {name: tensor.contiguous() for name, tensor in payload.items()}
    codes, scale = held["codes"], held["scale"]
    head, device = codes.shape[:3], codes.device
    made = {"mean": torch.empty(*head, dim, dtype=torch.float16, device=device)}
    made[PREFIX + "codes"] = torch.empty(*head, rows, dim // 2, dtype=torch.uint8, device=device)
    made[PREFIX + "scale"] = torch.empty(*head, rows, 1, dtype=torch.float16, device=device)
    made[PREFIX + "zero"] = torch.empty_like(made[PREFIX + "scale"])
    if head.numel():
        tokens = source.axis == "token"
        kernel = _token_kernel if tokens else _channel_kernel
        laid = kept.of(form, codes, tokens, source.bits)
        narrow = source.bits <= (FEW if tokens else SMALL)
        kernel[(head.numel(),)](
            codes.view(torch.uint8), scale, held.get("zero", scale), laid, *made.values(),
            dim, rows, source.bits, source.symmetric, narrow, inner.bits,
            num_warps=1, maxnreg=tuning.archive_registers(rows, tokens),
        )  # fmt: skip
    return made
