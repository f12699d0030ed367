"""The CPU backend: plain torch, and the oracle of every kernel. It runs on any device that torch runs on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from argus.attention import DENSE_BUDGET, DensePart, Part, Query, SinkPart, answer_bounded, limit
from argus.backends.base import (
    PLANES,
    Affine,
    Backend,
    Dense,
    Float8,
    Payload,
    Role,
    Segment,
    grouped,
    round_up,
    visible_pages,
)
from argus.hookspecs import hookimpl

FP8_MAX = 448.0


def round_down(x: Tensor) -> Tensor:
    """The largest float16 not above `x` (float32, within FP16's range)."""
    return -round_up(-x)


def over(x: Tensor, number: float) -> Tensor:
    """`x` divided by a number, rounded as everywhere: on a GPU torch would multiply by the number's rounded inverse."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis.

    Parameters
    ----------
    codes : Tensor
        ``[..., D]`` uint8 below ``2 ** bits``; ``D`` a multiple of 8 over the narrowest plane's bits.
    bits : int
        1 to 8.

    Returns
    -------
    Tensor
        uint8 ``[..., D * bits / 8]``. Each plane of ``b`` bits takes ``C = D * b / 8`` bytes; field ``j`` of byte ``c``
        holds element ``j * C + c``, so that a mask and a shift of whole bytes yield neighbours.
    """
    parts = []
    for plane in PLANES[bits]:
        fields = 8 // plane
        low = codes & ((1 << plane) - 1)
        codes = codes >> plane if plane < 8 else codes
        low = low.unflatten(-1, (fields, -1))
        byte = low[..., 0, :].clone()
        for j in range(1, fields):
            byte |= low[..., j, :] << (j * plane)
        parts.append(byte)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes ``[..., D]`` uint8 from what :func:`pack` returned; may be `packed` itself."""
    length = packed.shape[-1] * 8 // bits
    codes: Tensor | None = None
    start = shift = 0
    for plane in PLANES[bits]:
        fields = 8 // plane
        width = length // fields
        byte = packed[..., start : start + width]
        start += width
        part = byte if fields == 1 else _fields(byte, plane, fields)
        codes = part if codes is None else codes | (part << shift)
        shift += plane
    return codes if codes is not None else packed


def _fields(byte: Tensor, plane: int, fields: int) -> Tensor:
    mask = (1 << plane) - 1
    if fields == 8:
        shifts = torch.arange(8, dtype=torch.uint8, device=byte.device).unsqueeze(-1)
        return ((byte.unsqueeze(-2) >> shifts) & mask).flatten(-2)
    middle = [(byte >> (j * plane)) & mask for j in range(1, fields - 1)]
    return torch.stack([byte & mask, *middle, byte >> (8 - plane)], -2).flatten(-2)


class CpuBackend(Backend):
    """Vectorized torch, right before it is fast."""

    name = "cpu"

    def quantize(self, x: Tensor, form: Affine) -> Payload:
        parts, dim = grouped(x, form.axis, form.group)
        top = (1 << form.bits) - 1
        if form.symmetric:
            half = top >> 1
            scale = round_up(over(parts.abs().amax(dim), half))
            step = scale.float().masked_fill(scale == 0, 1.0).unsqueeze(dim)
            codes = (parts / step).round_().clamp_(-half, half).to(torch.int8)
            return {"codes": codes.view(x.shape), "scale": scale}
        if form.centred:
            centre = parts.mean(dim, dtype=torch.float64).float()
            apart = (parts - centre.unsqueeze(dim)).abs_().mean(dim, dtype=torch.float64).float()
            codes = (parts >= centre.unsqueeze(dim)).to(torch.uint8).view(x.shape)
            return self.affine(codes, (2 * apart).to(torch.float16), (centre - apart).to(torch.float16), form)
        low, high = torch.aminmax(parts, dim=dim)
        zero = round_down(low)
        scale = round_up(over(high - zero.float(), top))
        step = scale.float().masked_fill(scale == 0, 1.0).unsqueeze(dim)
        codes = ((parts - zero.float().unsqueeze(dim)) / step).round_().clamp_(0, top).to(torch.uint8)
        return self.affine(codes.view(x.shape), scale, zero, form)

    def affine(self, codes: Tensor, scale: Tensor, zero: Tensor, form: Affine) -> Payload:
        return {"codes": pack(codes, form.bits), "scale": scale, "zero": zero}

    def dequantize(self, payload: Payload, form: Affine) -> Tensor:
        scale = payload["scale"].float()
        if form.symmetric:
            x = payload["codes"].float()
        else:
            x = unpack(payload["codes"], form.bits).float()
        parts, dim = grouped(x, form.axis, form.group)
        parts.mul_(scale.unsqueeze(dim))
        if not form.symmetric:
            parts.add_(payload["zero"].float().unsqueeze(dim))
        return x

    def to_fp8(self, x: Tensor, form: Float8) -> Payload:
        parts, dim = grouped(x, form.axis, form.group)
        scale = round_up(over(parts.abs().amax(dim), FP8_MAX))
        step = scale.float().masked_fill(scale == 0, 1.0).unsqueeze(dim)
        codes = (parts / step).clamp_(-FP8_MAX, FP8_MAX).view(x.shape)
        return {"codes": codes.to(torch.float8_e4m3fn), "scale": scale}

    def from_fp8(self, payload: Payload, form: Float8) -> Tensor:
        # An e4m3 byte, its exponent and mantissa moved to FP16's places, is the number over 2^8: cheaper than a cast.
        byte = payload["codes"].view(torch.int8).to(torch.int16)
        half = ((byte & 0x7F) << 7) | (byte & -0x8000)
        x = half.view(torch.float16).float()
        parts, dim = grouped(x, form.axis, form.group)
        parts.mul_((payload["scale"].float() * 256.0).unsqueeze(dim))
        return x

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        return matrix.to(x) @ x

    def attend(self, query: Query, segments: Sequence[Segment], dense: Sequence[Dense], sinks: Tensor | None = None) -> Tensor:
        parts: list[Part] = [PagePart(group) for group in group_pages(segments)]
        held = [part.counted() for part in dense]
        parts += [DensePart(part.numbers("keys"), part.numbers("values"), part.visible) for part in held]
        if sinks is not None:
            parts.append(SinkPart(sinks))
        rows = query.rows[..., 0].numel() // query.length
        steps = max(1, DENSE_BUDGET // (rows * max([1, *(part.tokens for part in parts)])))
        if steps >= query.length:
            return answer_bounded(query, parts).out
        outs = []
        for begin in range(0, query.length, steps):
            part = query.part(begin, min(begin + steps, query.length))
            outs.append(answer_bounded(part, parts).out.unflatten(2, (query.groups, -1)))
        return torch.cat(outs, 3).flatten(2, 3)


def group_pages(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments of any stages in groups of no more pages than may be decoded together: small products cost the most."""
    groups: list[list[Segment]] = []
    room = 0
    for segment in segments:
        if len(segment.positions) > room:
            groups.append([])
            room = segment.block_pages
        groups[-1].append(segment)
        room -= len(segment.positions)
    return groups


class PagePart(Part):
    """A block of pages of one or several stages, decoded when asked and forgotten after."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.page_size = segments[0].page_size
        self.tokens = sum(len(segment.positions) for segment in segments) * self.page_size

    def scores(self, query: Query) -> Tensor:
        keys = self._decode("keys")
        scores = (query.rows @ keys.transpose(-1, -2)).permute(1, 2, 3, 0, 4).flatten(-2)
        return limit(scores, query, visible_pages(query, self.segments))

    def mix(self, weights: Tensor) -> Tensor:
        paged = weights.unflatten(-1, (-1, self.page_size)).permute(3, 0, 1, 2, 4)
        return (paged @ self._decode("values")).sum(0)

    def _decode(self, role: Role) -> Tensor:
        blocks = []
        for segment in self.segments:
            blocks.append(segment.exactly(role, segment.tier(role).decode(segment.payload(role), role)))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


@hookimpl
def argus_backends() -> dict[str, type[Backend]]:
    return {"cpu": CpuBackend}
