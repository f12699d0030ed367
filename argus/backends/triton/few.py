"""Decode attention on integer tensor cores for pages of different widths: few pages, so little code counts, not time.

What ``codes.py`` does, 32 tokens at a time and with each page's bits read from the table: codes of 1, 2, 4 and 8 bits in
fragment order, keys with scales a channel and values with scales a token. Signed codes are read as unsigned, 128 too large.
Lane ``4 g + t`` answers row ``t`` for tokens ``8 g + 4 s`` to ``8 g + 4 s + 3`` of half ``s`` of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.codes import _answered, _fold, _quarters
from argus.backends.triton.lane_outliers import _exact_rows, _more_answers, _more_scores, _within
from argus.backends.triton.lane_reading import ANY
from argus.backends.triton.lanes import (
    LOG2E,
    REACH,
    _base2,
    _bits,
    _bytes,
    _from_lane,
    _load1,
    _load4,
    _mma,
    _most,
    _transposed,
    _weights,
)


@triton.jit
def _operand_of(base, first, bits, flip, D: tl.constexpr):
    """Words `first` to `first + 3` of a block, an A operand: codes of `bits` bits in the low bits of their bytes."""
    # A plane has D / 16 stored words for each bit: a power of two of them, so the field is found by a shift.
    field = (first // (D // 16)) >> (bits // 2 - bits // 8)
    words = _load4(base + (first - field * (D // 16) * bits) * 128)
    mask = ((1 << bits) - 1) * 0x01010101
    shift = field * bits
    return (
        ((words[0] >> shift) & mask) ^ flip, ((words[1] >> shift) & mask) ^ flip,
        ((words[2] >> shift) & mask) ^ flip, ((words[3] >> shift) & mask) ^ flip,
    )  # fmt: skip


@triton.jit
def _few_share(
    q_ptr, run, at, where, mask, lowest, cap, begin, end,
    P: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr, CAPPED: tl.constexpr, FIELDS: tl.constexpr,
    KEXACT: tl.constexpr, VEXACT: tl.constexpr,
):  # fmt: skip
    """Answer four rows of one head for units `begin` to `end` of 32 tokens.

    run: table and positions of pages, and outliers of keys and of values, if KEXACT and VEXACT; at: where average and
    log-sum-exp go; where: head, first row, rows.
    """
    inner = where[0]
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    part = g % 2
    row = where[1] + t
    # Rows beyond the last repeat it; nothing of them is stored.
    q_row = tl.minimum(where[1] + g // 2, where[2] - 1)
    q_at = q_ptr.to(tl.int64) + ((inner * where[2] + q_row) * D + t * (D // 4) + part * 4) * 4
    own_row = q_ptr.to(tl.int64) + (inner * where[2] + tl.minimum(row, where[2] - 1)) * (D * 4)
    m = tl.full((32,), float("-inf"), tl.float32)
    total = tl.zeros((32,), tl.float32)
    offset_total = tl.zeros((32,), tl.float32)
    acc = ()
    for i in tl.static_range(D // 8):
        acc = acc + (tl.zeros((32,), tl.float32),)
    zero4 = (tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32))
    PER_PAGE: tl.constexpr = P // 64
    for unit in range(begin, end):
        page = unit // (2 * PER_PAGE)
        block = unit // 2 % PER_PAGE
        half = unit % 2
        row_of = run[0] + page * FIELDS
        if KEXACT or VEXACT:
            k_exact, v_exact = _exact_rows(run, page, inner, P, KEXACT, VEXACT)
        facts = tl.load(row_of + 9).to(tl.int32)
        k_bits = facts & 255
        v_bits = (facts >> 8) & 255
        k_signed = (facts >> 16) & 1
        v_signed = (facts >> 17) & 1
        k_group = facts >> 18
        k_flip = tl.where(k_signed == 1, 0x80808080 - (1 << 32), 0).to(tl.int32)
        v_flip = tl.where(v_signed == 1, 0x80808080 - (1 << 32), 0).to(tl.int32)
        place = inner * PER_PAGE + block
        keys = tl.load(row_of) + place * (8 * D * k_bits) + lane * 16
        values = tl.load(row_of + 3) + place * (8 * D * v_bits) + lane * 16
        token = inner * P + block * 64 + g * 8 + half * 4
        scale_at = tl.load(row_of + 4)
        scale = _quarters(scale_at + token * 2)
        zero = _quarters(tl.where(v_signed == 1, scale_at, tl.load(row_of + 5)) + token * 2)
        channel_at = ((inner * (PER_PAGE // k_group) + block // k_group) * D + t * (D // 4) + part * 4) * 2
        k_scale = tl.load(row_of + 1)
        k_zero = tl.where(k_signed == 1, k_scale, tl.load(row_of + 2))
        b, unscale, offset = _fold(q_at, k_scale + channel_at, k_zero + channel_at, k_signed == 1, part, D, False, True)
        # Column 2 t holds the high part of row t: its facts lie in the lanes of column 2 t.
        if not CAPPED:
            unscale *= LOG2E
            offset *= LOG2E
        unscale = _from_lane(unscale, t * 8)
        offset = _from_lane(offset, t * 8)
        x = ()
        for i in tl.static_range(2):
            c = zero4
            for s in tl.static_range(D // 32):
                a = _operand_of(keys, half * (D // 4) + i * (D // 8) + 4 * s, k_bits, k_flip, D)
                c = _mma(a, b[2 * s], b[2 * s + 1], c, False)
            x = x + ((c[0] * 256 + c[1]).to(tl.float32), (c[2] * 256 + c[3]).to(tl.float32))
        if KEXACT:
            if PER_PAGE > 1:
                k_exact = _within(run[2], k_exact[0], k_exact[1], block * (64 * D), (block + 1) * (64 * D))
            x = (x[0] * unscale, x[1] * unscale, x[2] * unscale, x[3] * unscale)
            unscale = tl.full((32,), 1.0, tl.float32)
            codes = (tl.load(row_of), tl.load(row_of + 1), tl.load(row_of + 2))
            x = _more_scores(
                x, run[2], k_exact, codes, (k_bits, k_signed, k_group * 64), block * 64, inner, own_row, 8 * g + half * 4,
                4, 1, 2, 1.0 if CAPPED else LOG2E, P, D, ANY, 0, False, 0, False,
            )  # fmt: skip
        if EXACT:
            marks = _load1(tl.load(row_of + 6) + token)
        if MASK:
            mask_at = mask[0] + (tl.load(run[1] + page) + block * 64 + g * 8 + half * 4) * mask[1]
        scores = ()
        best = m
        for i in tl.static_range(4):
            s = x[i] * unscale + offset
            if CAPPED:
                s = _base2(s, cap, True)
            if MASK == 1:
                s = tl.where(tl.load(mask_at + i * mask[1]) != 0, s, float("-inf"))
            elif MASK == 2:
                more = tl.load(mask_at + i * mask[1]).to(tl.float32)
                s = tl.where(more > lowest, s + more * LOG2E, float("-inf"))
            if EXACT:
                s = tl.where((marks >> (i * 8)) & 255 != 0, float("-inf"), s)
            best = tl.maximum(best, s)
            scores = scores + (s,)
        best = _most(best)
        safe = tl.where(best == float("-inf"), 0.0, best)
        keep = tl.exp2(m - safe)
        m = best
        total = total * keep
        offset_total = offset_total * keep
        weights = ()
        shares = ()
        size = tl.zeros((32,), tl.float32)
        for i in tl.static_range(4):
            p = tl.exp2(scores[i] - safe)
            total += p
            offset_total += p * tl.where(v_signed == 1, scale[i] * -128.0, zero[i])
            w = p * scale[i]
            size = tl.maximum(size, w)
            weights = weights + (w,)
            if VEXACT:
                shares = shares + (_weights(p, False),)
        size = tl.maximum(_most(size), 1e-30)
        inverse = REACH / size
        unscale = size * (1.0 / REACH)
        weigh = ()
        for j in tl.static_range(2):
            pair = _bytes(
                _bits(weights[2 * j] * inverse), _bits(weights[2 * j + 1] * inverse), tl.full((32,), 0x4051, tl.int32)
            )
            weigh = weigh + (_transposed(pair ^ (0x80800000 - (1 << 32))),)
        new = ()
        for i in tl.static_range(D // 16):
            o = _mma(_operand_of(values, 8 * i + 4 * half, v_bits, v_flip, D), weigh[0], weigh[1], zero4, False)
            new = new + (
                acc[2 * i] * keep + (o[0] * 256 + o[1]).to(tl.float32) * unscale,
                acc[2 * i + 1] * keep + (o[2] * 256 + o[3]).to(tl.float32) * unscale,
            )
        acc = new
        if VEXACT:
            if PER_PAGE > 1:
                v_exact = _within(run[3], v_exact[0], v_exact[1], block * (64 * D), (block + 1) * (64 * D))
            codes = (tl.load(row_of + 3), tl.load(row_of + 4), tl.load(row_of + 5))
            token_of = 16 * t + half * 4
            acc = _more_answers(
                acc, run[3], v_exact, codes, (v_bits, v_signed, 0), block * 64, inner, shares, token_of, token_of + 8, g, 4, 1,
                D // 8, 8, 16, D, 0, P, D, ANY, 0, True, 0, False,
            )  # fmt: skip
    _answered(at, row, where[2], g, m, total, offset_total, acc, D)
