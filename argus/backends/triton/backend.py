"""The Triton backend."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from argus.attention import Query, answer_bounded
from argus.backends.base import Affine, Dense, Float8, Payload, Plain, Projected, Role, Segment, grouped
from argus.backends.cpu import CpuBackend, PagePart
from argus.backends.triton import layout
from argus.backends.triton.fragments import Weights
from argus.backends.triton.shelf import Tables
from argus.backends.triton.sight import Sights

if TYPE_CHECKING:
    from argus.tiers.base import Tier

LOG = logging.getLogger(__name__)
DECODE = 8
"""Query tokens up to which the fused kernels answer from codes; longer chunks decode a bounded block at a time to FP16."""
ROWS = 128
"""Rows (query heads a key-value head times query tokens) that they take."""
LOG2E = 1.4426950408889634


class TritonBackend(CpuBackend):
    """Kernels where there is one, and otherwise the CPU backend's torch operations on the GPU.

    Codes are stored as ``layout.py`` tells: ``[n, B, H, P * D * bits / 8]`` in fragment order, else
    ``[n, B, H, P, D * bits / 8]``.
    """

    name = "triton"
    at_once = 64 << 20

    def __init__(self) -> None:
        from argus.backends.triton.dispatch import Dispatch

        self.dispatch = Dispatch()
        self.tables = Tables()
        self.sights = Sights()
        self.weights = Weights()
        self._compiled: set[tuple[object, ...]] = set()

    def quantize(self, x: Tensor, form: Affine) -> Payload:
        from argus.backends.triton import codec, convert

        self._tell((form, x.shape[-2:]), f"pages to codes of {form.bits} bits")
        made = convert.convert({"codes": x}, Plain(), form) or codec.quantize(x, form)
        return super().quantize(x.float(), form) if made is None else made

    def affine(self, codes: Tensor, scale: Tensor, zero: Tensor, form: Affine) -> Payload:
        from argus.backends.triton import codec

        return {"codes": codec.pack(codes, form.bits, form.axis), "scale": scale, "zero": zero}

    def dequantize(self, payload: Payload, form: Affine) -> Tensor:
        from argus.backends.triton import codec

        page, dim = codec.shape_of(payload, form)
        if codec.one_block(page, dim):
            return codec.dequantize(payload, form)
        codes = layout.unpack(payload["codes"].view(torch.uint8), form.bits, form.axis, page, dim)
        x = (codes.view(torch.int8) if form.symmetric else codes).float()
        parts, along = grouped(x, form.axis, form.group)
        parts.mul_(payload["scale"].float().unsqueeze(along))
        if not form.symmetric:
            parts.add_(payload["zero"].float().unsqueeze(along))
        return x

    def to_fp8(self, x: Tensor, form: Float8) -> Payload:
        from argus.backends.triton import codec, convert, float8

        self._tell((form, x.shape[-2:]), "pages to E4M3 codes")
        made = convert.convert({"codes": x}, Plain(), form) or float8.to_fp8(x, form)
        return codec.to_fp8(x, form) if made is None else made

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        from argus.backends.triton import archive

        return archive.project(x, matrix)

    def encode(self, x: Tensor, form: object) -> Payload:
        if isinstance(form, Projected):
            from argus.backends.triton import archive

            self._tell((form, x.shape[-2:]), "pages to projected pages")
            made = archive.archive({"codes": x}, Plain(), form, self.weights)
            if made is not None:
                return made
        return super().encode(x, form)

    def recode(self, source: Tier, target: Tier, payload: Payload, role: Role) -> Payload:
        made = self._recoded(payload, source.form(role), target.target(role))
        return super().recode(source, target, payload, role) if made is None else made

    def _recoded(self, payload: Payload, source: object, form: object) -> Payload | None:
        """What a kernel makes of codes as they are; None: there is none."""
        from argus.backends.triton import archive, convert

        if isinstance(source, Plain) and isinstance(form, (Affine, Float8)):
            return self.encode(payload["codes"], form)
        if not isinstance(source, (Affine, Float8, Plain)) or not isinstance(form, (Affine, Float8, Projected)):
            return None
        self._tell((source, form, payload["codes"].shape[3:]), f"pages of a stage as {type(form).__name__}")
        if isinstance(form, Projected):
            return archive.archive(payload, source, form, self.weights)
        return convert.convert(payload, source, form)

    def tensors(self) -> list[Tensor]:
        return [*self.tables.tensors(), *self.weights.tensors()]

    def attend(self, query: Query, segments: Sequence[Segment], dense: Sequence[Dense], sinks: Tensor | None = None) -> Tensor:
        if any(part.keys.shape[-1] != part.values.shape[-1] for part in dense):  # Kernels know one head_dim.
            return super().attend(query, segments, dense, sinks)
        if query.length > DECODE or query.rows.shape[2] > ROWS:
            return self._attend_chunk(query, segments, dense, sinks)
        from argus.backends.triton import launch

        pages = self.tables.of(segments, recorded=any(part.count is not None for part in dense))
        jobs = launch.plan(query, [*pages.runs, *(part for part in dense if part.keys.shape[2])])
        kind = (query.rows.shape[-1], *((job.share, job.constants) for job in jobs))
        self._tell(kind, f"attention over {len(jobs)} kinds of parts")
        work = launch.Workspace.of(query, sum(job.splits for job in jobs) + len(pages.others))
        self.workspace = max(self.workspace, 4 * (work.out.numel() + work.lse.numel()))
        slot = launch.answer_all(query, jobs, work, self.dispatch)
        for place in pages.others:
            out, lse = answer_bounded(query, [PagePart([segments[place]])])
            work.out[:, slot] = out.flatten(0, 1)
            work.lse[:, slot] = lse.flatten(0, 1) * LOG2E
            slot += 1
        return launch.merge(query, work, sinks, self.dispatch)

    def recordable(self, segments: Sequence[Segment], window: Dense) -> bool:
        from argus.backends.triton import launch

        alike = window.keys.dtype == window.values.dtype and window.keys.shape[-1] == window.values.shape[-1]
        whole = window.keys.is_cuda and alike and window.scales is None
        return whole and launch.in_halves(window.keys.dtype, window.keys.shape[-1]) and not self.tables.of(segments).others

    def reserve(self, segments: Sequence[Segment]) -> None:
        self.tables.reserve(segments)

    def follow(self, old: Sequence[Segment], new: Sequence[Segment]) -> bool:
        return self.tables.follow(old, new)

    def _tell(self, kind: tuple[object, ...], what: str) -> None:
        """Log that kernels are about to be compiled, which is when they are first asked for work of this kind."""
        if kind not in self._compiled:
            self._compiled.add(kind)
            LOG.info("kernels for %s are compiled, unless Triton has kept them", what)

    def _attend_chunk(self, query: Query, segments: Sequence[Segment], dense: Sequence[Dense], sinks: Tensor | None) -> Tensor:
        # Who keeps exact tokens in float32 wants more than FP16 products.
        if any(torch.float32 in (part.keys.dtype, part.values.dtype) for part in dense):
            return super().attend(query, segments, dense, sinks)
        from argus.backends.triton import prefill

        held = [part.counted() for part in dense if part.keys.shape[2]]
        out, used = prefill.attend(query, segments, self.tables.of(segments), held, sinks, self.sights.of(query))
        self.workspace = max(self.workspace, used)
        return out
