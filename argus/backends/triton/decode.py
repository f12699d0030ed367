"""Decode attention over pages and exact tokens in place: kernels for any form, a tier's own included.

Every kernel answers for a share of the tokens (a *split*) with its average and base-2 log-sum-exp, as FlashDecoding does
(Dao et al. 2023). Nothing decoded is written to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.planar import planar


@triton.jit
def _field_at(base, word, lane, byte, SHIFT: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, seen):
    """Fragment order: one plane's share of the codes."""
    F: tl.constexpr = 8 // BITS
    W: tl.constexpr = D // 2 // F
    V: tl.constexpr = 4 if W % 4 == 0 else (2 if W % 2 == 0 else 1)
    stored = word % W
    at = ((stored // V * 32 + lane) * V + stored % V) * 4 + byte
    return ((tl.load(base + at, mask=seen, other=0).to(tl.int32) >> ((word // W) * BITS)) & ((1 << BITS) - 1)) << SHIFT


@triton.jit
def _codes(base, tok, ch, seen, BITS: tl.constexpr, TOKENS: tl.constexpr, FRAGMENTS: tl.constexpr, D: tl.constexpr):
    """Codes of tokens and channels, int32, broadcast together."""
    if FRAGMENTS:
        code = tl.zeros(seen.shape, tl.int32)
        u = tok % 64
        if TOKENS:
            lane = (ch % 8) * 4 + u // 16
            word = ((ch // 16 * 2 + (u % 8) // 4) * 2 + (u % 4) // 2) * 2 + (ch % 16) // 8
            byte = u % 2 + (u % 16) // 8 * 2
        else:
            c = ch % (D // 4)
            lane = (u // 8) * 4 + ch // (D // 4)
            word = (((u % 8) // 2 * (D // 32) + c // 8) * 2 + (c % 8) // 4) * 2 + u % 2
            byte = c % 4
        base += tok // 64 * (64 * D * BITS // 8)
        if BITS & 8:
            code |= _field_at(base, word, lane, byte, 0, 8, D, seen)
        if BITS & 4:
            code |= _field_at(base, word, lane, byte, 0, 4, D, seen)
        if BITS & 2:
            code |= _field_at(base + (BITS & 4) * D * 8, word, lane, byte, BITS & 4, 2, D, seen)
        if BITS & 1:
            code |= _field_at(base + (BITS & 6) * D * 8, word, lane, byte, BITS & 6, 1, D, seen)
    else:
        code = planar(base, tok, ch, seen, BITS, D)
    return code


@triton.jit
def _tile(
    codes, scales, zeros, own, tok, ch, seen, inner, P: tl.constexpr, D: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr,
    FRAGMENTS: tl.constexpr, ELEMENT: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """Numbers of tokens and channels of one page and head, float32. KIND 0: plain, 1: E4M3, 2: affine, 3: what LOAD reads."""
    if KIND == 3:
        x = LOAD(codes, scales, zeros, own, tok, ch, seen, inner, P, D, BITS)
    elif KIND == 0:
        base = codes.to(tl.pointer_type(ELEMENT)) + inner * P * D
        x = tl.load(base + tok * D + ch, mask=seen, other=0.0).to(tl.float32)
    else:
        if TOKENS:
            at = inner * (P * (D // G)) + tok * (D // G) + ch // G
        else:
            at = inner * (P // G * D) + (tok // G) * D + ch
        scale = tl.load(scales.to(tl.pointer_type(tl.float16)) + at, mask=seen, other=0.0).to(tl.float32)
        base = codes.to(tl.pointer_type(tl.uint8)) + inner * (P * D * BITS // 8)
        if KIND == 1:
            # An e4m3 byte, its exponent and mantissa moved to FP16's places, is the number over 2^8.
            byte = tl.load(base + tok * D + ch, mask=seen, other=0).to(tl.int16)
            half = ((byte & 127) << 7) | ((byte & 128) << 8)
            x = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (scale * 256.0)
        else:
            code = _codes(base, tok, ch, seen, BITS, TOKENS, FRAGMENTS, D)
            if SYMMETRIC:
                code = (code << 24) >> 24
            x = code.to(tl.float32) * scale
            if not SYMMETRIC:
                x += tl.load(zeros.to(tl.pointer_type(tl.float16)) + at, mask=seen, other=0.0).to(tl.float32)
    return x


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
def _advance(s, v, m, total, acc, WIDE: tl.constexpr):
    """Online softmax by a tile of base-2 scores [R, T] and values [T, D]."""
    best = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(best == float("-inf"), 0.0, best)
    p = tl.exp2(s - safe[:, None])
    keep = tl.exp2(m - safe)
    total = total * keep + tl.sum(p, 1)
    acc = acc * keep[:, None]
    if WIDE:
        acc = tl.dot(p, v, acc, input_precision="ieee")
    else:
        acc = tl.dot(p.to(tl.float16), v.to(tl.float16), acc)
    return best, total, acc


@triton.jit
def _finish(out_ptr, lse_ptr, slot, row, ch, m, total, acc, R, D: tl.constexpr):
    safe = tl.where(total > 0.0, total, 1.0)
    held = row < R
    tl.store(out_ptr + (slot * R + row[:, None]) * D + ch[None, :], acc / safe[:, None], mask=held[:, None] & (ch < D)[None, :])
    tl.store(lse_ptr + slot * R + row, tl.where(total > 0.0, m + tl.log2(safe), float("-inf")), mask=held)


@triton.jit(do_not_specialize=(
    "pages", "per_split", "first_slot", "slots", "heads", "R", "S", "start", "mask_batch", "mask_head", "mask_step", "mask_key",
))  # fmt: skip
def _pages_kernel(
    q_ptr, table_ptr, positions_ptr, out_ptr, lse_ptr, mask_ptr,
    pages, per_split, first_slot, slots, heads, R, S, start, mask_batch, mask_head, mask_step, mask_key, lowest, cap,
    P: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, RB: tl.constexpr, TB: tl.constexpr,
    KKIND: tl.constexpr, KBITS: tl.constexpr, KTOKENS: tl.constexpr, KG: tl.constexpr, KSYMMETRIC: tl.constexpr,
    KFRAGMENTS: tl.constexpr,
    VKIND: tl.constexpr, VBITS: tl.constexpr, VTOKENS: tl.constexpr, VG: tl.constexpr, VSYMMETRIC: tl.constexpr,
    VFRAGMENTS: tl.constexpr,
    KELEMENT: tl.constexpr, VELEMENT: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr, CAPPED: tl.constexpr,
    KWIDE: tl.constexpr, VWIDE: tl.constexpr, FIELDS: tl.constexpr,
    k_own=None, v_own=None, KLOAD: tl.constexpr = None, VLOAD: tl.constexpr = None,
):  # fmt: skip
    """Answer for a share of the pages of one head, of any forms."""
    split = tl.program_id(0)
    inner = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, RB)
    ch = tl.arange(0, DB)
    q = tl.load(q_ptr + (inner * R + row[:, None]) * D + ch[None, :], mask=(row < R)[:, None] & (ch < D)[None, :], other=0.0)
    head = (inner % heads) * (R // S) + row // S
    mask_row = (inner // heads) * mask_batch + head * mask_head + (row % S) * mask_step
    m = tl.full((RB,), float("-inf"), tl.float32)
    total = tl.zeros((RB,), tl.float32)
    acc = tl.zeros((RB, DB), tl.float32)
    TILES: tl.constexpr = (P + TB - 1) // TB
    end = tl.minimum((split + 1) * per_split, pages)
    for number in range(split * per_split * TILES, end * TILES):
        page = number // TILES
        tok = (number % TILES) * TB + tl.arange(0, TB)
        row_of = table_ptr + page * FIELDS
        held = tok < P
        if EXACT:
            marks = tl.load(row_of + 6).to(tl.pointer_type(tl.uint8)) + inner * P
            held = held & (tl.load(marks + tok, mask=tok < P, other=1) == 0)
        seen = (tok < P)[:, None] & (ch < D)[None, :]
        k = _tile(
            tl.load(row_of), tl.load(row_of + 1), tl.load(row_of + 2), k_own, tok[:, None], ch[None, :], seen, inner, P, D,
            KKIND, KBITS, KTOKENS, KG, KSYMMETRIC, KFRAGMENTS, KELEMENT, KLOAD,
        )  # fmt: skip
        s = _capped(_scores(q, k, KWIDE, KKIND == 0), cap, CAPPED)
        pos = tl.load(positions_ptr + page) + tok
        s = _seen_by(row, pos, held, mask_ptr, mask_row, mask_key, lowest, start, S, MASK, s)
        v = _tile(
            tl.load(row_of + 3), tl.load(row_of + 4), tl.load(row_of + 5), v_own, tok[:, None], ch[None, :], seen, inner, P, D,
            VKIND, VBITS, VTOKENS, VG, VSYMMETRIC, VFRAGMENTS, VELEMENT, VLOAD,
        )  # fmt: skip
        m, total, acc = _advance(s, v, m, total, acc, VWIDE)
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
        m, total, acc = _advance(s, v, m, total, acc, WIDE)
    _finish(out_ptr, lse_ptr, inner * slots + first_slot + split, row, ch, m, total, acc, R, D)
