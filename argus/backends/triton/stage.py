"""Pages of any form written out as FP16 numbers, for kernels that read many queries against them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from argus.backends.base import PREFIX, Payload, Projected, Role, Segment
from argus.backends.triton import forms
from argus.backends.triton.decode import _tile

DECODED = 32 << 20
"""Bytes of float32 numbers that a tier which no kernel reads decodes at once, or those of one page where it has more."""
HIGHEST = torch.finfo(torch.float16).max
NAMES = ("codes", "scale", "zero")
TALLEST = 64
"""Rows of coefficients that a program holds, at most."""


@triton.jit
def _put(at, x, seen, HIGHEST: tl.constexpr):
    tl.store(at, tl.minimum(tl.maximum(x, -HIGHEST), HIGHEST).to(tl.float16), mask=seen)


@triton.jit
def _stage_kernel(
    codes, scales, zeros, own, out_ptr, codes_step, scales_step, zeros_step,
    P: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, TB: tl.constexpr,
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
    x = _tile(
        codes + page * codes_step, scales + page * scales_step, zeros + page * zeros_step, own, tok, ch, seen, inner, P, D,
        KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD,
    )  # fmt: skip
    _put(out_ptr + ((page * tl.num_programs(1) + inner) * P + tok) * D + ch, x, seen, HIGHEST)


@triton.jit
def _stage_projected_kernel(
    codes, scales, zeros, own, mean_ptr, matrix_ptr, out_ptr, codes_step, scales_step, zeros_step, factor,
    P: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, TB: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr,
    FRAGMENTS: tl.constexpr, ELEMENT: tl.constexpr, WIDE: tl.constexpr, LOAD: tl.constexpr, HIGHEST: tl.constexpr,
):  # fmt: skip
    """The same of a page whose R rows of coefficients are read: ``mean + factor * matrix^T c``."""
    TILES: tl.constexpr = (P + TB - 1) // TB
    page = (tl.program_id(0) // TILES).to(tl.int64)
    inner = tl.program_id(1).to(tl.int64)
    tok = tl.program_id(0) % TILES * TB + tl.arange(0, TB)
    row = tl.arange(0, RB)
    ch = tl.arange(0, DB)[None, :]
    c = _tile(
        codes + page * codes_step, scales + page * scales_step, zeros + page * zeros_step, own, row[:, None], ch,
        (row < R)[:, None] & (ch < D), inner, R, D, KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD,
    )  # fmt: skip
    held = (tok < P)[:, None]
    back = tl.load(matrix_ptr + row[None, :] * P + tok[:, None], mask=held & (row < R)[None, :], other=0.0)
    place = page * tl.num_programs(1) + inner
    mean = tl.load(mean_ptr + place * D + ch, mask=ch < D, other=0.0).to(tl.float32)
    x = tl.dot(back, c, input_precision="tf32x3") * factor + mean
    _put(out_ptr + (place * P + tok[:, None]) * D + ch, x, held & (ch < D), HIGHEST)


def stage(segment: Segment, role: Role, out: Tensor) -> int:
    """Decode one role of a segment into ``out [n, B, H, P, D]`` float16, and tell the bytes that this took beside."""
    payload, form = segment.payload(role), segment.tier(role).form(role)
    pages, batch, heads, page, dim = out.shape
    rows, inner = page, form
    if isinstance(form, Projected):
        rows, inner = page // form.ratio, form.inner
        mean, payload = payload["mean"], {name.removeprefix(PREFIX): x for name, x in payload.items() if name != "mean"}
    constants = None
    if segment.patch is None and not forms.rotates(inner) and (inner is form or rows <= TALLEST):
        constants = forms.described(inner, payload, rows, dim)
    if constants is None:
        return _stage_decoded(segment, role, out)
    most = 32
    read: tuple[Any, ...] = (out, *_steps(payload), page)
    kernel = _stage_kernel
    if isinstance(form, Projected):
        most, kernel = 64, _stage_projected_kernel
        read = (mean.contiguous(), form.matrix(page, out), out, *_steps(payload), form.factor(page), page, rows)
        read += (max(16, triton.next_power_of_2(rows)),)
    tokens = min(triton.next_power_of_2(page), most)
    kernel[(pages * triton.cdiv(page, tokens), batch * heads)](
        *_places(payload), forms.own(inner, out), *read, dim, triton.next_power_of_2(dim), tokens,
        **constants, HIGHEST=HIGHEST,
    )  # fmt: skip
    return 0


def _places(payload: Payload) -> list[int]:
    """Addresses of a payload's tensors, 0 where there is none."""
    found = (payload.get(name) for name in NAMES)
    return [0 if tensor is None else tensor.data_ptr() for tensor in found]


def _steps(payload: Payload) -> list[int]:
    """Bytes from page to page of each of them."""
    found = (payload.get(name) for name in NAMES)
    return [0 if tensor is None else tensor.stride(0) * tensor.element_size() for tensor in found]


def _stage_decoded(segment: Segment, role: Role, out: Tensor) -> int:
    step = max(1, DECODED // (4 * out[0].numel()))
    for begin in range(0, len(out), step):
        part = segment.part(begin, begin + step) if step < len(out) else segment
        decoded = part.tier(role).decode(part.payload(role), role)
        if part.patch is not None:
            decoded = part.patch(role, decoded)
        out[begin : begin + step] = decoded.clamp(-HIGHEST, HIGHEST)
    return 8 * min(step, len(out)) * out[0].numel()
