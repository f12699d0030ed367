"""Pages of any form written out as FP16 numbers, for kernels that read many queries against them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from argus.backends.base import Role, Segment
from argus.backends.triton import forms
from argus.backends.triton.lookup import FIELDS, NAMES
from argus.backends.triton.reading import _addresses, _page_tile
from argus.backends.triton.tables import Run

DECODED = 32 << 20
"""Bytes of float32 numbers that a tier which no kernel reads decodes at once, or those of one page where it has more."""
HIGHEST = torch.finfo(torch.float16).max


@triton.jit
def _expand_kernel(
    table_ptr, own, matrix, factor, out_ptr,
    P: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, TB: tl.constexpr, ROWS: tl.constexpr, MEAN: tl.constexpr,
    FIELDS: tl.constexpr, ALIGNED: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr,
    FRAGMENTS: tl.constexpr, ELEMENT: tl.constexpr, WIDE: tl.constexpr, LOAD: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """Write TB tokens of one page and head, decoded, as FP16 numbers; what is beyond FP16's range becomes its end."""
    TILES: tl.constexpr = (P + TB - 1) // TB
    page = (tl.program_id(0) // TILES).to(tl.int64)
    inner = tl.program_id(1).to(tl.int64)
    tok = tl.program_id(0) % TILES * TB + tl.arange(0, TB)
    ch = tl.arange(0, DB)
    row_of = table_ptr + page * FIELDS
    mean = row_of
    if ROWS:
        mean = tl.load(row_of + MEAN)
    x = _page_tile(
        _addresses(row_of, ALIGNED), mean, own, matrix, factor, tok, ch, inner, P, D, ROWS,
        KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD,
    )  # fmt: skip
    to = out_ptr + ((page * tl.num_programs(1) + inner) * P + tok[:, None]) * D + ch[None, :]
    near = tl.minimum(tl.maximum(x, -HIGHEST), HIGHEST).to(tl.float16)
    tl.store(to, near, mask=(tok < P)[:, None] & (ch < D)[None, :])


@dataclass(frozen=True)
class Piece:
    """Pages `begin` to `end` of a segment, and the run that has them in its table from `place` on, or none."""

    segment: Segment
    begin: int
    end: int
    run: Run | None
    place: int

    @property
    def count(self) -> int:
        """Pages."""
        return self.end - self.begin


def joined(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces in groups that follow one another in one table."""
    group: list[Piece] = []
    for piece in pieces:
        if group and (piece.run is None or piece.run is not group[-1].run or piece.place != group[-1].place + group[-1].count):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def expand(pieces: Sequence[Piece], role: Role, out: Tensor) -> int:
    """Decode one role of a group of pieces into ``out [n, B, H, P, D]`` float16, and tell the bytes that this took beside."""
    run = pieces[0].run
    form = None if run is None else run.key_form if role == "keys" else run.value_form
    if run is None or forms.rotates(form):
        used = done = 0
        for piece in pieces:
            used = max(used, _expand_decoded(piece, role, out[done : done + piece.count]))
            done += piece.count
        return used
    pages, batch, heads, page, dim = out.shape
    payload, where = (run.keys, 0) if role == "keys" else (run.values, len(NAMES))
    facts = forms.described(form, payload, page, dim)
    matrix, factor = forms.archive(form, page, out)
    tokens = min(triton.next_power_of_2(page), 64 if facts["ROWS"] else 32)
    # Means are told behind both roles' tensors and the marks.
    mean = 2 * len(NAMES) + 1 + (role == "values") - where
    _expand_kernel[(pages * triton.cdiv(page, tokens), batch * heads)](
        run.table[pieces[0].place :].view(-1)[where:], forms.own(form, out), matrix, factor, out,
        page, dim, triton.next_power_of_2(dim), tokens, MEAN=mean, FIELDS=FIELDS, ALIGNED=run.aligned, **facts, HIGHEST=HIGHEST,
    )  # fmt: skip
    done = 0
    for piece in pieces:
        rows = piece.segment.outliers.get(role)
        if rows is not None:
            held = piece.segment.positions[piece.begin : piece.end] // page
            rows.write(out[done : done + piece.count], held).clamp_(-HIGHEST, HIGHEST)
        done += piece.count
    return 0


def _expand_decoded(piece: Piece, role: Role, out: Tensor) -> int:
    step = max(1, DECODED // (4 * out[0].numel()))
    for begin in range(0, piece.count, step):
        end = min(begin + step, piece.count)
        part = piece.segment
        if end - begin < len(part.positions):
            part = part.part(piece.begin + begin, piece.begin + end)
        decoded = part.exactly(role, part.tier(role).decode(part.payload(role), role))
        out[begin:end] = decoded.clamp(-HIGHEST, HIGHEST)
    return 8 * min(step, piece.count) * out[0].numel()
