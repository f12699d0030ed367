"""Pages and exact tokens as the flash kernel reads them: FP16 keys and values of a bounded block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from argus.backends.base import Dense, Segment
from argus.backends.triton.expand import Piece, expand, joined
from argus.backends.triton.sight import Sight
from argus.backends.triton.tables import Pages

BLOCK = 64 << 20
"""Bytes of FP16 keys and values that are held at once, or those of one page where it has more."""
STEP = 64
"""Tokens by which the kernel counts where none are in pages."""


@dataclass(frozen=True)
class Tokens:
    """What one launch reads.

    Attributes
    ----------
    keys, values : Tensor
        FP16 numbers, token ``t`` at ``t // page`` times the page's stride and ``t % page`` times the token's.
    key_strides, value_strides : tuple of int
        Of batch, head, page and token.
    count, page : int
        Tokens, and tokens a page.
    first, last : int
        Bounds of their positions, in tokens.
    positions : Tensor or None
        ``[pages]`` of their first tokens, or ``[B, H, T]`` of all; None: consecutive from `first`.
    marks : Tensor or None
        ``[pages, B, H, P]`` uint8, nonzero where a token is answered elsewhere.
    factors : tuple of Tensor or None
        ``[B, H]`` float32, what keys and values were divided by.
    holes : bool
        Whether places may be empty.
    """

    keys: Tensor
    values: Tensor
    key_strides: tuple[int, int, int, int]
    value_strides: tuple[int, int, int, int]
    count: int
    page: int
    first: int
    last: int
    positions: Tensor | None = None
    marks: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    holes: bool = False


class Room:
    """Where pages are decoded: one buffer for block after block.

    Attributes
    ----------
    bytes : int
        The most that was held at once.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def pages(self, segments: Sequence[Segment], where: Pages, sight: Sight, inner: tuple[int, int, int]) -> Iterator[Tokens]:
        """Blocks of the pages that any row sees, as FP16; `where` they lie; `inner`: batch, heads and head_dim."""
        seen = [
            Piece(segment, 0, len(segment.positions), *(found or (None, 0)))
            for segment, found in zip(segments, where.where, strict=True)
            if sight.sees(segment.first, segment.last)
        ]
        if not seen:
            return
        batch, heads, dim = inner
        page = seen[0].segment.page_size
        shape = (batch, heads, page, dim)
        room = max(1, BLOCK // (4 * batch * heads * page * dim))
        total = sum(piece.count for piece in seen)
        held = torch.empty(2, min(room, total), *shape, dtype=torch.float16, device=seen[0].segment.positions.device)
        strides = (heads * page * dim, page * dim, held.stride(1), dim)
        for block in blocks(seen, sight, room):
            done = 0
            for group in joined(block):
                count = sum(piece.count for piece in group)
                for place, role in enumerate(("keys", "values")):
                    more = expand(group, role, held[place, done : done + count])
                    self.bytes = max(self.bytes, held.numel() * 2 + more)
                done += count
            marks = [
                piece.segment.exact[piece.begin : piece.end].view(torch.uint8)
                for piece in block
                if piece.segment.exact is not None
            ]
            yield Tokens(
                held[0], held[1], strides, strides, done * page, page,
                min(piece.segment.first for piece in block), max(piece.segment.last for piece in block),
                torch.cat([piece.segment.positions[piece.begin : piece.end] for piece in block]),
                torch.cat(marks).contiguous() if marks else None,
            )  # fmt: skip

    def dense(self, part: Dense, sight: Sight) -> Iterator[Tokens]:
        """Exact tokens that any row may see: FP16 as they lie, others divided by a power of two and cast, slice after slice."""
        if part.positions is not None:
            spans = [(0, part.keys.shape[2], 0, part.last)]
        else:
            spans = list(cut(part.start, part.last, sight))
        half = part.keys.dtype == part.values.dtype == torch.float16
        most = max(1, BLOCK // (4 * part.keys.shape[0] * part.keys.shape[1] * part.keys.shape[3]))
        for begin, end, first, last in spans:
            step = end - begin if half else most
            for low in range(begin, end, step):
                high = min(low + step, end)
                at = (first, last) if part.positions is not None else (part.start + low, part.start + high - 1)
                yield self._slice(part, low, high, *at)

    def _slice(self, part: Dense, low: int, high: int, first: int, last: int) -> Tokens:
        keys, values = part.numbers("keys", low, high), part.numbers("values", low, high)
        factors = None
        if not keys.dtype == values.dtype == torch.float16:
            (keys, key_factor), (values, value_factor) = fitted(keys), fitted(values)
            factors = (key_factor, value_factor)
            self.bytes = max(self.bytes, 4 * (keys.numel() + values.numel()))
        keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
        strides = [(*x.stride()[:2], STEP * x.stride(2), x.stride(2)) for x in (keys, values)]
        positions = None if part.positions is None else part.positions[:, :, low:high]
        return Tokens(keys, values, *strides, high - low, STEP, first, last, positions, factors=factors, holes=part.holes)


def cut(start: int, last: int, sight: Sight) -> Iterator[tuple[int, int, int, int]]:
    """Consecutive tokens cut at the sight's bounds, what no row sees left out: begin, end, first and last position."""
    first, last = max(start, sight.first), min(last, sight.last)
    if first > last:
        return
    edges = sorted({first, last + 1, *(x for x in (sight.plain_first, sight.plain_last + 1) if first < x <= last)})
    for low, high in pairwise(edges):
        yield low - start, high - start, low, high - 1


def fitted(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, H, T, D]`` over a power of two a head that brings its largest number below 2^15, float16; and that factor."""
    if x.dtype == torch.float16:
        return x, x.new_ones(x.shape[:2], dtype=torch.float32)
    largest = torch.linalg.vector_norm(x, torch.inf, (2, 3), keepdim=True).float()
    factor = torch.exp2(torch.frexp(largest).exponent - 15).clamp_min(2.0**-100)
    return (x / factor.to(x.dtype)).to(torch.float16), factor


def blocks(pieces: Sequence[Piece], sight: Sight, pages: int) -> Iterator[list[Piece]]:
    """Pieces in blocks of so many pages at most, cut where needed; those that need a mask apart from those that do not."""
    block: list[Piece] = []
    room, plain = pages, False
    for piece in pieces:
        clear, begin = sight.plain(piece.segment.first, piece.segment.last), piece.begin
        while begin < piece.end:
            if block and (not room or clear != plain):
                yield block
                block, room = [], pages
            end = min(piece.end, begin + room)
            block.append(replace(piece, begin=begin, end=end, place=piece.place + begin - piece.begin))
            room, plain, begin = room - (end - begin), clear, end
    if block:
        yield block
