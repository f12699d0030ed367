"""Tables that are kept as long as pages stay, and those that recorded launches read, which are told of pages that move."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from argus.backends.base import Loaded, Projected, Segment
from argus.backends.triton.lookup import FIELDS, Found, find
from argus.backends.triton.tables import Pages, Run, lay, sort

ROOM = 8
"""Pages that there is room for, at least, where a launch is recorded."""


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


@dataclass(frozen=True, eq=False)
class Kept:
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
        self._held: dict[int, Kept] = {}

    def find(self, segments: Sequence[Segment]) -> Pages | None:
        """The tables of `segments`, if they were kept and no others since."""
        held = self._held.get(id(segments[0]))
        return held.pages if held is not None and held.of(segments) else None

    def keep(self, segments: Sequence[Segment], pages: Pages) -> None:
        """Keep the tables of `segments` while all of these are alive."""
        key = id(segments[0])

        def forget(_: object) -> None:
            self._held.pop(key, None)

        # A reference that is gone, as those of tables kept before are then, tells nothing.
        self._held[key] = Kept(tuple(weakref.ref(segment, forget) for segment in segments), pages)

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
