"""Where the pages of a stage lie: what kernels need to read them in place, made once while pages stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from argus.backends.base import Affine, Payload, Projected, Segment
from argus.backends.rows import ExactRows
from argus.backends.triton.forms import booked, own
from argus.backends.triton.fragments import fragments
from argus.backends.triton.layout import in_sixteens
from argus.backends.triton.lookup import Find, Found, facts_of, find, forms_of, parts_of, same_stage
from argus.backends.triton.tuning import FEW_PAGES


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


def make_runs(groups: Sequence[Sequence[tuple[Segment, Found]]], laid: Lay) -> list[Run]:
    """The runs of several stages, whose tables go to the device in one copy."""
    if not groups:
        return []
    parts = [[segment for segment, _ in group] for group in groups]
    counts = [sum(len(found.table) for _, found in group) for group in groups]
    held = torch.cat([found.table for group in groups for _, found in group]).to(parts[0][0].positions.device).split(counts)
    places = torch.cat([segment.positions for group in parts for segment in group]).to(torch.int64).split(counts)
    aligned = [all(found.aligned for _, found in group) for group in groups]
    return [make_run(*one, laid) for one in zip(parts, held, places, aligned, strict=True)]


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
    found = [find(segment) for segment in segments]
    for place, segment in enumerate(segments):
        first = groups[-1][0] if groups else place
        if not found[place].readable:
            others.append(place)
        elif groups and same_stage(segments[first], segment) and found[first].shapes == found[place].shapes:
            groups[-1].append(place)
        else:
            groups.append([place])
    runs = make_runs([[(segments[place], found[place]) for place in group] for group in groups], laid)
    where: list[tuple[Run, int] | None] = [None] * len(segments)
    for group, run in zip(groups, runs, strict=True):
        done = 0
        for place in group:
            where[place] = (run, done)
            done += len(segments[place].positions)
    return Pages(tuple(mix(runs)), tuple(others), tuple(where))
