"""Decode attention over pages whose token axis is projected (``jl``), answered without leaving the projected space.

A page is ``x = mean + W^T c`` with 16 rows ``c`` for 64 tokens, so ``q . x = q . mean + W^T (c q)`` and
``p x = sum(p) mean + (W p) c``. Coefficients are planar 4-bit codes with a scale and a zero a row: ``c q`` is
``(codes q) * scale + sum(q) * zero``, and the values' scales go into ``W p``. Built as ``warp.py`` is: products with codes on
integer tensor cores, ``q`` and ``W p`` as two int8 parts; products with ``W`` and means on ``mma.m16n8k16``, every FP32 factor
as two FP16 parts. Lane ``4 g + t`` answers row ``t`` for tokens ``8 i + g``; ``W`` stays in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.half import _mma16, _short
from argus.backends.triton.warp import (
    REACH,
    _bits,
    _bytes,
    _halves,
    _load1,
    _load2,
    _load4,
    _mma,
    _most,
    _sum,
    _transposed,
    _xor,
)


@triton.jit
def _words(at, COUNT: tl.constexpr):
    """COUNT neighbouring words from one address a lane."""
    if COUNT == 1:
        words = (_load1(at),)
    elif COUNT == 2:
        words = _load2(at)
    else:
        words = ()
        for i in tl.static_range(COUNT // 4):
            words = words + _load4(at + i * 16)
    return words


@triton.jit
def _pair(a, b):
    """High parts of two float32 as two FP16 in a word, and their low parts in another."""
    high_a, rest_a = _short(a, False)
    high_b, rest_b = _short(b, False)
    low_a, none = _short(rest_a, False)
    low_b, none = _short(rest_b, False)
    return high_a | (high_b << 16), low_a | (low_b << 16)


@triton.jit
def _parts(x):
    """High and low FP16 part of a float32 in one word."""
    high, rest = _short(x, False)
    low, none = _short(rest, False)
    return high | (low << 16)


@triton.jit
def _half_at(at):
    return tl.load(at.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _projected_kernel(
    q_ptr, table_ptr, positions_ptr, key_matrix, value_matrix, out_ptr, lse_ptr, mask_ptr,
    pages, per_split, first_slot, slots, heads, R, S, start, mask_batch, mask_head, mask_step, mask_key, lowest, cap,
    key_factor, value_factor,
    D: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr, CAPPED: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Answer four rows of one head for a share of the pages."""
    split = tl.program_id(0)
    inner = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(2)
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    part = g % 2
    q_at = q_ptr + (inner * R + tl.minimum(tile * 4 + g // 2, R - 1)) * D
    row = tile * 4 + t
    held_row = tl.minimum(row, R - 1)
    if MASK:
        head = (inner % heads) * (R // S) + held_row // S
        mask_row = (inner // heads) * mask_batch + head * mask_head + (held_row % S) * mask_step
    # q as two int8 parts for codes and as two FP16 parts for means, each in the order in which lanes load its factor.
    KW: tl.constexpr = D // 32
    size = tl.zeros((32,), tl.float32)
    q_sum = tl.zeros((32,), tl.float32)
    for i in tl.static_range(D // 4):
        one = tl.load(q_at + t * (D // 4) + i)
        size = tl.maximum(size, tl.abs(one))
        q_sum += one
    size = tl.maximum(size, _xor(size, 1))
    size = tl.maximum(tl.maximum(size, _xor(size, 2)), 1e-30)
    q_sum += _xor(q_sum, 1)
    q_sum += _xor(q_sum, 2)
    inverse = REACH / size
    pairs = 0x51 - part * 0x11
    flip = tl.where(part == 1, 0x80808080 - (1 << 32), 0).to(tl.int32)
    b = ()
    for w in tl.static_range(KW):
        for h in tl.static_range(2):
            at = q_at + h * (D // 2) + t * (D // 8) + 4 * w
            low = _bytes(_bits(tl.load(at) * inverse), _bits(tl.load(at + 1) * inverse), pairs)
            high = _bytes(_bits(tl.load(at + 2) * inverse), _bits(tl.load(at + 3) * inverse), pairs)
            b = b + (_bytes(low, high, tl.full((32,), 0x5410, tl.int32)) ^ flip,)
    means = ()
    for n in tl.static_range(D // 8):
        at = q_at + (n // 4) * 32 + t * 8 + (n % 4) * 2
        high, low = _pair(tl.load(at), tl.load(at + 1))
        means = means + (tl.where(part == 1, low, high),)
    # The facts of row t, from the lanes of the queries' columns 2 t.
    q_row = q_ptr + (inner * R + held_row) * D
    row_sum = tl.zeros((32,), tl.float32)
    row_size = tl.zeros((32,), tl.float32)
    for i in tl.static_range(D // 8):
        one = tl.load(q_row + g * (D // 8) + i)
        row_sum += one
        row_size = tl.maximum(row_size, tl.abs(one))
    row_sum = _sum(row_sum)
    unscale = tl.maximum(_most(row_size), 1e-30) * (1.0 / REACH)
    back = ()
    forth = ()
    for i in tl.static_range(4):
        for r in tl.static_range(4):
            # A operand rows are tokens, columns coefficients; and the other way round.
            at = key_matrix + (2 * t + 8 * (r // 2)) * 64 + 16 * i + g + 8 * (r % 2)
            back = back + (_pair(tl.load(at) * key_factor, tl.load(at + 64) * key_factor),)
            at = value_matrix + (g + 8 * (r % 2)) * 64 + 16 * i + 2 * t + 8 * (r // 2)
            forth = forth + (_pair(tl.load(at) * value_factor, tl.load(at + 1) * value_factor),)
    m = tl.full((32,), float("-inf"), tl.float32)
    total = tl.zeros((32,), tl.float32)
    none4 = (tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32))
    zero4 = (tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32), tl.zeros((32,), tl.float32))
    VW: tl.constexpr = D // 64
    acc = ()
    for i in tl.static_range(D // 8):
        acc = acc + (tl.zeros((32,), tl.float32),)
    for page in range(split * per_split, tl.minimum((split + 1) * per_split, pages)):
        row_of = table_ptr + page * FIELDS
        codes = tl.load(row_of) + inner * (8 * D) + g * (D // 2) + t * (D // 8)
        upper = _words(codes, KW)
        lower = _words(codes + 4 * D, KW)
        codes = tl.load(row_of + 3) + inner * (8 * D) + g * (D // 16)
        v0 = _words(codes + (2 * t) * (D // 2), VW)
        v1 = _words(codes + (2 * t + 8) * (D // 2), VW)
        v2 = _words(codes + (2 * t + 1) * (D // 2), VW)
        v3 = _words(codes + (2 * t + 9) * (D // 2), VW)
        mean_at = tl.load(row_of + 7) + inner * (2 * D) + t * 16
        c = none4
        f = zero4
        for w in tl.static_range(KW):
            a = (upper[w] & 0x0F0F0F0F, lower[w] & 0x0F0F0F0F, (upper[w] >> 4) & 0x0F0F0F0F, (lower[w] >> 4) & 0x0F0F0F0F)
            c = _mma(a, b[2 * w], b[2 * w + 1], c, False)
            mean = _load4(mean_at + w * 64)
            f = _mma16(mean[0], mean[0], mean[1], mean[1], means[4 * w], means[4 * w + 1], f, False)
            f = _mma16(mean[2], mean[2], mean[3], mean[3], means[4 * w + 2], means[4 * w + 3], f, False)
        scale_at = tl.load(row_of + 1) + (inner * 16 + g) * 2
        zero_at = tl.load(row_of + 2) + (inner * 16 + g) * 2
        r0 = (c[0] * 256 + c[1]).to(tl.float32) * (unscale * _half_at(scale_at)) + row_sum * _half_at(zero_at)
        r1 = (c[2] * 256 + c[3]).to(tl.float32) * (unscale * _half_at(scale_at + 16)) + row_sum * _half_at(zero_at + 16)
        r0 = _transposed(_parts(r0))
        r1 = _transposed(_parts(r1))
        offset = f[0] + f[1]
        scores = ()
        best = m
        for i in tl.static_range(4):
            f = zero4
            for half in tl.static_range(2):
                f = _mma16(
                    back[4 * i][half], back[4 * i + 1][half], back[4 * i + 2][half], back[4 * i + 3][half], r0, r1, f, False
                )  # fmt: skip
            for h in tl.static_range(2):
                s = f[2 * h] + f[2 * h + 1] + offset
                token = 16 * i + 8 * h + g
                if CAPPED:
                    s = cap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * 1.4426950408889634) / cap) + 1.0))
                s = s * 1.4426950408889634
                if EXACT:
                    marks = tl.load(row_of + 6).to(tl.pointer_type(tl.uint8)) + inner * 64
                    s = tl.where(tl.load(marks + token) == 0, s, float("-inf"))
                if MASK:
                    pos = tl.load(positions_ptr + page) + token
                if MASK == 1:
                    s = tl.where(tl.load(mask_ptr + mask_row + pos * mask_key) != 0, s, float("-inf"))
                elif MASK == 2:
                    more = tl.load(mask_ptr + mask_row + pos * mask_key).to(tl.float32)
                    s = tl.where(more > lowest, s + more * 1.4426950408889634, float("-inf"))
                elif MASK == 3:
                    s = tl.where(pos <= start + held_row % S, s, float("-inf"))
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
            weigh = weigh + (_transposed(_parts(p)),)
        weight = _sum(weight)
        total = total * keep + weight
        f = zero4
        for i in tl.static_range(4):
            for half in tl.static_range(2):
                f = _mma16(
                    forth[4 * i][half], forth[4 * i + 1][half], forth[4 * i + 2][half], forth[4 * i + 3][half],
                    weigh[2 * i], weigh[2 * i + 1], f, False,
                )  # fmt: skip
        w0 = f[0] + f[1]
        w1 = f[2] + f[3]
        scale_at = tl.load(row_of + 4) + (inner * 16 + g) * 2
        zero_at = tl.load(row_of + 5) + (inner * 16 + g) * 2
        shift = _sum(w0 * _half_at(zero_at) + w1 * _half_at(zero_at + 16))
        w0 = w0 * _half_at(scale_at)
        w1 = w1 * _half_at(scale_at + 16)
        size = tl.maximum(_most(tl.maximum(tl.abs(w0), tl.abs(w1))), 1e-30)
        factor = REACH / size
        undo = size * (1.0 / REACH)
        mixed = _bytes(_bits(w0 * factor), _bits(w1 * factor), tl.full((32,), 0x4051, tl.int32))
        mixed = _transposed(mixed ^ (0x80800000 - (1 << 32)))
        mean_at = tl.load(row_of + 8) + inner * (2 * D) + g * (D // 8)
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
    safe = tl.where(total > 0.0, total, 1.0)
    slot = inner * slots + first_slot + split
    stored = row < R
    at = out_ptr + (slot * R + row) * D + g * (D // 16)
    for i in tl.static_range(D // 16):
        tl.store(at + i, acc[2 * i] / safe, mask=stored)
        tl.store(at + D // 2 + i, acc[2 * i + 1] / safe, mask=stored)
    tl.store(lse_ptr + slot * R + row, tl.where(total > 0.0, m + tl.log2(safe), float("-inf")), mask=stored & (g == 0))
