"""Decode attention over pages and exact tokens in place: kernels for any form, a tier's own included.

Every kernel answers for a share of the tokens (a *split*) with its average and base-2 log-sum-exp, as FlashDecoding does
(Dao et al. 2023). Nothing decoded is written to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.reading import _addresses, _page_tile, _projected_tile
from argus.backends.triton.tile_outliers import AT_ONCE, _more_answers, _more_scores, _outliers_at, _row_of


@triton.jit
def _scores(q, k, WIDE: tl.constexpr, HALF: tl.constexpr):
    """Products of rows [R, D] and keys [T, D], both float32 (HALF: keys hold FP16 numbers), in two FP16 parts each."""
    k = tl.trans(k)
    if WIDE:
        s = tl.dot(q, k, input_precision="ieee")
    else:
        high = q.to(tl.float16)
        k_high = k.to(tl.float16)
        s = tl.dot((q - high.to(tl.float32)).to(tl.float16), k_high)
        if not HALF:
            s = tl.dot(high, (k - k_high.to(tl.float32)).to(tl.float16), s)
        s = tl.dot(high, k_high, s)
    return s


@triton.jit
def _seen_by(row, pos, held, mask_ptr, mask_row, mask_key, lowest, start, S, MASK: tl.constexpr, s):
    """Scores [R, T] after masks; MASK 0: none, 1: boolean, 2: additive, 3: causal by position."""
    seen = held[None, :]
    if MASK == 1:
        seen = seen & (tl.load(mask_ptr + mask_row[:, None] + pos[None, :] * mask_key, mask=seen, other=0) != 0)
    elif MASK == 2:
        more = tl.load(mask_ptr + mask_row[:, None] + pos[None, :] * mask_key, mask=seen, other=0.0).to(tl.float32)
        seen = seen & (more > lowest)
        s += more * 1.4426950408889634
    elif MASK == 3:
        seen = seen & (pos[None, :] <= (start + row % S)[:, None])
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _capped(s, cap, CAPPED: tl.constexpr):
    """Base-2 scores, capped as Gemma 2 does."""
    if CAPPED:
        s = cap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * 1.4426950408889634) / cap) + 1.0))
    return s * 1.4426950408889634


@triton.jit
def _weighed(s, m, total, acc):
    """Online softmax by a tile of base-2 scores [R, T]: the largest so far, sums in its measure, and weights [R, T]."""
    best = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(best == float("-inf"), 0.0, best)
    p = tl.exp2(s - safe[:, None])
    keep = tl.exp2(m - safe)
    return best, total * keep + tl.sum(p, 1), acc * keep[:, None], p


@triton.jit
def _advance(s, v, m, total, acc, WIDE: tl.constexpr):
    """:func:`_weighed`, and the tile's values [T, D] added."""
    best, total, acc, p = _weighed(s, m, total, acc)
    if WIDE:
        acc = tl.dot(p, v, acc, input_precision="ieee")
    else:
        acc = tl.dot(p.to(tl.float16), v.to(tl.float16), acc)
    return best, total, acc, p


@triton.jit
def _finish(out_ptr, lse_ptr, slot, row, ch, m, total, acc, R, D: tl.constexpr):
    safe = tl.where(total > 0.0, total, 1.0)
    held = row < R
    tl.store(out_ptr + (slot * R + row[:, None]) * D + ch[None, :], acc / safe[:, None], mask=held[:, None] & (ch < D)[None, :])
    tl.store(lse_ptr + slot * R + row, tl.where(total > 0.0, m + tl.log2(safe), float("-inf")), mask=held)


@triton.jit(do_not_specialize=(
    "pages", "first_slot", "slots", "heads", "R", "S", "start", "mask_batch", "mask_head", "mask_step", "mask_key",
    "k_first", "v_first",
))  # fmt: skip
def _pages_kernel(
    q_ptr, turned_ptr, table_ptr, positions_ptr, out_ptr, lse_ptr, mask_ptr,
    pages, first_slot, slots, heads, R, S, start, mask_batch, mask_head, mask_step, mask_key, lowest, cap,
    k_first, v_first,
    P: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, RB: tl.constexpr, TB: tl.constexpr,
    KKIND: tl.constexpr, KBITS: tl.constexpr, KTOKENS: tl.constexpr, KG: tl.constexpr, KSYMMETRIC: tl.constexpr,
    KFRAGMENTS: tl.constexpr, KROWS: tl.constexpr, KTURNED: tl.constexpr, KEXACT: tl.constexpr,
    VKIND: tl.constexpr, VBITS: tl.constexpr, VTOKENS: tl.constexpr, VG: tl.constexpr, VSYMMETRIC: tl.constexpr,
    VFRAGMENTS: tl.constexpr, VROWS: tl.constexpr, VTURNED: tl.constexpr, VEXACT: tl.constexpr,
    KELEMENT: tl.constexpr, VELEMENT: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr, CAPPED: tl.constexpr,
    KWIDE: tl.constexpr, VWIDE: tl.constexpr, FIELDS: tl.constexpr, ALIGNED: tl.constexpr,
    COUNTED: tl.constexpr,
    k_own=None, v_own=None, k_matrix=None, v_matrix=None, k_factor=1.0, v_factor=1.0, k_turn=None, v_turn=None,
    k_kept=None, v_kept=None, KLOAD: tl.constexpr = None, VLOAD: tl.constexpr = None,
):  # fmt: skip
    """Answer for a share of the pages of one head, of any forms.

    q_ptr, turned_ptr: queries, and those that meet what is kept of keys. pages: how many, or, COUNTED, where their number lies.
    KROWS, VROWS: rows of projected pages, or 0. KEXACT, VEXACT: whether pages have outliers, told by k_kept and v_kept: ends,
    places and numbers of rows, from page k_first on.
    """
    split = tl.program_id(0)
    inner = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, RB)
    ch = tl.arange(0, DB)
    q_ptr += inner * R * D
    held_q = (row < R)[:, None] & (ch < D)[None, :]
    q = tl.load(turned_ptr + (inner * R + row[:, None]) * D + ch[None, :], mask=held_q, other=0.0)
    head = (inner % heads) * (R // S) + row // S
    mask_row = (inner // heads) * mask_batch + head * mask_head + (row % S) * mask_step
    m = tl.full((RB,), float("-inf"), tl.float32)
    total = tl.zeros((RB,), tl.float32)
    acc = tl.zeros((RB, DB), tl.float32)
    TILES: tl.constexpr = (P + TB - 1) // TB
    held_pages = pages
    if COUNTED:
        held_pages = tl.load(pages)
    per_split = tl.cdiv(held_pages, tl.num_programs(0))
    end = tl.minimum((split + 1) * per_split, held_pages)
    for number in range(split * per_split * TILES, end * TILES):
        page = number // TILES
        begin = (number % TILES) * TB
        tok = begin + tl.arange(0, TB)
        row_of = table_ptr + page * FIELDS
        position = tl.load(positions_ptr + page)
        held = tok < P
        if EXACT:
            marks = tl.load(row_of + 6).to(tl.pointer_type(tl.uint8)) + inner * P
            held = held & (tl.load(marks + tok, mask=tok < P, other=1) == 0)
        codes = _addresses(row_of, ALIGNED)
        mean = tl.load(row_of + 7)
        if KROWS:
            # Answered where they are projected: there are fewer rows than tokens.
            k, back, means = _projected_tile(
                codes, mean, k_own, k_matrix, tok, ch, inner, P, D, KROWS,
                KKIND, KBITS, KTOKENS, KG, KSYMMETRIC, KFRAGMENTS, KELEMENT, KLOAD,
            )  # fmt: skip
            s = tl.dot(_scores(q, k, KWIDE, False), tl.trans(back), input_precision="tf32x3") * k_factor
            s += tl.sum(q * means[None, :], 1)[:, None]
        else:
            k = _page_tile(
                codes, mean, k_own, k_matrix, k_factor, tok, ch, inner, P, D, KROWS,
                KKIND, KBITS, KTOKENS, KG, KSYMMETRIC, KFRAGMENTS, KELEMENT, KLOAD,
            )  # fmt: skip
            s = _scores(q, k, KWIDE, KKIND == 0)
        if KEXACT:
            at, last = _row_of(k_kept[0], (position // P - k_first) * tl.num_programs(1) + inner)
            for n in range(at, last, AT_ONCE):
                token, channel, delta, there = _outliers_at(
                    k_kept, n, last, begin, codes, mean, k_own, k_matrix, k_factor, k_turn, inner, P, D, DB, TB, KROWS, KTURNED,
                    KKIND, KBITS, KTOKENS, KG, KSYMMETRIC, KFRAGMENTS, KELEMENT, KLOAD,
                )  # fmt: skip
                s = _more_scores(s, q_ptr, row, R, delta, token, channel, there, begin, D, TB, KWIDE)
        s = _capped(s, cap, CAPPED)
        s = _seen_by(row, position + tok, held, mask_ptr, mask_row, mask_key, lowest, start, S, MASK, s)
        codes = _addresses(row_of + 3, ALIGNED)
        mean = tl.load(row_of + 8)
        if VROWS:
            v, back, means = _projected_tile(
                codes, mean, v_own, v_matrix, tok, ch, inner, P, D, VROWS,
                VKIND, VBITS, VTOKENS, VG, VSYMMETRIC, VFRAGMENTS, VELEMENT, VLOAD,
            )  # fmt: skip
            m, total, acc, p = _weighed(s, m, total, acc)
            mixed = tl.dot(p, back, input_precision="tf32x3") * v_factor
            acc = tl.dot(mixed, v, acc, input_precision="ieee" if VWIDE else "tf32x3") + tl.sum(p, 1)[:, None] * means[None, :]
        else:
            v = _page_tile(
                codes, mean, v_own, v_matrix, v_factor, tok, ch, inner, P, D, VROWS,
                VKIND, VBITS, VTOKENS, VG, VSYMMETRIC, VFRAGMENTS, VELEMENT, VLOAD,
            )  # fmt: skip
            m, total, acc, p = _advance(s, v, m, total, acc, VWIDE)
        if VEXACT:
            at, last = _row_of(v_kept[0], (position // P - v_first) * tl.num_programs(1) + inner)
            for n in range(at, last, AT_ONCE):
                token, channel, delta, there = _outliers_at(
                    v_kept, n, last, begin, codes, mean, v_own, v_matrix, v_factor, v_turn, inner, P, D, DB, TB, VROWS, VTURNED,
                    VKIND, VBITS, VTOKENS, VG, VSYMMETRIC, VFRAGMENTS, VELEMENT, VLOAD,
                )  # fmt: skip
                acc = _more_answers(acc, p, delta, token, channel, v_turn, begin, D, DB, TB, VTURNED, VWIDE)
    _finish(out_ptr, lse_ptr, inner * slots + first_slot + split, row, ch, m, total, acc, R, D)


@triton.jit(do_not_specialize=(
    "tokens", "first", "k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token", "p_batch", "p_head", "per_split",
    "first_slot", "slots", "heads", "R", "S", "start", "mask_batch", "mask_head", "mask_step", "mask_key",
))  # fmt: skip
def _dense_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, out_ptr, lse_ptr, mask_ptr,
    tokens, first, k_batch, k_head, k_token, v_batch, v_head, v_token, p_batch, p_head,
    per_split, first_slot, slots, heads, R, S, start, mask_batch, mask_head, mask_step, mask_key, lowest, cap,
    D: tl.constexpr, DB: tl.constexpr, RB: tl.constexpr, TB: tl.constexpr,
    PLACED: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Answer for a share of exact tokens of one head."""
    split = tl.program_id(0)
    inner = tl.program_id(1).to(tl.int64)
    batch = inner // heads
    row = tl.arange(0, RB)
    ch = tl.arange(0, DB)
    q = tl.load(q_ptr + (inner * R + row[:, None]) * D + ch[None, :], mask=(row < R)[:, None] & (ch < D)[None, :], other=0.0)
    head = (inner % heads) * (R // S) + row // S
    mask_row = batch * mask_batch + head * mask_head + (row % S) * mask_step
    k_ptr += batch * k_batch + (inner % heads) * k_head
    v_ptr += batch * v_batch + (inner % heads) * v_head
    m = tl.full((RB,), float("-inf"), tl.float32)
    total = tl.zeros((RB,), tl.float32)
    acc = tl.zeros((RB, DB), tl.float32)
    for begin in range(split * per_split, tl.minimum((split + 1) * per_split, tokens), TB):
        tok = begin + tl.arange(0, TB)
        held = tok < tokens
        seen = held[:, None] & (ch < D)[None, :]
        k = tl.load(k_ptr + tok[:, None] * k_token + ch[None, :], mask=seen, other=0.0).to(tl.float32)
        if PLACED:
            pos = tl.load(positions_ptr + batch * p_batch + (inner % heads) * p_head + tok, mask=held, other=-1).to(tl.int64)
            held = pos >= 0
        else:
            pos = (first + tok).to(tl.int64)
        s = _capped(_scores(q, k, WIDE, True), cap, CAPPED)
        s = _seen_by(row, pos, held, mask_ptr, mask_row, mask_key, lowest, start, S, MASK, s)
        v = tl.load(v_ptr + tok[:, None] * v_token + ch[None, :], mask=seen, other=0.0).to(tl.float32)
        m, total, acc, p = _advance(s, v, m, total, acc, WIDE)
    _finish(out_ptr, lse_ptr, inner * slots + first_slot + split, row, ch, m, total, acc, R, D)
