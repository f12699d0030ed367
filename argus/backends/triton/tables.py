"""Where the pages of a stage lie: what kernels need to read them in place, made once while pages stay."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from argus.backends.base import ROLES, Affine, Loaded, Payload, Projected, Segment
from argus.backends.rows import ExactRows
from argus.backends.triton.forms import booked, known, own
from argus.backends.triton.fragments import fragments
from argus.backends.triton.layout import BLOCK, in_sixteens
from argus.backends.triton.tuning import FEW_PAGES

FIELDS = 10
"""Of a page: addresses of codes, scale and zero of keys, the same of values, exact marks, means of keys and of values; and what
:func:`facts_of` tells of its forms."""
NAMES = ("codes", "scale", "zero")
ROOM = 8
"""Pages that there is room for, at least, where a launch is recorded."""
COEFFICIENTS = "coefficients."
"""How the names of a projected page's coefficients begin."""


@dataclass(frozen=True, eq=False)
class Run:
    """Pages of one stage that one launch answers for.

    Attributes
    ----------
    key_form, value_form : Affine, Float8 or Plain
    keys, values : dict of str to Tensor
        The payload of the first pages, for its dtypes and shapes.
    table : Tensor
        ``[pages, FIELDS]`` int64, addresses and facts; there may be room for more.
    positions : Tensor
        ``[pages]`` int64, in tokens; there may be room for more.
    pages : int
        Pages held.
    page : int
        Tokens a page.
    last : int
        The largest position held, in tokens.
    exact : bool
        Whether tokens may be answered elsewhere.
    laid : tuple of Tensor
        What all pages share, of keys and of values: projections, as :func:`~argus.backends.triton.fragments.fragments` lays
        them, or codebooks, as :func:`lay_book` does.
    aligned : bool
        Whether every tensor of every page begins at a multiple of 16 bytes.
    outliers : tuple of ExactRows or None
        Exact numbers of pages, of keys and of values; None: there are none.
    members : tuple of Run
        Several stages with few pages each, in one table that tells each page's form; the forms above are those of the first.
    count : Tensor or None
        int32 ``[1]``, `pages` on the device, where a recorded launch finds how many there are by then.
    """

    key_form: object
    value_form: object
    keys: Payload
    values: Payload
    table: Tensor
    positions: Tensor
    pages: int
    page: int
    last: int
    exact: bool
    laid: tuple[Tensor, ...] = ()
    aligned: bool = False
    outliers: tuple[ExactRows | None, ExactRows | None] = (None, None)
    members: tuple[Run, ...] = ()
    count: Tensor | None = None

    @property
    def roles(self) -> tuple[tuple[Any, Payload], tuple[Any, Payload]]:
        """Form and payload of keys and of values."""
        return (self.key_form, self.keys), (self.value_form, self.values)

    @property
    def outlying(self) -> tuple[bool, bool]:
        """Whether keys, and values, have outliers."""
        return self.outliers[0] is not None, self.outliers[1] is not None


def in_projection(form: object, payload: Payload, page: int) -> bool:
    """Whether lanes read projected pages: 64 tokens in 16, 8 or 4 rows of 4-bit codes with a scale and a zero a row."""
    if not isinstance(form, Projected):
        return False
    inner, dim = form.inner, payload["mean"].shape[-1]
    known = isinstance(inner, Affine) and inner == Affine(4, "token", inner.group) and inner.group in (None, dim)
    return known and page == 64 and form.ratio in (4, 8, 16) and in_sixteens(dim)


@dataclass(frozen=True, eq=False)
class Found:
    """What is looked up once of a segment.

    Attributes
    ----------
    readable : bool
        Whether kernels read it in place.
    shapes : list
        What its pages look like in memory.
    table : Tensor
        As :func:`addresses` tells it; empty where kernels do not read it.
    aligned : bool
        Whether all that it tells are multiples of 16 bytes.
    """

    readable: bool
    shapes: list[Any]
    table: Tensor
    aligned: bool


def find(segment: Segment) -> Found:
    """Look a segment up."""
    reads = readable(segment)
    table = addresses(segment) if reads else torch.zeros(0, FIELDS, dtype=torch.int64, device="cpu")
    return Found(reads, shapes(segment), table, not bool((table[:, :-1] % 16).any()))


def readable(segment: Segment) -> bool:
    """Whether kernels read this segment in place."""
    if not segment.positions.numel() or (segment.exact is not None and not segment.exact[0].is_contiguous()):
        return False
    return all(known(segment.tier(role).form(role), parts_of(segment.payload(role))) for role in ROLES)


def same_stage(first: Segment, second: Segment) -> bool:
    """Whether the launch that answers for `first` may answer for both, if pages of both look alike."""
    return (
        first.key_tier is second.key_tier
        and first.value_tier is second.value_tier
        and first.page_size == second.page_size
        and first.outliers == second.outliers
    )


def shapes(segment: Segment) -> list[Any]:
    """What the pages of a segment look like in memory."""
    tensors = (*segment.keys.values(), *segment.values.values(), segment.exact)
    return [None if x is None else (x.dtype, x.shape[1:], x.stride()) for x in tensors]


def parts_of(payload: Payload) -> Payload:
    """Codes, scales and zeros by their plain names."""
    return {name.removeprefix(COEFFICIENTS): tensor for name, tensor in payload.items()}


def addresses(segment: Segment) -> Tensor:
    """``[pages, FIELDS]`` int64 of a segment: where each page's tensors begin, 0 where it has none, and its facts."""
    kept = [payload.get(name) for payload in (parts_of(segment.keys), parts_of(segment.values)) for name in NAMES]
    tensors = [*kept, segment.exact, segment.keys.get("mean"), segment.values.get("mean")]
    facts = facts_of(*forms_of(segment), segment.page_size)
    starts = [*(0 if tensor is None else tensor.data_ptr() for tensor in tensors), facts]
    steps = [*(0 if tensor is None else tensor.stride(0) * tensor.element_size() for tensor in tensors), 0]
    first, step = torch.tensor([starts, steps], device="cpu")
    return first + step * torch.arange(len(segment.positions), device="cpu").unsqueeze(-1)


Find = Callable[[Segment], Found]
"""Looks a segment up."""
Lay = Callable[[Any, bool, Segment], Tensor]
"""Lays what all pages of a form share for lanes, of keys (back to tokens, where they are projected) or of values (forth)."""


def lay_book(levels: Tensor) -> Tensor:
    """Words of up to eight levels in FP16, the low bytes of all and then the high bytes: ``[32, 4]`` int32, a row a lane.

    Words that all lanes read from one place would go to uniform registers, and be copied from there for every ``prmt``.
    """
    halves = torch.zeros(8, dtype=torch.float16, device=levels.device)
    halves[: len(levels)] = levels
    return halves.view(torch.uint8).view(8, 2).T.reshape(1, 16).repeat(32, 1).view(torch.int32)


def lay(form: Any, back: bool, like: Segment) -> Tensor:
    """The codebook or the projection of `form` for pages as those of `like`."""
    levels = own(form, like.positions)
    if levels is not None:
        return lay_book(levels)
    return fragments(form.matrix(like.page_size, like.positions), form.factor(like.page_size), back)


def is_laid(form: object, payload: Payload, page: int) -> bool:
    """Whether pages of a form share what is laid for lanes."""
    return in_projection(form, payload, page) or booked(form)


def forms_of(segment: Segment) -> tuple[Any, Any]:
    """The forms of keys and of values."""
    return segment.key_tier.form("keys"), segment.value_tier.form("values")


def facts_of(key_form: object, value_form: object, page: int) -> int:
    """What the kernel for codes of any width is told of a page; 0 where it does not read it.

    Bits of keys, bits of values (8 bits each), whether either is signed (a bit each), blocks of 64 tokens that share a scale.
    """
    if not (isinstance(key_form, Affine) and isinstance(value_form, Affine)):
        return 0
    widths = {key_form.bits, value_form.bits} <= {1, 2, 4, 8}
    if not widths or page % BLOCK or (key_form.group or page) % BLOCK:
        return 0
    if (key_form.axis, value_form.axis, value_form.group) != ("channel", "token", None):
        return 0
    signs = key_form.symmetric | value_form.symmetric << 1
    return key_form.bits | value_form.bits << 8 | signs << 16 | (key_form.group or page) // BLOCK << 18


def mix(runs: Sequence[Run]) -> list[Run]:
    """Put stages with few pages each into one run, for the kernel that reads codes of any width, where there are several."""
    few = [run for run in runs if run.pages <= FEW_PAGES and facts_of(run.key_form, run.value_form, run.page)]
    few = [run for run in few if run.keys["scale"].shape[-1] % 64 == 0]
    few = [run for run in few if (run.exact, run.outlying) == (few[0].exact, few[0].outlying)]
    if len(few) < 2:
        return list(runs)
    joint = replace(
        few[0],
        table=torch.cat([run.table for run in few]),
        positions=torch.cat([run.positions for run in few]),
        pages=sum(run.pages for run in few),
        last=max(run.last for run in few),
        members=tuple(few),
    )
    return [joint, *(run for run in runs if run not in joint.members)]


def roomy(run: Run) -> Run:
    """The same with room for an eighth more pages, and their number on the device."""
    rows = run.pages + max(ROOM, run.pages // 8)
    table, positions = run.table.new_zeros(rows, FIELDS), run.positions.new_zeros(rows)
    return told(replace(run, table=table, positions=positions, count=table.new_zeros(1, dtype=torch.int32)), run)


def told(run: Run, now: Run) -> Run:
    """`now`, where a launch recorded over `run`, which has room, finds it."""
    run.table[: now.pages] = now.table
    run.positions[: now.pages] = now.positions
    if run.count is not None:
        run.count.fill_(now.pages)
    return replace(now, table=run.table, positions=run.positions, count=run.count)


def takes(run: Run, now: Run) -> bool:
    """Whether a launch recorded over a run with room answers for the pages of `now` once it is told of them."""
    if now.pages > len(run.table) or any(run.outlying) or any(now.outlying):
        return False
    return compiled_for(run) == compiled_for(now) and all(one is other for one, other in zip(run.laid, now.laid, strict=True))


def compiled_for(run: Run) -> tuple[object, ...]:
    """What of a run launches are compiled for."""
    payloads = [{name: (x.dtype, x.shape[1:], x.stride()) for name, x in kept.items()} for _, kept in run.roles]
    return (run.key_form, run.value_form, payloads, run.page, run.exact, run.aligned, len(run.laid), bool(run.members))


def make_run(segments: Sequence[Segment], table: Tensor, positions: Tensor, aligned: bool, laid: Lay) -> Run:
    """The run of segments of one stage."""
    first = segments[0]
    key_form, value_form = forms_of(first)
    shared = ((key_form, first.keys, True), (value_form, first.values, False))
    return Run(
        key_form=key_form,
        value_form=value_form,
        keys=parts_of(first.keys),
        values=parts_of(first.values),
        table=table,
        positions=positions,
        pages=len(table),
        page=first.page_size,
        last=max(segment.last for segment in segments),
        exact=first.exact is not None,
        laid=tuple(laid(form, back, first) for form, kept, back in shared if is_laid(form, kept, first.page_size)),
        aligned=aligned,
        outliers=(first.outliers.get("keys"), first.outliers.get("values")),
    )


def make_runs(groups: Sequence[Sequence[Segment]], laid: Lay, find: Find) -> list[Run]:
    """The runs of several stages, whose tables go to the device in one copy."""
    if not groups:
        return []
    found = [[find(segment) for segment in group] for group in groups]
    counts = [sum(len(one.table) for one in group) for group in found]
    held = torch.cat([one.table for group in found for one in group]).to(groups[0][0].positions.device).split(counts)
    places = torch.cat([segment.positions for group in groups for segment in group]).to(torch.int64).split(counts)
    aligned = [all(one.aligned for one in group) for group in found]
    return [make_run(*one, laid) for one in zip(groups, held, places, aligned, strict=True)]


@dataclass(frozen=True)
class Pages:
    """Segments sorted by who answers for them: a kernel for a run of pages, or the decoding of a block.

    Attributes
    ----------
    runs : tuple of Run
    others : tuple of int
        Segments that no kernel reads.
    where : tuple
        Of each segment the run of its stage and the place of its first page there; None of `others`.
    """

    runs: tuple[Run, ...]
    others: tuple[int, ...]
    where: tuple[tuple[Run, int] | None, ...]


def sort(segments: Sequence[Segment], laid: Lay = lay, find: Find = find) -> Pages:
    """Gather the segments of each stage; segments that no kernel reads are told by their place."""
    groups: list[list[int]] = []
    others = []
    for place, segment in enumerate(segments):
        found, first = find(segment), groups[-1][0] if groups else place
        if not found.readable:
            others.append(place)
        elif groups and same_stage(segments[first], segment) and find(segments[first]).shapes == found.shapes:
            groups[-1].append(place)
        else:
            groups.append([place])
    runs = make_runs([[segments[place] for place in group] for group in groups], laid, find)
    where: list[tuple[Run, int] | None] = [None] * len(segments)
    for group, run in zip(groups, runs, strict=True):
        done = 0
        for place in group:
            where[place] = (run, done)
            done += len(segments[place].positions)
    return Pages(tuple(mix(runs)), tuple(others), tuple(where))


@dataclass(frozen=True, eq=False)
class Held:
    """Tables of a list of segments, as long as these are alive."""

    segments: tuple[weakref.ref[Segment], ...]
    pages: Pages

    def of(self, segments: Sequence[Segment]) -> bool:
        """Whether they are of these."""
        same = len(self.segments) == len(segments)
        return same and all(ref() is segment for ref, segment in zip(self.segments, segments, strict=True))


class Shelf:
    """Tables by the first of their segments."""

    def __init__(self) -> None:
        self._held: dict[int, Held] = {}

    def find(self, segments: Sequence[Segment]) -> Pages | None:
        """The tables of `segments`, if they were kept and no others since."""
        held = self._held.get(id(segments[0]))
        return held.pages if held is not None and held.of(segments) else None

    def keep(self, segments: Sequence[Segment], pages: Pages) -> None:
        """Keep the tables of `segments` while the first of these is alive."""
        key = id(segments[0])
        forget = weakref.ref(segments[0], lambda _: self._held.pop(key, None))
        self._held[key] = Held((forget, *(weakref.ref(segment) for segment in segments[1:])), pages)

    def runs(self) -> list[Run]:
        """Every run kept."""
        return [run for held in self._held.values() for joint in held.pages.runs for run in (joint, *joint.members)]


class Tables:
    """What :func:`sort` returned for lists of segments that are still alive."""

    def __init__(self) -> None:
        self._plain, self._roomy = Shelf(), Shelf()
        self._laid: dict[tuple[object, bool, int, torch.device], Tensor] = {}
        self._found: weakref.WeakKeyDictionary[Segment, Found] = weakref.WeakKeyDictionary()

    def of(self, segments: Sequence[Segment], recorded: bool = False) -> Pages:
        """The tables of `segments`, made anew only when they are not those of the last time.

        Parameters
        ----------
        segments : sequence of Segment
        recorded : bool
            Whether a launch may be recorded, which reads the tables that :meth:`reserve` made, if it did.
        """
        if not segments:
            return Pages((), (), ())
        found = self._roomy.find(segments) if recorded else None
        if found is None:
            found = self._plain.find(segments)
        if found is None:
            found = sort(segments, self._lay, self._find)
            self._plain.keep(segments, found)
        return found

    def reserve(self, segments: Sequence[Segment]) -> None:
        """Have tables of `segments` with room, which may be told of other pages."""
        if segments:
            pages = self.of(segments)
            self._roomy.keep(segments, replace(pages, runs=tuple(map(roomy, pages.runs))))

    def follow(self, old: Sequence[Segment], new: Sequence[Segment]) -> bool:
        """Tell the tables with room that were made for `old` of `new` instead; False: they cannot take them."""
        pages, now = self._roomy.find(old) if old and new else None, self.of(new)
        if pages is None or now.others or len(pages.runs) != len(now.runs):
            return False
        pairs = list(zip(pages.runs, now.runs, strict=True))
        if not all(takes(*pair) for pair in pairs):
            return False
        self._roomy.keep(new, replace(now, runs=tuple(told(*pair) for pair in pairs)))
        return True

    def _find(self, segment: Segment) -> Found:
        found = self._found.get(segment)
        if found is None:
            found = self._found[segment] = find(segment)
        return found

    def _lay(self, form: Projected | Loaded, back: bool, like: Segment) -> Tensor:
        key = (form, back, like.page_size, like.positions.device)
        if key not in self._laid:
            self._laid[key] = lay(form, back, like)
        return self._laid[key]

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        runs = [*self._plain.runs(), *self._roomy.runs()]
        held = [tensor for run in runs for tensor in (run.table, run.positions, run.count) if tensor is not None]
        # Of pages on a GPU these are the host's.
        found = [one.table for segment, one in self._found.items() if one.table.device == segment.positions.device]
        return [*held, *self._laid.values(), *found]
