"""Projecting pages, and one kernel from pages to their archive: mean, coefficients, and codes of these."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from argus.backends.base import PLANES, PREFIX, Affine, Payload, Plain, Projected
from argus.backends.triton import layout, tuning
from argus.backends.triton.archive_codes import archive_codes
from argus.backends.triton.codec import _grid, _whole, kind_of
from argus.backends.triton.forms import ELEMENTS
from argus.backends.triton.fragments import Weights
from argus.backends.triton.planar import put_planar
from argus.backends.triton.rounding import RANGE, SYMMETRIC, _affine, _coded, _over_constant, _round_up

SLICE = 32
"""Channels that are projected at once, at most: what one warp holds of a page in registers."""


@triton.jit
def _project_kernel(
    x_ptr, matrix_ptr, out_ptr, rows, tokens, dim,
    MB: tl.constexpr, PB: tl.constexpr, DB: tl.constexpr,
):  # fmt: skip
    """One page's ``matrix @ x``."""
    page = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * MB + tl.arange(0, MB)
    channel = tl.program_id(2) * DB + tl.arange(0, DB)
    total = tl.zeros((MB, DB), tl.float32)
    for start in range(0, tokens, PB):
        token = start + tl.arange(0, PB)
        seen = token < tokens
        w = tl.load(matrix_ptr + row[:, None] * tokens + token[None, :], mask=(row < rows)[:, None] & seen[None, :], other=0.0)
        at = (page * tokens + token[:, None]) * dim + channel[None, :]
        x = tl.load(x_ptr + at, mask=seen[:, None] & (channel < dim)[None, :], other=0.0)
        total = tl.dot(w, x.to(tl.float32), total, input_precision="ieee")
    at = (page * rows + row[:, None]) * dim + channel[None, :]
    tl.store(out_ptr + at, total, mask=(row < rows)[:, None] & (channel < dim)[None, :])


@triton.jit
def _projected(x_ptr, w, mean_ptr, P: tl.constexpr, D: tl.constexpr, SL: tl.constexpr):
    """Coefficients of a slice of channels; their mean is stored."""
    channel = tl.arange(0, SL)
    x = tl.load(x_ptr + tl.arange(0, P)[:, None] * D + channel[None, :]).to(tl.float32)
    mean = (tl.sum(x.to(tl.float64), 0) * (1.0 / P)).to(tl.float32).to(tl.float16)
    tl.store(mean_ptr + channel, mean)
    # Three products of tf32 on tensor cores, with an error near float32's.
    return tl.dot(w, x - mean.to(tl.float32)[None, :], input_precision="tf32x3")


@triton.jit
def _steps(low, high, KIND: tl.constexpr, TOP: tl.constexpr):
    """Scale and zero of groups that reach from low to high."""
    if KIND == SYMMETRIC:
        largest = tl.maximum(-low, high)
        scale = _round_up(_over_constant(largest, TOP >> 1))
        zero = scale
    else:
        scale, zero = _affine(low, high, TOP)
    return scale, zero


@triton.jit
def _archive_kernel(
    x_ptr, matrix_ptr, mean_ptr, codes_ptr, scale_ptr, zero_ptr,
    P: tl.constexpr, D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, SL: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Archive one page of one head, R rows of M. BITS 0: plain coefficients."""
    page = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, M)
    held = (row < R)[:, None]
    w = tl.load(matrix_ptr + row[:, None] * P + tl.arange(0, P)[None, :], mask=held, other=0.0)
    TOP: tl.constexpr = (1 << BITS) - 1
    N: tl.constexpr = D // SL
    parts = ()
    for j in tl.static_range(N):
        parts = parts + (_projected(x_ptr + page * P * D + j * SL, w, mean_ptr + page * D + j * SL, P, D, SL),)
    if BITS == 0:
        for j in tl.static_range(N):
            at = page * R * D + row[:, None] * D + j * SL + tl.arange(0, SL)[None, :]
            tl.store(codes_ptr + at, parts[j], mask=held)
    else:
        codes = ()
        if TOKENS:
            low, high = tl.min(parts[0], 1), tl.max(parts[0], 1)
            for j in tl.static_range(1, N):
                low, high = tl.minimum(low, tl.min(parts[j], 1)), tl.maximum(high, tl.max(parts[j], 1))
            scale, zero = _steps(low, high, KIND, TOP)
            tl.store(scale_ptr + page * R + row, scale, mask=row < R)
            if KIND == RANGE:
                tl.store(zero_ptr + page * R + row, zero, mask=row < R)
            for j in tl.static_range(N):
                codes = codes + (_coded(parts[j], scale[:, None], zero[:, None], KIND, TOP),)
        else:
            group = tl.arange(0, M // G)
            for j in tl.static_range(N):
                x = tl.reshape(parts[j], (M // G, G, SL))
                scale, zero = _steps(tl.min(x, 1), tl.max(x, 1), KIND, TOP)
                at = (page * (R // G) + group[:, None]) * D + j * SL + tl.arange(0, SL)[None, :]
                tl.store(scale_ptr + at, scale, mask=(group < R // G)[:, None])
                if KIND == RANGE:
                    tl.store(zero_ptr + at, zero, mask=(group < R // G)[:, None])
                codes = codes + (tl.reshape(_coded(x, scale[:, None, :], zero[:, None, :], KIND, TOP), (M, SL)),)
        put_planar(codes_ptr + page * (R * D * BITS // 8), codes, held, BITS, D)


def archive(payload: Payload, source: object, form: Projected, laid: Weights) -> Payload | None:
    """Plain pages or their codes, archived; None where there is no kernel.

    Parameters
    ----------
    payload : dict of str to Tensor
        What `source` keeps of pages ``[n, B, H, P, D]``.
    source : object
        The form in which it does.
    form : Projected
    laid : Weights
        Projections that were laid for kernels before.

    Returns
    -------
    dict of str to Tensor or None
        As :meth:`argus.backends.base.Backend.encode` gives it.
    """
    if isinstance(source, Affine):
        return archive_codes(payload, source, form, laid)
    if not isinstance(source, Plain):
        return None
    inner, x = form.inner, payload["codes"].contiguous()
    *head, page, dim = x.shape
    rows = page // form.ratio
    if not _whole(page, dim, rows) or not 16 <= page <= 128 or rows > 64 or layout.in_fragments(rows, dim):
        return None
    kept: dict[str, Tensor] = {}
    width = min(SLICE, dim)
    if isinstance(inner, Affine) and not inner.centred:
        length, shape = _grid(inner, torch.empty(*head, rows, dim, device="meta"))
        width = min(width, dim * min(PLANES[inner.bits]) // 8)
        if not _whole(length) or (inner.axis == "token" and length != dim):
            return None
        kind = torch.int8 if inner.symmetric else torch.uint8
        kept["codes"] = torch.empty(*head, rows, dim * inner.bits // 8, dtype=kind, device=x.device)
        kept["scale"] = torch.empty(shape, dtype=torch.float16, device=x.device)
        if not inner.symmetric:
            kept["zero"] = torch.empty_like(kept["scale"])
        writing = (kind_of(inner), inner.bits, inner.axis == "token", length)
    elif isinstance(inner, Plain):
        dtype = torch.float32 if inner.dtype is None else inner.dtype
        if dtype not in ELEMENTS:
            return None
        kept["codes"] = torch.empty(*head, rows, dim, dtype=dtype, device=x.device)
        writing = (RANGE.value, 0, False, 1)
    else:
        return None
    if width < 8:
        return None
    mean = torch.empty(*head, dim, dtype=torch.float16, device=x.device)
    if mean.numel():
        matrix = (form.matrix(page, mean) / page).contiguous()
        out = kept["codes"] if isinstance(inner, Plain) else kept["codes"].view(torch.uint8)
        _archive_kernel[(mean.numel() // dim,)](
            x, matrix, mean, out, kept.get("scale", mean), kept.get("zero", mean), page, dim, rows, max(16, rows), width,
            *writing, num_warps=tuning.codec_warps(page * width),
        )  # fmt: skip
    return {"mean": mean} | {PREFIX + name: tensor for name, tensor in kept.items()}


def project(x: Tensor, matrix: Tensor) -> Tensor:
    """See :meth:`argus.backends.base.Backend.project`."""
    *head, tokens, dim = x.shape
    rows = matrix.shape[0]
    x, matrix = x.contiguous(), matrix.to(torch.float32).contiguous()
    out = torch.empty(*head, rows, dim, dtype=torch.float32, device=x.device)
    mb, pb, db = (max(16, min(64, tuning.power(size))) for size in (rows, tokens, dim))
    if out.numel():
        grid = (x.numel() // (tokens * dim), tuning.over(rows, mb), tuning.over(dim, db))
        _project_kernel[grid](x, matrix, out, rows, tokens, dim, mb, pb, db)
    return out
