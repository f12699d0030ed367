"""How a GPU rotates and codes pages: one kernel that reads each number once."""

from __future__ import annotations

from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from argus.backends.base import PLANES

TOKENS, WARPS = 64, 4
"""Tokens of a program, and its warps."""
WIDTH = 32
"""Channels that are coded at once, at most."""


@triton.jit
def _store_plane(
    codes, out, held, START: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, TOTAL: tl.constexpr, D: tl.constexpr,
    W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Store one plane of slices of codes ``[T, W]``, in the order of :func:`argus.backends.cpu.pack`."""
    F: tl.constexpr = 8 // BITS
    N: tl.constexpr = D // F // W
    for j in tl.static_range(N):
        byte = (codes[j] >> SHIFT) & ((1 << BITS) - 1)
        for f in tl.static_range(1, F):
            byte |= ((codes[j + f * N] >> SHIFT) & ((1 << BITS) - 1)) << (f * BITS)
        at = tl.arange(0, T)[:, None] * (D * TOTAL // 8) + (START + j * W) + tl.arange(0, W)[None, :]
        tl.store(out + at, byte.to(tl.uint8), mask=held)


@triton.jit
def _encode_kernel(
    x_ptr, turn_ptr, signs_ptr, bounds_ptr, codes_ptr, scale_ptr, count, root,
    D: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Codes and scales of T tokens; `turn` is the Hadamard matrix of ones and minus ones, `root` what makes it orthonormal."""
    first = tl.program_id(0).to(tl.int64) * T
    token = first + tl.arange(0, T)
    channel = tl.arange(0, D)
    held = token < count
    x = tl.load(x_ptr + token[:, None] * D + channel[None, :], mask=held[:, None], other=0.0).to(tl.float32)
    scale = tl.sqrt(tl.sum(x * x, 1) * (1.0 / D)).to(tl.float16)
    tl.store(scale_ptr + token, scale, mask=held)
    step = scale.to(tl.float32)
    step = tl.where(step == 0.0, 1.0, step)
    y = x * tl.load(signs_ptr + channel)[None, :] * (1.0 / step)[:, None]
    # Ones are exact in FP16, and so are numbers of 22 bits in two halves: two products are nearly float32's.
    high = y.to(tl.float16)
    low = (y - high.to(tl.float32)).to(tl.float16)
    codes = ()
    for j in tl.static_range(D // W):
        turn = tl.load(turn_ptr + channel[:, None] * D + (j * W + tl.arange(0, W))[None, :])
        turned = tl.dot(low, turn, tl.dot(high, turn)) * root
        code = tl.zeros((T, W), tl.int32)
        for i in tl.static_range((1 << BITS) - 1):
            code += (turned > tl.load(bounds_ptr + i)).to(tl.int32)
        codes = codes + (code,)
    out = codes_ptr + first * (D * BITS // 8)
    if BITS & 4:
        _store_plane(codes, out, held[:, None], 0, 0, 4, BITS, D, W, T)
    if BITS & 2:
        _store_plane(codes, out, held[:, None], 0, 0, 2, BITS, D, W, T)
    if BITS & 1:
        _store_plane(codes, out, held[:, None], (BITS & 2) * D // 8, BITS & 2, 1, BITS, D, W, T)


def width(dim: int, bits: int) -> int | None:
    """Channels that the kernel codes at once; None: it does not take such tokens."""
    size = min(WIDTH, dim * min(PLANES[bits]) // 8)
    return size if dim & (dim - 1) == 0 and size >= 16 and dim <= 256 else None


def encode(x: Tensor, turn: Tensor, signs: Tensor, bounds: Tensor, bits: int, size: int) -> dict[str, Tensor]:
    """Rotate and code tokens.

    Parameters
    ----------
    x : Tensor
        ``[n, B, H, P, D]`` of any floating dtype.
    turn : Tensor
        ``[D, D]`` float16, the Hadamard matrix of ones and minus ones.
    signs : Tensor
        ``[D]`` float32, by which channels are multiplied before.
    bounds : Tensor
        ``[2 ** bits - 1]`` float32, in order, between the codes of numbers over the token's scale.
    bits : int
    size : int
        As :func:`width` tells it.

    Returns
    -------
    dict of str to Tensor
        ``codes`` uint8 ``[n, B, H, P, D * bits / 8]`` and ``scale`` float16 ``[n, B, H, P]``.
    """
    *head, dim = x.shape
    x = x.contiguous()
    codes = torch.empty(*head, dim * bits // 8, dtype=torch.uint8, device=x.device)
    scale = torch.empty(head, dtype=torch.float16, device=x.device)
    if scale.numel():
        _encode_kernel[(triton.cdiv(scale.numel(), TOKENS),)](
            x, turn, signs, bounds, codes, scale, scale.numel(), 1 / sqrt(dim), dim, bits, size, TOKENS, num_warps=WARPS
        )
    return {"codes": codes, "scale": scale}
