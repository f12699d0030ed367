"""Decode attention on 16-bit tokens in place, and on E4M3 or int8 codes made 16 bits in registers: pages, window, anchors.

Products run on ``mma.m16n8k16`` with float32 sums. Queries and weights go in two 16-bit parts, high and low, in neighbouring
columns, so that neither is rounded; codes times their scale are rounded to FP16. Tokens are the M side of the first
product; values, read along channels, are paired token by token for the second. Lane ``4 g + t`` answers row ``t`` for tokens
``8 i + g``, in channels ``64 h + 8 g`` and the seven that follow, and of channels beyond the last 64 in an eighth, from ``g``
eighths on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.lane_outliers import _exact_rows, _fetch_exact, _more_answers, _more_scores, _within
from argus.backends.triton.lane_reading import BF16 as BF16_NUMBERS, E4M3, FP16
from argus.backends.triton.lanes import (
    _base2,
    _bytes,
    _floats,
    _from_e4m3,
    _from_int8,
    _load1,
    _load2,
    _load4,
    _load16,
    _mma16,
    _most,
    _seen,
    _short,
    _store2,
    _stream4,
    _sum,
    _times,
    _weights,
)


@triton.jit
def _eight(codes, scales, token, channel, D: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SIGNED: tl.constexpr):
    """Eight neighbouring channels of a token, E4M3 (SIGNED: int8) with scales, as four words of two FP16."""
    w = _load2(codes + token * D + channel)
    if SIGNED:
        x = _from_int8(w[0]) + _from_int8(w[1])
    else:
        x = _from_e4m3(w[0]) + _from_e4m3(w[1])
    if TOKENS:
        one = tl.load((scales + (token * (D // G) + channel // G) * 2).to(tl.pointer_type(tl.int16))).to(tl.int32)
        both = _bytes(one, one, tl.full((32,), 0x1010, tl.int32))
        scale = (both, both, both, both)
    else:
        scale = _load4(scales + (token // G * D + channel) * 2)
    return _times(x[0], scale[0]), _times(x[1], scale[1]), _times(x[2], scale[2]), _times(x[3], scale[3])


@triton.jit
def _two(codes, scales, token, channel, D: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SIGNED: tl.constexpr):
    """Two neighbouring channels, from an even one on, as :func:`_eight` has eight."""
    w = _load16(codes + token * D + channel)
    x = _from_int8(w)[0] if SIGNED else _from_e4m3(w)[0]
    if TOKENS:
        one = _load16(scales + (token * (D // G) + channel // G) * 2)
        scale = one | (one << 16)
    else:
        scale = _load1(scales + (token // G * D + channel) * 2)
    return _times(x, scale)


@triton.jit
def _channels(at, D: tl.constexpr):
    """Of D float32 eight of every 32 from one address a lane, where lanes that differ in t are eight channels apart.

    Of 16 that are left lanes of t from 2 on have zeros.
    """
    x = ()
    for i in tl.static_range(D // 32):
        x = x + _floats(at + i * 128, 8)
    if D % 32:
        beyond = tl.arange(0, 32) % 4 >= 2
        left = _floats(at + (D // 32 * 128 - tl.where(beyond, 64, 0)), 8)
        for i in tl.static_range(8):
            x = x + (tl.where(beyond, 0.0, left[i]),)
    return x


@triton.jit
def _key_words(token_at, t, D: tl.constexpr):
    """Of a token's D 16-bit numbers those that are multiplied by what :func:`_channels` has; of others, any."""
    words = ()
    for n in tl.static_range(D // 32):
        words = words + (_stream4(token_at + (n * 64 + t * 16)),)
    if D % 32:
        words = words + (_stream4(token_at + (D // 32 * 64 + t % 2 * 16)),)
    return words


@triton.jit
def _value_words(token_at, g, D: tl.constexpr):
    """Of a token's D 16-bit numbers those of lanes g, in D / 16 words."""
    words = ()
    for n in tl.static_range(D // 64):
        words = words + _stream4(token_at + (n * 128 + g * 16))
    LEFT: tl.constexpr = D % 64 // 16
    left_at = token_at + (D // 64 * 128 + g * (4 * LEFT))
    if LEFT == 2:
        words = words + _load2(left_at)
    else:
        for i in tl.static_range(LEFT):
            words = words + (_load1(left_at + 4 * i),)
    return words


@triton.jit
def _key_codes(codes, scales, token, t, D: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SIGNED: tl.constexpr):
    """:func:`_key_words` of codes."""
    words = ()
    for n in tl.static_range(D // 32):
        words = words + (_eight(codes, scales, token, n * 32 + t * 8, D, TOKENS, G, SIGNED),)
    if D % 32:
        words = words + (_eight(codes, scales, token, D // 32 * 32 + t % 2 * 8, D, TOKENS, G, SIGNED),)
    return words


@triton.jit
def _value_codes(codes, scales, token, g, D: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SIGNED: tl.constexpr):
    """:func:`_value_words` of codes."""
    words = ()
    for n in tl.static_range(D // 64):
        words = words + _eight(codes, scales, token, n * 64 + g * 8, D, TOKENS, G, SIGNED)
    LEFT: tl.constexpr = D % 64 // 16
    for i in tl.static_range(LEFT):
        words = words + (_two(codes, scales, token, D // 64 * 64 + g * (2 * LEFT) + 2 * i, D, TOKENS, G, SIGNED),)
    return words


@triton.jit
def _query_rows(q_ptr, where, D: tl.constexpr):
    """Four rows of a head: lane ``4 g + t`` holds of row ``g // 2`` channels ``32 i + 8 t`` and the seven that follow."""
    lane = tl.arange(0, 32)
    # Rows beyond the last repeat it; nothing of them is stored.
    row = tl.minimum(where[1] + lane // 8, where[2] - 1)
    return _channels(q_ptr.to(tl.int64) + ((where[0] * where[2] + row) * D + lane % 4 * 8) * 4, D)


@triton.jit
def _in_parts(q, D: tl.constexpr, BF16: tl.constexpr):
    """What :func:`_query_rows` has as the second factor of products with tokens: high parts in a column, low in the next."""
    part = tl.arange(0, 32) // 4 % 2
    b = ()
    for i in tl.static_range((D + 31) // 32 * 4):
        high0, rest0 = _short(q[2 * i], BF16)
        high1, rest1 = _short(q[2 * i + 1], BF16)
        low0, none = _short(rest0, BF16)
        low1, none = _short(rest1, BF16)
        b = b + (tl.where(part == 1, low0 | (low1 << 16), high0 | (high1 << 16)),)
    return b


@triton.jit
def _halves_share(
    q_ptr, source, at, where, mask, lowest, latest, cap, begin_unit, end_unit,
    P: tl.constexpr, D: tl.constexpr, U: tl.constexpr, BF16: tl.constexpr, DENSE: tl.constexpr, PLACED: tl.constexpr,
    CODED: tl.constexpr, KTOKENS: tl.constexpr, KG: tl.constexpr, VTOKENS: tl.constexpr, VG: tl.constexpr,
    MASK: tl.constexpr, EXACT: tl.constexpr, CAPPED: tl.constexpr, FIELDS: tl.constexpr,
    KEXACT: tl.constexpr, VEXACT: tl.constexpr,
):  # fmt: skip
    """Answer four rows of one head for units of 16 U tokens, of pages or of one dense part.

    source: table and positions of pages, and outliers of keys and of values, if KEXACT and VEXACT; or keys and values of this
    head, their strides a token, positions (or the first), tokens and scales of a dense part (CODED: int8 in rows of D). at:
    where average and log-sum-exp go. where: head, first row, rows.
    """
    inner = where[0]
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    row = where[1] + t
    own_row = q_ptr.to(tl.int64) + (inner * where[2] + tl.minimum(row, where[2] - 1)) * (D * 4)
    b = _in_parts(_query_rows(q_ptr, where, D), D, BF16)
    m = tl.full((32,), float("-inf"), tl.float32)
    total = tl.zeros((32,), tl.float32)
    acc = ()
    zero = tl.zeros((32,), tl.float32)
    zero4 = (zero, zero, zero, zero)
    for i in tl.static_range(D // 16):
        acc = acc + (zero4,)
    UNIT: tl.constexpr = 16 * U
    PER_PAGE: tl.constexpr = P // UNIT
    KW: tl.constexpr = (D + 31) // 32
    if KEXACT or VEXACT:
        k_exact, v_exact = _exact_rows(source, begin_unit // PER_PAGE, inner, P, KEXACT, VEXACT)
    for unit in range(begin_unit, end_unit):
        if DENSE:
            begin = unit * UNIT
            end = source[5]
            k_from = source[0]
            v_from = source[1]
            k_token = source[2] * 2
            v_token = source[3] * 2
            k_scale = source[6]
            v_scale = source[7]
        else:
            page = unit // PER_PAGE
            begin = (unit % PER_PAGE) * UNIT
            end = P
            row_of = source[0] + page * FIELDS
            SIZE: tl.constexpr = 1 if CODED else 2
            k_from = tl.load(row_of) + inner * (P * D * SIZE)
            v_from = tl.load(row_of + 3) + inner * (P * D * SIZE)
            k_token = D * 2
            v_token = D * 2
            if CODED:
                KS: tl.constexpr = P * (D // KG) if KTOKENS else P // KG * D
                VS: tl.constexpr = P * (D // VG) if VTOKENS else P // VG * D
                k_scale = tl.load(row_of + 1) + inner * (KS * 2)
                v_scale = tl.load(row_of + 4) + inner * (VS * 2)
        keys = ()
        for i in tl.static_range(2 * U):
            token = begin + 8 * i + g
            if DENSE:
                token = tl.minimum(token, end - 1)
            if CODED:
                keys = keys + _key_codes(k_from, k_scale, token, t, D, KTOKENS, KG, DENSE)
            else:
                keys = keys + _key_words(k_from + token.to(tl.int64) * k_token, t, D)
        values = ()
        for i in tl.static_range(2 * U):
            for j in tl.static_range(2):
                token = begin + 8 * i + 2 * t + j
                if DENSE:
                    token = tl.minimum(token, end - 1)
                if CODED:
                    values = values + _value_codes(v_from, v_scale, token, g, D, VTOKENS, VG, DENSE)
                else:
                    values = values + _value_words(v_from + token.to(tl.int64) * v_token, g, D)
        if KEXACT or VEXACT:
            following = tl.minimum(unit + 1, end_unit - 1) // PER_PAGE
            next_exact = _exact_rows(source, following, inner, P, KEXACT, VEXACT)
        if KEXACT:
            k_exact = _within(source[2], k_exact[0], k_exact[1], begin * D, (begin + UNIT) * D)
        if VEXACT:
            v_exact = _within(source[3], v_exact[0], v_exact[1], begin * D, (begin + UNIT) * D)
        x = ()
        for s in tl.static_range(U):
            c = zero4
            for i in tl.static_range(KW):
                even = keys[2 * s * KW + i]
                odd = keys[(2 * s + 1) * KW + i]
                c = _mma16(even[0], odd[0], even[1], odd[1], b[4 * i], b[4 * i + 1], c, BF16)
                c = _mma16(even[2], odd[2], even[3], odd[3], b[4 * i + 2], b[4 * i + 3], c, BF16)
            x = x + (c[0] + c[1], c[2] + c[3])
        if KEXACT:
            codes = (tl.load(row_of), tl.load(row_of + 1), tl.load(row_of + 2))
            x = _more_scores(
                x, source[2], k_exact, codes, 0, begin, inner, own_row, g, 2 * U, 8, 16, 1.0,
                P, D, E4M3 if CODED else BF16_NUMBERS if BF16 else FP16, 8, KTOKENS, KG, True,
            )  # fmt: skip
        scores = ()
        best = m
        for i in tl.static_range(2 * U):
            token = begin + 8 * i + g
            s = _base2(x[i], cap, CAPPED)
            seen = token < end
            pos = token.to(tl.int64)
            if DENSE:
                if PLACED:
                    pos = tl.load(source[4] + token, mask=seen, other=-1).to(tl.int64)
                    seen = pos >= 0
                else:
                    pos += source[4]
            elif MASK:
                pos += tl.load(source[1] + page)
            if EXACT:
                marks = tl.load(row_of + 6).to(tl.pointer_type(tl.uint8)) + inner * P
                seen = seen & (tl.load(marks + token) == 0)
            if DENSE or MASK or EXACT:
                s = _seen(s, pos, seen, mask, lowest, latest, MASK)
            best = tl.maximum(best, s)
            scores = scores + (s,)
        best = _most(best)
        safe = tl.where(best == float("-inf"), 0.0, best)
        keep = tl.exp2(m - safe)
        m = best
        total = total * keep
        weigh = ()
        shares = ()
        for i in tl.static_range(2 * U):
            p = tl.exp2(scores[i] - safe)
            total += p
            weigh = weigh + (_weights(p, BF16),)
            if VEXACT:
                shares = shares + (_weights(p, False),)
        new = ()
        for j in tl.static_range(D // 16):
            old = acc[j]
            c = (old[0] * keep, old[1] * keep, old[2] * keep, old[3] * keep)
            for s in tl.static_range(U):
                r0 = values[(4 * s) * (D // 16) + j]
                r1 = values[(4 * s + 1) * (D // 16) + j]
                r2 = values[(4 * s + 2) * (D // 16) + j]
                r3 = values[(4 * s + 3) * (D // 16) + j]
                lower = tl.full((32,), 0x5410, tl.int32)
                upper = tl.full((32,), 0x7632, tl.int32)
                c = _mma16(
                    _bytes(r0, r1, lower), _bytes(r0, r1, upper), _bytes(r2, r3, lower), _bytes(r2, r3, upper),
                    weigh[2 * s], weigh[2 * s + 1], c, BF16,
                )  # fmt: skip
            new = new + (c,)
        acc = new
        if VEXACT:
            codes = (tl.load(row_of + 3), tl.load(row_of + 4), tl.load(row_of + 5))
            flat = ()
            for i in tl.static_range(D // 16):
                flat = flat + (acc[i][0], acc[i][2])
            flat = _more_answers(
                flat, source[3], v_exact, codes, 0, begin, inner, shares, 2 * t, 2 * t + 1, g * 8, 2 * U, 8,
                D // 8, 1, 2, 4, 64, P, D, E4M3 if CODED else BF16_NUMBERS if BF16 else FP16, 8, VTOKENS, VG, True,
            )  # fmt: skip
            new = ()
            for i in tl.static_range(D // 16):
                new = new + ((flat[2 * i], acc[i][1], flat[2 * i + 1], acc[i][3]),)
            acc = new
        if KEXACT or VEXACT:
            k_exact, v_exact = next_exact
            _fetch_exact(source[2], k_exact[0], k_exact[1], source[3], v_exact[0], v_exact[1])
    total = _sum(total)
    safe = tl.where(total > 0.0, total, 1.0)
    stored = row < where[2]
    to = at[0].to(tl.int64) + row * (D * 4)
    for j in tl.static_range(D // 16):
        c = acc[j]
        if j < D // 64 * 4:
            place = g * 8 + (j // 4 * 64 + j % 4 * 2)
        else:
            place = g * (D % 64 // 8) + (D // 64 * 64 + (j - D // 64 * 4) * 2)
        _store2(to + place * 4, (c[0] + c[1]) / safe, (c[2] + c[3]) / safe, stored)
    tl.store(at[1] + row, tl.where(total > 0.0, m + tl.log2(safe), float("-inf")), mask=stored & (g == 0))
