"""Decode attention over pages whose token axis is projected (``jl``), answered without leaving the projected space.

A page is ``x = mean + W^T c`` with 16, 8 or 4 rows ``c`` for 64 tokens, so ``q . x = q . mean + W^T (c q)`` and
``p x = sum(p) mean + (W p) c``. Coefficients are planar 4-bit codes with a scale and a zero a row: ``c q`` is
``(codes q) * scale + sum(q) * zero``, and the values' scales go into ``W p``. Built as ``codes.py`` is: products with codes on
integer tensor cores, ``q`` and ``W p`` as two int8 parts; products with ``W``, of ones and minus ones, and with means on
``mma.m16n8k16``, every FP32 factor as two FP16 parts. Lane ``4 g + t`` answers row ``t`` for tokens ``8 i + g``; ``W`` is read
from the L1 cache for each page: its registers would leave room for fewer warps.

Channels that are no multiple of 64 are taken as the next one: lanes that have none read those of others, multiply them by
zeros of ``q``, and store nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.lane_outliers import _exact_rows, _fetch_exact, _more_answers, _more_scores
from argus.backends.triton.lane_reading import PROJECTED
from argus.backends.triton.lanes import (
    REACH,
    _base2,
    _bits,
    _bytes,
    _fetch,
    _floats,
    _half,
    _halves,
    _load2,
    _load4,
    _mma,
    _mma16,
    _most,
    _reload4,
    _seen,
    _short,
    _store2,
    _sum,
    _transposed,
    _weights,
    _words,
    _xor,
)


@triton.jit
def _pair(a, b):
    """High parts of two float32 as two FP16 in a word, and their low parts in another."""
    high_a, rest_a = _short(a, False)
    high_b, rest_b = _short(b, False)
    low_a, none = _short(rest_a, False)
    low_b, none = _short(rest_b, False)
    return high_a | (high_b << 16), low_a | (low_b << 16)


@triton.constexpr_function
def _padded(dim):
    """Channels that lanes have room for."""
    return (dim + 63) // 64 * 64


@triton.jit
def _row_codes(row_at, t, D: tl.constexpr):
    """A lane's share of the codes of a row of keys: words of channels c, and D / 2 further."""
    if D % 64 == 0:
        words = _words(row_at + t * (D // 8), D // 32)
    else:
        words = ()
        for j in tl.static_range(_padded(D) // 64):
            words = words + _load2(row_at + tl.minimum(t * (_padded(D) // 64) + j, D // 16 - 1) * 8)
    return words


@triton.jit
def _some(at, held, COUNT: tl.constexpr, ALL: tl.constexpr):
    """COUNT float32 from one address a lane, zeros where they are not `held`; ALL: they are."""
    x = _floats(at, COUNT)
    if not ALL:
        y = ()
        for i in tl.static_range(COUNT):
            y = y + (tl.where(held, x[i], 0.0),)
        x = y
    return x


@triton.jit
def _projected_share(
    q_ptr, run, result, where, mask, lowest, latest, cap, begin, end,
    M: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr, CAPPED: tl.constexpr, FIELDS: tl.constexpr,
    KEXACT: tl.constexpr, VEXACT: tl.constexpr, KFACTOR: tl.constexpr, VFACTOR: tl.constexpr,
):  # fmt: skip
    """Answer four rows of one head for pages `begin` to `end`.

    run: table and positions of pages, matrices of keys and of values as ``tables.fragments`` lays them, and outliers of keys
    and of values, if KEXACT and VEXACT. result: where average and log-sum-exp go. where: head, first row, rows.
    """
    table_ptr = run[0]
    positions_ptr = run[1]
    back_ptr = run[2]
    forth_ptr = run[3]
    inner = where[0]
    R = where[2]
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    part = g % 2
    q_at = q_ptr.to(tl.int64) + (inner * R + tl.minimum(where[1] + g // 2, R - 1)) * (D * 4)
    row = where[1] + t
    held_row = tl.minimum(row, R - 1)
    # q as two int8 parts for codes and as two FP16 parts for means, each in the order in which lanes load its factor.
    DP: tl.constexpr = _padded(D)
    ALL: tl.constexpr = D == DP
    KW: tl.constexpr = DP // 32
    size = tl.zeros((32,), tl.float32)
    q_sum = tl.zeros((32,), tl.float32)
    q = _floats(q_at + t * D, D // 4)
    for i in tl.static_range(D // 4):
        size = tl.maximum(size, tl.abs(q[i]))
        q_sum += q[i]
    size = tl.maximum(size, _xor(size, 1))
    size = tl.maximum(tl.maximum(size, _xor(size, 2)), 1e-30)
    q_sum += _xor(q_sum, 1)
    q_sum += _xor(q_sum, 2)
    inverse = REACH / size
    pairs = 0x51 - part * 0x11
    flip = tl.where(part == 1, 0x80808080 - (1 << 32), 0).to(tl.int32)
    b = ()
    for w in tl.static_range(KW):
        place = t * (DP // 8) + 4 * w
        for h in tl.static_range(2):
            q = _some(q_at + (h * (D // 2) + tl.minimum(place, D // 2 - 4)) * 4, place < D // 2, 4, ALL)
            low = _bytes(_bits(q[0] * inverse), _bits(q[1] * inverse), pairs)
            high = _bytes(_bits(q[2] * inverse), _bits(q[3] * inverse), pairs)
            b = b + (_bytes(low, high, tl.full((32,), 0x5410, tl.int32)) ^ flip,)
    means = ()
    for n in tl.static_range(DP // 8):
        place = (n // 4) * 32 + t * 8 + (n % 4) * 2
        q = _some(q_at + tl.minimum(place, D - 2) * 4, place < D, 2, ALL)
        high, low = _pair(q[0], q[1])
        means = means + (tl.where(part == 1, low, high),)
    # The facts of row t, from the lanes of the queries' columns 2 t.
    q_row = q_ptr.to(tl.int64) + (inner * R + held_row) * (D * 4)
    row_sum = tl.zeros((32,), tl.float32)
    row_size = tl.zeros((32,), tl.float32)
    for n in tl.static_range(D // 16):
        q = _floats(q_row + g * (D // 2) + n * 8, 2)
        for i in tl.static_range(2):
            row_sum += q[i]
            row_size = tl.maximum(row_size, tl.abs(q[i]))
    row_sum = _sum(row_sum)
    unscale = tl.maximum(_most(row_size), 1e-30) * (1.0 / REACH)
    # Rows g and g + 8 of the coefficients; where there are fewer, the last again, which the projections do not count.
    near = tl.minimum(g, M - 1)
    far = tl.minimum(g + 8, M - 1)
    back = back_ptr.to(tl.int64) + lane * 16
    forth = forth_ptr.to(tl.int64) + lane * 16
    m = tl.full((32,), float("-inf"), tl.float32)
    total = tl.zeros((32,), tl.float32)
    none4 = (tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32))
    zero4 = (tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32))
    VW: tl.constexpr = DP // 64
    own = g * (DP // 16) if ALL else tl.minimum(g * (DP // 16), D // 2 - DP // 16)
    acc = ()
    for i in tl.static_range(DP // 8):
        acc = acc + (tl.zeros((32,), tl.float32),)
    if KEXACT or VEXACT:
        k_exact, v_exact = _exact_rows((table_ptr, positions_ptr, run[4], run[5]), begin, inner, 64, KEXACT, VEXACT)
    for page in range(begin, end):
        row_of = table_ptr + page * FIELDS
        codes = tl.load(row_of) + inner * (M * D // 2)
        upper = _row_codes(codes + near * (D // 2), t, D)
        lower = _row_codes(codes + far * (D // 2), t, D) if M > 8 else upper
        codes = tl.load(row_of + 3) + inner * (M * D // 2) + own
        v0 = _words(codes + tl.minimum(2 * t, M - 1) * (D // 2), VW)
        v2 = _words(codes + tl.minimum(2 * t + 1, M - 1) * (D // 2), VW)
        v1 = _words(codes + (2 * t + 8) * (D // 2), VW) if M > 8 else v0
        v3 = _words(codes + (2 * t + 9) * (D // 2), VW) if M > 8 else v2
        mean_at = tl.load(row_of + 7) + inner * (2 * D) + t * 16
        # An eighth of the next page's codes a lane, first of keys, then of values; then their means.
        next_of = table_ptr + tl.minimum(page + 1, end - 1) * FIELDS
        next_codes = tl.where(lane < 8, tl.load(next_of), tl.load(next_of + 3)) + lane % 8 * (M * D // 16)
        next_mean = tl.where(lane < 24, tl.load(next_of + 7), tl.load(next_of + 8)) + lane % 4 * (D // 2)
        _fetch(tl.where(lane < 16, next_codes + inner * (M * D // 2), next_mean + inner * (2 * D)))
        c = none4
        f = zero4
        for w in tl.static_range(KW):
            a = (upper[w] & 0x0F0F0F0F, lower[w] & 0x0F0F0F0F, (upper[w] >> 4) & 0x0F0F0F0F, (lower[w] >> 4) & 0x0F0F0F0F)
            c = _mma(a, b[2 * w], b[2 * w + 1], c, False)
            mean = _load4(mean_at + (w * 64 if ALL else tl.minimum(w * 64, D * 2 - 16 - t * 16)))
            f = _mma16(mean[0], mean[0], mean[1], mean[1], means[4 * w], means[4 * w + 1], f, False)
            f = _mma16(mean[2], mean[2], mean[3], mean[3], means[4 * w + 2], means[4 * w + 3], f, False)
        scale_at = tl.load(row_of + 1) + inner * (M * 2)
        zero_at = tl.load(row_of + 2) + inner * (M * 2)
        r0 = (c[0] * 256 + c[1]).to(tl.float32) * (unscale * _half(scale_at + near * 2))
        r0 += row_sum * _half(zero_at + near * 2)
        r1 = (c[2] * 256 + c[3]).to(tl.float32) * (unscale * _half(scale_at + far * 2))
        r1 += row_sum * _half(zero_at + far * 2)
        r0 = _weights(r0, False)
        r1 = _weights(r1, False)
        offset = f[0] + f[1]
        x = ()
        for i in tl.static_range(4):
            f = zero4
            w = _reload4(back + i * 512)
            f = _mma16(w[0], w[1], w[2], w[3], r0, r1, f, False)
            x = x + (f[0] + f[1] + offset, f[2] + f[3] + offset)
        if KEXACT or VEXACT:
            following = tl.minimum(page + 1, end - 1)
            next_exact = _exact_rows((table_ptr, positions_ptr, run[4], run[5]), following, inner, 64, KEXACT, VEXACT)
        if KEXACT:
            codes = (tl.load(row_of), tl.load(row_of + 1), tl.load(row_of + 2))
            x = _more_scores(
                x, run[4], k_exact, codes, (tl.load(row_of + 7), KFACTOR, run[4][4]), 0, inner, q_row, g, 8, 8, 16, 1.0,
                64, D, PROJECTED, M, True, D, False,
            )  # fmt: skip
        scores = ()
        best = m
        for i in tl.static_range(4):
            for h in tl.static_range(2):
                token = 16 * i + 8 * h + g
                s = _base2(x[2 * i + h], cap, CAPPED)
                if MASK or EXACT:
                    seen = token < 64
                    pos = token.to(tl.int64)
                    if EXACT:
                        marks = tl.load(row_of + 6).to(tl.pointer_type(tl.uint8)) + inner * 64
                        seen = tl.load(marks + token) == 0
                    if MASK:
                        pos += tl.load(positions_ptr + page)
                    s = _seen(s, pos, seen, mask, lowest, latest, MASK)
                best = tl.maximum(best, s)
                scores = scores + (s,)
        best = _most(best)
        safe = tl.where(best == float("-inf"), 0.0, best)
        keep = tl.exp2(m - safe)
        m = best
        weight = tl.zeros((32,), tl.float32)
        weigh = ()
        for i in tl.static_range(8):
            p = tl.exp2(scores[i] - safe)
            weight += p
            weigh = weigh + (_weights(p, False),)
        weight = _sum(weight)
        total = total * keep + weight
        f = zero4
        for i in tl.static_range(4):
            w = _reload4(forth + i * 512)
            f = _mma16(w[0], w[1], w[2], w[3], weigh[2 * i], weigh[2 * i + 1], f, False)
        w0 = f[0] + f[1]
        w1 = f[2] + f[3]
        scale_at = tl.load(row_of + 4) + inner * (M * 2)
        zero_at = tl.load(row_of + 5) + inner * (M * 2)
        shift = _sum(w0 * _half(zero_at + near * 2) + w1 * _half(zero_at + far * 2))
        w0 = w0 * _half(scale_at + near * 2)
        w1 = w1 * _half(scale_at + far * 2)
        size = tl.maximum(_most(tl.maximum(tl.abs(w0), tl.abs(w1))), 1e-30)
        factor = REACH / size
        undo = size * (1.0 / REACH)
        mixed = _bytes(_bits(w0 * factor), _bits(w1 * factor), tl.full((32,), 0x4051, tl.int32))
        mixed = _transposed(mixed ^ (0x80800000 - (1 << 32)))
        mean_at = tl.load(row_of + 8) + inner * (2 * D) + own * 2
        low_mean = _words(mean_at, 2 * VW)
        high_mean = _words(mean_at + D, 2 * VW)
        new = ()
        for w in tl.static_range(VW):
            # Bytes of four rows, gathered channel by channel.
            p01 = _bytes(v0[w], v1[w], tl.full((32,), 0x5140, tl.int32))
            q01 = _bytes(v0[w], v1[w], tl.full((32,), 0x7362, tl.int32))
            p23 = _bytes(v2[w], v3[w], tl.full((32,), 0x5140, tl.int32))
            q23 = _bytes(v2[w], v3[w], tl.full((32,), 0x7362, tl.int32))
            x = (
                _bytes(p01, p23, tl.full((32,), 0x5410, tl.int32)), _bytes(p01, p23, tl.full((32,), 0x7632, tl.int32)),
                _bytes(q01, q23, tl.full((32,), 0x5410, tl.int32)), _bytes(q01, q23, tl.full((32,), 0x7632, tl.int32)),
            )  # fmt: skip
            low4 = _halves(low_mean[2 * w]) + _halves(low_mean[2 * w + 1])
            high4 = _halves(high_mean[2 * w]) + _halves(high_mean[2 * w + 1])
            for e in tl.static_range(4):
                a = (x[e] & 0x0F0F0F0F, (x[e] >> 4) & 0x0F0F0F0F, none4[0], none4[0])
                c = _mma(a, mixed, none4[0], none4, False)
                new = new + (
                    acc[2 * (4 * w + e)] * keep + ((c[0] * 256 + c[1]).to(tl.float32) * undo + (weight * low4[e] + shift)),
                    acc[2 * (4 * w + e) + 1] * keep + ((c[2] * 256 + c[3]).to(tl.float32) * undo + (weight * high4[e] + shift)),
                )
        acc = new
        if VEXACT:
            codes = (tl.load(row_of + 3), tl.load(row_of + 4), tl.load(row_of + 5))
            acc = _more_answers(
                acc, run[5], v_exact, codes, (tl.load(row_of + 8), VFACTOR, run[5][4]), 0, inner, weigh, 2 * t, 2 * t + 1,
                g * (D // 16), 8, 8, D // 8, D // 2, 1, D, 0, 64, D, PROJECTED, M, True, D, False,
            )  # fmt: skip
        if KEXACT or VEXACT:
            k_exact, v_exact = next_exact
            _fetch_exact(run[4], k_exact[0], k_exact[1], run[5], v_exact[0], v_exact[1])
    safe = tl.where(total > 0.0, total, 1.0)
    stored = row < R
    to = result[0].to(tl.int64) + (row * D + own) * 4
    half = D // 2 * 4
    held = stored if ALL else stored & (g * (DP // 16) < D // 2)
    for i in tl.static_range(DP // 32):
        _store2(to + i * 8, acc[4 * i] / safe, acc[4 * i + 2] / safe, held)
        _store2(to + half + i * 8, acc[4 * i + 1] / safe, acc[4 * i + 3] / safe, held)
    tl.store(result[1] + row, tl.where(total > 0.0, m + tl.log2(safe), float("-inf")), mask=stored & (g == 0))
