"""Products of a projection with integer codes on 16-bit tensor cores, exact, and quantizing what comes of them.

What the kernels of ``archive_codes.py`` share, which tells the method. A column's codes are eight words ``2 i + r`` of two
tokens: ``16 t + 2 i + r`` and the one 8 further.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.lanes import _bytes, _load4, _mma16, _xor
from argus.backends.triton.rounding import _affine, _reciprocal
from argus.backends.triton.words import _put16, _traded

NEAR = tl.constexpr(128.0)
"""From here to 256 a unit is the last bit of a BF16 number."""
TINY = tl.constexpr(2.0**24)
"""One over what the last bit of an FP16 number below 2^-14 stands for."""


@triton.jit
def _packed(a, b):
    """Two numbers rounded to FP16, in a word."""
    return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], tl.int32, True, 1)


@triton.jit
def _fused(a, b, c):
    """``a * b + c``, rounded once wherever it runs."""
    return tl.inline_asm_elementwise("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], tl.float32, True, 1)


@triton.jit
def _operands(at):
    """Four operands of four words, as :func:`argus.backends.triton.fragments.signs` lays them."""
    words = ()
    for i in tl.static_range(4):
        words = words + _load4(at + i * 512)
    return words


@triton.jit
def _beside(words, COUNT: tl.constexpr):
    """COUNT words, moved by a byte."""
    moved = ()
    for i in tl.static_range(COUNT):
        moved = moved + (words[i] >> 8,)
    return moved


@triton.jit
def _in_pairs(even, odd, SIGNED: tl.constexpr):
    """A column's codes: bytes 0 and 2, and of words moved by a byte the others, of signed codes 128 larger.

    A code is an FP16 number as it is, as many times 2^-24.
    """
    words = ()
    for i in tl.static_range(4):
        x = even[i] & 0x00FF00FF
        y = odd[i] & 0x00FF00FF
        if SIGNED:
            x = x ^ 0x00800080
            y = y ^ 0x00800080
        words = words + (x, y)
    return words


@triton.jit
def _products(a, b, c):
    """`c` plus 16 rows of 64 tokens times the codes of 8 channels."""
    for i in tl.static_range(4):
        c = _mma16(a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3], b[2 * i], b[2 * i + 1], c, False)
    return c


@triton.jit
def _for_totals(w, g):
    """Numbers of tokens, in pairs like codes, as :func:`_totals` multiplies them: column g has a quarter of them."""
    words = ()
    for i in tl.static_range(4):
        one = tl.where(g % 2 == 0, w[2 * i], w[2 * i + 1])
        words = words + (tl.where(g % 4 < 2, one, 0), tl.where(g % 4 < 2, 0, one))
    return words


@triton.jit
def _totals(b, other, w, c):
    """Sums over tokens, times `w`, of column g of 8 channels where t is even, or of 8 others.

    Codes are the first factor as they lie in registers for the second: of a column's pairs of tokens the even ones are row g,
    of the first half of its tokens, and the odd ones row g + 8, and those of the other 8 channels its other half.
    """
    for i in tl.static_range(4):
        c = _mma16(b[2 * i], b[2 * i + 1], other[2 * i], other[2 * i + 1], w[2 * i], w[2 * i + 1], c, False)
    return c[0] + c[3]


@triton.jit
def _own(first, second, ROWS: tl.constexpr):
    """What a lane has of its own row: of two rows that four lanes hold, the second is every other lane's."""
    if ROWS == 2:
        x = tl.where(tl.arange(0, 32) % 2 == 1, second, first)
    else:
        x = first
    return x


@triton.jit
def _of_both(x, ROWS: tl.constexpr):
    """A float32 number of the first row and of the second, where lanes have their own row's; of one row, twice."""
    if ROWS == 2:
        other = _xor(x, 1)
        odd = tl.arange(0, 32) % 2 == 1
        both = (tl.where(odd, other, x), tl.where(odd, x, other))
    else:
        both = (x, x)
    return both


@triton.jit
def _least(x, N: tl.constexpr, LARGEST: tl.constexpr):
    """The smallest, or largest, of N numbers of a lane; N a power of two."""
    for level in tl.static_range(6):
        if (N >> level) > 1:
            y = ()
            for i in tl.static_range(N >> (level + 1)):
                if LARGEST:
                    y = y + (tl.maximum(x[2 * i], x[2 * i + 1]),)
                else:
                    y = y + (tl.minimum(x[2 * i], x[2 * i + 1]),)
            x = y
    return x[0]


@triton.jit
def _least_of_row(upper, lower, N: tl.constexpr, LARGEST: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr):
    """The smallest, or largest, of a lane's own row."""
    first = _least(upper, N, LARGEST)
    if ROWS == 2:
        second = _least(lower, N, LARGEST)
        z = _own(first, second, 2)
        other = _xor(_own(second, first, 2), 1)
    else:
        z = first
        other = _xor(z, 1)
    for i in tl.static_range(3 if SHORT else 2):
        if i > 0:
            other = _xor(z, 16 if i == 2 else 2)
        if LARGEST:
            z = tl.maximum(z, other)
        else:
            z = tl.minimum(z, other)
    return z


@triton.jit
def _largest(a, b, c, SIGNED: tl.constexpr):
    """The largest of three words as integers, in one instruction where floats take two."""
    if SIGNED:
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 x; max.s32 x, $1, $2; max.s32 $0, x, $3; }", "=r,r,r,r", [a, b, c], tl.int32, True, 1
        )
    else:
        x = tl.inline_asm_elementwise(
            "{ .reg .b32 x; max.u32 x, $1, $2; max.u32 $0, x, $3; }", "=r,r,r,r", [a, b, c], tl.int32, True, 1
        )
    return x


@triton.jit
def _larger_word(a, b, SIGNED: tl.constexpr):
    if SIGNED:
        x = tl.maximum(a, b)
    else:
        x = tl.maximum(a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)
    return x


@triton.jit
def _joined(z, a, b, FIRST: tl.constexpr):
    """The largest as integers with and without a sign, a pair, of those so far and two numbers; FIRST: of these two."""
    x, y = a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True)
    if FIRST:
        most = (_larger_word(x, y, True), _larger_word(x, y, False))
    else:
        most = (_largest(z[0], x, y, True), _largest(z[1], x, y, False))
    return most


@triton.jit
def _greatest_of_row(first, second, SIGNED: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr):
    """The largest of a lane's own row, as words."""
    if ROWS == 2:
        z = _larger_word(_own(first, second, 2), _traded(_own(second, first, 2), 1), SIGNED)
    else:
        z = _larger_word(first, _traded(first, 1), SIGNED)
    z = _larger_word(z, _traded(z, 2), SIGNED)
    if SHORT:
        z = _larger_word(z, _traded(z, 16), SIGNED)
    return z


@triton.jit
def _extremes(upper, lower, N: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr):
    """The smallest and the largest number of a lane's own row, which four lanes hold, SHORT: eight, N numbers each.

    As integers, floats that are not negative are in order, and negative ones are too, downwards, and above them if integers
    have no sign. So where there are both, the largest with and without a sign tell.
    """
    first = (0, 0)
    second = (0, 0)
    for i in tl.static_range(N // 2):
        first = _joined(first, upper[2 * i], upper[2 * i + 1], i == 0)
        if ROWS == 2:
            second = _joined(second, lower[2 * i], lower[2 * i + 1], i == 0)
    high = _greatest_of_row(first[0], second[0], True, ROWS, SHORT)
    low = _greatest_of_row(first[1], second[1], False, ROWS, SHORT)
    one_sign = (high < 0) | (low >= 0)
    low, high = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    if tl.max(one_sign.to(tl.int32), 0) > 0:
        low = _least_of_row(upper, lower, N, False, ROWS, SHORT)
        high = _least_of_row(upper, lower, N, True, ROWS, SHORT)
    return low, high


@triton.jit
def _nearest(a, b, inverse, offset):
    """Two codes, in bytes 0 and 2: ``round(a * inverse + offset - NEAR)``, of a float32 sum, and that of `b`."""
    return tl.inline_asm_elementwise(
        "{ .reg .f32 x, y; fma.rn.f32 x, $1, $3, $4; fma.rn.f32 y, $2, $3, $4; cvt.rn.bf16x2.f32 $0, y, x; }",
        "=r,f,f,f,f", [a, b, inverse, offset], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _four(x, FIRST: tl.constexpr, inverse, offset):
    """A word of four codes."""
    near = _nearest(x[FIRST], x[FIRST + 1], inverse, offset)
    far = _nearest(x[FIRST + 2], x[FIRST + 3], inverse, offset)
    return _bytes(near, far, tl.full((32,), 0x6420, tl.int32))


@triton.jit
def _affine_rows(low, high, offset, scale_at, zero_at, held, UNIT: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Store scale and zero of a lane's own row, where `held`, and tell what :func:`_quantized` asks for of both rows.

    low, high: the smallest and the largest of the row. offset: of the row, to be added to numbers. UNIT: what a number of 1
    stands for, a power of two.
    """
    scale, zero = _affine((low + offset) * UNIT, (high + offset) * UNIT, (1 << BITS) - 1)
    _put16(scale_at, scale.to(tl.int16, bitcast=True).to(tl.int32), held)
    _put16(zero_at, zero.to(tl.int16, bitcast=True).to(tl.int32), held)
    step = scale.to(tl.float32)
    inverse = _reciprocal(tl.where(step == 0.0, 1.0, step))
    least = (offset * UNIT - zero.to(tl.float32)) * inverse + NEAR
    return _of_both(inverse * UNIT, ROWS), _of_both(least, ROWS)


@triton.jit
def _quantized(x, y, inverse, least, N: tl.constexpr):
    """Words of 4-bit codes of two times N numbers of a row in a lane; a byte holds one of `x`, one of `y`."""
    words = ()
    for i in tl.static_range(N // 4):
        words = words + (_four(x, 4 * i, inverse, least) + 16 * _four(y, 4 * i, inverse, least),)
    return words
