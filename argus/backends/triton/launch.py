"""Launchers of decode attention: which kernel answers for which part, and where its answer goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from argus.attention import Query
from argus.backends.base import Affine, Dense, Float8, Plain
from argus.backends.triton import layout, tuning
from argus.backends.triton.decode import _dense_kernel, _merge_kernel, _pages_kernel
from argus.backends.triton.half import _half_kernel
from argus.backends.triton.projected import _projected_kernel
from argus.backends.triton.tables import FIELDS, Run
from argus.backends.triton.warp import _warp_kernel

ROWS = 4
"""Rows that a warp answers for."""


@dataclass(frozen=True)
class Mask:
    """A query's mask as kernels take it: what kind, where, and its strides (batch, head, query token, key)."""

    kind: int
    tensor: Tensor
    strides: tuple[int, int, int, int] = (0, 0, 0, 0)
    lowest: float = 0.0

    @classmethod
    def of(cls, query: Query, last: int) -> Mask:
        """The mask of `query` over keys up to position `last`."""
        mask = query.mask
        if mask is None:
            return cls(3 if last > query.start else 0, query.rows)
        strides = [stride if size > 1 else 0 for stride, size in zip(mask.stride()[:2], mask.shape[:2], strict=True)]
        where = (strides[0], strides[1], mask.stride(2), mask.stride(3))
        if mask.dtype == torch.bool:
            return cls(1, mask.view(torch.uint8), where)
        return cls(2, mask, where, torch.finfo(mask.dtype).min)


@dataclass(frozen=True)
class Workspace:
    """Answers of all splits.

    Attributes
    ----------
    out : Tensor
        ``[B * H, slots, R, D]`` float32.
    lse : Tensor
        ``[B * H, slots, R]`` float32, base 2.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def of(cls, query: Query, slots: int) -> Workspace:
        """Room for so many splits."""
        batch, heads, rows, dim = query.rows.shape
        device = query.rows.device
        return cls(
            torch.empty(batch * heads, slots, rows, dim, dtype=torch.float32, device=device),
            torch.empty(batch * heads, slots, rows, dtype=torch.float32, device=device),
        )


_ELEMENTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _described(form: object, payload: dict[str, Tensor], page: int, dim: int) -> tuple[int, int, bool, int, bool, bool]:
    """KIND, BITS, TOKENS, G, SYMMETRIC and FRAGMENTS of a form."""
    if not isinstance(form, (Affine, Float8)):
        return 0, 16, False, 1, True, False
    group = form.group or (page if form.axis == "channel" else dim)
    if isinstance(form, Float8):
        return 1, 8, form.axis == "token", group, True, False
    return 2, form.bits, form.axis == "token", group, form.symmetric, layout.in_fragments(page, dim)


@dataclass(frozen=True)
class Job:
    """One launch: a part, the kernel that answers for it, and how many programs a head it gets.

    Attributes
    ----------
    part : Run or Dense
    kernel : {"codes", "halves", "projected", "any"}
        Integer tensor cores on codes in fragment order; 16-bit tokens; projected pages; anything, decoded in registers.
    units : int
        Units of work of that kernel.
    splits : int
        Programs a head.
    """

    part: Run | Dense
    kernel: str
    units: int
    splits: int


def plan(query: Query, part: Run | Dense) -> Job:
    """The launch that answers `query` for a part."""
    batch, heads, rows, dim = query.rows.shape
    processors = tuning.processors(query.rows.device)
    tiles = batch * heads * triton.cdiv(rows, ROWS)
    if isinstance(part, Dense):
        tokens = part.keys.shape[2]
        if part.keys.dtype == part.values.dtype and in_halves(part.keys.dtype, dim):
            units = triton.cdiv(tokens, 16)
            return Job(part, "halves", units, tuning.splits(units, tiles, 1, processors, tuning.HALF_WARPS))
        return Job(part, "any", tokens, tuning.splits(tokens, batch * heads, 128, processors, 4))
    if part.matrices:
        return Job(part, "projected", part.pages, tuning.splits(part.pages, tiles, 4, processors, tuning.PROJECTED))
    if in_codes(query, part):
        units = part.pages * (part.page // layout.BLOCK)
        resident = tuning.code_warps(part.key_form.bits, part.value_form.bits, dim, units * tiles // processors)
        return Job(part, "codes", units, tuning.splits(units, tiles, 2, processors, resident))
    plain = isinstance(part.key_form, Plain) and isinstance(part.value_form, Plain)
    kinds = {payload["codes"].dtype for payload in (part.keys, part.values)}
    unit = 16 * tuning.half_tiles(dim)
    if plain and len(kinds) == 1 and in_halves(kinds.pop(), dim) and part.page % unit == 0:
        units = part.pages * (part.page // unit)
        return Job(part, "halves", units, tuning.splits(units, tiles, 2, processors, tuning.HALF_WARPS))
    return Job(part, "any", part.pages, tuning.splits(part.pages, batch * heads, 1, processors, 4))


def in_codes(query: Query, run: Run) -> bool:
    """Whether the integer tensor core kernel answers for `run`."""
    key, value, dim = run.key_form, run.value_form, query.rows.shape[-1]
    return (
        isinstance(key, Affine)
        and isinstance(value, Affine)
        and layout.in_fragments(run.page, dim)
        and (key.axis, value.axis) == ("channel", "token")
        and (key.group or run.page) % layout.BLOCK == 0
        and value.group in (None, dim)
        and (query.mask is not None or run.last <= query.start)
    )


def in_halves(dtype: torch.dtype, dim: int) -> bool:
    """Whether the 16-bit kernel reads tokens of this kind."""
    return dtype in (torch.float16, torch.bfloat16) and dim % 64 == 0


def answer_all(query: Query, jobs: Sequence[Job], work: Workspace) -> int:
    """Answer for all parts into slots from the first on, and tell the next free slot; side by side in a CUDA graph."""
    graph = query.rows.is_cuda and torch.cuda.is_current_stream_capturing()
    current = torch.cuda.current_stream() if graph else None
    sides: list[torch.cuda.Stream] = []
    slot = 0
    for place, job in enumerate(jobs):
        if current is None or place == len(jobs) - 1:
            answer(query, job, work, slot)
        else:
            side = torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                answer(query, job, work, slot)
            sides.append(side)
        slot += job.splits
    for side in sides:
        current.wait_stream(side)
    return slot


def answer(query: Query, job: Job, work: Workspace, slot: int) -> None:
    """Answer for a part into ``job.splits`` slots from `slot` on."""
    if job.kernel == "codes":
        _answer_codes(query, job, work, slot)
    elif job.kernel == "halves":
        _answer_halves(query, job, work, slot)
    elif job.kernel == "projected":
        _answer_projected(query, job, work, slot)
    elif isinstance(job.part, Dense):
        _answer_dense(query, job, work, slot)
    else:
        _answer_pages(query, job, work, slot)


def _answer_codes(query: Query, job: Job, work: Workspace, slot: int) -> None:
    batch, heads, rows, dim = query.rows.shape
    run, mask = job.part, Mask.of(query, job.part.last)
    key, value = run.key_form, run.value_form
    _warp_kernel[(job.splits, batch * heads, triton.cdiv(rows, ROWS))](
        query.rows.contiguous(), run.table, run.positions, work.out, work.lse, mask.tensor,
        job.units, triton.cdiv(job.units, job.splits), slot, work.out.shape[1], heads, rows, query.length,
        *mask.strides, mask.lowest, query.softcap or 0.0,
        run.page, dim, key.bits, key.group or run.page, key.symmetric, value.bits, value.symmetric,
        mask.kind, run.exact, query.softcap is not None, FIELDS, tuning.prefetch(key.bits, value.bits, dim),
        num_warps=1, maxnreg=tuning.code_registers(key.bits, value.bits, dim),
    )  # fmt: skip


def _answer_projected(query: Query, job: Job, work: Workspace, slot: int) -> None:
    batch, heads, rows, dim = query.rows.shape
    run, mask = job.part, Mask.of(query, job.part.last)
    _projected_kernel[(job.splits, batch * heads, triton.cdiv(rows, ROWS))](
        query.rows.contiguous(), run.table, run.positions, *run.matrices, work.out, work.lse, mask.tensor,
        run.pages, triton.cdiv(run.pages, job.splits), slot, work.out.shape[1], heads, rows, query.length, query.start,
        *mask.strides, mask.lowest, query.softcap or 0.0,
        *(float(form.ratio) if form.unbiased else 1.0 for form in (run.key_form, run.value_form)),
        dim, mask.kind, run.exact, query.softcap is not None, FIELDS, num_warps=1,
    )  # fmt: skip


def _answer_halves(query: Query, job: Job, work: Workspace, slot: int) -> None:
    batch, heads, rows, dim = query.rows.shape
    part, mask = job.part, Mask.of(query, job.part.last)
    grid = (job.splits, batch * heads, triton.cdiv(rows, ROWS))
    share = triton.cdiv(job.units, job.splits)
    common = (share, slot, work.out.shape[1], heads, rows, query.length, query.start, *mask.strides, mask.lowest)
    softcap = query.softcap or 0.0
    registers = tuning.HALF_REGISTERS if dim <= 128 else None
    if isinstance(part, Run):
        kind = part.keys["codes"].dtype
        _half_kernel[grid](
            query.rows.contiguous(), part.table, part.positions, work.out, work.out, work.out, work.lse, mask.tensor,
            0, 0, 0, 0, 0, 0, 0, 0, job.units, *common, softcap,
            part.page, dim, tuning.half_tiles(dim), kind == torch.bfloat16, False, False,
            mask.kind, part.exact, query.softcap is not None, FIELDS, num_warps=1, maxnreg=registers,
        )  # fmt: skip
        return
    keys, values = (x if x.stride(-1) == 1 and x.stride(2) % 8 == 0 else x.contiguous() for x in (part.keys, part.values))
    placed = part.positions is not None
    _half_kernel[grid](
        query.rows.contiguous(), work.lse, part.positions.contiguous() if placed else work.lse, keys, values,
        work.out, work.lse, mask.tensor, keys.shape[2], part.start, *keys.stride()[:3], *values.stride()[:3],
        job.units, *common, softcap,
        16, dim, 1, keys.dtype == torch.bfloat16, True, placed,
        mask.kind, False, query.softcap is not None, FIELDS, num_warps=1, maxnreg=registers,
    )  # fmt: skip


def _answer_pages(query: Query, job: Job, work: Workspace, slot: int) -> None:
    batch, heads, rows, dim = query.rows.shape
    run, splits = job.part, job.splits
    mask = Mask.of(query, run.last)
    wide = [payload["codes"].dtype == torch.float32 for payload in (run.keys, run.values)]
    elements = [_ELEMENTS.get(payload["codes"].dtype, tl.uint8) for payload in (run.keys, run.values)]
    tile = tuning.tile(dim, rows)
    _pages_kernel[(splits, batch * heads)](
        query.rows.contiguous(), run.table, run.positions, work.out, work.lse, mask.tensor,
        run.pages, triton.cdiv(run.pages, splits), slot, work.out.shape[1], heads, rows, query.length, query.start,
        *mask.strides, mask.lowest, query.softcap or 0.0,
        run.page, dim, triton.next_power_of_2(dim), max(16, triton.next_power_of_2(rows)), tile,
        *_described(run.key_form, run.keys, run.page, dim), *_described(run.value_form, run.values, run.page, dim),
        *elements, mask.kind, run.exact, query.softcap is not None, *wide, FIELDS, **tuning.options(dim, rows),
    )  # fmt: skip


def _answer_dense(query: Query, job: Job, work: Workspace, slot: int) -> None:
    batch, heads, rows, dim = query.rows.shape
    part, splits = job.part, job.splits
    mask = Mask.of(query, part.last)
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (part.keys, part.values))
    positions = part.keys if part.positions is None else part.positions.contiguous()
    tile = tuning.tile(dim, rows)
    tokens = keys.shape[2]
    _dense_kernel[(splits, batch * heads)](
        query.rows.contiguous(), keys, values, positions, work.out, work.lse, mask.tensor,
        tokens, part.start, *keys.stride()[:3], *values.stride()[:3], heads * tokens, tokens,
        triton.cdiv(triton.cdiv(tokens, splits), tile) * tile, slot, work.out.shape[1], heads, rows, query.length, query.start,
        *mask.strides, mask.lowest, query.softcap or 0.0,
        dim, triton.next_power_of_2(dim), max(16, triton.next_power_of_2(rows)), tile,
        part.positions is not None, mask.kind, query.softcap is not None, keys.dtype == torch.float32,
        **tuning.options(dim, rows),
    )  # fmt: skip


def merge(query: Query, work: Workspace, sinks: Tensor | None) -> Tensor:
    """The answer ``[B, H, R, D]`` float32 of all splits and the sinks."""
    batch, heads, rows, dim = query.rows.shape
    out = torch.empty_like(query.rows, memory_format=torch.contiguous_format)
    slots, chunk = work.out.shape[1], min(32, triton.next_power_of_2(dim))
    at_once = min(256, max(2, triton.next_power_of_2(slots)))
    _merge_kernel[(batch * heads, rows, triton.cdiv(dim, chunk))](
        work.out, work.lse, work.lse if sinks is None else sinks.contiguous(), out, slots, heads, rows, query.length,
        dim, chunk, at_once, sinks is not None, num_warps=max(1, min(8, at_once * chunk // 1024)),
    )  # fmt: skip
    return out
