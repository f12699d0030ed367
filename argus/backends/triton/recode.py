"""One kernel from pages, or what a tier keeps of them, to integer codes: a warp takes 64 tokens and keeps all in registers.

Target codes lie in fragment order (``layout.py``). Byte ``c`` of the words of one *quartet* ``S = (s, h)`` belongs to one
group of the target: for axis ``channel`` ``D / 16`` quartets of eight words ``(i, a)`` a lane, for axis ``token`` four
quartets of ``D / 8``. So a group's numbers lie in one byte of a lane's words and in the eight lanes that share ``t``: to find
their range takes no exchange but four shuffles, and codes never leave the lane that read their source.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.codes import _load_block, _quarters, _word
from argus.backends.triton.lanes import _from_e4m3, _half, _halves, _load1, _load2, _load4, _load16
from argus.backends.triton.rounding import FLOATING, FP8_MAX, RANGE, _affine, _over_constant, _reciprocal, _round_up
from argus.backends.triton.words import (
    _across,
    _byte,
    _inside,
    _joined,
    _owned,
    _put2,
    _put4,
    _put16,
    _put_words,
    _rounded,
    _rounded_e4m3,
    _rounded_signed,
    _signed_values,
    _spread,
    _values,
)

FLOAT32, FLOAT16, BFLOAT16, E4M3, CODES = (tl.constexpr(i) for i in range(5))
"""What the source is: numbers or E4M3 codes in natural order, or integer codes in fragment order."""


@triton.jit
def _wide(x, SOURCE: tl.constexpr):
    """The two 16-bit numbers of a word as float32."""
    if SOURCE == FLOAT16:
        low, high = _halves(x)
    else:
        low = (x << 16).to(tl.float32, bitcast=True)
        high = ((x >> 16) << 16).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _rows(base, lane, D: tl.constexpr):
    """Axis channel, codes of 8 bits in natural order: a lane's words, those of each token in a row."""
    words = ()
    at = base + (lane // 4 * 8) * D + lane % 4 * (D // 4)
    for m in tl.static_range(8):
        if D % 64 == 0:
            for j in tl.static_range(D // 64):
                words = words + _load4(at + m * D + j * 16)
        else:
            for j in tl.static_range(D // 32):
                words = words + _load2(at + m * D + j * 8)
    return words


@triton.jit
def _quartet_scales(base, lane, unit, S: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """Four FP16 numbers, one a byte of the words of a quartet, where groups of the source run as those of the target do."""
    if TOKENS:
        at = base + (unit * 64 + lane % 4 * 16 + 2 * S) * 2
        four = _halves(_load1(at)) + _halves(_load1(at + 16))
    else:
        four = _quarters(base + ((unit * (64 // G) + lane // 4 * 8 // G) * D + lane % 4 * (D // 4) + 4 * S) * 2)
    return four


@triton.jit
def _member_scales(base, lane, unit, TOKENS: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """An FP16 number for each pair (i, a), where groups of the source run across those of the target."""
    scales = ()
    if TOKENS:
        for m in tl.static_range(D // 8):
            scales = scales + (_half(base + ((unit * (64 // G) + lane % 4 * 16 // G) * D + 8 * m + lane // 4) * 2),)
    else:
        for m in tl.static_range(8):
            scales = scales + (_half(base + (unit * 64 + lane // 4 * 8 + m) * 2),)
    return scales


@triton.jit
def _as_floats(w):
    return (
        w[0].to(tl.float32, bitcast=True), w[1].to(tl.float32, bitcast=True),
        w[2].to(tl.float32, bitcast=True), w[3].to(tl.float32, bitcast=True),
    )  # fmt: skip


@triton.jit
def _numbers(base, lane, S: tl.constexpr, M: tl.constexpr, SOURCE: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr):
    """Four numbers of member M of a quartet from pages in natural order."""
    SIZE: tl.constexpr = 4 if SOURCE == FLOAT32 else 2
    if TOKENS:
        at = base + ((lane % 4 * 16 + 2 * S) * D + 8 * M + lane // 4) * SIZE
        if SOURCE == FLOAT32:
            x = (_load1(at), _load1(at + D * 4), _load1(at + D * 32), _load1(at + D * 36))
        else:
            x = (_load16(at), _load16(at + D * 2), _load16(at + D * 16), _load16(at + D * 18))
    else:
        at = base + ((lane // 4 * 8 + M) * D + lane % 4 * (D // 4) + 4 * S) * SIZE
        if SOURCE == FLOAT32:
            x = _load4(at)
        else:
            x = _load2(at)
    if SOURCE == FLOAT32:
        y = _as_floats(x)
    elif TOKENS:
        y = (_wide(x[0], SOURCE)[0], _wide(x[1], SOURCE)[0], _wide(x[2], SOURCE)[0], _wide(x[3], SOURCE)[0])
    else:
        y = _wide(x[0], SOURCE) + _wide(x[1], SOURCE)
    return y


@triton.jit
def _column(base, lane, S: tl.constexpr, M: tl.constexpr, D: tl.constexpr):
    """Axis token, codes of 8 bits in natural order: the word of member M of a quartet."""
    at = base + (lane % 4 * 16 + 2 * S) * D + 8 * M + lane // 4
    return _joined(_byte(at), _byte(at + D), _byte(at + 8 * D), _byte(at + 9 * D))


@triton.jit
def _floats4(word):
    a, b = _from_e4m3(word)
    return _halves(a) + _halves(b)


@triton.jit
def _times4(x, s):
    return (x[0] * s[0], x[1] * s[1], x[2] * s[2], x[3] * s[3])


@triton.jit
def _shrunk(s, BY: tl.constexpr):
    return (s[0] * BY, s[1] * BY, s[2] * BY, s[3] * BY)


@triton.jit
def _two(a, b):
    """Two FP16 numbers in a word."""
    return (a.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | (b.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _encoded(
    x, lane, first, second, at, held, scale_ptr, zero_ptr,
    N: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Words of codes of a quartet's N members, 4 N numbers; scales and zeros are stored."""
    L1: tl.constexpr = 16 if TOKENS else 4
    L2: tl.constexpr = 8
    L3: tl.constexpr = 4 if TOKENS else (16 if G == 64 else 0)
    TOP: tl.constexpr = (1 << BITS) - 1
    words = ()
    if KIND != RANGE:
        LIMIT: tl.constexpr = FP8_MAX if KIND == FLOATING else TOP >> 1
        sizes = ()
        for i in tl.static_range(4 * N):
            sizes = sizes + (tl.abs(x[i]),)
        largest = _across(_inside(sizes, N, 1), first, second, L1, L2, L3, 1)
        scale = _round_up(_over_constant(largest, LIMIT))
        step = scale.to(tl.float32)
        step = tl.where(step == 0.0, 1.0, step)
        inverse = _reciprocal(step)
        s = _as_floats(_spread(step.to(tl.int32, bitcast=True), lane, L1, L2, L3))
        y = _as_floats(_spread(inverse.to(tl.int32, bitcast=True), lane, L1, L2, L3))
        for m in tl.static_range(N):
            if KIND == FLOATING:
                words = words + (_rounded_e4m3(x[4 * m], x[4 * m + 1], x[4 * m + 2], x[4 * m + 3], s, y),)
            else:
                words = words + (_rounded_signed(x[4 * m], x[4 * m + 1], x[4 * m + 2], x[4 * m + 3], s, y),)
    else:
        high = _across(_inside(x, N, 1), first, second, L1, L2, L3, 1)
        low = _across(_inside(x, N, 2), first, second, L1, L2, L3, 2)
        scale, zero = _affine(low, high, TOP)
        _put16(zero_ptr + at, zero.to(tl.int16, bitcast=True).to(tl.int32), held)
        step = scale.to(tl.float32)
        step = tl.where(step == 0.0, 1.0, step)
        inverse = _reciprocal(step)
        pairs = _spread(_two(step.to(tl.float16), zero), lane, L1, L2, L3)
        y = _as_floats(_spread(inverse.to(tl.int32, bitcast=True), lane, L1, L2, L3))
        a, b, c, d = _halves(pairs[0]), _halves(pairs[1]), _halves(pairs[2]), _halves(pairs[3])
        s, z = (a[0], b[0], c[0], d[0]), (a[1], b[1], c[1], d[1])
        for m in tl.static_range(N):
            words = words + (_rounded(x[4 * m], x[4 * m + 1], x[4 * m + 2], x[4 * m + 3], s, y, z),)
    _put16(scale_ptr + at, scale.to(tl.int16, bitcast=True).to(tl.int32), held)
    return words


@triton.jit
def _stored(codes, W: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, NS: tl.constexpr, N: tl.constexpr):
    """Stored word W of a plane: codes are words ``[S, i, a]``, of which it takes some in the order ``(i, S, a)``."""
    F: tl.constexpr = 8 // BITS
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x01010101
    x = tl.zeros((32,), tl.int32)
    for f in tl.static_range(F):
        # Word k = f * NS * N / F + W = ((i * NS) + S) * 2 + a.
        word = codes[
            ((f * (NS * N // F) + W) // 2 % NS) * N + (f * (NS * N // F) + W) // (2 * NS) * 2 + (f * (NS * N // F) + W) % 2
        ]
        if BITS == 8:
            x = word
        else:
            if SHIFT > 0:
                word = word >> SHIFT
            x = x | ((word & MASK) << (f * BITS))
    return x


@triton.jit
def _store_plane(
    base, lane, codes, SHIFT: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, NS: tl.constexpr, N: tl.constexpr
):
    W: tl.constexpr = D * BITS // 16
    words = ()
    for i in tl.static_range(W):
        words = words + (_stored(codes, i, SHIFT, BITS, NS, N),)
    _put_words(base, lane, words, W)


@triton.jit
def _store_rows(base, lane, codes, D: tl.constexpr):
    """Axis channel, codes of 8 bits in natural order."""
    at = base + (lane // 4 * 8) * D + lane % 4 * (D // 4)
    for m in tl.static_range(8):
        if D % 64 == 0:
            for j in tl.static_range(D // 64):
                _put4(
                    at + m * D + j * 16,
                    codes[32 * j + m], codes[32 * j + 8 + m], codes[32 * j + 16 + m], codes[32 * j + 24 + m],
                )  # fmt: skip
        else:
            for j in tl.static_range(D // 32):
                _put2(at + m * D + j * 8, codes[16 * j + m], codes[16 * j + 8 + m])


@triton.jit
def _recode_kernel(
    from_ptr, from_scale, from_zero, codes_ptr, scale_ptr, zero_ptr,
    D: tl.constexpr, SOURCE: tl.constexpr, FROM_BITS: tl.constexpr, FROM_SYMMETRIC: tl.constexpr, FROM_TOKENS: tl.constexpr,
    FROM_G: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Encode 64 tokens of one head."""
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    NS: tl.constexpr = 4 if TOKENS else D // 16
    N: tl.constexpr = D // 8 if TOKENS else 8
    first, second, held, to = _owned(lane, unit, D, TOKENS, G)
    PER: tl.constexpr = 4 if TOKENS else 8
    # Words of source codes come with them at the top of their bytes.
    TIMES: tl.constexpr = 1.0 / (1 << (8 - FROM_BITS))
    source = from_ptr.to(tl.int64)
    scales_at = from_scale.to(tl.int64)
    zeros_at = from_zero.to(tl.int64)
    CROSSED: tl.constexpr = SOURCE == E4M3 and FROM_TOKENS != TOKENS
    if SOURCE == CODES:
        base = source + unit * (8 * D * FROM_BITS)
        words = _load_block(base, lane, FROM_BITS, D)
    elif SOURCE == E4M3:
        base = source + unit * (64 * D)
        if not TOKENS:
            words = _rows(base, lane, D)
    else:
        base = source + unit * (64 * D * (4 if SOURCE == FLOAT32 else 2))
    if CROSSED:
        members = _member_scales(scales_at, lane, unit, TOKENS, FROM_G, D)
    codes = ()
    for S in tl.static_range(NS):
        x = ()
        if SOURCE >= E4M3 and not CROSSED:
            s = _quartet_scales(scales_at, lane, unit, S, TOKENS, FROM_G, D)
        if SOURCE == CODES:
            if FROM_BITS < 8:
                s = _shrunk(s, TIMES)
            if not FROM_SYMMETRIC:
                z = _quartet_scales(zeros_at, lane, unit, S, TOKENS, FROM_G, D)
        for m in tl.static_range(N):
            if SOURCE == CODES:
                word = _word(words, m // 2 * (2 * NS) + S * 2 + m % 2, FROM_BITS, D, 8 - FROM_BITS)
                if FROM_SYMMETRIC:
                    x = x + _signed_values(word, s)
                else:
                    x = x + _values(word, s, z)
            elif SOURCE == E4M3:
                if TOKENS:
                    word = _column(base, lane, S, m, D)
                else:
                    word = words[m * (D // 16) + S]
                if CROSSED:
                    x = x + _times4(_floats4(word), (members[m], members[m], members[m], members[m]))
                else:
                    x = x + _times4(_floats4(word), s)
            else:
                x = x + _numbers(base, lane, S, m, SOURCE, TOKENS, D)
        codes = codes + _encoded(
            x, lane, first, second, to + S * PER, held, scale_ptr.to(tl.int64), zero_ptr.to(tl.int64),
            N, KIND, BITS, TOKENS, G,
        )  # fmt: skip
    target = codes_ptr.to(tl.int64) + unit * (8 * D * BITS)
    if KIND == FLOATING:
        _store_rows(target, lane, codes, D)
    elif BITS & 8:
        _store_plane(target, lane, codes, 0, 8, D, NS, N)
    if BITS & 4:
        _store_plane(target, lane, codes, 0, 4, D, NS, N)
    if BITS & 2:
        _store_plane(target + (BITS & 4) * D * 8, lane, codes, BITS & 4, 2, D, NS, N)
    if BITS & 1:
        _store_plane(target + (BITS & 6) * D * 8, lane, codes, BITS & 6, 1, D, NS, N)
