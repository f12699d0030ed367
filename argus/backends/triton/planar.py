"""Codes in the order of :func:`argus.backends.cpu.pack`, read and written by kernels; for third parties too."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _plane_at(base, tok, ch, start, SHIFT: tl.constexpr, BITS: tl.constexpr, TOTAL: tl.constexpr, D: tl.constexpr, seen):
    """Planar order: one plane's share of the codes."""
    WIDTH: tl.constexpr = D * BITS // 8
    byte = tl.load(base + tok * (D * TOTAL // 8) + start + ch % WIDTH, mask=seen, other=0).to(tl.int32)
    return ((byte >> ((ch // WIDTH) * BITS)) & ((1 << BITS) - 1)) << SHIFT


@triton.jit
def planar(base, tok, ch, seen, BITS: tl.constexpr, D: tl.constexpr):
    """Codes of tokens and channels, int32, that :func:`argus.backends.cpu.pack` packed along D channels; base: uint8."""
    code = tl.zeros(seen.shape, tl.int32)
    if BITS & 8:
        code |= _plane_at(base, tok, ch, 0, 0, 8, BITS, D, seen)
    if BITS & 4:
        code |= _plane_at(base, tok, ch, 0, 0, 4, BITS, D, seen)
    if BITS & 2:
        code |= _plane_at(base, tok, ch, (BITS & 4) * D // 8, BITS & 4, 2, BITS, D, seen)
    if BITS & 1:
        code |= _plane_at(base, tok, ch, (BITS & 6) * D // 8, BITS & 6, 1, BITS, D, seen)
    return code


@triton.jit
def _put_plane(
    out, codes, held, START: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, TOTAL: tl.constexpr, D: tl.constexpr
):
    F: tl.constexpr = 8 // BITS
    T: tl.constexpr = codes[0].shape[0]
    W: tl.constexpr = codes[0].shape[1]
    N: tl.constexpr = D // F // W
    for j in tl.static_range(N):
        byte = (codes[j] >> SHIFT) & ((1 << BITS) - 1)
        for f in tl.static_range(1, F):
            byte |= ((codes[j + f * N] >> SHIFT) & ((1 << BITS) - 1)) << (f * BITS)
        at = tl.arange(0, T)[:, None] * (D * TOTAL // 8) + (START + j * W) + tl.arange(0, W)[None, :]
        tl.store(out + at, byte.to(tl.uint8), mask=held)


@triton.jit
def put_planar(out, codes, held, BITS: tl.constexpr, D: tl.constexpr):
    """Pack codes of tokens along D channels, at `out` (uint8) and where `held` ``[T, 1]``.

    codes: a tuple of slices ``[T, W]`` of neighbouring channels, int32 below ``2 ** BITS``; W divides ``D * plane / 8`` for
    each plane of bits.
    """
    if BITS & 8:
        _put_plane(out, codes, held, 0, 0, 8, BITS, D)
    if BITS & 4:
        _put_plane(out, codes, held, 0, 0, 4, BITS, D)
    if BITS & 2:
        _put_plane(out, codes, held, (BITS & 4) * D // 8, BITS & 4, 2, BITS, D)
    if BITS & 1:
        _put_plane(out, codes, held, (BITS & 6) * D // 8, BITS & 6, 1, BITS, D)
