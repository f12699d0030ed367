"""Decode attention on integer tensor cores: keys with scales a channel, values with scales a token, in fragment order.

A warp takes 64 tokens at a time and keeps everything in registers. Scales are folded: ``q' = q * scale`` for each channel and
``p' = p * scale`` for each token, each rounded to 16 bits in the page and held as two int8 parts, high and low, in
neighbouring columns; the codes themselves are never converted, only masked out of their words. Products are exact integers,
and the rounding of q' and p' is finer than FP16's. Zeros enter as ``q . zero``, one number a row and page, and as
``sum(p * zero)``. Lane ``4 g + t`` answers row ``t`` for tokens ``8 g`` to ``8 g + 7``; see ``layout.py`` for codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.lane_outliers import (
    _exact_rows,
    _fetch_exact,
    _more_answers,
    _more_scores,
    _within,
)
from argus.backends.triton.lane_reading import CODES
from argus.backends.triton.lanes import (
    LOG2E,
    REACH,
    _base2,
    _bits,
    _bytes,
    _from_lane,
    _halves,
    _halves8,
    _load1,
    _load2,
    _load4,
    _mma,
    _most,
    _partner,
    _reload4,
    _store1,
    _sum,
    _transposed,
    _weights,
    _xor,
)


@triton.jit
def _load_plane(base, lane, BITS: tl.constexpr, D: tl.constexpr):
    """One plane of a block: D * BITS / 16 words a lane."""
    W: tl.constexpr = D * BITS // 16
    words = ()
    if W % 4 == 0:
        for i in tl.static_range(W // 4):
            words = words + _load4(base + i * 512 + lane * 16)
    elif W % 2 == 0:
        for i in tl.static_range(W // 2):
            words = words + _load2(base + i * 256 + lane * 8)
    else:
        for i in tl.static_range(W):
            words = words + (_load1(base + i * 128 + lane * 4),)
    return words


@triton.jit
def _load_block(base, lane, BITS: tl.constexpr, D: tl.constexpr):
    """All planes of a block."""
    words = ()
    if BITS & 8:
        words = words + _load_plane(base, lane, 8, D)
    if BITS & 4:
        words = words + _load_plane(base, lane, 4, D)
    if BITS & 2:
        words = words + _load_plane(base + (BITS & 4) * D * 8, lane, 2, D)
    if BITS & 1:
        words = words + _load_plane(base + (BITS & 6) * D * 8, lane, 1, D)
    return words


@triton.jit
def _field(word, SHIFT: tl.constexpr, BITS: tl.constexpr, TO: tl.constexpr):
    """The field of every byte at bit SHIFT, moved to bit TO."""
    if SHIFT > TO:
        word = word >> (SHIFT - TO)
    elif SHIFT < TO:
        word = word << (TO - SHIFT)
    MASK: tl.constexpr = (((1 << BITS) - 1) * 0x01010101) << TO
    return word & ((MASK ^ 0x80000000) - 0x80000000)  # as an int32


@triton.constexpr_function
def _place(last, bits, dim):
    """The bit at which the words of a sum have their codes, `last` the last of them: where its largest plane lies anyway."""
    if bits == 8:
        return 0
    plane = 4 if bits & 4 else 2 if bits & 2 else 1
    return min(last // (dim * plane // 16) * plane, 8 - bits)


@triton.constexpr_function
def _unit(last, bits, dim):
    """The number that a code of 1 stands for at :func:`_place`, upside down."""
    return 2.0 ** -_place(last, bits, dim)


@triton.jit
def _word(words, R: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, TO: tl.constexpr):
    """Word R of a block: four codes, each at bit TO of its byte."""
    if BITS == 8:
        x = words[R]
    else:
        x = 0
        if BITS & 4:
            FOURS: tl.constexpr = D // 4
            x = _field(words[R % FOURS], R // FOURS * 4, 4, TO)
        if BITS & 2:
            TWOS: tl.constexpr = D // 8
            START: tl.constexpr = (BITS & 4) * D // 16
            x = x | _field(words[START + R % TWOS], R // TWOS * 2, 2, TO + (BITS & 4))
        if BITS & 1:
            ONES: tl.constexpr = D // 16
            FIRST: tl.constexpr = (BITS & 6) * D // 16
            x = x | _field(words[FIRST + R % ONES], R // ONES, 1, TO + (BITS & 6))
    return x


@triton.constexpr_function
def _steps(dim):
    """Instructions that sum over channels, 32 each, the last of them over 16 where there are no more."""
    return (dim + 31) // 32


@triton.jit
def _operand(words, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, TO: tl.constexpr):
    """Words FIRST to FIRST + 3, an A operand; of COUNT 2 zeros for the others."""
    near = (_word(words, FIRST, BITS, D, TO), _word(words, FIRST + 1, BITS, D, TO))
    if COUNT == 4:
        far = (_word(words, FIRST + 2, BITS, D, TO), _word(words, FIRST + 3, BITS, D, TO))
    else:
        far = (tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32))
    return near + far


@triton.jit
def _quarters(at):
    """Four FP16 numbers from an 8-byte address."""
    w = _load2(at)
    return _halves(w[0]) + _halves(w[1])


@triton.jit
def _fold(q_at, scales, zeros, signed, part, D: tl.constexpr, SYMMETRIC: tl.constexpr, ANY: tl.constexpr):
    """q' as B operands, what to multiply products by, and q . zero, for the row of this lane's column.

    ANY: codes that are `signed` (known when it runs) are read 128 too large, which their zero takes back.

    The two lanes that hold a row's high and low part fold half of their channels each, and exchange.
    """
    y = ()
    size = tl.zeros((32,), tl.float32)
    offset = tl.zeros((32,), tl.float32)
    for s in tl.static_range(_steps(D)):
        # Where channels are an odd number of 16s, the last step has no second half: its lanes fold zeros.
        back = part * 4 if 32 * s + 32 > D else 0
        scale = _quarters(scales + s * 16 - back * 2)
        if not SYMMETRIC:
            zero = _quarters(zeros + s * 16 - back * 2)
        if ANY:
            zero = (
                tl.where(signed, scale[0] * -128.0, zero[0]), tl.where(signed, scale[1] * -128.0, zero[1]),
                tl.where(signed, scale[2] * -128.0, zero[2]), tl.where(signed, scale[3] * -128.0, zero[3]),
            )  # fmt: skip
        q = _reload4(q_at + s * 32 - back * 4)
        for j in tl.static_range(4):
            number = q[j].to(tl.float32, bitcast=True)
            if 32 * s + 32 > D:
                number = tl.where(part == 0, number, 0.0)
            one = number * scale[j]
            size = tl.maximum(size, tl.abs(one))
            if not SYMMETRIC:
                offset += number * zero[j]
            y = y + (one,)
    size = tl.maximum(size, _xor(size, 1))
    size = tl.maximum(size, _xor(size, 2))
    size = tl.maximum(tl.maximum(size, _xor(size, 4)), 1e-30)
    if not SYMMETRIC:
        offset += _xor(offset, 1)
        offset += _xor(offset, 2)
        offset += _xor(offset, 4)
    inverse = REACH / size
    pairs = 0x51 - part * 0x11
    others = 0x40 + part * 0x11
    first = part == 0
    flip = tl.where(first, 0, 0x80808080 - (1 << 32)).to(tl.int32)
    b = ()
    for s in tl.static_range(_steps(D)):
        y0 = _bits(y[4 * s] * inverse)
        y1 = _bits(y[4 * s + 1] * inverse)
        y2 = _bits(y[4 * s + 2] * inverse)
        y3 = _bits(y[4 * s + 3] * inverse)
        join = tl.full((32,), 0x5410, tl.int32)
        mine = _bytes(_bytes(y0, y1, pairs), _bytes(y2, y3, pairs), join)
        theirs = _partner(_bytes(_bytes(y0, y1, others), _bytes(y2, y3, others), join))
        b = b + (tl.where(first, mine, theirs) ^ flip, tl.where(first, theirs, mine) ^ flip)
    return b, size * (1.0 / REACH), offset


@triton.jit
def _answered(at, row, rows, g, m, total, offset, acc, D: tl.constexpr):
    """Store average and log-sum-exp; each lane has a share of the sums."""
    total = _sum(total)
    offset = _sum(offset)
    safe = tl.where(total > 0.0, total, 1.0)
    shown = row < rows
    to = at[0].to(tl.int64) + (row * D + g) * 4
    for i in tl.static_range(D // 8):
        _store1(to + i * 32, (acc[i] + offset) / safe, shown)
    tl.store(at[1] + row, tl.where(total > 0.0, m + tl.log2(safe), float("-inf")), mask=shown & (g == 0))


@triton.jit
def _codes_share(
    q_ptr, run, at, where, mask, lowest, cap, begin, end,
    P: tl.constexpr, D: tl.constexpr, KBITS: tl.constexpr, KG: tl.constexpr, KSYM: tl.constexpr,
    VBITS: tl.constexpr, VSYM: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr, CAPPED: tl.constexpr,
    FIELDS: tl.constexpr, PREFETCH: tl.constexpr, KEXACT: tl.constexpr, VEXACT: tl.constexpr,
):  # fmt: skip
    """Answer four rows of one head for blocks `begin` to `end` of 64 tokens.

    run: table and positions of pages, and outliers of keys and of values, if KEXACT and VEXACT; at: where average and
    log-sum-exp go; where: head, first row, rows.
    """
    table_ptr = run[0]
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
    row_of = table_ptr + begin // PER_PAGE * FIELDS
    place = inner * PER_PAGE + begin % PER_PAGE
    keys_at = tl.load(row_of) + place * (8 * D * KBITS)
    values_at = tl.load(row_of + 3) + place * (8 * D * VBITS)
    if PREFETCH:
        keys = _load_block(keys_at, lane, KBITS, D)
        values = _load_block(values_at, lane, VBITS, D)
    if KEXACT or VEXACT:
        k_exact, v_exact = _exact_rows(run, begin // PER_PAGE, inner, P, KEXACT, VEXACT)
    for unit in range(begin, end):
        page = unit // PER_PAGE
        block = unit % PER_PAGE
        row_of = table_ptr + page * FIELDS
        if not PREFETCH:
            keys = _load_block(keys_at, lane, KBITS, D)
            values = _load_block(values_at, lane, VBITS, D)
        following = tl.minimum(unit + 1, end - 1)
        next_of = table_ptr + following // PER_PAGE * FIELDS
        place = inner * PER_PAGE + following % PER_PAGE
        keys_at = tl.load(next_of) + place * (8 * D * KBITS)
        values_at = tl.load(next_of + 3) + place * (8 * D * VBITS)
        if KEXACT or VEXACT:
            next_k_exact, next_v_exact = _exact_rows(run, following // PER_PAGE, inner, P, KEXACT, VEXACT)
        if PREFETCH:
            next_keys = _load_block(keys_at, lane, KBITS, D)
            next_values = _load_block(values_at, lane, VBITS, D)
        scales = _load4(tl.load(row_of + 4) + (inner * P + block * 64 + g * 8) * 2)
        if not VSYM:
            zeros = _load4(tl.load(row_of + 5) + (inner * P + block * 64 + g * 8) * 2)
        channel_at = ((inner * (P // KG) + block * 64 // KG) * D + t * (D // 4) + part * 4) * 2
        scale_at, zero_at = tl.load(row_of + 1) + channel_at, tl.load(row_of + 2) + channel_at
        b, unscale, offset = _fold(q_at, scale_at, zero_at, False, part, D, KSYM, False)
        # Column 2 t holds the high part of row t: its facts lie in the lanes of column 2 t.
        if not CAPPED:
            unscale *= LOG2E
            offset *= LOG2E
        unscale = _from_lane(unscale, t * 8)
        if not KSYM:
            offset = _from_lane(offset, t * 8)
        x = ()
        for i in tl.static_range(4):
            c = zero4
            for s in tl.static_range(_steps(D)):
                a = _operand(
                    keys, i * (D // 8) + 4 * s, 2 if 32 * s + 32 > D else 4, KBITS, D, _place((i + 1) * (D // 8) - 1, KBITS, D)
                )
                c = _mma(a, b[2 * s], b[2 * s + 1], c, KSYM)
            # The lane's numbers times its row's, for codes at this place.
            factor = unscale * _unit((i + 1) * (D // 8) - 1, KBITS, D)
            x = x + ((c[0] * 256 + c[1]).to(tl.float32) * factor, (c[2] * 256 + c[3]).to(tl.float32) * factor)
        if KEXACT:
            if PER_PAGE > 1:
                k_exact = _within(run[2], k_exact[0], k_exact[1], block * (64 * D), (block + 1) * (64 * D))
            codes = (tl.load(row_of), tl.load(row_of + 1), tl.load(row_of + 2))
            x = _more_scores(
                x, run[2], k_exact, codes, 0, block * 64, inner, own_row, 8 * g, 8, 1, 2, 1.0 if CAPPED else LOG2E,
                P, D, CODES, KBITS, False, KG, KSYM,
            )  # fmt: skip
        if EXACT:
            marks = _load2(tl.load(row_of + 6) + inner * P + block * 64 + g * 8)
        if MASK:
            mask_at = mask[0] + (tl.load(run[1] + page) + block * 64 + g * 8) * mask[1]
        scores = ()
        best = m
        for i in tl.static_range(8):
            s = x[i]
            if not KSYM:
                s += offset
            if CAPPED:
                s = _base2(s, cap, True)
            if MASK == 1:
                s = tl.where(tl.load(mask_at + i * mask[1]) != 0, s, float("-inf"))
            elif MASK == 2:
                more = tl.load(mask_at + i * mask[1]).to(tl.float32)
                s = tl.where(more > lowest, s + more * LOG2E, float("-inf"))
            if EXACT:
                s = tl.where((marks[i // 4] >> (i % 4 * 8)) & 255 != 0, float("-inf"), s)
            best = tl.maximum(best, s)
            scores = scores + (s,)
        best = _most(best)
        if MASK or EXACT:
            safe = tl.where(best == float("-inf"), 0.0, best)
        else:
            safe = best
        keep = tl.exp2(m - safe)
        m = best
        scale = _halves8(scales)
        if not VSYM:
            zero = _halves8(zeros)
        total = total * keep
        offset_total = offset_total * keep
        weights = ()
        shares = ()
        size = tl.zeros((32,), tl.float32)
        for i in tl.static_range(8):
            p = tl.exp2(scores[i] - safe)
            total += p
            if not VSYM:
                offset_total += p * zero[i]
            w = p * scale[i]
            size = tl.maximum(size, w)
            weights = weights + (w,)
            if VEXACT:
                shares = shares + (_weights(p, False),)
        size = tl.maximum(_most(size), 1e-30)
        inverse = REACH / size
        unscale = size * (1.0 / REACH)
        weigh = ()
        for j in tl.static_range(4):
            pair = _bytes(
                _bits(weights[2 * j] * inverse), _bits(weights[2 * j + 1] * inverse), tl.full((32,), 0x4051, tl.int32)
            )
            weigh = weigh + (_transposed(pair ^ (0x80800000 - (1 << 32))),)
        new = ()
        for i in tl.static_range(D // 16):
            o = _mma(_operand(values, 8 * i, 4, VBITS, D, _place(8 * i + 7, VBITS, D)), weigh[0], weigh[1], zero4, VSYM)
            o = _mma(_operand(values, 8 * i + 4, 4, VBITS, D, _place(8 * i + 7, VBITS, D)), weigh[2], weigh[3], o, VSYM)
            factor = unscale * _unit(8 * i + 7, VBITS, D)
            new = new + (
                acc[2 * i] * keep + (o[0] * 256 + o[1]).to(tl.float32) * factor,
                acc[2 * i + 1] * keep + (o[2] * 256 + o[3]).to(tl.float32) * factor,
            )
        acc = new
        if VEXACT:
            if PER_PAGE > 1:
                v_exact = _within(run[3], v_exact[0], v_exact[1], block * (64 * D), (block + 1) * (64 * D))
            codes = (tl.load(row_of + 3), tl.load(row_of + 4), tl.load(row_of + 5))
            acc = _more_answers(
                acc, run[3], v_exact, codes, 0, block * 64, inner, shares, 16 * t, 16 * t + 8, g, 8, 1, D // 8, 8, 16, D, 0,
                P, D, CODES, VBITS, True, D, VSYM,
            )  # fmt: skip
        if KEXACT or VEXACT:
            k_exact = next_k_exact
            v_exact = next_v_exact
            _fetch_exact(run[2], k_exact[0], k_exact[1], run[3], v_exact[0], v_exact[1])
        if PREFETCH:
            keys = next_keys
            values = next_values
    _answered(at, row, where[2], g, m, total, offset_total, acc, D)
