"""Attention of long chunks: pages and exact tokens pass a block at a time, and the answer goes on from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from argus.attention import Query
from argus.backends.base import Dense, Segment
from argus.backends.triton import tuning
from argus.backends.triton.flash import LIFT, _flash_kernel
from argus.backends.triton.sight import Sight
from argus.backends.triton.staging import Room, Tokens
from argus.backends.triton.tables import Pages

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Running:
    """The answer so far, for each share of the tokens of every block.

    Attributes
    ----------
    out : Tensor
        ``[N, B, H, R, D]`` float32, values by weight.
    best, total : Tensor
        ``[N, B, H, R]`` float32: the largest score, base 2, and the sum of weights.
    """

    out: Tensor
    best: Tensor
    total: Tensor

    @classmethod
    def of(cls, query: Query, sinks: Tensor | None, shares: int) -> Running:
        """Nothing seen but learned sinks."""
        batch, heads, rows, dim = query.rows.shape
        out = query.rows.new_zeros(shares, batch, heads, rows, dim)
        best = query.rows.new_full((shares, batch, heads, rows), -torch.inf)
        total = torch.zeros_like(best)
        if sinks is not None:
            spread = sinks.float().view(1, heads, -1, 1).expand(batch, heads, query.groups, query.length)
            best[0] = spread.reshape(batch, heads, rows) * LOG2E
            total[0] = 2.0**LIFT.value
        return cls(out, best, total)

    @property
    def bytes(self) -> int:
        """Bytes held."""
        return 4 * (self.out.numel() + self.best.numel() + self.total.numel())

    def answer(self) -> Tensor:
        """``[B, H, R, D]``; zero where a row saw nothing."""
        out, total = self.out[0], self.total[0]
        if len(self.out) > 1:
            top = self.best.amax(0)
            weight = torch.exp2(self.best - top.masked_fill(top == -torch.inf, 0.0))
            out, total = (self.out * weight.unsqueeze(-1)).sum(0), (self.total * weight).sum(0)
        return out / total.masked_fill(total == 0, 1.0).unsqueeze(-1)


def tile(length: int, dim: int, masked: bool = False) -> tuple[int, int, int, int]:
    """Query tokens and keys that a program takes at once, its warps, and its stages; a mask takes registers of its own."""
    rows, wide = max(16, min(64, triton.next_power_of_2(length))), dim > 128
    return rows, 32 if masked else 64, 8 if wide and rows >= 64 else 4, 2 if masked or wide else 3


def shares_of(query: Query) -> int:
    """Programs that share the tokens of a block, so that few queries keep all processors busy."""
    batch, heads, _, dim = query.rows.shape
    programs = batch * heads * query.groups * triton.cdiv(query.length, tile(query.length, dim)[0])
    return max(1, min(16, tuning.processors(query.rows.device) // programs))


def attend(
    query: Query, segments: Sequence[Segment], pages: Pages, dense: Sequence[Dense], sinks: Tensor | None, sight: Sight
) -> tuple[Tensor, int]:
    """Answer a chunk of queries over pages and exact tokens.

    Parameters
    ----------
    query, segments, dense, sinks
        As for :meth:`argus.backends.base.Backend.attend`.
    pages : Pages
        Where those of `segments` lie.
    sight : Sight
        Of `query`.

    Returns
    -------
    Tensor
        ``[B, H, R, D]`` float32.
    int
        Bytes of the workspace: the answer so far, and the largest block or what merging the answer takes.
    """
    batch, heads, _, dim = query.rows.shape
    running, room = Running.of(query, sinks, shares_of(query)), Room()
    rows = query.rows.contiguous()
    for tokens in room.pages(segments, pages, sight, (batch, heads, dim)):
        _go_on(query, rows, tokens, sight, running)
    for part in dense:
        for tokens in room.dense(part, sight):
            _go_on(query, rows, tokens, sight, running)
    merging = running.bytes if len(running.out) > 1 else 0
    return running.answer(), running.bytes + max(room.bytes, merging)


def _go_on(query: Query, rows: Tensor, tokens: Tokens, sight: Sight, running: Running) -> None:
    batch, heads, count, dim = rows.shape
    shares = len(running.out)
    kind, mask, strides, lowest = _mask(query, tokens, sight)
    bm, bn, warps, stages = tile(query.length, dim, kind in (1, 2))
    placed = _placed(tokens, kind)
    held = rows if tokens.positions is None else tokens.positions
    factors = tokens.factors or (rows, rows)
    _flash_kernel[(triton.cdiv(query.length, bm), batch * heads * query.groups, shares)](
        rows, tokens.keys, tokens.values, *factors, held, rows if tokens.marks is None else tokens.marks, mask,
        running.out, running.best, running.total,
        tokens.count, tokens.first, triton.cdiv(triton.cdiv(tokens.count, shares), bn) * bn,
        *tokens.key_strides, *tokens.value_strides, *(held.stride()[:2] if placed == 2 else (0, 0)),
        heads, count, query.length, query.start, *strides, lowest, query.scale, query.softcap or 0.0,
        tokens.page, dim, triton.next_power_of_2(dim), bm, bn,
        placed, kind, tokens.marks is not None, query.softcap is not None, tokens.factors is not None,
        placed == 0 and tokens.count % bn == 0,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _placed(tokens: Tokens, kind: int) -> int:
    """PLACED of the kernel."""
    if tokens.positions is None or (kind == 0 and tokens.positions.dim() == 3 and not tokens.holes):
        return 1
    return 0 if tokens.positions.dim() == 1 else 2


def _mask(query: Query, tokens: Tokens, sight: Sight) -> tuple[int, Tensor, tuple[int, int, int, int], float]:
    """Kind, tensor, strides (batch, head, query token, key) and lowest number of the mask that these tokens need."""
    mask = query.mask
    if sight.plain(tokens.first, tokens.last):
        return 0, query.rows, (0, 0, 0, 0), 0.0
    if mask is None:
        return 3, query.rows, (0, 0, 0, 0), 0.0
    batch, head = (stride if size > 1 else 0 for stride, size in zip(mask.stride()[:2], mask.shape[:2], strict=True))
    strides = (batch, head, mask.stride(2), mask.stride(3))
    if mask.dtype == torch.bool:
        return 1, mask.view(torch.uint8), strides, 0.0
    return 2, mask, strides, torch.finfo(mask.dtype).min
