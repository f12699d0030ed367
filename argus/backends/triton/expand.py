"""Pages of any form written out as FP16 numbers, for kernels that read many queries against them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from argus.backends.base import Projected, Role, Segment
from argus.backends.triton import forms
from argus.backends.triton.decode import _tile
from argus.backends.triton.tables import FIELDS, NAMES, Run

DECODED = 32 << 20
"""Bytes of float32 numbers that a tier which no kernel reads decodes at once, or those of one page where it has more."""
HIGHEST = torch.finfo(torch.float16).max


@triton.jit
def _put(at, x, seen, HIGHEST: tl.constexpr):
    tl.store(at, tl.minimum(tl.maximum(x, -HIGHEST), HIGHEST).to(tl.float16), mask=seen)


@triton.jit
def _at(row_of, ALIGNED: tl.constexpr):
    """Addresses of a page's codes, scales and zeros."""
    codes, scales, zeros = tl.load(row_of), tl.load(row_of + 1), tl.load(row_of + 2)
    if ALIGNED:
        codes, scales, zeros = tl.multiple_of(codes, 16), tl.multiple_of(scales, 16), tl.multiple_of(zeros, 16)
    return codes, scales, zeros


@triton.jit
def _expand_kernel(
    table_ptr, own, out_ptr,
    P: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, TB: tl.constexpr, FIELDS: tl.constexpr, ALIGNED: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr,
    FRAGMENTS: tl.constexpr, ELEMENT: tl.constexpr, WIDE: tl.constexpr, LOAD: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """Write TB tokens of one page and head, decoded, as FP16 numbers; what is beyond FP16's range becomes its end."""
    TILES: tl.constexpr = (P + TB - 1) // TB
    page = (tl.program_id(0) // TILES).to(tl.int64)
    inner = tl.program_id(1).to(tl.int64)
    tok = (tl.program_id(0) % TILES * TB + tl.arange(0, TB))[:, None]
    ch = tl.arange(0, DB)[None, :]
    seen = (tok < P) & (ch < D)
    codes, scales, zeros = _at(table_ptr + page * FIELDS, ALIGNED)
    x = _tile(
        codes, scales, zeros, own, tok, ch, seen, inner, P, D, KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD
    )
    _put(out_ptr + ((page * tl.num_programs(1) + inner) * P + tok) * D + ch, x, seen, HIGHEST)


@triton.jit
def _expand_projected_kernel(
    table_ptr, own, out_ptr, matrix_ptr, factor,
    R: tl.constexpr, MEAN: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, TB: tl.constexpr, FIELDS: tl.constexpr, ALIGNED: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr,
    FRAGMENTS: tl.constexpr, ELEMENT: tl.constexpr, WIDE: tl.constexpr, LOAD: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """The same of a page of which R rows of coefficients are kept, up to 16: ``mean + factor * matrix^T c``."""
    TILES: tl.constexpr = (P + TB - 1) // TB
    page = (tl.program_id(0) // TILES).to(tl.int64)
    inner = tl.program_id(1).to(tl.int64)
    tok = tl.program_id(0) % TILES * TB + tl.arange(0, TB)
    row = tl.arange(0, 16)
    ch = tl.arange(0, DB)[None, :]
    row_of = table_ptr + page * FIELDS
    codes, scales, zeros = _at(row_of, ALIGNED)
    c = _tile(
        codes, scales, zeros, own, row[:, None], ch, (row < R)[:, None] & (ch < D), inner, R, D,
        KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD,
    )  # fmt: skip
    held = (tok < P)[:, None]
    back = tl.load(matrix_ptr + row[None, :] * P + tok[:, None], mask=held & (row < R)[None, :], other=0.0)
    means = tl.load(row_of + MEAN).to(tl.pointer_type(tl.float16))
    mean = tl.load(means + inner * D + ch, mask=ch < D, other=0.0).to(tl.float32)
    x = tl.dot(back, c, input_precision="tf32x3") * factor + mean
    place = page * tl.num_programs(1) + inner
    _put(out_ptr + (place * P + tok[:, None]) * D + ch, x, held & (ch < D), HIGHEST)


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
    arguments = [run.table[pieces[0].place :].view(-1)[where:], forms.own(form, out), out]
    tokens, kernel, rows, inner = 32, _expand_kernel, page, form
    if isinstance(form, Projected):
        tokens, kernel, rows, inner = 64, _expand_projected_kernel, page // form.ratio, form.inner
        # Means are told behind both roles' tensors and the marks.
        mean = 2 * len(NAMES) + 1 + (role == "values") - where
        arguments += [form.matrix(page, out), form.factor(page), rows, mean]
        payload = {name: payload[name] for name in payload if name != "mean"}
    constants = forms.described(inner, payload, rows, dim)
    tokens = min(triton.next_power_of_2(page), tokens)
    kernel[(pages * triton.cdiv(page, tokens), batch * heads)](
        *arguments, page, dim, triton.next_power_of_2(dim), tokens, FIELDS, run.aligned, **constants, HIGHEST=HIGHEST
    )
    return 0


def _expand_decoded(piece: Piece, role: Role, out: Tensor) -> int:
    step = max(1, DECODED // (4 * out[0].numel()))
    for begin in range(0, piece.count, step):
        end = min(begin + step, piece.count)
        part = piece.segment
        if end - begin < len(part.positions):
            part = part.part(piece.begin + begin, piece.begin + end)
        decoded = part.tier(role).decode(part.payload(role), role)
        if part.patch is not None:
            decoded = part.patch(role, decoded)
        out[begin:end] = decoded.clamp(-HIGHEST, HIGHEST)
    return 8 * min(step, piece.count) * out[0].numel()
