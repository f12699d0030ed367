"""The order in which this backend stores codes: plain torch, the reference of the kernels that read and write it.

Pages whose tokens are a multiple of 64 and whose head_dim is one of 16, from 32 on, are kept in *fragment order*: what a lane
of a warp needs for the integer tensor core instruction ``mma.m16n8k32`` (PTX ISA 9.7.14, matrix fragments) lies together, in
16-byte pieces where there are as many, coalesced over the lanes, so that a mask is all that stands between a load and the
tensor core. Other pages are kept as the CPU backend keeps them (*planar*).

A block of 64 tokens and ``D`` channels is ``D / 2`` *words* a lane, four codes each; lane ``4 * g + t``, ``g < 8``, ``t < 4``:

- axis ``channel`` (the tensor core sums over channels): word ``(i, S, a)``, ``i < 4``, ``S < D / 16``, ``a < 2``, byte ``c``
  is the code of token ``8 g + 2 i + a`` and channel ``t D / 4 + 4 S + c``; an instruction takes two ``S = 2 s + h``;
- axis ``token`` (it sums over tokens): word ``(i, s, h, a)``, ``i < D / 16``, ``s, h, a < 2``, byte ``c`` is the code of
  token ``16 t + 8 (c / 2) + 4 s + 2 h + c % 2`` and channel ``16 i + 8 a + g``.

Words are cut into planes of ``b`` bits (:data:`argus.backends.base.PLANES`) of ``n = D b / 16`` *stored words*; word ``k`` lies
in field ``k / n`` of every byte of stored word ``k % n``, so that words which are summed have one place in their bytes and need
no shift. Stored words ``w`` of a plane lie at ``(w / v, lane, w % v)``, ``v`` up to 16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from argus.backends.base import PLANES, Axis
from argus.backends.cpu import pack as pack_planar, unpack as unpack_planar

BLOCK = 64
"""Tokens of a block."""
LANES = 32


def in_sixteens(dim: int) -> bool:
    """Whether tensor cores take tokens of so many channels."""
    return dim % 16 == 0 and dim >= 32


def in_fragments(page: int, dim: int) -> bool:
    """Whether pages of this shape are kept in fragment order."""
    return page % BLOCK == 0 and in_sixteens(dim)


def vector(words: int) -> int:
    """Stored words of a plane that a lane keeps together."""
    return 4 if words % 4 == 0 else 2 if words % 2 == 0 else 1


def to_words(codes: Tensor, axis: Axis) -> Tensor:
    """Codes ``[..., P, D]`` uint8 as ``[..., P / 64, D / 2, 32, 4]``: word, lane, byte."""
    dim = codes.shape[-1]
    head = codes.shape[:-2]
    if axis == "channel":
        x = codes.reshape(-1, 8, 4, 2, 4, dim // 16, 4)  # block, g, i, a, t, S, c
        x = x.permute(0, 2, 5, 3, 1, 4, 6)  # block, i, S, a, g, t, c
    else:
        x = codes.reshape(-1, 4, 2, 2, 2, 2, dim // 16, 2, 8)  # block, t, c / 2, s, h, c % 2, i, a, g
        x = x.permute(0, 6, 3, 4, 7, 8, 1, 2, 5)  # block, i, s, h, a, g, t, c / 2, c % 2
    return x.reshape(*head, -1, dim // 2, LANES, 4)


def from_words(words: Tensor, axis: Axis) -> Tensor:
    """Codes ``[..., P, D]`` from what :func:`to_words` returned."""
    dim = 2 * words.shape[-3]
    head = words.shape[:-4]
    if axis == "channel":
        x = words.reshape(-1, 4, dim // 16, 2, 8, 4, 4).permute(0, 4, 1, 3, 5, 2, 6)
    else:
        x = words.reshape(-1, dim // 16, 2, 2, 2, 8, 4, 2, 2).permute(0, 6, 7, 2, 3, 8, 1, 4, 5)
    return x.reshape(*head, -1, dim)


def pack(codes: Tensor, bits: int, axis: Axis) -> Tensor:
    """Pack codes.

    Parameters
    ----------
    codes : Tensor
        ``[..., P, D]`` uint8 below ``2 ** bits``.
    bits : int
        1 to 8.
    axis : {"channel", "token"}

    Returns
    -------
    Tensor
        uint8, ``[..., P * D * bits / 8]`` in fragment order or ``[..., P, D * bits / 8]`` planar.
    """
    page, dim = codes.shape[-2:]
    if not in_fragments(page, dim):
        return pack_planar(codes, bits)
    words = to_words(codes, axis)
    parts = []
    shift = 0
    for plane in PLANES[bits]:
        fields = 8 // plane
        low = ((words >> shift) & ((1 << plane) - 1)).unflatten(-3, (fields, -1))
        stored = low[..., 0, :, :, :].clone()
        for j in range(1, fields):
            stored |= low[..., j, :, :, :] << (j * plane)
        v = vector(stored.shape[-3])
        parts.append(stored.unflatten(-3, (-1, v)).transpose(-3, -2).flatten(-4))
        shift += plane
    return torch.cat(parts, -1).flatten(-2)


def unpack(packed: Tensor, bits: int, axis: Axis, page: int, dim: int) -> Tensor:
    """Codes ``[..., P, D]`` uint8 from what :func:`pack` returned."""
    if not in_fragments(page, dim):
        return unpack_planar(packed, bits)
    blocks = packed.unflatten(-1, (page // BLOCK, -1))
    words = torch.zeros(*blocks.shape[:-1], dim // 2, LANES, 4, dtype=torch.uint8, device=packed.device)
    start = shift = 0
    for plane in PLANES[bits]:
        fields = 8 // plane
        stored = dim // 2 // fields
        size = stored * LANES * 4
        v = vector(stored)
        part = blocks[..., start : start + size].unflatten(-1, (-1, LANES, v, 4)).transpose(-3, -2).flatten(-4, -3)
        for j in range(fields):
            words[..., j * stored : (j + 1) * stored, :, :] |= ((part >> (j * plane)) & ((1 << plane) - 1)) << shift
        start += size
        shift += plane
    return from_words(words, axis)
