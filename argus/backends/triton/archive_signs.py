"""Archiving pages of 1-bit codes whose scales are channels': keys. What is said in ``archive_codes.py`` holds, but for products.

A bit of the code and the one of ``W`` agree or differ: ``W codes`` is how often they agree, less 32. Binary tensor cores count
it, 256 bits of a row at once: where ``W`` has ones and bits are set, and where it has minus ones and they are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.archive_channels import _run, _turned_block
from argus.backends.triton.lanes import _half, _halves, _load4
from argus.backends.triton.products import _fused, _packed, _put_run, _quantized
from argus.backends.triton.words import _put16

EVEN, ODD = tl.constexpr(0x55555555), tl.constexpr(-0x55555556)
"""Bits of a word of the first half of the channels, and of the second."""
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
    # Of up to 4 rows, lanes 16 apart share a row, and each takes one half of the channels.
    SHORT: tl.constexpr = R <= 4
    K: tl.constexpr = D // 16
    HALVES: tl.constexpr = 1 if SHORT else 2
    quarter = g % 2 * 2 + g // 4
    at = from_ptr.to(tl.int64) + unit * (8 * D) + (8 * t + quarter) * 16 + g // 2 % 2 * (512 if D == 128 else 8)
    # Bits of run k: those of both halves of the channels in turn.
    turned = _turned_block(at, 0, 1, D)
    weights = weights_ptr.to(tl.int64) + lane * 16
    near = _load4(weights)
    far = near
    if ROWS == 2:
        far = _load4(weights + 512)
    magic = tl.full((32,), MAGIC, tl.int32)
    # Channels of columns 2 t and, D / 2 further, 2 t + 1.
    channel = t // 2 * (D // 4) + t % 2 * (D // 16)
    if SHORT:
        channel += g // 4 * (D // 8)
    upper = ()
    lower = ()
    second = ()
    for HALF in tl.static_range(HALVES):
        place_of = from_scale.to(tl.int64) + (unit * D + channel + HALF * (D // 8)) * 2
        scales = _run(place_of, D) + _run(place_of + D, D)
        for pair in tl.static_range(K // 2):
            low = _halves(scales[pair])
            high = _halves(scales[K // 2 + pair])
            for odd in tl.static_range(2):
                if ROWS == 2 or HALF == 0:
                    n = _agreeing(far if HALF else near, turned[2 * pair + odd], magic - 32)
                    if ROWS == 1:
                        second = second + (n[2], n[3])
                    else:
                        lower = lower + (_scaled(n[2], low[odd]), _scaled(n[3], high[odd]))
                    upper = upper + (_scaled(n[0], low[odd]), _scaled(n[1], high[odd]))
                else:
                    run = 2 * (2 * pair + odd)
                    upper = upper + (_scaled(second[run], low[odd]), _scaled(second[run + 1], high[odd]))
    # Of run k a lane of row k keeps how many bits are set.
    counts = (magic, magic, magic, magic)
    for k in tl.static_range(K):
        mine = tl.where(g == k, EVEN, 0)
        counts = _set(mine, mine + mine, turned[k], counts)
    for i in tl.static_range(4):
        to = (unit * D + t // 2 * (D // 4) + i // 2 * (D // 8) + t % 2 * (D // 16) + i % 2 * (D // 2) + g) * 2
        total = (counts[i].to(tl.float32, bitcast=True) + LEAST) * (1.0 / 64)
        if D == 128:
            held = g >= 0
        else:
            held = g < K
        inside = tl.where(held, to, 0)
        mean = _fused(total, _half(from_scale.to(tl.int64) + inside), _half(from_zero.to(tl.int64) + inside))
        _put16(mean_ptr.to(tl.int64) + inside, _packed(mean, mean), held)
    for r in tl.static_range(ROWS):
        row = g % (4 if SHORT else 8) + 8 * r
        at_row = (unit * R + row) * 2
        numbers = lower if r else upper
        # Numbers are [half, run, column].
        codes = _quantized(
            numbers[0::2], numbers[1::2], 0.0, scale_ptr.to(tl.int64) + at_row, zero_ptr.to(tl.int64) + at_row,
            (t == 0) & (row < R), 1 / 64, K if SHORT else 2 * K, BITS, SHORT,
        )  # fmt: skip
        to = codes_ptr.to(tl.int64) + (unit * R + row) * (D // 2) + channel
        for HALF in tl.static_range(HALVES):
            if D == 128:
                two = (codes[2 * HALF], codes[2 * HALF + 1])
            else:
                two = (codes[HALF],)
            _put_run(to + HALF * (D // 8), two, row < R, K // 4)
