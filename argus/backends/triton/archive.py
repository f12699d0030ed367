"""Projecting pages, and one kernel from pages or codes of a stage to their archive: mean, coefficients, and codes of these."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from argus.backends.base import PREFIX, Affine, Payload, Plain, Projected
from argus.backends.triton import layout, tuning
from argus.backends.triton.archive_codes import archive_codes
from argus.backends.triton.codec import _affine, _code, _grid, _over, _round_up, _rounded_even, _unpack, _whole, shape_of
from argus.backends.triton.forms import ELEMENTS
from argus.backends.triton.fragments import Weights

PRECISION = "tf32x3"
"""How coefficients are multiplied: ``tf32x3`` on tensor cores, with an error near float32's, or ``ieee`` on ordinary ones."""
WARPS = 4
"""Warps of a program, at least."""


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
def _planar_plane(
    codes, out, rows, START: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, TOTAL: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Store `rows` rows of one plane of codes ``[R, D]``, as :func:`argus.backends.cpu.pack` packs them."""
    F: tl.constexpr = 8 // BITS
    W: tl.constexpr = D // F
    low = (codes >> SHIFT) & ((1 << BITS) - 1)
    if F > 1:
        low = _bytes_of(low, R, W, F, BITS)
    row = tl.arange(0, R)[:, None]
    tl.store(out + row * (D * TOTAL // 8) + START + tl.arange(0, W)[None, :], low.to(tl.uint8), mask=row < rows)


@triton.jit
def _bytes_of(x, R: tl.constexpr, W: tl.constexpr, F: tl.constexpr, BITS: tl.constexpr):
    """Codes ``[R, F * W]`` as bytes ``[R, W]`` that hold element ``j * W + c`` in field j of byte c; in halves, by pairs."""
    low, high = tl.split(tl.permute(tl.reshape(x, (R, 2, F // 2 * W)), (0, 2, 1)))
    x = low | (high << (BITS * F // 2))
    if F >= 4:
        low, high = tl.split(tl.permute(tl.reshape(x, (R, 2, F // 4 * W)), (0, 2, 1)))
        x = low | (high << (BITS * F // 4))
    if F >= 8:
        low, high = tl.split(tl.permute(tl.reshape(x, (R, 2, W)), (0, 2, 1)))
        x = low | (high << BITS)
    return x


@triton.jit
def _archive_kernel(
    x_ptr, from_scale, from_zero, matrix_ptr, mean_ptr, codes_ptr, scale_ptr, zero_ptr,
    P: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr,
    CODES: tl.constexpr, FROM_BITS: tl.constexpr, FROM_TOKENS: tl.constexpr, FROM_G: tl.constexpr, FROM_SYMMETRIC: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Archive one page of one head; KIND 0: plain coefficients, 1: affine, 2: symmetric. R: ROWS, or 16 if they are fewer."""
    page = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, P)[:, None]
    channel = tl.arange(0, D)[None, :]
    if CODES:
        codes = _unpack(x_ptr + page * (P * D * FROM_BITS // 32), FROM_TOKENS, FROM_BITS, P, D)
        if FROM_SYMMETRIC:
            codes = (codes << 24) >> 24
        if FROM_TOKENS:
            at = page * (P * D // FROM_G) + token * (D // FROM_G) + channel // FROM_G
        else:
            at = page * (P // FROM_G * D) + (token // FROM_G) * D + channel
        x = codes.to(tl.float32) * tl.load(from_scale + at).to(tl.float32)
        if not FROM_SYMMETRIC:
            x += tl.load(from_zero + at).to(tl.float32)
    else:
        x = tl.load(x_ptr + page * P * D + token * D + channel).to(tl.float32)
    mean = (tl.sum(x.to(tl.float64), 0) * (1.0 / P)).to(tl.float32).to(tl.float16)
    tl.store(mean_ptr + page * D + tl.arange(0, D), mean)
    rest = x - mean.to(tl.float32)[None, :]
    row = tl.arange(0, R)
    w = tl.load(matrix_ptr + row[:, None] * P + tl.arange(0, P)[None, :], mask=(row < ROWS)[:, None], other=0.0)
    c = tl.dot(w, rest, input_precision=PRECISION)
    if KIND == 0:
        tl.store(codes_ptr + page * ROWS * D + row[:, None] * D + channel, c, mask=(row < ROWS)[:, None])
    else:
        if TOKENS:
            AXIS: tl.constexpr = 2
            A: tl.constexpr = R
            HELD: tl.constexpr = ROWS
            B: tl.constexpr = D // G
            parts = tl.reshape(c, (R, B, G))
        else:
            AXIS: tl.constexpr = 1
            A: tl.constexpr = R // G
            HELD: tl.constexpr = ROWS // G
            B: tl.constexpr = D
            parts = tl.reshape(c, (A, G, D))
        TOP: tl.constexpr = (1 << BITS) - 1
        group = tl.arange(0, A)[:, None]
        to = page * HELD * B + group * B + tl.arange(0, B)[None, :]
        if KIND == 2:
            HALF: tl.constexpr = TOP >> 1
            largest = tl.max(tl.abs(parts), AXIS)
            scale = _round_up(_over(largest, largest * 0.0 + HALF))
            step = tl.expand_dims(scale, AXIS).to(tl.float32)
            step = tl.where(step == 0.0, 1.0, step)
            code = tl.minimum(tl.maximum(_rounded_even(_over(parts, step)), -HALF), HALF) & 255
        else:
            scale, zero = _affine(tl.min(parts, AXIS), tl.max(parts, AXIS), TOP)
            tl.store(zero_ptr + to, zero, mask=group < HELD)
            code = _code(parts, tl.expand_dims(scale, AXIS), tl.expand_dims(zero, AXIS), TOP)
        tl.store(scale_ptr + to, scale, mask=group < HELD)
        code = tl.reshape(code, (R, D))
        out = codes_ptr + page * (ROWS * D * BITS // 8)
        if BITS & 8:
            _planar_plane(code, out, ROWS, 0, 0, 8, BITS, R, D)
        if BITS & 4:
            _planar_plane(code, out, ROWS, 0, 0, 4, BITS, R, D)
        if BITS & 2:
            _planar_plane(code, out, ROWS, (BITS & 4) * D // 8, BITS & 4, 2, BITS, R, D)
        if BITS & 1:
            _planar_plane(code, out, ROWS, (BITS & 6) * D // 8, BITS & 6, 1, BITS, R, D)


def archive(payload: Payload, source: Affine | Plain, form: Projected, kept: Weights) -> Payload | None:
    """Pages in fragment order or plain, archived; None where a page is not one block or the inner form has no kernel.

    Parameters
    ----------
    payload : dict of str to Tensor
        What `source` keeps of pages ``[n, B, H, P, D]``, plain numbers of any floating dtype.
    source : Affine or Plain
    form : Projected
    kept : Weights
        Projections that were laid for kernels before.

    Returns
    -------
    dict of str to Tensor or None
        As :meth:`argus.backends.base.Backend.encode` gives it.
    """
    if isinstance(source, Affine):
        made = archive_codes(payload, source, form, kept)
        if made is not None:
            return made
    inner = form.inner
    coded = isinstance(source, Affine)
    page, dim = shape_of(payload, source) if isinstance(source, Affine) else payload["codes"].shape[-2:]
    rows = page // form.ratio
    affine = isinstance(inner, Affine) and not inner.centred
    if not (affine or isinstance(inner, Plain)) or page * dim > 64 * 256:
        return None
    if not _whole(page, dim, rows) or rows < 1 or page < 16 or dim < 16 or layout.in_fragments(rows, dim):
        return None
    if coded and not layout.in_fragments(page, dim):
        return None
    codes = payload["codes"].contiguous()
    head = codes.shape[:3]
    if isinstance(source, Affine):
        group = source.group or (page if source.axis == "channel" else dim)
        scale, zero = payload["scale"].contiguous(), payload.get("zero", payload["scale"]).contiguous()
        reading = (True, source.bits, source.axis == "token", group, source.symmetric)
        x = codes.view(torch.int32)
    else:
        reading, scale, zero, x = (False, 8, False, 1, True), codes, codes, codes
    mean = torch.empty(*head, dim, dtype=torch.float16, device=codes.device)
    kept: dict[str, Tensor] = {}
    if isinstance(inner, Affine):
        length, shape = _grid(inner, torch.empty(*head, rows, dim, device="meta"))
        if not _whole(length):
            return None
        kind = torch.int8 if inner.symmetric else torch.uint8
        kept["codes"] = torch.empty(*head, rows, dim * inner.bits // 8, dtype=kind, device=codes.device)
        kept["scale"] = torch.empty(shape, dtype=torch.float16, device=codes.device)
        if not inner.symmetric:
            kept["zero"] = torch.empty_like(kept["scale"])
        writing = (2 if inner.symmetric else 1, inner.bits, inner.axis == "token", length)
    else:
        dtype = torch.float32 if inner.dtype is None else inner.dtype
        if dtype not in ELEMENTS:
            return None
        kept["codes"] = torch.empty(*head, rows, dim, dtype=dtype, device=codes.device)
        writing = (0, 8, False, 1)
    if mean.numel():
        matrix = (form.matrix(page, mean) / page).contiguous()
        out = kept["codes"].view(torch.uint8) if affine else kept["codes"]
        _archive_kernel[(mean.numel() // dim,)](
            x, scale, zero, matrix, mean, out, kept.get("scale", mean), kept.get("zero", mean),
            page, dim, rows, max(16, rows), *reading, *writing, PRECISION, num_warps=max(WARPS, tuning.codec_warps(page * dim)),
        )  # fmt: skip
    return {"mean": mean} | {PREFIX + name: tensor for name, tensor in kept.items()}


def project(x: Tensor, matrix: Tensor) -> Tensor:
    """See :meth:`argus.backends.base.Backend.project`."""
    *head, tokens, dim = x.shape
    rows = matrix.shape[0]
    x, matrix = x.contiguous(), matrix.to(torch.float32).contiguous()
    out = torch.empty(*head, rows, dim, dtype=torch.float32, device=x.device)
    mb, pb, db = (max(16, min(64, triton.next_power_of_2(size))) for size in (rows, tokens, dim))
    if out.numel():
        grid = (x.numel() // (tokens * dim), triton.cdiv(rows, mb), triton.cdiv(dim, db))
        _project_kernel[grid](x, matrix, out, rows, tokens, dim, mb, pb, db)
    return out
