"""Products of a projection with integer codes, in signed bytes on integer tensor cores, and quantizing what comes of them.

What both kernels of ``archive_codes.py`` share, which tells the method. Lane ``4 g + t`` holds rows ``g`` and ``g + 8``, and of
every 8 channels columns ``2 t`` and ``2 t + 1``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.lanes import _load1, _mma, _mma_right, _xor
from argus.backends.triton.rounding import _affine
from argus.backends.triton.words import _put16, _put_some1, _put_some2, _put_some4, _rounded, _traded

UNIT = tl.constexpr(64)
"""Bytes from the first sum of a row to what a unit stands for, in what :func:`argus.backends.triton.fragments.weights` lays."""


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
