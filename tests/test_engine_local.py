"""A layer whose queries see the newest tokens only forgets the others, and answers as one that does not."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from argus.engine import LayerCache
from argus.errors import ArgusError
from argus.ledger import measure
from argus.moves import Context
from argus.tiers.base import ROLES
from argus.turns import age
from tests.conftest import DIM, HEADS, ask, dense_attention, grow, make_layer, queries, reachable, tokens, unique_bytes
from tests.test_engine import LADDERS
from tests.test_engine_machine import LONGEST, RUN

FEW = {"policy": "topk", "share": 0.05}
SAME = {name: LADDERS[name] for name in ("exact", "seven", "one page a block", "outliers")}
SAME["slack"] = LADDERS["seven"] | {"slack": 24}
SAME["sinks"] = LADDERS["seven"] | {"anchors": {"sinks": {"tokens": 120}}, "outliers": FEW}
"""Ladders that do with a page what they do with it whatever came before."""
CHOSEN = SAME | {
    "anchors": LADDERS["anchors"],
    "all": LADDERS["seven"] | {"anchors": {"sinks": {}, "novelty": {"share": 0.1}}, "outliers": FEW},
    "eight": LADDERS["anchors"] | {"kept": "int8"},
    "salience": {"order": ("int4", "sign"), "capacities": {"int4": 16}, "aging": "salience"},
}


def pair(reach: int, **options: Any) -> tuple[LayerCache, LayerCache]:
    """A local layer, and one that keeps everything."""
    whole = make_layer(**options)
    return LayerCache(whole.plan, reach), whole


def local_mask(length: int, steps: int, reach: int) -> torch.Tensor:
    """Which keys ``[1, 1, S, L]`` the last `steps` queries see."""
    key, query = torch.arange(length), torch.arange(length - steps, length).unsqueeze(-1)
    return ((key <= query) & (key > query - reach)).view(1, 1, steps, length)


def alike(layers: tuple[LayerCache, LayerCache], reach: int, steps: int = 1) -> None:
    q = queries(steps, steps, batch=2)
    mask = local_mask(layers[0].length, steps, reach)
    torch.testing.assert_close(*(ask(layer, q, mask=mask) for layer in layers), rtol=1e-5, atol=1e-5)


def as_it_reads(layer: LayerCache, reach: int, steps: int) -> None:
    """Its answer is attention over what it reads of the pages that it has."""
    q, begin = queries(steps, steps, batch=2), layer.forgotten * layer.plan.page_size
    parts = [layer.read(range(layer.forgotten, len(layer.where)))] if layer.forgotten < len(layer.where) else []
    keys, values = (torch.cat(part, 2) for part in zip(*parts, *layer.window.parts(), strict=True))
    mask = local_mask(layer.length, steps, reach)
    wanted = dense_attention(q, keys, values, 0.3, mask[..., begin:])
    torch.testing.assert_close(ask(layer, q, mask=mask).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reach", [1, 7, 20, 64])
@pytest.mark.parametrize("name", sorted(CHOSEN))
def test_answers_are_those_of_all_tokens(name: str, reach: int) -> None:
    """A prompt of many pages, single tokens, and chunks; copies and chosen rows too."""
    layers = pair(reach, **CHOSEN[name])
    for seed, steps in enumerate((100, *[1] * 20, 30, 3, 45, *[1] * 9)):
        written = tokens(seed, steps, batch=2)
        for layer in layers:
            layer.write(*written)
        as_it_reads(layers[0], reach, steps)
        if name in SAME:
            alike(layers, reach, steps)
        newest = queries(seed, 4, batch=2).unflatten(1, (2, -1)).flatten(2, 3)
        for layer in layers:
            age([layer], [Context(queries=newest)])
        assert layers[0].length == layers[1].length
    assert layers[0].forgotten > 10
    assert layers[0].window.start == layers[1].window.start
    twins = copy.deepcopy(layers)
    for layer in twins:
        layer.select(torch.tensor([1, 0]))
    as_it_reads(twins[0], reach, 1)
    if name in SAME:
        alike(twins, reach)


@pytest.mark.parametrize("name", sorted(CHOSEN))
@pytest.mark.parametrize("chunk", [1, 24, None])
def test_memory_does_not_grow(name: str, chunk: int | None) -> None:
    layer, whole = pair(20, **CHOSEN[name])
    held = []
    for seed in range(3):
        for one in (layer, whole):
            grow(one, *tokens(seed, 240), chunk=chunk)
        held.append(measure(layer.tensors(), layer.values).bytes)
    assert held[2] <= held[0] * 1.1
    assert held[2] < measure(whole.tensors(), whole.values).bytes / 3
    size = layer.plan.page_size
    assert layer.values == 2 * HEADS * DIM * (layer.length - size * layer.forgotten)
    # All that queries see, a page that may be cropped back to, and what has not filled a page.
    assert 20 <= layer.length - size * layer.forgotten <= 20 + layer.plan.most + 2 * size


@pytest.mark.parametrize("name", sorted(SAME))
def test_a_page_of_tokens_can_be_cropped(name: str) -> None:
    layers = pair(20, **CHOSEN[name])
    for layer in layers:
        grow(layer, *tokens(1, 130))
    for drop in (3, 5):
        for layer in layers:
            layer.crop(layer.length - drop)
        for layer in layers:
            layer.write(*tokens(drop, 1))
        q, mask = queries(2, 1), local_mask(layers[0].length, 1, 20)
        torch.testing.assert_close(*(ask(layer, q, mask=mask) for layer in layers), rtol=1e-5, atol=1e-5)
    layer = layers[0]
    least = layer.forgotten * layer.plan.page_size + 20 - 1
    for length in (1, least - 1):
        with pytest.raises(ArgusError, match=f"allowed is 0 or {least} on"):
            layer.crop(length)
    layer.crop(least)
    assert layer.length == least
    layer.crop(0)
    assert (layer.length, layer.forgotten) == (0, 0)
    grow(layer, *tokens(3, 40))
    assert layer.length == 40


class LocalMachine(RuleBasedStateMachine):
    """Whatever is written, cropped and selected: a local layer answers as one that keeps everything."""

    @initialize(name=st.sampled_from(sorted(SAME)), reach=st.integers(1, 70), seed=st.integers(0, 10**6))
    def begin(self, name: str, reach: int, seed: int) -> None:
        self.layers = pair(reach, **SAME[name])
        self.reach, self.seed, self.batch = reach, seed * 1000, 2

    @property
    def least(self) -> int:
        """Tokens that are left at least after a crop."""
        local = self.layers[0]
        return local.forgotten * local.plan.page_size + self.reach - 1 if local.forgotten else 0

    def fresh(self) -> int:
        self.seed += 1
        return self.seed

    @rule(chunk=st.sampled_from([1, 2, 7, 8, 16, 29, 64, 96]), ageing=st.booleans())
    def write(self, chunk: int, ageing: bool) -> None:
        if self.layers[0].length + chunk > LONGEST:
            return
        written = tokens(self.fresh(), chunk, self.batch)
        for layer in self.layers:
            layer.write(*written)
            if ageing:
                age([layer])

    @rule(steps=st.integers(2, 40))
    def write_one_by_one(self, steps: int) -> None:
        for _ in range(steps):
            self.write(1, True)

    @precondition(lambda self: self.layers[0].length)
    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        length = self.least + round(share * (self.layers[0].length - self.least))
        for layer in self.layers:
            layer.crop(length)

    @precondition(lambda self: self.layers[0].length)
    @rule(rows=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def select(self, rows: list[int]) -> None:
        rows = [min(row, self.batch - 1) for row in rows]
        for layer in self.layers:
            layer.select(torch.tensor(rows))
        self.batch = len(rows)

    @precondition(lambda self: self.layers[0].length)
    @rule(steps=st.integers(1, 9))
    def attend(self, steps: int) -> None:
        # Of what has been forgotten tokens that come see nothing; earlier ones may have.
        local = self.layers[0]
        steps = min(steps, local.length - self.least)
        if steps < 1:
            return
        q, mask = queries(self.fresh(), steps, self.batch), local_mask(local.length, steps, self.reach)
        torch.testing.assert_close(*(ask(layer, q, mask=mask) for layer in self.layers), rtol=1e-5, atol=1e-5)

    @invariant()
    def holds_what_may_be_seen(self) -> None:
        local, whole = self.layers
        size = local.plan.page_size
        assert (local.length, local.window.start) == (whole.length, whole.window.start)
        assert local.where[local.forgotten :] == whole.where[local.forgotten :]
        for stage, pool in enumerate(local.pools):
            held = [page for page, place in enumerate(local.where) if place == stage and page >= local.forgotten]
            assert sorted(pool.pages) == held
        if local.exact.positions is not None:
            positions = local.exact.positions
            assert bool(((positions == -1) | (positions >= local.forgotten * size)).all())
        tiers = [stage.tier(role) for stage in local.plan.stages for role in ROLES]
        held = measure(local.tensors(), local.values)
        assert held.bytes == unique_bytes(list(reachable(local, skip=[local.plan, *tiers])))


LocalMachine.TestCase.settings = RUN
TestLocal = LocalMachine.TestCase


def test_a_share_of_the_pages_held_is_kept_as_others_are_forgotten() -> None:
    """Those that have a stage stay in it, however many came before them."""
    options = {"order": ("int8", "int4"), "aging": {"policy": "uniform", "share": 0.5}}
    layer = pair(160, **options)[0]
    for seed in range(600):
        grow(layer, *tokens(seed, 1))
    held = [len(pool) for pool in layer.pools]
    assert sum(held) > 15
    assert abs(held[0] - held[1]) <= 1
