"""Decode attention on 16-bit tokens in place, one warp a share: pages kept as they are, the window, anchors.

Built as ``warp.py`` is, on ``mma.m16n8k16`` with float32 sums. Queries and weights go in two 16-bit parts, high and low, in
neighbouring columns, so that neither is rounded. Tokens are the M side of the first product; values, read along channels,
are paired token by token for the second. Lane ``4 g + t`` answers row ``t`` for tokens ``8 i + g``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.warp import _bytes, _load4, _most, _sum, _transposed


@triton.jit
def _mma16(a0, a1, a2, a3, b0, b1, c, BF16: tl.constexpr):
    """c + a @ b for 16 x 16 and 16 x 8 numbers of 16 bits."""
    if BF16:
        d = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        d = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return d


@triton.jit
def _short(x, BF16: tl.constexpr):
    """16 bits of the number nearest to x, and what it leaves."""
    if BF16:
        near = x.to(tl.bfloat16)
    else:
        near = x.to(tl.float16)
    return near.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF, x - near.to(tl.float32)


@triton.jit
def _half_kernel(
    q_ptr, table_ptr, positions_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mask_ptr,
    tokens, first, k_batch, k_head, k_token, v_batch, v_head, v_token, units, per_split, first_slot, slots, heads, R, S,
    start, mask_batch, mask_head, mask_step, mask_key, lowest, cap,
    P: tl.constexpr, D: tl.constexpr, U: tl.constexpr, BF16: tl.constexpr, DENSE: tl.constexpr, PLACED: tl.constexpr,
    MASK: tl.constexpr, EXACT: tl.constexpr, CAPPED: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Answer four rows of one head for a share of the units of 16 U tokens: of pages, or of one dense part."""
    split = tl.program_id(0)
    inner = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(2)
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    part = g % 2
    column_row = tile * 4 + g // 2
    row = tile * 4 + t
    shown = tl.where(column_row < R, 1.0, 0.0)
    q_at = q_ptr.to(tl.int64) + ((inner * R + tl.minimum(column_row, R - 1)) * D + t * 8) * 4
    b = ()
    for i in tl.static_range(D // 16):
        piece = _load4(q_at + (i // 2) * 128 + (i % 2) * 16)
        for j in tl.static_range(2):
            high0, rest0 = _short(piece[2 * j].to(tl.float32, bitcast=True) * shown, BF16)
            high1, rest1 = _short(piece[2 * j + 1].to(tl.float32, bitcast=True) * shown, BF16)
            low0, none = _short(rest0, BF16)
            low1, none = _short(rest1, BF16)
            b = b + (tl.where(part == 1, low0 | (low1 << 16), high0 | (high1 << 16)),)
    held_row = tl.minimum(row, R - 1)
    if MASK:
        head = (inner % heads) * (R // S) + held_row // S
        mask_row = (inner // heads) * mask_batch + head * mask_head + (held_row % S) * mask_step
    m = tl.full((32,), float("-inf"), tl.float32)
    total = tl.zeros((32,), tl.float32)
    acc = ()
    zero = tl.zeros((32,), tl.float32)
    zero4 = (zero, zero, zero, zero)
    for i in tl.static_range(D // 16):
        acc = acc + (zero4,)
    UNIT: tl.constexpr = 16 * U
    PER_PAGE: tl.constexpr = P // UNIT
    W: tl.constexpr = D // 64
    if DENSE:
        k_from = k_ptr.to(tl.int64) + ((inner // heads) * k_batch + (inner % heads) * k_head) * 2
        v_from = v_ptr.to(tl.int64) + ((inner // heads) * v_batch + (inner % heads) * v_head) * 2
    else:
        k_token = D
        v_token = D
    for unit in range(split * per_split, tl.minimum((split + 1) * per_split, units)):
        if DENSE:
            begin = unit * UNIT
            end = tokens
        else:
            page = unit // PER_PAGE
            begin = (unit % PER_PAGE) * UNIT
            end = P
            k_from = tl.load(table_ptr + page * FIELDS) + inner * (P * D * 2)
            v_from = tl.load(table_ptr + page * FIELDS + 3) + inner * (P * D * 2)
        keys = ()
        for i in tl.static_range(2 * U):
            token = begin + 8 * i + g
            if DENSE:
                token = tl.minimum(token, end - 1)
            for n in tl.static_range(D // 32):
                keys = keys + (_load4(k_from + token.to(tl.int64) * (k_token * 2) + (n * 64 + t * 16)),)
        values = ()
        for i in tl.static_range(2 * U):
            for j in tl.static_range(2):
                token = begin + 8 * i + 2 * t + j
                if DENSE:
                    token = tl.minimum(token, end - 1)
                for n in tl.static_range(W):
                    values = values + (_load4(v_from + token.to(tl.int64) * (v_token * 2) + (n * 128 + g * 16)),)
        x = ()
        for s in tl.static_range(U):
            c = zero4
            for i in tl.static_range(D // 32):
                even = keys[2 * s * (D // 32) + i]
                odd = keys[(2 * s + 1) * (D // 32) + i]
                c = _mma16(even[0], odd[0], even[1], odd[1], b[4 * i], b[4 * i + 1], c, BF16)
                c = _mma16(even[2], odd[2], even[3], odd[3], b[4 * i + 2], b[4 * i + 3], c, BF16)
            x = x + (c[0] + c[1], c[2] + c[3])
        scores = ()
        best = m
        for i in tl.static_range(2 * U):
            token = begin + 8 * i + g
            s = x[i]
            if CAPPED:
                s = cap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * 1.4426950408889634) / cap) + 1.0))
            s = s * 1.4426950408889634
            seen = token < end
            if DENSE:
                if PLACED:
                    pos = tl.load(positions_ptr + inner * tokens + token, mask=seen, other=-1).to(tl.int64)
                    seen = pos >= 0
                else:
                    pos = (first + token).to(tl.int64)
            elif MASK:
                pos = tl.load(positions_ptr + page) + token
            if EXACT:
                marks = tl.load(table_ptr + page * FIELDS + 6).to(tl.pointer_type(tl.uint8)) + inner * P
                seen = seen & (tl.load(marks + token) == 0)
            if MASK == 1:
                seen = seen & (tl.load(mask_ptr + mask_row + pos * mask_key, mask=seen, other=0) != 0)
            elif MASK == 2:
                more = tl.load(mask_ptr + mask_row + pos * mask_key, mask=seen, other=0.0).to(tl.float32)
                seen = seen & (more > lowest)
                s += more * 1.4426950408889634
            elif MASK == 3:
                seen = seen & (pos <= start + held_row % S)
            if DENSE or MASK or EXACT:
                s = tl.where(seen, s, float("-inf"))
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
            high, rest = _short(p, BF16)
            low, none = _short(rest, BF16)
            weigh = weigh + (_transposed(high | (low << 16)),)
        new = ()
        for h in tl.static_range(D // 64):
            for j in tl.static_range(4):
                old = acc[4 * h + j]
                c = (old[0] * keep, old[1] * keep, old[2] * keep, old[3] * keep)
                for s in tl.static_range(U):
                    r0 = values[(4 * s) * W + h][j]
                    r1 = values[(4 * s + 1) * W + h][j]
                    r2 = values[(4 * s + 2) * W + h][j]
                    r3 = values[(4 * s + 3) * W + h][j]
                    lower = tl.full((32,), 0x5410, tl.int32)
                    upper = tl.full((32,), 0x7632, tl.int32)
                    c = _mma16(
                        _bytes(r0, r1, lower), _bytes(r0, r1, upper), _bytes(r2, r3, lower), _bytes(r2, r3, upper),
                        weigh[2 * s], weigh[2 * s + 1], c, BF16,
                    )  # fmt: skip
                new = new + (c,)
        acc = new
    total = _sum(total)
    safe = tl.where(total > 0.0, total, 1.0)
    slot = inner * slots + first_slot + split
    stored = row < R
    at = out_ptr + (slot * R + row) * D + g * 8
    for h in tl.static_range(D // 64):
        for j in tl.static_range(4):
            c = acc[4 * h + j]
            tl.store(at + h * 64 + 2 * j, (c[0] + c[1]) / safe, mask=stored)
            tl.store(at + h * 64 + 2 * j + 1, (c[2] + c[3]) / safe, mask=stored)
    tl.store(lse_ptr + slot * R + row, tl.where(total > 0.0, m + tl.log2(safe), float("-inf")), mask=stored & (g == 0))
