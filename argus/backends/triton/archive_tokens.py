"""Archiving pages whose scales are tokens': values. The method is told in ``archive_codes.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.codes import _load_block, _place, _word
from argus.backends.triton.lanes import _bytes, _halves, _halves8, _load4, _xor
from argus.backends.triton.products import UNIT, _float_at, _limbs, _packed, _products, _quantized, _shared_sums, _sums
from argus.backends.triton.recode import _as_floats
from argus.backends.triton.words import _lane_word, _put_some1, _traded


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
