"""Launchers of decode attention: which kernel answers for which part, and where its answer goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from argus.attention import Query
from argus.backends.base import Affine, Dense, Float8, Payload, Plain
from argus.backends.rows import ExactRows
from argus.backends.triton import forms, fused, layout, tuning
from argus.backends.triton.decode import _dense_kernel, _pages_kernel
from argus.backends.triton.dispatch import Dispatch, constants
from argus.backends.triton.fused import _decode_kernel, _merge_kernel
from argus.backends.triton.lookup import FIELDS
from argus.backends.triton.tables import Run, in_projection

ROWS = 4
"""Rows that a warp answers for."""
SHARES = {
    "codes": fused.CODES,
    "projected": fused.PROJECTED,
    "pages": fused.PAGES,
    "dense": fused.DENSE,
    "few": fused.FEW,
    "book": fused.BOOK,
}


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


@dataclass(frozen=True)
class Job:
    """A part, the kernel that answers for it, and how many programs a head it gets.

    Attributes
    ----------
    part : Run or Dense
    share : {"codes", "projected", "pages", "dense", "few", "book", "any"}
        Which share of the fused kernel: integer tensor cores on codes in fragment order; projected pages; pages of 16-bit
        tokens or E4M3 codes; 16-bit tokens in a row; few pages of codes of different widths; codes of a codebook. ``any``: a
        launch of its own, for anything, decoded in registers.
    units : int
        Units of work of that kernel.
    constants : tuple
        What the share is compiled for.
    cost : float
        Of a unit, in the time that 64 tokens of 2-bit codes take.
    first, splits : int
        Programs a head: the first that answers for it, and how many. Small parts may have one together.
    """

    part: Run | Dense
    share: str
    units: int
    constants: tuple[Any, ...] = ()
    cost: float = 1.0
    first: int = 0
    splits: int = 1


def plan(query: Query, parts: Sequence[Run | Dense]) -> list[Job]:
    """The jobs that answer `query` for all parts: those of the fused kernel, in order, and then the others."""
    batch, heads, rows, dim = query.rows.shape
    processors = tuning.processors(query.rows.device)
    jobs = [job_of(query, one) for part in parts for one in apart(query, part)]
    fused = [job for job in jobs if job.share != "any"]
    resident = tuning.resident([(job.share, job.constants) for job in fused], dim)
    room = max(1, processors * resident // (batch * heads * tuning.over(rows, ROWS)))
    places = tuning.divide(tuple(job.units for job in fused), tuple(job.cost for job in fused), room)
    out = [replace(job, first=first, splits=splits) for job, (first, splits) in zip(fused, places, strict=True)]
    for job in jobs:
        if job.share == "any":
            least = 128 if isinstance(job.part, Dense) else 1
            out.append(replace(job, splits=tuning.splits(job.units, batch * heads, least, processors, 4)))
    return out


def apart(query: Query, part: Run | Dense) -> tuple[Run | Dense, ...]:
    """A part as kernels take it.

    A run that joins several stages is taken apart where some page may be hidden by its position alone; codes of exact tokens
    are decoded where no kernel reads them.
    """
    if isinstance(part, Dense):
        if part.scales is None or layout.in_sixteens(query.rows.shape[-1]):
            return (part,)
        return (replace(part, keys=part.numbers("keys"), values=part.numbers("values"), scales=None),)
    return part.members if part.members and not past(query, part) else (part,)


def past(query: Query, run: Run) -> bool:
    """Whether every query row may see every position of `run`, but for what a mask hides."""
    return query.mask is not None or run.last <= query.start


def job_of(query: Query, part: Run | Dense) -> Job:
    """The job of one part, before it is told how many programs it gets."""
    dim = query.rows.shape[-1]
    mask = Mask.of(query, part.last).kind
    if isinstance(part, Dense):
        tokens, coded = part.keys.shape[2], part.scales is not None
        if coded or (part.keys.dtype == part.values.dtype and in_halves(part.keys.dtype, dim)):
            facts = (part.keys.dtype == torch.bfloat16, part.positions is not None, mask, coded, part.count is not None)
            return Job(part, "dense", tuning.over(tokens, 16), facts, tuning.DENSE)
        return Job(part, "any", tokens)
    if part.members:
        return Job(part, "few", part.pages * (part.page // 32), (part.page, mask, part.exact, *part.outlying), tuning.FEW)
    if projected(part, dim):
        factors = (form.factor(part.page) for form, _ in part.roles)
        facts = (part.page // part.key_form.ratio, mask, part.exact, *part.outlying, *factors)
        return Job(part, "projected", part.pages, facts, tuning.PROJECTED)
    key, value, page = part.key_form, part.value_form, part.page
    if in_codes(query, part):
        early = tuning.prefetch(key.bits, value.bits, dim)
        facts = (page, key.bits, key.group or page, key.symmetric, value.bits, value.symmetric, mask, part.exact, early)
        facts += part.outlying
        return Job(part, "codes", part.pages * (page // layout.BLOCK), facts, tuning.codes(key.bits, value.bits))
    tiles = tuning.half_tiles(dim, part.pages, any(part.outlying))
    if in_book(part, dim):
        tiles = tiles if page % (16 * tiles) == 0 else 1
        turns = (forms.signs(form, dim) is not None for form in (key, value))
        facts = (page, tiles, key.option, value.option, *turns, mask, part.exact)
        return Job(part, "book", part.pages * (page // (16 * tiles)), facts, tiles * tuning.BOOK)
    if in_pages(part, dim, 16 * tiles):
        coded = isinstance(key, Float8)
        scales = [(form.axis == "token", _group(form, page, dim)) if coded else (False, 1) for form in (key, value)]
        facts = (page, tiles, part.keys["codes"].dtype == torch.bfloat16, coded, *scales[0], *scales[1], mask, part.exact)
        facts += part.outlying
        cost = tiles * (tuning.EIGHT if coded else tuning.SIXTEEN)
        return Job(part, "pages", part.pages * (page // (16 * tiles)), facts, cost)
    return Job(part, "any", part.pages)


def projected(run: Run, dim: int) -> bool:
    """Whether lanes answer for projected pages."""
    alike = all(in_projection(form, kept, run.page) for form, kept in run.roles) and run.key_form.ratio == run.value_form.ratio
    return alike and (dim % 64 == 0 or not any(run.outlying))


def _group(form: Affine | Float8, page: int, dim: int) -> int:
    """Numbers that share a scale."""
    return form.group or (page if form.axis == "channel" else dim)


def in_codes(query: Query, run: Run) -> bool:
    """Whether the integer tensor cores answer for `run`."""
    key, value, dim = run.key_form, run.value_form, query.rows.shape[-1]
    return (
        isinstance(key, Affine)
        and isinstance(value, Affine)
        and layout.in_fragments(run.page, dim)
        and (key.axis, value.axis) == ("channel", "token")
        and (key.group or run.page) % layout.BLOCK == 0
        and value.group in (None, dim)
        and past(query, run)
    )


def in_halves(dtype: torch.dtype, dim: int) -> bool:
    """Whether 16-bit tensor cores take tokens of this kind as they are."""
    return dtype in (torch.float16, torch.bfloat16) and layout.in_sixteens(dim)


def in_pages(run: Run, dim: int, unit: int) -> bool:
    """Whether 16-bit tensor cores answer for `run`, taking so many tokens at once."""
    forms = (run.key_form, run.value_form)
    if run.page % unit or not layout.in_sixteens(dim) or (dim % 64 and any(run.outlying)):
        return False
    if all(isinstance(form, Float8) for form in forms):
        return all(_group(form, run.page, dim) % (8 if form.axis == "token" else unit) == 0 for form in forms)
    kinds = {payload["codes"].dtype for payload in (run.keys, run.values)}
    return all(isinstance(form, Plain) for form in forms) and len(kinds) == 1 and in_halves(kinds.pop(), dim)


def in_book(run: Run, dim: int) -> bool:
    """Whether codes of `run` are looked up in registers."""
    booked = forms.booked(run.key_form) and forms.booked(run.value_form)
    return booked and not any(run.outlying) and run.page % 16 == 0 and dim % 64 == 0


def odd(number: int) -> int:
    """A number as the fused kernel takes it: Triton compiles anew for integers in a tuple that are 1 or divide by 16."""
    return 2 * number + 3


def answer_all(query: Query, jobs: Sequence[Job], work: Workspace, dispatch: Dispatch) -> int:
    """Answer for all parts into slots from the first on, in their order, and tell the next free slot."""
    fused = [job for job in jobs if job.share != "any"]
    slot = sum(job.splits for job in fused)
    for job in jobs:
        if job.share == "any":
            (_answer_dense if isinstance(job.part, Dense) else _answer_pages)(query, job, work, slot)
            slot += job.splits
    # Last, since the merge may begin to start while it runs.
    if fused:
        _answer_fused(query, fused, work, dispatch)
    return slot


def _answer_fused(query: Query, jobs: Sequence[Job], work: Workspace, dispatch: Dispatch) -> None:
    batch, heads, rows, dim = query.rows.shape
    mask = Mask.of(query, 0)
    counts, arguments, answers = [], [], 0
    for job in jobs:
        counts.append((odd(job.first), odd(job.splits), odd(answers), *_units(job)))
        arguments.append((_source(query, job), SHARES[job.share], constants(job.constants)))
        answers += job.splits
    programs = max(job.first + job.splits for job in jobs)
    registers = tuning.registers([(job.share, job.constants) for job in jobs], dim)
    dispatch.launch(
        _decode_kernel,
        (programs, batch * heads, tuning.over(rows, ROWS)),
        (
            query.rows.contiguous(), work.out, work.lse, mask.tensor,
            0, work.out.shape[1], heads, rows, query.length, query.start, *mask.strides, mask.lowest, query.softcap or 0.0,
            tuple(counts), tuple(arguments),
        ),
        {
            "D": dim, "MASKED": query.mask is not None, "CAPPED": query.softcap is not None, "FIELDS": FIELDS,
            "EARLY": query.rows.is_cuda,
        },
        num_warps=1,
        maxnreg=registers,
    )  # fmt: skip
    slot = 0
    for job in jobs:
        if job.share == "book" and forms.signs(job.part.value_form, dim) is None:
            forms.turn_back(job.part.value_form, work.out[:, slot : slot + job.splits])
        slot += job.splits


def _units(job: Job) -> tuple[Any, ...]:
    """Units of work; of a run with room a page's, and where the number of pages is found."""
    if isinstance(job.part, Dense) or job.part.count is None:
        return (odd(job.units),)
    return (odd(job.units // job.part.pages), job.part.count)


def _source(query: Query, job: Job) -> tuple[Any, ...]:
    """Where a share finds its part."""
    part = job.part
    if isinstance(part, Run):
        found = (part.table, part.positions, *part.laid)
        if any(part.outlying):
            found += tuple(_exact(part, *one) for one in zip(part.outliers, part.roles, strict=True))
        return (*found, *_turns(query, part)) if job.share == "book" else found
    keys, values = (x if x.stride(-1) == 1 and x.stride(2) % 8 == 0 else x.contiguous() for x in (part.keys, part.values))
    placed = part.positions.contiguous() if part.positions is not None else keys
    counts = (keys.shape[2], part.start, *keys.stride()[:3], *values.stride()[:3])
    scales = (x.contiguous() for x in part.scales or ())
    return (keys, values, placed, *(odd(count) for count in counts), *scales, *(() if part.count is None else (part.count,)))


def _exact(run: Run, exact: ExactRows | None, role: tuple[Any, Payload]) -> tuple[Any, ...]:
    """Outliers of a role, and the matrix of projected pages; of a role that has none, what is not read."""
    if exact is None:
        return (odd(0), *[run.table] * 4)
    matrix, _ = forms.archive(role[0], run.page, exact.places)
    return (odd(exact.first), *exact.tensors(), run.table if matrix is None else matrix)


def _turns(query: Query, run: Run) -> tuple[Tensor, ...]:
    """Queries, and the signs with which lanes turn them and the answers; what is not read is queries too."""
    rows, dim = query.rows, query.rows.shape[-1]
    signs = [forms.signs(form, dim) for form in (run.key_form, run.value_form)]
    queries = (forms.turned(run.key_form, rows) if signs[0] is None else rows).contiguous()
    return (queries, *(queries if one is None else one(dim, rows).contiguous() for one in signs))


def _answer_pages(query: Query, job: Job, work: Workspace, slot: int) -> None:
    batch, heads, rows, dim = query.rows.shape
    run, splits = job.part, job.splits
    mask = Mask.of(query, run.last)
    tile = tuning.tile(dim, rows)
    facts: dict[str, Any] = {}
    for role, (form, payload), exact in zip(("k", "v"), run.roles, run.outliers, strict=True):
        matrix, factor = forms.archive(form, run.page, query.rows)
        kept = None if exact is None else exact.tensors()
        facts |= {f"{role}_own": forms.own(form, query.rows), f"{role}_matrix": matrix, f"{role}_factor": factor}
        facts |= {f"{role}_turn": forms.rotation(form, query.rows), f"{role}_kept": kept}
        facts |= {role.upper() + name: fact for name, fact in forms.described(form, payload, run.page, dim).items()}
        facts |= {role.upper() + "TURNED": forms.rotates(form), role.upper() + "EXACT": kept is not None}
        facts[f"{role}_first"] = 0 if exact is None else exact.first
    turned = forms.turned(run.key_form, query.rows).contiguous()
    _pages_kernel[(splits, batch * heads)](
        query.rows.contiguous(), turned, run.table, run.positions, work.out, work.lse, mask.tensor,
        run.pages if run.count is None else run.count, slot, work.out.shape[1], heads, rows, query.length, query.start,
        *mask.strides, mask.lowest, query.softcap or 0.0,
        P=run.page, D=dim, DB=tuning.power(dim), RB=max(16, tuning.power(rows)), TB=tile,
        MASK=mask.kind, EXACT=run.exact, CAPPED=query.softcap is not None, FIELDS=FIELDS, ALIGNED=run.aligned,
        COUNTED=run.count is not None, **facts,
        **tuning.options(dim, rows, True),
    )  # fmt: skip
    forms.turn_back(run.value_form, work.out[:, slot : slot + splits])


def _answer_dense(query: Query, job: Job, work: Workspace, slot: int) -> None:
    batch, heads, rows, dim = query.rows.shape
    part, splits = job.part.counted(), job.splits
    mask = Mask.of(query, part.last)
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (part.keys, part.values))
    positions = part.keys if part.positions is None else part.positions.contiguous()
    tile = tuning.tile(dim, rows)
    tokens = keys.shape[2]
    _dense_kernel[(splits, batch * heads)](
        query.rows.contiguous(), keys, values, positions, work.out, work.lse, mask.tensor,
        tokens, part.start, *keys.stride()[:3], *values.stride()[:3], heads * tokens, tokens,
        tuning.over(tuning.over(tokens, splits), tile) * tile, slot, work.out.shape[1], heads, rows, query.length, query.start,
        *mask.strides, mask.lowest, query.softcap or 0.0,
        dim, tuning.power(dim), max(16, tuning.power(rows)), tile,
        part.positions is not None, mask.kind, query.softcap is not None, keys.dtype == torch.float32,
        **tuning.options(dim, rows, False),
    )  # fmt: skip


def merge(query: Query, work: Workspace, sinks: Tensor | None, dispatch: Dispatch) -> Tensor:
    """The answer ``[B, H, R, D]`` float32 of all splits and the sinks."""
    batch, heads, rows, dim = query.rows.shape
    out = torch.empty_like(query.rows, memory_format=torch.contiguous_format)
    slots = work.out.shape[1]
    chunk, at_once, warps = tuning.merging(slots, dim)
    early = query.rows.is_cuda
    dispatch.launch(
        _merge_kernel,
        (batch * heads, rows, tuning.over(dim, chunk)),
        (work.out, work.lse, work.lse if sinks is None else sinks.contiguous(), out, slots, heads, rows, query.length),
        {"D": dim, "CB": chunk, "NB": at_once, "SINKS": sinks is not None, "EARLY": early},
        num_warps=warps,
        **({"launch_pdl": True} if early else {}),
    )
    return out
