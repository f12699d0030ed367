"""Archiving pages whose scales are tokens': values. The method is told in ``archive_codes.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.codes import _load_block, _place, _word
from argus.backends.triton.lanes import _bytes, _load4
from argus.backends.triton.products import (
    TINY,
    _affine_rows,
    _beside,
    _extremes,
    _for_totals,
    _in_pairs,
    _operands,
    _own,
    _packed,
    _products,
    _quantized,
    _totals,
)
from argus.backends.triton.words import _put16, _put_some1, _traded


@triton.constexpr_function
def _tile_place(tile, bits, dim):
    """The bit at which codes of 8 channels lie in their bytes, where most of them lie anyway: one for two such tiles."""
    return _place(tile // 2 * 8 + 7, bits, dim)


@triton.constexpr_function
def _one(pair, bits, dim):
    """What a code of 1 counts for at the place of a pair of tiles, upside down."""
    return 2.0 ** -_tile_place(2 * pair, bits, dim)


@triton.jit
def _times2(x, y, FACTOR: tl.constexpr):
    if FACTOR != 1.0:
        x *= FACTOR
        y *= FACTOR
    return x, y


@triton.jit
def _tile(words, j: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """The codes of 8 channels."""
    b = ()
    for w in tl.static_range(4):
        b = b + (_word(words, j // 2 * 8 + 2 * w + j % 2, BITS, D, _tile_place(j, BITS, D)),)
    return b


@triton.jit
def _pairs_of_tokens(at):
    """FP16 numbers of tokens, two a word, as :func:`argus.backends.triton.products._in_pairs` has them."""
    near = _load4(at)
    far = _load4(at + 16)
    words = ()
    for i in tl.static_range(4):
        words = words + (_bytes(near[i], far[i], tl.full((32,), 0x5410, tl.int32)),)
        words = words + (_bytes(near[i], far[i], tl.full((32,), 0x7632, tl.int32)),)
    return words


@triton.jit
def _token_kernel(
    from_ptr, from_scale, from_zero, weights_ptr, mean_ptr, codes_ptr, scale_ptr, zero_ptr,
    D: tl.constexpr, R: tl.constexpr, FROM_BITS: tl.constexpr, SYMMETRIC: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Archive a page of one head whose scales are tokens': ``c = (W (scale * codes) + W zero) / 64``."""
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    ROWS: tl.constexpr = 2 if R > 8 else 1
    # Of up to 4 rows, lanes 16 apart share a row, and each takes every other 8 channels.
    SHORT: tl.constexpr = R <= 4
    PER: tl.constexpr = 2 if SHORT else 1
    first = g < 4
    zero = tl.zeros((32,), tl.float32)
    zero4 = (zero, zero, zero, zero)
    words = _load_block(from_ptr.to(tl.int64) + unit * (8 * D * FROM_BITS), lane, FROM_BITS, D)
    tokens = t.to(tl.int64) * 32
    beside = _beside(words, D * FROM_BITS // 16)
    signs = _operands(weights_ptr.to(tl.int64) + lane * 16)
    scales = _pairs_of_tokens(from_scale.to(tl.int64) + unit * 128 + tokens)
    counts = _for_totals(scales, g)
    # Numbers have their own signs, or those of their rows' ones.
    a = ()
    for i in tl.static_range(16):
        a = a + ((signs[i] & (0x80008000 - (1 << 32))) ^ scales[i // 4 * 2 + i % 4 // 2],)
    if SYMMETRIC:
        # Signed codes are multiplied 128 larger.
        shifts = scales
        FACTOR: tl.constexpr = -128.0
    else:
        shifts = _pairs_of_tokens(from_zero.to(tl.int64) + unit * 128 + tokens)
        FACTOR: tl.constexpr = 1.0
    shift = _products(signs, shifts, zero4)
    ones = ()
    for i in tl.static_range(16):
        ones = ones + (tl.full((32,), 0x3C003C00, tl.int32),)
    shift_total = _products(ones, shifts, zero4)[0] * FACTOR
    upper = ()
    lower = ()
    totals = ()
    for p in tl.static_range(D // 16):
        b = _in_pairs(_tile(words, 2 * p, FROM_BITS, D), _tile(beside, 2 * p, FROM_BITS, D), SYMMETRIC)
        other = _in_pairs(_tile(words, 2 * p + 1, FROM_BITS, D), _tile(beside, 2 * p + 1, FROM_BITS, D), SYMMETRIC)
        n = _products(a, b, zero4)
        m = _products(a, other, zero4)
        if SHORT:
            upper = upper + _times2(tl.where(first, n[0], m[0]), tl.where(first, n[1], m[1]), _one(p, FROM_BITS, D))
        else:
            upper = upper + _times2(n[0], n[1], _one(p, FROM_BITS, D)) + _times2(m[0], m[1], _one(p, FROM_BITS, D))
        if ROWS == 2:
            lower = lower + _times2(n[2], n[3], _one(p, FROM_BITS, D)) + _times2(m[2], m[3], _one(p, FROM_BITS, D))
        total = _totals(b, other, counts, zero4)
        if _one(p, FROM_BITS, D) != 1.0:
            total *= _one(p, FROM_BITS, D)
        totals = totals + (total,)
    # Lanes keep the totals of every other two times 8 channels, of one of them each: of column g.
    own_mean = mean_ptr.to(tl.int64) + unit * (D * 2) + (t * 8 + g).to(tl.int64) * 2
    for m in tl.static_range(D // 32):
        total = tl.where(t < 2, totals[2 * m], totals[2 * m + 1])
        mean = total * (TINY / 64) + shift_total * (1.0 / 64)
        _put16(own_mean + m * 64, _packed(mean, mean), g >= 0)
    odd = t % 2
    join = tl.where(odd == 0, 0x5410, 0x3276)
    low, high = _extremes(upper, lower, D // 4 // PER, ROWS, SHORT)
    first_row = g % (4 if SHORT else 8)
    own = _own(first_row, first_row + 8, ROWS)
    at_row = own.to(tl.int64) * 2
    inverse, least = _affine_rows(
        low, high, _own(shift[0], shift[2], ROWS) * (FACTOR / TINY), scale_ptr.to(tl.int64) + unit * (R * 2) + at_row,
        zero_ptr.to(tl.int64) + unit * (R * 2) + at_row, (t < ROWS) & (own < R), TINY / 64, BITS, ROWS,
    )  # fmt: skip
    # Bytes of two columns a lane: those of one of two tiles go to each of two lanes, whose neighbours they are.
    place = first_row * (D // 8) + t // 2 + odd * (2 * PER)
    if SHORT:
        place += g // 4 * 2
    to = codes_ptr.to(tl.int64) + unit * (R * D // 2) + place.to(tl.int64) * 4
    for r in tl.static_range(ROWS):
        held = first_row + 8 * r < R
        numbers = lower if r else upper
        codes = _quantized(numbers[: D // 8 // PER], numbers[D // 8 // PER :], inverse[r], least[r], D // 8 // PER)
        for i in tl.static_range(D // 32 // PER):
            _put_some1(to + 4 * D * r + 16 * PER * i, _bytes(codes[i], _traded(codes[i], 1), join), held)
