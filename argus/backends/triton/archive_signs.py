"""Archiving pages of 1-bit codes whose scales are channels': keys. The method is told in ``archive_codes.py``, but for sums.

``W codes`` is how many of a channel's 64 bits agree with those of ``W``, less 32. Binary tensor cores count them, 256 bits of a
row at once: where ``W`` has ones and bits are set, and where it has minus ones and they are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.archive_channels import _channel, _put_rows, _run, _turned_block
from argus.backends.triton.lanes import _half, _halves, _load4
from argus.backends.triton.products import _fused, _packed
from argus.backends.triton.words import _put16

MAGIC, LEAST = tl.constexpr(0x4B400000), tl.constexpr(-12582912.0)
"""1.5 * 2^23 as a float32 lies in a register, to which integers can be added; and what it is, with a minus."""


@triton.jit
def _agreeing(a, b, c):
    """``c`` plus how many bits 16 rows of 256 and 8 columns have in common."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a[0], a[1], a[2], a[3], b, ~b, c, c, c, c],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _set(a0, a1, b, c):
    """``c`` plus how many bits 16 rows of 128 and 8 columns have in common."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {$0,$1,$2,$3}, {$4,$5}, {$6}, {$7,$8,$9,$10};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r", [a0, a1, b, c[0], c[1], c[2], c[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _scaled(n, scale):
    """``scale`` times the number that was added to :data:`MAGIC`: exact."""
    return _fused(n.to(tl.float32, bitcast=True), scale, scale * LEAST)


@triton.jit
def _put_means(turned, own_scale, own_zero, own_mean, weights, held, D: tl.constexpr):
    """Store the means of 4 channels: a lane of row k counts the bits that are set of run k."""
    magic = tl.full((32,), MAGIC, tl.int32)
    counts = (magic, magic, magic, magic)
    for k in tl.static_range(D // 16):
        if k % 2 == 0:
            alone = _load4(weights + 512 * (2 + k // 2))
        counts = _set(alone[k % 2 * 2], alone[k % 2 * 2 + 1], turned[k], counts)
    for i in tl.static_range(4):
        total = (counts[i].to(tl.float32, bitcast=True) + LEAST) * (1.0 / 64)
        further = (i // 2 * (D // 8) + i % 2 * (D // 2)) * 2
        mean = _fused(total, _half(own_scale + further), _half(own_zero + further))
        _put16(own_mean + further, _packed(mean, mean), held)


@triton.jit
def _sign_kernel(
    from_ptr, from_scale, from_zero, weights_ptr, mean_ptr, codes_ptr, scale_ptr, zero_ptr,
    D: tl.constexpr, R: tl.constexpr, FROM_BITS: tl.constexpr, SYMMETRIC: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Archive a page of one head whose scales are channels': ``c = scale * (W codes) / 64``."""
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    ROWS: tl.constexpr = 2 if R > 8 else 1
    K: tl.constexpr = D // 16
    HALVES: tl.constexpr = 1 if R <= 4 else 2
    quarter = g % 2 * 2 + g // 4
    at = from_ptr.to(tl.int64) + unit * (8 * D) + (8 * t + quarter) * 16 + g // 2 % 2 * (512 if D == 128 else 8)
    # Bits of run k: those of both halves of the channels in turn.
    turned = _turned_block(at, 0, 1, D)
    weights = weights_ptr.to(tl.int64) + lane * 16
    start = tl.full((32,), MAGIC, tl.int32) - 32
    products = ()
    for m in tl.static_range(ROWS):
        a = _load4(weights + m * 512)
        for k in tl.static_range(K):
            products = products + (_agreeing(a, turned[k], start),)
    place_of = from_scale.to(tl.int64) + (unit * D + _channel(g, t, D, R)) * 2
    upper = ()
    lower = ()
    for HALF in tl.static_range(HALVES):
        scales = _run(place_of + HALF * (D // 4), D) + _run(place_of + HALF * (D // 4) + D, D)
        for k in tl.static_range(K):
            low = _halves(scales[k // 2])[k % 2]
            high = _halves(scales[(K + k) // 2])[k % 2]
            if ROWS == 2:
                n = products[HALF * K + k]
                lower = lower + (_scaled(n[2], low), _scaled(n[3], high))
            else:
                n = products[k][2 * HALF : 2 * HALF + 2]
            upper = upper + (_scaled(n[0], low), _scaled(n[1], high))
    # Of 64 channels lanes of rows from 4 on do again what others do.
    own = (unit * D + t // 2 * (D // 4) + t % 2 * (D // 16) + g % K) * 2
    _put_means(
        turned, from_scale.to(tl.int64) + own, from_zero.to(tl.int64) + own, mean_ptr.to(tl.int64) + own, weights, g < K, D
    )
    _put_rows(upper, lower, unit, g, t, codes_ptr, scale_ptr, zero_ptr, 1 / 64, D, R, BITS)
