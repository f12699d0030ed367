"""How a GPU rotates and codes pages: one kernel that reads each number once."""

from __future__ import annotations

from math import sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from argus.backends.base import PLANES
from argus.backends.triton.planar import put_planar

TOKENS, WARPS = 16, 1
"""Tokens of a program, and its warps."""
WIDTH = 32
"""Channels that are coded at once, at most."""


@triton.jit
def _code(x, bounds, BITS: tl.constexpr):
    """How many bounds lie below each number: a binary search of all at once."""
    code = tl.zeros(x.shape, tl.int32)
    for b in tl.static_range(BITS):
        above = x > bounds[(1 << (BITS - 1 - b)) - 1]
        code |= tl.where(above, 1 << (BITS - 1 - b), 0)
        rest = ()
        for i in tl.static_range((1 << (BITS - 1 - b)) - 1):
            rest = rest + (tl.where(above, bounds[(1 << (BITS - 1 - b)) + i], bounds[i]),)
        bounds = rest
    return code


@triton.jit
def _encode_kernel(
    x_ptr, turn_ptr, signs_ptr, bounds_ptr, codes_ptr, scale_ptr, count, root,
    D: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, T: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Codes and scales of T tokens, W channels at a time, ``D = W << LEVELS``.

    The Hadamard matrix of size D is that of its slices (sums and differences, LEVELS times) times that of size W, `turn`, of
    ones and minus ones; `root` makes it orthonormal.
    """
    first = tl.program_id(0).to(tl.int64) * T
    token = first + tl.arange(0, T)
    held = token < count
    channel = tl.arange(0, W)
    parts = ()
    total = tl.zeros((T,), tl.float32)
    for j in tl.static_range(1 << LEVELS):
        at = x_ptr + token[:, None] * D + (j * W + channel)[None, :]
        x = tl.load(at, mask=held[:, None], other=0.0).to(tl.float32)
        total += tl.sum(x * x, 1)
        parts = parts + (x * tl.load(signs_ptr + j * W + channel)[None, :],)
    scale = tl.sqrt(total * (1.0 / D)).to(tl.float16)
    tl.store(scale_ptr + token, scale, mask=held)
    step = scale.to(tl.float32)
    inverse = (1.0 / tl.where(step == 0.0, 1.0, step))[:, None]
    turn = tl.load(turn_ptr + channel[:, None] * W + channel[None, :])
    turned = ()
    for j in tl.static_range(1 << LEVELS):
        # Ones are exact in FP16, and so are numbers of 22 bits in two halves: two products are nearly float32's.
        y = parts[j] * inverse
        high = y.to(tl.float16)
        low = (y - high.to(tl.float32)).to(tl.float16)
        turned = turned + (tl.dot(low, turn, tl.dot(high, turn)),)
    for level in tl.static_range(LEVELS):
        mixed = ()
        for j in tl.static_range(1 << LEVELS):
            if (j >> level) % 2 == 0:
                mixed = mixed + (turned[j] + turned[j + (1 << level)],)
            else:
                mixed = mixed + (turned[j - (1 << level)] - turned[j],)
        turned = mixed
    bounds = ()
    for i in tl.static_range((1 << BITS) - 1):
        bounds = bounds + (tl.load(bounds_ptr + i) / root,)
    codes = ()
    for j in tl.static_range(1 << LEVELS):
        codes = codes + (_code(turned[j], bounds, BITS),)
    put_planar(codes_ptr + first * (D * BITS // 8), codes, held[:, None], BITS, D)


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
        ``[size, size]`` float16, the Hadamard matrix of ones and minus ones.
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
            x, turn, signs, bounds, codes, scale, scale.numel(), 1 / sqrt(dim), dim, bits, size, TOKENS,
            (dim // size).bit_length() - 1, num_warps=WARPS,
        )  # fmt: skip
    return {"codes": codes, "scale": scale}
