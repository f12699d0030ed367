"""Decode attention on codes of a codebook of up to eight levels, with a scale a token.

Levels are looked up in registers, as FP16, by ``prmt``: it picks four bytes at once by four hexadecimal digits. Codes packed
along channels are such digits once other bits are masked: a byte holds channels ``c`` and ``c + D / 2`` four bits apart. Scales
never meet levels: a score is multiplied by its key's, a weight by its value's. Products, rows and tokens are those of
``halves.py``; channels of values are not, since a lane takes four from either half of a token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.hadamard import _hadamard
from argus.backends.triton.halves import _channels, _in_parts, _query_rows
from argus.backends.triton.lanes import (
    _base2,
    _bytes,
    _floats,
    _load1,
    _load2,
    _load4,
    _load16,
    _mma16,
    _most,
    _seen,
    _store2,
    _sum,
    _weights,
)


@triton.jit
def _plane(row, channel, N: tl.constexpr, C: tl.constexpr):
    """Where in a plane's C bytes channel ``32 N + channel`` lies; written so that steps N that share bytes share a load."""
    if C % 32 == 0:
        at = row + channel + N * 32 % C
    elif 32 % C == 0:
        at = row + channel % C
    else:
        at = row + (N * 32 + channel) % C
    return at


@triton.jit
def _planes(row, channel, N: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, TWO: tl.constexpr):
    """Bytes of each plane that hold channels ``32 N + channel`` and their neighbours: a word, or TWO."""
    words = ()
    if BITS & 2:
        at = _plane(row, channel, N, D // 4) + OFFSET
        words = words + (_load2(at) if TWO else (_load1(at),),)
    if BITS & 1:
        at = _plane(row, channel, N, D // 8) + (OFFSET + (BITS & 2) * D // 8)
        words = words + (_load2(at) if TWO else (_load1(at),),)
    return words


@triton.jit
def _field(word, channel, N: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr):
    """One plane's share of the digits of channels ``32 N + channel`` and of those D / 2 beyond."""
    C: tl.constexpr = D * BITS // 8
    if C % 32 == 0:
        RIGHT: tl.constexpr = N * 32 // C * BITS - SHIFT
    elif 32 % C == 0:
        word = word >> (channel // C * BITS)
        RIGHT: tl.constexpr = N * 32 // C * BITS - SHIFT
    else:
        word = word >> ((N * 32 + channel) // C * BITS)
        RIGHT: tl.constexpr = 0 - SHIFT
    if RIGHT > 0:
        word = word >> RIGHT
    elif RIGHT < 0:
        word = word << (0 - RIGHT)
    return word & ((0x33333333 if BITS == 2 else 0x11111111) << SHIFT)


@triton.jit
def _digits(words, channel, J: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """Codes of four neighbouring channels, each followed by that of the channel D / 2 beyond, four bits each."""
    if BITS == 3:
        x = _field(words[0][J], channel, N, 2, 0, D) | _field(words[1][J], channel, N, 1, 2, D)
    else:
        x = _field(words[0][J], channel, N, BITS, 0, D)
    return x


@triton.jit
def _book(laid, BITS: tl.constexpr):
    """Low bytes of levels, two words, and high bytes; of up to four levels the second word is not read."""
    w = _load4(laid.to(tl.int64) + tl.arange(0, 32) * 16)
    if BITS < 3:
        w = (w[0], w[0], w[2], w[2])
    return w


@triton.jit
def _levels(digits, book, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Levels of eight codes as four words: of every four, those that FIRST pairs and those that SECOND pairs."""
    words = ()
    for i in tl.static_range(2):
        low = _bytes(book[0], book[1], digits >> (16 * i))
        high = _bytes(book[2], book[3], digits >> (16 * i))
        first = _bytes(low, high, tl.full((32,), FIRST, tl.int32))
        words = words + (first, _bytes(low, high, tl.full((32,), SECOND, tl.int32)))
    return words


@triton.jit
def _of_two(first, second, book):
    """Levels of two tokens, four channels from either half of them: a word for each channel."""
    lower = (first & 0x0F0F0F0F) | ((second << 4) & ~0x0F0F0F0F)
    upper = ((first >> 4) & 0x0F0F0F0F) | (second & ~0x0F0F0F0F)
    return _levels(lower, book, 0x5140, 0x7362) + _levels(upper, book, 0x5140, 0x7362)


@triton.jit
def _number(word):
    """The FP16 number in the low half of a word, as float32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _rows(
    table, inner, unit, P: tl.constexpr, D: tl.constexpr, U: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Addresses of a unit's keys, their scales, values, and their scales."""
    row_of = table + unit // (P // (16 * U)) * FIELDS
    first = inner * P + unit % (P // (16 * U)) * (16 * U)
    return (
        tl.load(row_of) + first * (D * KBITS // 8),
        tl.load(row_of + 1) + first * 2,
        tl.load(row_of + 3) + first * (D * VBITS // 8),
        tl.load(row_of + 4) + first * 2,
    )


@triton.jit
def _keys(at, D: tl.constexpr, U: tl.constexpr, BITS: tl.constexpr):
    """Codes of 16 U tokens of keys as they are: lane ``4 g + t`` reads of tokens ``8 i + g``."""
    lane = tl.arange(0, 32)
    ROW: tl.constexpr = D * BITS // 8
    words = ()
    for i in tl.static_range(2 * U):
        for n in tl.static_range(D // 64):
            words = words + (_planes(at + lane // 4 * ROW, lane % 4 * 8, n, 8 * i * ROW, BITS, D, True),)
    return words


@triton.jit
def _values(at, D: tl.constexpr, U: tl.constexpr, BITS: tl.constexpr):
    """Codes of 16 U tokens of values as they are: lane ``4 g + t`` reads of tokens ``8 i + 2 t`` and the next."""
    lane = tl.arange(0, 32)
    ROW: tl.constexpr = D * BITS // 8
    words = ()
    for i in tl.static_range(4 * U):
        for n in tl.static_range(D // 64):
            after = (8 * (i // 2) + i % 2) * ROW
            words = words + (_planes(at + lane % 4 * (2 * ROW), lane // 4 * 4, n, after, BITS, D, False),)
    return words


@triton.jit
def _scales(at, U: tl.constexpr):
    """Scales of tokens ``8 i + g``, an FP16 in a word each."""
    words = ()
    for i in tl.static_range(2 * U):
        words = words + (_load16(at + tl.arange(0, 32) // 4 * 2 + 16 * i),)
    return words


@triton.jit
def _answers(acc, total, D: tl.constexpr):
    """Averages of row t: lane ``4 g + t`` holds, n by n, four channels from ``32 n + 4 g`` and the four D / 2 beyond."""
    inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
    y = ()
    for i in tl.static_range(D // 16):
        y = y + ((acc[i][0] + acc[i][1]) * inverse, (acc[i][2] + acc[i][3]) * inverse)
    return y


@triton.jit
def _products(x, y, N: tl.constexpr):
    """Products of N numbers a lane by N others."""
    z = ()
    for i in tl.static_range(N):
        z = z + (x[i] * y[i],)
    return z


@triton.jit
def _turned(q, signs, D: tl.constexpr):
    """Queries, as ``halves._query_rows`` has them, as they meet rotated keys: signs, and then the Hadamard transform."""
    x = _products(q, _channels(signs.to(tl.int64) + tl.arange(0, 32) % 4 * 32, D), D // 4)
    return _hadamard(x, D // 4, 0, 2)


@triton.jit
def _turned_back(y, signs, D: tl.constexpr):
    """Averages of rotated values, as :func:`_answers` has them, as those of values: the Hadamard transform, and then signs."""
    at = signs.to(tl.int64) + tl.arange(0, 32) // 4 * 16
    along = ()
    for n in tl.static_range(D // 64):
        along = along + _floats(at + n * 128, 4) + _floats(at + (n * 128 + D * 2), 4)
    return _products(_hadamard(y, D // 8, 2, 5), along, D // 8)


@triton.jit
def _book_share(
    source, at, where, mask, lowest, latest, cap, begin_unit, end_unit,
    P: tl.constexpr, D: tl.constexpr, U: tl.constexpr, KBITS: tl.constexpr, VBITS: tl.constexpr,
    KTURN: tl.constexpr, VTURN: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr, CAPPED: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """Answer four rows of one head for units of 16 U tokens of pages.

    source: table and positions of pages, books of keys and of values as ``tables.lay_book`` lays them, queries, and signs of
    keys and of values. KTURN: the signs of keys turn queries; else they are as they meet what is read of keys. VTURN: the signs
    of values turn averages back; else they are of what is read. at: where average and log-sum-exp go. where: head, first row,
    rows.
    """
    inner = where[0]
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    row = where[1] + t
    q = _query_rows(source[4], where, D)
    if KTURN:
        q = _turned(q, source[5], D)
    b = _in_parts(q, D, False)
    k_book = _book(source[2], KBITS)
    v_book = _book(source[3], VBITS)
    m = tl.full((32,), float("-inf"), tl.float32)
    zero = tl.zeros((32,), tl.float32)
    total = zero
    zero4 = (zero, zero, zero, zero)
    acc = ()
    for i in tl.static_range(D // 16):
        acc = acc + (zero4,)
    W: tl.constexpr = D // 64
    rows = _rows(source[0], inner, begin_unit, P, D, U, KBITS, VBITS, FIELDS)
    keys = _keys(rows[0], D, U, KBITS)
    k_scales = _scales(rows[1], U)
    values = _values(rows[2], D, U, VBITS)
    v_scales = _scales(rows[3], U)
    for unit in range(begin_unit, end_unit):
        page = unit // (P // (16 * U))
        # What comes next is read as soon as registers are free, halfway ahead of its use.
        rows = _rows(source[0], inner, tl.minimum(unit + 1, end_unit - 1), P, D, U, KBITS, VBITS, FIELDS)
        x = ()
        for s in tl.static_range(U):
            c = zero4
            for n in tl.static_range(W):
                even = ()
                odd = ()
                for j in tl.static_range(2):
                    even = even + _levels(_digits(keys[2 * s * W + n], t * 8, j, n, KBITS, D), k_book, 0x6240, 0x7351)
                    odd = odd + _levels(_digits(keys[(2 * s + 1) * W + n], t * 8, j, n, KBITS, D), k_book, 0x6240, 0x7351)
                for half in tl.static_range(2):
                    for j in tl.static_range(2):
                        c = _mma16(
                            even[4 * j + half], odd[4 * j + half], even[4 * j + 2 + half], odd[4 * j + 2 + half],
                            b[4 * (n + half * W) + 2 * j], b[4 * (n + half * W) + 2 * j + 1], c, False,
                        )  # fmt: skip
            x = x + (c[0] + c[1], c[2] + c[3])
        keys = _keys(rows[0], D, U, KBITS)
        scores = ()
        best = m
        for i in tl.static_range(2 * U):
            token = unit % (P // (16 * U)) * (16 * U) + 8 * i + g
            s = _base2(x[i] * _number(k_scales[i]), cap, CAPPED)
            seen = token < P
            pos = token.to(tl.int64)
            if MASK:
                pos += tl.load(source[1] + page)
            if EXACT:
                marks = tl.load(source[0] + page * FIELDS + 6).to(tl.pointer_type(tl.uint8)) + inner * P
                seen = tl.load(marks + token) == 0
            if MASK or EXACT:
                s = _seen(s, pos, seen, mask, lowest, latest, MASK)
            best = tl.maximum(best, s)
            scores = scores + (s,)
        best = _most(best)
        safe = tl.where(best == float("-inf"), 0.0, best)
        keep = tl.exp2(m - safe)
        m = best
        total = total * keep
        weigh = ()
        for i in tl.static_range(2 * U):
            p = tl.exp2(scores[i] - safe)
            total += p
            weigh = weigh + (_weights(p * _number(v_scales[i]), False),)
        new = ()
        for n in tl.static_range(W):
            levels = ()
            for i in tl.static_range(2 * U):
                first = _digits(values[2 * i * W + n], g * 4, 0, n, VBITS, D)
                second = _digits(values[(2 * i + 1) * W + n], g * 4, 0, n, VBITS, D)
                levels = levels + (_of_two(first, second, v_book),)
            for j in tl.static_range(4):
                old = acc[4 * n + j]
                c = (old[0] * keep, old[1] * keep, old[2] * keep, old[3] * keep)
                for s in tl.static_range(U):
                    lower = levels[2 * s]
                    upper = levels[2 * s + 1]
                    c = _mma16(
                        lower[2 * j], lower[2 * j + 1], upper[2 * j], upper[2 * j + 1],
                        weigh[2 * s], weigh[2 * s + 1], c, False,
                    )  # fmt: skip
                new = new + (c,)
        acc = new
        values = _values(rows[2], D, U, VBITS)
        k_scales = _scales(rows[1], U)
        v_scales = _scales(rows[3], U)
    total = _sum(total)
    y = _answers(acc, total, D)
    if VTURN:
        y = _turned_back(y, source[6], D)
    stored = row < where[2]
    to = at[0].to(tl.int64) + (row * D + g * 4) * 4
    for n in tl.static_range(W):
        for j in tl.static_range(4):
            _store2(to + (n * 32 + j // 2 * (D // 2) + j % 2 * 2) * 4, y[8 * n + 2 * j], y[8 * n + 2 * j + 1], stored)
    lse = tl.where(total > 0.0, m + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(at[1] + row, lse, mask=stored & (g == 0))
