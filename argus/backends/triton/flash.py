"""Flash attention that goes on from block to block: one kernel over FP16 keys and values.

The online softmax (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023) keeps the largest score, the sum of weights and the
weighted values of every row in float32. Products are of FP16 numbers, summed in float32. A row of queries is divided by a power
of two first, and so are keys and values that were not FP16: no number is too large for FP16.
"""

from __future__ import annotations

import triton
import triton.language as tl

LIFT = tl.constexpr(14.0)
"""Weights are kept 2^14 times too large: of FP16's range they use what lies above 1 too, and vanish only below 2^-38."""


@triton.jit
def _power(x):
    """The largest power of two not above a positive float32, and its inverse; 0 and 2^127 where it is below 2^-126."""
    exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
    inverse = tl.maximum(0x7F000000 - exponent, 0x00800000)
    return exponent.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=(
    "tokens", "first", "share", "p_batch", "p_head", "R", "S", "start", "mask_batch", "mask_head", "mask_step",
))  # fmt: skip
def _flash_kernel(
    q_ptr, k_ptr, v_ptr, k_factor_ptr, v_factor_ptr, positions_ptr, marks_ptr, mask_ptr, out_ptr, best_ptr, total_ptr,
    tokens, first, share, k_batch, k_head, k_page, k_token, v_batch, v_head, v_page, v_token, p_batch, p_head,
    heads, R, S, start, mask_batch, mask_head, mask_step, mask_key, lowest, scale, cap,
    P: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PLACED: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr, CAPPED: tl.constexpr, FACTORS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Go on with the answer of BM query tokens of one query head over a share of the tokens.

    Token ``t`` lies at ``t // P`` pages and ``t % P`` tokens. PLACED 0: pages that start at ``positions``, 1: consecutive
    tokens from ``first``, 2: tokens at ``positions``, empty where negative. MASK 0: none, 1: boolean, 2: additive, 3: causal.
    EXACT: ``marks`` tell tokens that are answered elsewhere. FACTORS: keys and values were divided by a factor a head. EVEN:
    BN divides the tokens.
    """
    groups = R // S
    inner = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    batch = inner // heads
    step = tl.program_id(0) * BM + tl.arange(0, BM)
    ch = tl.arange(0, DB)
    row = inner * R + group * S + step
    asked = step < S
    whole = asked[:, None] & (ch < D)[None, :]
    size = tl.abs(scale)
    q = tl.load(q_ptr + row[:, None] * D + ch[None, :], mask=whole, other=0.0) / size
    factor, inverse = _power(tl.max(tl.abs(q), 1))
    q = (q * inverse[:, None]).to(tl.float16)
    factor *= size
    if FACTORS:
        factor *= tl.load(k_factor_ptr + inner)
        v_factor = tl.load(v_factor_ptr + inner)
    if not CAPPED:
        factor *= 1.4426950408889634
    row += tl.program_id(2).to(tl.int64) * tl.num_programs(1) * S
    m = tl.load(best_ptr + row, mask=asked, other=float("-inf"))
    total = tl.load(total_ptr + row, mask=asked, other=0.0)
    acc = tl.load(out_ptr + row[:, None] * D + ch[None, :], mask=whole, other=0.0)
    if FACTORS:
        acc /= v_factor
    k_ptr += batch * k_batch + (inner % heads) * k_head
    v_ptr += batch * v_batch + (inner % heads) * v_head
    mask_row = batch * mask_batch + ((inner % heads) * groups + group) * mask_head + step.to(tl.int64) * mask_step
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, tokens)
    if PLACED == 1 and MASK == 3:
        end = tl.minimum(end, start + tl.program_id(0) * BM + BM - first)
    PAGED: tl.constexpr = P % BN == 0
    WHOLE: tl.constexpr = EVEN and D == DB
    PLAIN: tl.constexpr = EVEN and MASK == 0 and PLACED < 2 and not EXACT and not CAPPED
    within = tl.arange(0, BN)
    for low in range(begin, end, BN):
        tok = low + within
        page = tok // P
        held = tok < tokens
        if PAGED:
            # One page's tokens: what differs from tile to tile is one address.
            k_at = k_ptr + (low // P * k_page + low % P * k_token) + (within[:, None] * k_token + ch[None, :])
            v_at = v_ptr + (low // P * v_page + low % P * v_token) + (within[:, None] * v_token + ch[None, :])
        else:
            k_at = k_ptr + (page * k_page + tok % P * k_token)[:, None] + ch[None, :]
            v_at = v_ptr + (page * v_page + tok % P * v_token)[:, None] + ch[None, :]
        if PLACED == 2:
            pos = tl.load(positions_ptr + batch * p_batch + (inner % heads) * p_head + tok, mask=held, other=-1)
            held = pos >= 0
        elif PLACED == 1:
            pos = first + tok
        elif MASK > 0:
            if PAGED:
                pos = (tl.load(positions_ptr + low // P) + low % P).to(tl.int32) + within
            else:
                pos = (tl.load(positions_ptr + page, mask=held, other=0) + tok % P).to(tl.int32)
        if EXACT:
            marks = tl.load(marks_ptr + (page * (tl.num_programs(1) // groups) + inner) * P + tok % P, mask=held, other=1)
        if WHOLE:
            k = tl.load(k_at)
            v = tl.load(v_at)
        else:
            there = (tok < tokens)[:, None] & (ch < D)[None, :]
            k = tl.load(k_at, mask=there, other=0.0)
            v = tl.load(v_at, mask=there, other=0.0)
        s = tl.dot(q, tl.trans(k))
        if PLAIN:
            best = tl.maximum(m, tl.max(s, 1) * factor)
            safe = best
            p = tl.exp2(s * factor[:, None] - (safe - LIFT)[:, None])
        else:
            s *= factor[:, None]
            if CAPPED:
                s = cap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * 1.4426950408889634) / cap) + 1.0)) * 1.4426950408889634
            seen = held[None, :]
            if MASK == 3:
                seen = seen & (pos[None, :] <= (start + step)[:, None])
            elif MASK > 0:
                seen = seen & asked[:, None]
                more = tl.load(mask_ptr + mask_row[:, None] + pos[None, :] * mask_key, mask=seen, other=0)
                if MASK == 1:
                    seen = seen & (more != 0)
                else:
                    seen = seen & (more > lowest)
                    s += more.to(tl.float32) * 1.4426950408889634
            if EXACT:
                seen = seen & (marks == 0)[None, :]
            if MASK > 0 or EXACT or PLACED == 2 or not EVEN:
                s = tl.where(seen, s, float("-inf"))
            best = tl.maximum(m, tl.max(s, 1))
            safe = tl.where(best == float("-inf"), 0.0, best)
            p = tl.exp2(s - (safe - LIFT)[:, None])
        keep = tl.exp2(m - safe)
        total = total * keep + tl.sum(p, 1)
        acc = tl.dot(p.to(tl.float16), v, acc * keep[:, None])
        m = best
    if FACTORS:
        acc *= v_factor
    tl.store(best_ptr + row, m, mask=asked)
    tl.store(total_ptr + row, total, mask=asked)
    tl.store(out_ptr + row[:, None] * D + ch[None, :], acc, mask=whole)
