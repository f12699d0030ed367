"""The engine under random writes, ageing, crops and selections, against plain dense tensors."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from argus.blocks import EXACT
from argus.engine import LayerCache
from argus.ledger import measure
from argus.moves import Context
from argus.plan import Plan
from argus.tiers.base import ROLES
from argus.turns import age
from tests.conftest import (
    GROUPS,
    HEADS,
    SEVEN,
    ask,
    config,
    contents,
    dense_attention,
    make_plan,
    queries,
    reachable,
    tokens,
    unique_bytes,
)

SPREAD = 1.5
"""How far a page of 8 x 8 numbers may lie above its tier's declared error, which speaks of the mean over many numbers."""
HALF = 2.0**-9
"""What is always allowed, relative to the numbers themselves: scales, zeros and means live in FP16."""
LONGEST = 160
"""Tokens at most."""

RUN = settings(
    max_examples=50,
    stateful_step_count=24,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

SMALL = {"fp16": 8, "fp8": 16, "int8": 8, "int4": 16, "int2": 16, "sign": 16}
LOSSY = {
    "seven stages": make_plan(config(tuple(SEVEN), SMALL, dtype="float16")),
    "sinks and novelty": make_plan(
        config(tuple(SEVEN), SMALL, anchors={"sinks": {"tokens": 3}, "novelty": {"share": 0.1}}, dtype="float16")
    ),
    "sigma": make_plan(
        config(tuple(SEVEN), SMALL, outliers={"policy": "sigma", "threshold": 2.0}, anchors={"sinks": {}}, dtype="float16")
    ),
    "topk, lines, log": make_plan(
        config(
            ("int8", "int4", "int2", "sign"),
            aging={"policy": "log", "first": 1, "ratio": 1.5},
            outliers={"policy": "topk", "share": 0.05},
            anchors={"lines": {"tokens": 2}},
            dtype="float16",
            block_pages=3,
        )
    ),
    "two pages at once": make_plan(
        config(("int8", "int4"), {"int8": 16}, slack=8, anchors={"lines": {"tokens": 2}}, dtype="float16", block_pages=3)
    ),
    "uniform, blocks of one page": make_plan(
        config(("int4", "int2"), aging="uniform", anchors={"novelty": {"share": 0.2, "scope": "page"}}, block_pages=1)
    ),
}
EXACT_PLANS = {
    "one stage": make_plan(config(("fp16",), block_pages=3)),
    "window below a page": make_plan(config(("fp16",), window=3, page_size=5, block_pages=1)),
    "three pages at once": make_plan(config(("fp16",), slack=16, block_pages=2)),
    "two stages": make_plan(
        config(("fp16", "jl"), {"fp16": 16}, options={"jl": {"ratio": 1}}, anchors={"sinks": {"tokens": 5}})
    ),
}


class EngineMachine(RuleBasedStateMachine):
    """A layer and, beside it, what it was given: `truth`, keys and values ``[B, H, T, D]`` of the tokens held."""

    plans: dict[str, Plan]

    def start(self, name: str, batch: int, seed: int) -> None:
        self.plan = self.plans[name]
        self.layer = LayerCache(self.plan)
        self.seed, self.batch = seed, batch
        self.ids = torch.zeros(batch, 0, dtype=torch.int64)
        self.truth = tokens(0, 0, batch)
        self.padding = torch.arange(batch) % 3

    @property
    def length(self) -> int:
        return self.truth[0].shape[2]

    def fresh(self) -> int:
        self.seed += 1
        return self.seed

    @rule(chunk=st.sampled_from([1, 2, 3, 7, 8, 16, 29, 64, 96]), ageing=st.booleans())
    def write(self, chunk: int, ageing: bool) -> None:
        if self.length + chunk > LONGEST:
            return
        new = tokens(self.fresh(), chunk, self.batch)
        ids = torch.randint(0, 12, (self.batch, chunk), generator=torch.Generator().manual_seed(self.seed))
        self.truth = tuple(torch.cat(pair, 2) for pair in zip(self.truth, new, strict=True))
        self.ids = torch.cat([self.ids, ids], 1)
        self.layer.write(*new)
        if ageing:
            self.age()

    @rule(steps=st.integers(2, 20))
    def write_one_by_one(self, steps: int) -> None:
        for _ in range(steps):
            self.write(1, True)

    @precondition(lambda self: self.length)
    @rule()
    def age(self) -> None:
        where = list(self.layer.where)
        leaves = len(self.layer.window) >= self.plan.most
        before = self.readings() if leaves else []
        age([self.layer], [Context(self.ids, self.padding)])
        assert (len(self.layer.where) > len(where)) == leaves
        if leaves:
            self.check_moves(before)

    @precondition(lambda self: self.length)
    @rule(share=st.floats(0, 1), depth=st.sampled_from(["anywhere", "in the window", "page end", "nothing"]))
    def crop(self, share: float, depth: str) -> None:
        size, held = self.plan.page_size, len(self.layer.where) * self.plan.page_size
        length = int(share * self.length)
        if depth == "in the window":
            length = held + int(share * (self.length - held))
        elif depth == "page end":
            length = length // size * size
        elif depth == "nothing":
            length = self.length
        whole = length // size
        truth = [x[:, :, :length].clone() for x in self.truth]
        if whole < len(self.layer.where) and length % size:
            # A page that is cut comes back to the window as it reads, in the window's dtype.
            for x, read in zip(truth, self.layer.read([whole]), strict=True):
                x[:, :, whole * size :] = read[:, :, : length % size].to(self.plan.dtype).float()
        self.layer.crop(length)
        self.truth, self.ids = (truth[0], truth[1]), self.ids[:, :length]

    @precondition(lambda self: self.length)
    @rule(data=st.data(), count=st.integers(1, 4))
    def select(self, data: st.DataObject, count: int) -> None:
        rows = torch.tensor(data.draw(st.lists(st.integers(0, self.batch - 1), min_size=count, max_size=count)))
        self.layer.select(rows)
        self.truth = (self.truth[0][rows], self.truth[1][rows])
        self.ids, self.padding, self.batch = self.ids[rows], self.padding[rows], count

    @precondition(lambda self: self.length)
    @rule(steps=st.integers(1, 9))
    def attend(self, steps: int) -> None:
        q = queries(self.fresh(), min(steps, len(self.layer.window) or 1), self.batch, HEADS * GROUPS)
        wanted = dense_attention(q, *self.expected(), 0.3)
        torch.testing.assert_close(ask(self.layer, q).double(), wanted, rtol=1e-5, atol=1e-5)

    @invariant()
    def holds_what_it_was_given(self) -> None:
        layer = self.layer
        assert layer.length == self.length
        if not self.length:
            return
        assert layer.shape == (self.batch, HEADS, self.truth[0].shape[3])
        assert layer.window.start == len(layer.where) * self.plan.page_size
        for i in (0, 1):
            window = torch.cat([part[i].float() for part in layer.window.parts()] or [self.truth[i][:, :, :0]], 2)
            assert torch.equal(window, self.truth[i][:, :, layer.window.start :])

    @invariant()
    def pools_hold_the_pages(self) -> None:
        layer, blocks = self.layer, self.plan.block_pages
        for stage, pool in enumerate(layer.pools):
            assert sorted(pool.pages) == [page for page, place in enumerate(layer.where) if place == stage]
            assert len(pool.slabs) == -(-len(pool.pages) // blocks)
            for slab in pool.slabs:
                assert all(tensor.shape[0] <= blocks and tensor.shape[1] == self.batch for tensor in slab.values())

    @invariant()
    def counts_every_byte(self) -> None:
        held = measure(self.layer.tensors(), self.layer.values)
        tiers = [stage.tier(role) for stage in self.plan.stages for role in ROLES]
        assert held.bytes == unique_bytes(list(reachable(self.layer, skip=[self.plan, *tiers])))
        assert self.layer.values == 2 * self.truth[0].numel()

    def readings(self) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        """The stage of each page and what it reads."""
        return [(stage, self.layer.read([page])) for page, stage in enumerate(self.layer.where)]

    def expected(self) -> tuple[Tensor, Tensor]:
        """What attention has to see."""
        return contents(self.layer)

    def check_moves(self, before: list[tuple[int, tuple[Tensor, Tensor]]]) -> None:
        layer, size = self.layer, self.plan.page_size
        assert len(layer.window) < self.plan.window + size
        for page, stage in enumerate(layer.where):
            read = layer.read([page])
            span = slice(page * size, (page + 1) * size)
            if page < len(before):
                source_stage, source = before[page]
                assert stage >= source_stage
            else:
                source_stage, source = None, tuple(x[:, :, span] for x in self.truth)
            for i, role in enumerate(ROLES):
                if source_stage == stage:
                    assert torch.equal(read[i], source[i])
                    continue
                coded = self.coded(page, role)
                # What is kept exact is what was written, to the bit.
                assert torch.equal(read[i][~coded], self.truth[i][:, :, span][~coded])
                self.check_error(read[i], source[i], coded, self.plan.stages[stage].tier(role).error)

    def coded(self, page: int, role: str) -> Tensor:
        """``[B, H, P, D]``: the numbers of a page that its tier codes; the others are kept exact."""
        size = self.plan.page_size
        coded = torch.ones_like(self.truth[0][:, :, :size], dtype=torch.bool)
        positions = self.layer.exact.positions
        if positions is not None:
            for row, head, place in (positions // size == page).nonzero().tolist():
                coded[row, head, int(positions[row, head, place]) % size] = False
        numbers = self.layer.outliers[role].rows
        if numbers is not None:
            counts = numbers.counts.flatten().tolist()
            rows = self.batch * HEADS
            for row in range(rows):
                begin = sum(counts[: page * rows + row])
                coded.view(rows, -1)[row, numbers.places[begin : begin + counts[page * rows + row]].long()] = False
        return coded

    def check_error(self, read: Tensor, source: Tensor, coded: Tensor, error: float) -> None:
        """``|read - source|`` over ``|source - mean|`` of the numbers coded, a page of one row and head at a time.

        The mean is that of the whole page, a channel: of a page whose tokens are all but one kept exact, one is coded.
        """
        mean = source.mean(-2, keepdim=True)
        off, spread, size = (
            x.masked_fill(~coded, 0.0).flatten(-2).norm(dim=-1) for x in (read - source, source - mean, source)
        )
        assert bool((off <= SPREAD * error * spread + HALF * size).all()), (off / spread, error)


class ExactMachine(EngineMachine):
    """With every stage exact nothing ever changes, and attention is dense attention."""

    plans = EXACT_PLANS

    @initialize(name=st.sampled_from(sorted(EXACT_PLANS)), batch=st.integers(1, 3), seed=st.integers(0, 10**6))
    def begin(self, name: str, batch: int, seed: int) -> None:
        self.start(name, batch, seed * 1000)

    def expected(self) -> tuple[Tensor, Tensor]:
        return self.truth

    @precondition(lambda self: len(self.layer.where))
    @invariant()
    def reads_to_the_bit(self) -> None:
        if any(stage for stage in self.layer.where):
            return  # A projection of all rows is exact only up to rounding.
        for read, wanted in zip(self.layer.read(range(len(self.layer.where))), self.truth, strict=True):
            assert torch.equal(read, wanted[:, :, : read.shape[2]])


class LossyMachine(EngineMachine):
    """Each page stays within its tier's error of its own source; what is exact stays so; stages keep to their capacity."""

    plans = LOSSY

    @initialize(name=st.sampled_from(sorted(LOSSY)), batch=st.integers(1, 3), seed=st.integers(0, 10**6))
    def begin(self, name: str, batch: int, seed: int) -> None:
        self.start(name, batch, seed * 1000)

    @invariant()
    def stages_keep_to_their_capacity(self) -> None:
        counts = Counter(self.layer.where)
        if type(self.plan.aging).__name__ == "Fifo":
            for place, stage in enumerate(self.plan.stages[:-1]):
                assert stage.facts.capacity is None or counts[place] <= stage.facts.capacity
        assert sorted(self.layer.where, reverse=True) == self.layer.where

    @invariant()
    def exact_tokens_are_what_was_written(self) -> None:
        """Sinks and anchors, by position, to the bit; and every page's marks name the same tokens."""
        exact, size = self.layer.exact, self.plan.page_size
        marked = Counter()
        for pool in self.layer.pools:
            for slab, pages in pool.blocks():
                if EXACT in slab:
                    for place, row, head, step in slab[EXACT].nonzero().tolist():
                        marked[row, head, pages[place] * size + step] += 1
        held = Counter()
        if exact.positions is not None:
            for row, head, place in (exact.positions >= 0).nonzero().tolist():
                position = int(exact.positions[row, head, place])
                held[row, head, position] += 1
                for kept, wanted in zip((exact.keys, exact.values), self.truth, strict=True):
                    assert torch.equal(kept[row, head, place].float(), wanted[row, head, position])
        assert held == marked
        assert all(count == 1 for count in held.values())


ExactMachine.TestCase.settings = RUN
LossyMachine.TestCase.settings = RUN
TestExact = ExactMachine.TestCase
TestLossy = LossyMachine.TestCase
