"""E4M3 codes of whole pages: one program a page of a head, everything in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from argus.backends.base import Float8, Payload
from argus.backends.triton import tuning
from argus.backends.triton.codec import _grid, _whole
from argus.backends.triton.rounding import FP8_MAX, INTERPRETED, _over, _over_constant, _round_up


@triton.jit
def _float8_kernel(
    x_ptr, codes_ptr, scale_ptr, TOKENS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, G: tl.constexpr, CAST: tl.constexpr
):
    """Codes in natural order; where CAST is not set, numbers that torch is to cast."""
    page = tl.program_id(0).to(tl.int64)
    at = page * P * D + tl.arange(0, P)[:, None] * D + tl.arange(0, D)[None, :]
    x = tl.load(x_ptr + at).to(tl.float32)
    if TOKENS:
        AXIS: tl.constexpr = 2
        A: tl.constexpr = P
        B: tl.constexpr = D // G
        parts = tl.reshape(x, (P, B, G))
    else:
        AXIS: tl.constexpr = 1
        A: tl.constexpr = P // G
        B: tl.constexpr = D
        parts = tl.reshape(x, (A, G, D))
    largest = tl.max(tl.abs(parts), AXIS)
    scale = _round_up(_over_constant(largest, FP8_MAX))
    tl.store(scale_ptr + page * A * B + tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :], scale)
    step = tl.expand_dims(scale, AXIS).to(tl.float32)
    step = tl.where(step == 0.0, 1.0, step)
    # No quotient is beyond 448, since the scale is rounded up.
    y = tl.reshape(_over(parts, step), (P, D))
    if CAST:
        tl.store(codes_ptr + at, y.to(tl.float8e4nv))
    else:
        tl.store(codes_ptr + at, y)


def to_fp8(x: Tensor, form: Float8) -> Payload | None:
    """See :meth:`argus.backends.base.Backend.to_fp8`; of any floating dtype. None where a page is not one block."""
    page, dim = x.shape[-2:]
    group, shape = _grid(form, x)
    if not _whole(page, dim, group) or page * dim > 32768:
        return None
    x = x.contiguous()
    dtype = torch.float32 if INTERPRETED else torch.float8_e4m3fn
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(shape, dtype=torch.float16, device=x.device)
    if x.numel():
        _float8_kernel[(x.numel() // (page * dim),)](
            x, codes, scale, form.axis == "token", page, dim, group, not INTERPRETED, num_warps=tuning.codec_warps(page * dim)
        )
    return {"codes": codes.to(torch.float8_e4m3fn), "scale": scale}
