"""What was launched over some pages answers for others once its tables were told of them, as a recorded step does."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from argus.attention import Query
from argus.backends.base import Dense, Plain, Segment
from argus.backends.triton import launch
from tests.backends.decoding import BOUND, DEVICE, FORMS, Case, Kept, KeptProjection, assembly, poison, spiked

__all__ = ["assembly", "poison"]
EVERY = ["int8", "int4", "fp8", "plain", "jl"]


class Moving(Case):
    """A case whose stages hold other pages from time to time."""

    def __init__(self, stages: list[str], counts: list[int], dim: int = 64, marked: bool = False) -> None:
        super().__init__(Plain(), Plain(), dim=dim, counts=(1,), batch=1, window=12)
        self.marked, self.dim = marked, dim
        self.kept = [
            (KeptProjection(self.backend, FORMS["int4-token"], True),) * 2
            if name == "jl"
            else (Kept(self.backend, FORMS[name]), Kept(self.backend, FORMS.get(f"{name}-token", FORMS[name])))
            for name in stages
        ]
        self.segments = self.pages(counts)
        self.dense[0] = self.counted(7)

    def pages(self, counts: list[int]) -> list[Segment]:
        """Random pages, so many of each stage, oldest stage last."""
        made, first = [], 0
        for tiers, count in zip(self.kept, counts, strict=True):
            x = (self.random(count, 1, 2, 64, self.dim) * (0.3 + 2 * self.random(self.dim).abs()) for _ in tiers)
            keys, values = (tier.encode(one) for tier, one in zip(tiers, x, strict=True))
            marks = self.random(count, 1, 2, 64) > 1.0 if self.marked else None
            positions = (torch.arange(count) + first).to(DEVICE) * 64
            first += count
            made.append(Segment(*tiers, keys, values, positions, first * 64 - 1, 64, marks))
        return made

    def counted(self, held: int) -> Dense:
        """The window, of which so many places are held, as a recorded step sees it."""
        return replace(self.dense[0], count=torch.tensor([held, self.dense[0].start], dtype=torch.int32, device=DEVICE))

    def record(self) -> list[launch.Job]:
        """Launches over what is held now."""
        self.backend.reserve(self.segments)
        # One token sees all, wherever it is.
        self.query = replace(self.query, start=1 << 20)
        return launch.plan(self.query, [*self.backend.tables.of(self.segments, recorded=True).runs, *self.dense])

    def replay(self, jobs: list[launch.Job], segments: list[Segment]) -> None:
        """Launch the same again, and compare with what these pages answer."""
        work = launch.Workspace.of(self.query, sum(job.splits for job in jobs))
        launch.answer_all(self.query, jobs, work, self.backend.dispatch)
        got = launch.merge(self.query, work, None, self.backend.dispatch).double()
        held, start = self.dense[0].count.tolist()
        window = replace(self.dense[0], keys=self.dense[0].keys[:, :, :held], values=self.dense[0].values[:, :, :held])
        window = replace(window, start=start, last=start + held - 1, count=None)
        self.segments, counted, self.dense = segments, self.dense, [window, *self.dense[1:]]
        want = self.expected(Query(self.query.rows, self.query.start, 1, self.query.mask))
        self.dense = counted
        assert torch.isfinite(got).all()
        assert float((got - want).norm() / want.norm()) <= BOUND


@pytest.mark.parametrize(
    ("stages", "old", "new", "dim", "marked"),
    [
        (EVERY, [2, 9, 2, 2, 2], [2, 10, 2, 1, 4], 64, False),
        (["int4", "jl", "fp8"], [3, 2, 2], [2, 4, 2], 128, True),
        (["int4", "plain"], [2, 2], [2, 3], 96, False),
        (["int4", "fp8"], [2, 2], [3, 2], 72, True),
        (["int8", "int4", "int2"], [2, 3, 1], [2, 3, 3], 64, True),
        (["int2"], [1], [9], 64, False),
    ],
)
def test_pages_that_moved(stages: list[str], old: list[int], new: list[int], dim: int, marked: bool) -> None:
    case = Moving(stages, old, dim, marked)
    jobs = case.record()
    case.replay(jobs, case.segments)
    told = [(run.table.data_ptr(), run.positions.data_ptr()) for job in jobs if isinstance(run := job.part, launch.Run)]
    for counts, held in ((new, 12), (old, 3)):
        before, segments = case.segments, case.pages(counts)
        assert case.backend.follow(before, segments)
        case.dense[0].count[0] = held
        case.replay(jobs, segments)
    runs = case.backend.tables.of(case.segments, recorded=True).runs
    assert sorted((run.table.data_ptr(), run.positions.data_ptr()) for run in runs) == sorted(told)
    assert sum(run.pages for run in runs) == sum(old)


@pytest.mark.parametrize(("stages", "dim"), [(["int4", "fp8"], 64), (["jl", "plain"], 128), (["int8", "int4", "int2"], 80)])
def test_masks_and_a_window_that_moved(stages: list[str], dim: int) -> None:
    """A mask is read where pages and the window's first token are by now, and as it is by now."""
    old, new = [2] * len(stages), [3] * (len(stages) - 1) + [2]
    case = Moving(stages, old, dim)
    mask = torch.ones(1, 1, 1, 64 * (sum(new) + 4), dtype=torch.bool, device=DEVICE)
    mask[..., :70] = False
    # Weights are about even, so that the window counts beside so many more tokens in pages.
    case.query = replace(case.query, mask=mask, rows=case.query.rows / 10)
    jobs = case.record()
    case.replay(jobs, case.segments)
    before, segments = case.segments, case.pages(new)
    assert case.backend.follow(before, segments)
    case.dense[0].count.copy_(torch.tensor([9, 64 * sum(new)]))
    mask[:] = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.4
    case.replay(jobs, segments)


def test_what_is_launched_as_usual_has_no_room() -> None:
    case = Moving(["int8", "int4"], [9, 9])
    case.record()
    assert all(run.count is None and len(run.table) == run.pages for run in case.backend.tables.of(case.segments).runs)
    assert all(len(run.table) == run.pages + 8 for run in case.backend.tables.of(case.segments, recorded=True).runs)


def test_what_cannot_be_told() -> None:
    """More pages than there is room for, other stages, other marks, outliers, and pages for which nothing was reserved."""
    case = Moving(["int8", "int4"], [9, 9])
    before = case.segments
    assert not case.backend.follow(before, case.pages([9, 10]))
    case.record()
    case.marked = True
    marked = case.pages([9, 9])
    case.marked = False
    for refused in (case.pages([9, 18]), case.pages([9, 9])[:1], marked, spiked(case.pages([9, 9])), []):
        assert not case.backend.follow(before, refused)
    assert case.backend.follow(before, case.pages([9, 17]))


def test_tables_go_with_any_of_their_pages() -> None:
    """A run holds the first pages of its stage, which the other stages' must not keep."""
    case = Moving(["int8", "int4"], [9, 9])
    case.record()
    first, last = case.segments
    gone = weakref.ref(last.keys["codes"])
    case.segments.clear()
    del last
    assert gone() is None
    assert case.backend.tables.of([first]).runs


def test_tables_go_with_their_pages() -> None:
    case = Moving(["int8", "int4"], [9, 9])
    case.record()
    before, segments = case.segments, case.pages([9, 10])
    assert case.backend.follow(before, segments)
    held = case.backend.tables.tensors()
    assert any(tensor.dtype == torch.int32 for tensor in held)
    del before, segments, held
    case.segments.clear()
    assert not case.backend.tables.tensors()
