"""Kernels that quantize, pack, unpack and project pages, and their launchers. The order of codes is told in ``layout.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from argus.backends.base import Affine, Float8, Payload
from argus.backends.triton import layout, tuning
from argus.backends.triton.rounding import (
    CENTRED,
    FLOATING,
    FP8_MAX,
    INTERPRETED,
    RANGE,
    SYMMETRIC,
    _affine,
    _code,
    _coded,
    _over,
    _over_constant,
    _round_even,
    _round_up,
)


@triton.jit
def _join(x, NB: tl.constexpr, N: tl.constexpr, F: tl.constexpr, BITS: tl.constexpr):
    """The F fields [NB, N, 32, F] of each word, BITS apart, in one; in pairs, since sums of reshaped tensors go wrong."""
    low, high = tl.split(tl.reshape(x, (NB, N, 32, F // 2, 2)))
    x = low | (high << BITS)
    if F >= 4:
        low, high = tl.split(tl.reshape(x, (NB, N, 32, F // 4, 2)))
        x = low | (high << (2 * BITS))
    if F >= 8:
        low, high = tl.split(tl.reshape(x, (NB, N, 32, F // 8, 2)))
        x = low | (high << (4 * BITS))
    return tl.reshape(x, (NB, N, 32))


@triton.jit
def _pack_plane(words, out, SHIFT: tl.constexpr, BITS: tl.constexpr, NB: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr):
    """Store one plane of words [NB, N, 32] at out."""
    F: tl.constexpr = 8 // BITS
    W: tl.constexpr = N // F
    V: tl.constexpr = 4 if W % 4 == 0 else (2 if W % 2 == 0 else 1)
    stored = words
    if BITS < 8:
        low = (words >> SHIFT) & (((1 << (BITS % 8)) - 1) * 0x01010101)
        stored = _join(tl.permute(tl.reshape(low, (NB, F, W, 32)), (0, 2, 3, 1)), NB, W, F, BITS)
    block = tl.arange(0, NB)[:, None, None]
    word = tl.arange(0, W)[None, :, None]
    lane = tl.arange(0, 32)[None, None, :]
    tl.store(out + block * STRIDE + ((word // V) * 32 + lane) * V + word % V, stored)


@triton.jit
def _pack(codes, out, TOKENS: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """Store codes [P, D] int32 in fragment order at out (32-bit words)."""
    NB: tl.constexpr = P // 64
    N: tl.constexpr = D // 2
    STRIDE: tl.constexpr = 64 * D * BITS // 32
    if TOKENS:
        x = tl.reshape(codes, (NB, 4, 2, 2, 2, 2, D // 16, 2, 8))
        x = tl.permute(x, (0, 6, 3, 4, 7, 8, 1, 2, 5))
    else:
        x = tl.reshape(codes, (NB, 8, 4, 2, 4, D // 16, 4))
        x = tl.permute(x, (0, 2, 5, 3, 1, 4, 6))
    words = _join(tl.reshape(x, (NB, N, 32, 4)), NB, N, 4, 8)
    if BITS & 8:
        _pack_plane(words, out, 0, 8, NB, N, STRIDE)
    if BITS & 4:
        _pack_plane(words, out, 0, 4, NB, N, STRIDE)
    if BITS & 2:
        _pack_plane(words, out + (BITS & 4) * N * 4, BITS & 4, 2, NB, N, STRIDE)
    if BITS & 1:
        _pack_plane(words, out + (BITS & 6) * N * 4, BITS & 6, 1, NB, N, STRIDE)


@triton.jit
def _unpack_plane(base, SHIFT: tl.constexpr, BITS: tl.constexpr, NB: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr):
    F: tl.constexpr = 8 // BITS
    W: tl.constexpr = N // F
    V: tl.constexpr = 4 if W % 4 == 0 else (2 if W % 2 == 0 else 1)
    block = tl.arange(0, NB)[:, None, None]
    word = tl.arange(0, W)[None, :, None]
    lane = tl.arange(0, 32)[None, None, :]
    stored = tl.load(base + block * STRIDE + ((word // V) * 32 + lane) * V + word % V)
    fields = stored[:, None, :, :] >> (tl.arange(0, F) * BITS)[None, :, None, None]
    if BITS < 8:
        fields &= ((1 << (BITS % 8)) - 1) * 0x01010101
    return tl.reshape(fields, (NB, N, 32)) << SHIFT


@triton.jit
def _unpack(base, TOKENS: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """Codes [P, D] int32 from fragment order at base (32-bit words)."""
    NB: tl.constexpr = P // 64
    N: tl.constexpr = D // 2
    STRIDE: tl.constexpr = 64 * D * BITS // 32
    words = tl.zeros((NB, N, 32), tl.int32)
    if BITS & 8:
        words |= _unpack_plane(base, 0, 8, NB, N, STRIDE)
    if BITS & 4:
        words |= _unpack_plane(base, 0, 4, NB, N, STRIDE)
    if BITS & 2:
        words |= _unpack_plane(base + (BITS & 4) * N * 4, BITS & 4, 2, NB, N, STRIDE)
    if BITS & 1:
        words |= _unpack_plane(base + (BITS & 6) * N * 4, BITS & 6, 1, NB, N, STRIDE)
    x = (words[:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None, :]) & 255
    if TOKENS:
        x = tl.reshape(x, (NB, D // 16, 2, 2, 2, 8, 4, 2, 2))
        x = tl.permute(x, (0, 6, 7, 2, 3, 8, 1, 4, 5))
    else:
        x = tl.reshape(x, (NB, 4, D // 16, 2, 8, 4, 4))
        x = tl.permute(x, (0, 4, 1, 3, 5, 2, 6))
    return tl.reshape(x, (P, D))


@triton.jit
def _mean(parts, AXIS: tl.constexpr, G: tl.constexpr):
    SHARE: tl.constexpr = 1.0 / G
    return (tl.sum(parts.to(tl.float64), AXIS) * SHARE).to(tl.float32)


@triton.jit
def _page_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr,
    TOKENS: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Quantize one page of one head and store it in fragment order."""
    page = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, P)[:, None] * D + tl.arange(0, D)[None, :]
    x = tl.load(x_ptr + page * P * D + at).to(tl.float32)
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
    TOP: tl.constexpr = (1 << BITS) - 1
    to = page * A * B + tl.arange(0, A)[:, None] * B + tl.arange(0, B)[None, :]
    if KIND == SYMMETRIC:
        HALF: tl.constexpr = TOP >> 1
        largest = tl.max(tl.abs(parts), AXIS)
        scale = _round_up(_over_constant(largest, HALF))
        zero = scale
        code = _coded(parts, tl.expand_dims(scale, AXIS), tl.expand_dims(zero, AXIS), KIND, TOP)
    elif KIND == CENTRED:
        centre = _mean(parts, AXIS, G)
        rest = parts - tl.expand_dims(centre, AXIS)
        far = _mean(tl.abs(rest), AXIS, G)
        scale = (2.0 * far).to(tl.float16)
        tl.store(zero_ptr + to, (centre - far).to(tl.float16))
        code = (rest >= 0.0).to(tl.int32)
    else:
        scale, zero = _affine(tl.min(parts, AXIS), tl.max(parts, AXIS), TOP)
        tl.store(zero_ptr + to, zero)
        code = _coded(parts, tl.expand_dims(scale, AXIS), tl.expand_dims(zero, AXIS), KIND, TOP)
    tl.store(scale_ptr + to, scale)
    _pack(tl.reshape(code, (P, D)), codes_ptr + page * (P * D * BITS // 32), TOKENS, BITS, P, D)


@triton.jit
def _group_kernel(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, unit, others, per_other, per_element, size,
    BITS: tl.constexpr, KIND: tl.constexpr, CAST: tl.constexpr, OB: tl.constexpr, GB: tl.constexpr,
):  # fmt: skip
    """Quantize groups of any length, codes in natural order; KIND 0: affine, 1: symmetric, 2: E4M3."""
    number = tl.program_id(0).to(tl.int64)
    other = tl.program_id(1) * OB + tl.arange(0, OB)
    element = tl.arange(0, GB)
    here = other < others
    held = here[:, None] & (element < size)[None, :]
    at = number * unit + other[:, None] * per_other + element[None, :] * per_element
    first = number * unit + other * per_other
    x = tl.load(x_ptr + at, mask=held, other=0.0).to(tl.float32)
    # Places past the group repeat its first number, which widens no range.
    x = tl.where(held, x, tl.load(x_ptr + first, mask=here, other=0.0).to(tl.float32)[:, None])
    to = number * others + other
    TOP: tl.constexpr = (1 << BITS) - 1
    if KIND == 0:
        scale, zero = _affine(tl.min(x, 1), tl.max(x, 1), TOP)
        tl.store(zero_ptr + to, zero, mask=here)
        tl.store(codes_ptr + at, _code(x, scale[:, None], zero[:, None], TOP).to(tl.uint8), mask=held)
    else:
        LIMIT: tl.constexpr = (TOP >> 1) if KIND == 1 else FP8_MAX
        largest = tl.max(tl.abs(x), 1)
        scale = _round_up(_over_constant(largest, LIMIT))
        step = scale.to(tl.float32)
        step = tl.where(step == 0.0, 1.0, step)
        y = _over(x, step[:, None])
        if KIND == 1:
            y = _round_even(y)
        y = tl.minimum(tl.maximum(y, -LIMIT), LIMIT)
        if KIND == 1:
            tl.store(codes_ptr + at, y.to(tl.int8), mask=held)
        elif CAST:
            tl.store(codes_ptr + at, y.to(tl.float8e4nv), mask=held)
        else:
            tl.store(codes_ptr + at, y, mask=held)
    tl.store(scale_ptr + to, scale, mask=here)


@triton.jit
def _pack_kernel(codes_ptr, out_ptr, TOKENS: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    page = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, P)[:, None] * D + tl.arange(0, D)[None, :]
    codes = tl.load(codes_ptr + page * P * D + at).to(tl.int32)
    _pack(codes, out_ptr + page * (P * D * BITS // 32), TOKENS, BITS, P, D)


@triton.jit
def _unpack_kernel(
    codes_ptr, scale_ptr, zero_ptr, out_ptr,
    TOKENS: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr, D: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Pages from fragment order."""
    page = tl.program_id(0).to(tl.int64)
    codes = _unpack(codes_ptr + page * (P * D * BITS // 32), TOKENS, BITS, P, D)
    if SYMMETRIC:
        codes = (codes << 24) >> 24
    token = tl.arange(0, P)[:, None]
    channel = tl.arange(0, D)[None, :]
    if TOKENS:
        at = page * (P * D // G) + token * (D // G) + channel // G
    else:
        at = page * (P // G * D) + (token // G) * D + channel
    x = codes.to(tl.float32) * tl.load(scale_ptr + at).to(tl.float32)
    if not SYMMETRIC:
        x += tl.load(zero_ptr + at).to(tl.float32)
    tl.store(out_ptr + page * P * D + token * D + channel, x)


def _whole(*sizes: int) -> bool:
    """Whether a page of these sizes is one Triton block."""
    return all(size & (size - 1) == 0 for size in sizes)


def _grid(form: Affine | Float8, x: Tensor) -> tuple[int, tuple[int, ...]]:
    """The group's length, and the shape of scales."""
    *head, page, dim = x.shape
    group = form.group or (page if form.axis == "channel" else dim)
    return group, (*head, page // group, dim) if form.axis == "channel" else (*head, page, dim // group)


def kind_of(form: Affine | Float8) -> int:
    """How numbers are quantized to a form, as kernels are told."""
    if isinstance(form, Float8):
        kind = FLOATING
    else:
        kind = CENTRED if form.centred else SYMMETRIC if form.symmetric else RANGE
    return int(kind.value)


def quantize(x: Tensor, form: Affine) -> Payload | None:
    """See :meth:`argus.backends.base.Backend.quantize`; takes any floating dtype. None where it has no kernel."""
    *head, page, dim = x.shape
    group, shape = _grid(form, x)
    if not (layout.in_fragments(page, dim) and _whole(page, dim, group)):
        if form.centred:
            return None
        codes, scale, zero = _quantize_groups(x, form, 1 if form.symmetric else 0)
        packed = layout.pack(codes.view(torch.uint8), form.bits, form.axis).view(codes.dtype)
        return {"codes": packed, "scale": scale} if form.symmetric else {"codes": packed, "scale": scale, "zero": zero}
    x = x.contiguous()
    kind = torch.int8 if form.symmetric else torch.uint8
    payload = {"codes": torch.empty(*head, page * dim * form.bits // 8, dtype=kind, device=x.device)}
    payload["scale"] = torch.empty(shape, dtype=torch.float16, device=x.device)
    if not form.symmetric:
        payload["zero"] = torch.empty_like(payload["scale"])
    warps = tuning.centred_warps(page * dim, form.axis) if form.centred else tuning.codec_warps(page * dim)
    if x.numel():
        _page_kernel[(x.numel() // (page * dim),)](
            x, payload["codes"].view(torch.int32), payload["scale"], payload.get("zero", payload["scale"]),
            form.axis == "token", form.bits, page, dim, group, kind_of(form), num_warps=warps,
        )  # fmt: skip
    return payload


def _quantize_groups(x: Tensor, form: Affine | Float8, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in natural order, scale and zero (what the kind does not write, it leaves undefined)."""
    page, dim = x.shape[-2:]
    group, shape = _grid(form, x)
    x = x.contiguous()
    cast = not INTERPRETED
    dtype = {0: torch.uint8, 1: torch.int8, 2: torch.float8_e4m3fn if cast else torch.float32}[kind]
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(shape, dtype=torch.float16, device=x.device)
    zero = torch.empty_like(scale) if kind == 0 else scale
    if form.axis == "channel":
        unit, others, per_other, per_element = group * dim, dim, 1, dim
    else:
        unit, others, per_other, per_element = page * dim, page * dim // group, group, 1
    gb = triton.next_power_of_2(group)
    ob = min(triton.next_power_of_2(others), max(16, 4096 // gb))
    if x.numel():
        grid = (x.numel() // unit, triton.cdiv(others, ob))
        bits = form.bits if isinstance(form, Affine) else 8
        _group_kernel[grid](
            x, codes, scale, zero, unit, others, per_other, per_element, group, bits, kind, cast, ob, gb,
            num_warps=tuning.codec_warps(ob * gb),
        )  # fmt: skip
    return codes, scale, zero


def to_fp8(x: Tensor, form: Float8) -> Payload:
    """See :meth:`argus.backends.base.Backend.to_fp8`."""
    codes, scale, _ = _quantize_groups(x, form, 2)
    return {"codes": codes.to(torch.float8_e4m3fn), "scale": scale}


def pack(codes: Tensor, bits: int, axis: str) -> Tensor:
    """:func:`argus.backends.triton.layout.pack` as a kernel where the page is one block."""
    *head, page, dim = codes.shape
    if not (layout.in_fragments(page, dim) and _whole(page, dim)):
        return layout.pack(codes, bits, axis)
    codes = codes.contiguous()
    out = torch.empty(*head, page * dim * bits // 8, dtype=torch.uint8, device=codes.device)
    if codes.numel():
        _pack_kernel[(codes.numel() // (page * dim),)](
            codes, out.view(torch.int32), axis == "token", bits, page, dim, num_warps=tuning.codec_warps(page * dim)
        )
    return out


def shape_of(payload: Payload, form: Affine) -> tuple[int, int]:
    """Tokens of a page and head_dim."""
    numbers = payload["codes"].shape[3:].numel() * 8 // form.bits
    if form.axis == "channel":
        dim = payload["scale"].shape[-1]
        return numbers // dim, dim
    page = payload["scale"].shape[-2]
    return page, numbers // page


def dequantize(payload: Payload, form: Affine) -> Tensor:
    """See :meth:`argus.backends.base.Backend.dequantize`; for pages in fragment order that are one block."""
    page, dim = shape_of(payload, form)
    codes = payload["codes"].contiguous()
    group = form.group or (page if form.axis == "channel" else dim)
    out = torch.empty(*codes.shape[:3], page, dim, dtype=torch.float32, device=codes.device)
    if out.numel():
        _unpack_kernel[(out.numel() // (page * dim),)](
            codes.view(torch.int32), payload["scale"].contiguous(), payload.get("zero", payload["scale"]).contiguous(), out,
            form.axis == "token", form.bits, page, dim, group, form.symmetric, num_warps=tuning.codec_warps(page * dim),
        )  # fmt: skip
    return out


def one_block(page: int, dim: int) -> bool:
    """Whether :func:`dequantize` reads pages of this shape."""
    return layout.in_fragments(page, dim) and _whole(page, dim)
