"""Layers that take their turn together hold what they hold when each takes it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from argus import turns
from argus.backends.cpu import CpuBackend
from argus.engine import LayerCache
from argus.errors import RangeError
from argus.moves import Context
from argus.turns import Turns, age
from tests.conftest import DIM, config, contents, make_plan, tokens

SEVEN = ("fp16", "fp8", "int8", "int4", "int2", "sign", "jl")
ANCHORS = {"sinks": {"tokens": 3}, "lines": {"tokens": 2}, "novelty": {"share": 0.1}}
LADDERS: dict[str, dict[str, Any]] = {
    "moves": {"order": SEVEN, "capacities": dict.fromkeys(SEVEN[:-1], 8), "anchors": ANCHORS},
    "eight": {"order": ("int4",), "anchors": ANCHORS, "kept": "int8"},
    "cascade": {"order": SEVEN[2:5], "capacities": {"int8": 8, "int4": 16}, "encode": "cascade"},
    "slack": {"order": SEVEN[2:4], "capacities": {"int8": 16}, "slack": 16, "anchors": ANCHORS, "block_pages": 9},
    "queries": {"order": SEVEN[2:4], "capacities": {"int8": 16}, "anchors": {"salience": {"share": 0.1}}},
    "outliers": {"order": SEVEN[3:5], "capacities": {"int4": 16}, "outliers": "topk", "anchors": ANCHORS},
}


def layers_of(options: dict[str, Any], count: int = 3, reach: int | None = None) -> list[LayerCache]:
    plan = make_plan(config(**options))
    return [LayerCache(plan, reach) for _ in range(count)]


def fed(layers: list[LayerCache], steps: int, seed: int, take: Callable[[list[LayerCache], list[Context]], None]) -> None:
    """Write other tokens to each layer, one at a time, of two rows, and ask other queries of each."""
    words, padding = torch.arange(1000).remainder(9).repeat(2, 1), torch.tensor([0, 3])
    asked = [tokens(seed + 100 + place, 4, batch=2)[0] for place in range(len(layers))]
    known = [Context(words, padding, queries) for queries in asked]
    given = [tokens(seed + place, steps, batch=2) for place in range(len(layers))]
    for step in range(steps):
        for layer, pair in zip(layers, given, strict=True):
            layer.write(*(x[:, :, step : step + 1] for x in pair))
        take(layers, known)


def each(layers: list[LayerCache], known: list[Context]) -> None:
    for layer, own in zip(layers, known or [Context()] * len(layers), strict=True):
        age([layer], [own])


def alike(one: LayerCache, other: LayerCache) -> None:
    assert one.where == other.where
    assert one.forgotten == other.forgotten
    assert len(one.window) == len(other.window)
    for x, y in zip(one.exact.tensors(), other.exact.tensors(), strict=True):
        assert torch.equal(x, y)
    first = one.forgotten * one.plan.page_size
    for x, y in zip(read(one), read(other), strict=True):
        torch.testing.assert_close(x[:, :, first:], y[:, :, first:], rtol=1e-5, atol=1e-5)
    assert sum(x.nbytes for _, x in one.tensors()) == sum(x.nbytes for _, x in other.tensors())


def read(layer: LayerCache) -> tuple[Tensor, ...]:
    if not layer.forgotten:
        return contents(layer)
    return layer.read(range(layer.forgotten, len(layer.where)))


@pytest.mark.parametrize("name", LADDERS)
def test_together_as_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = LADDERS[name]
    together, alone = layers_of(options), layers_of(options)
    sizes = []
    take = turns.take
    monkeypatch.setattr(turns, "take", lambda found: (sizes.append(len(found)), take(found)))
    fed(together, 90, 1, age)
    assert set(sizes) == {3}
    sizes.clear()
    fed(alone, 90, 1, each)
    assert set(sizes) == {1}
    for one, other in zip(together, alone, strict=True):
        alike(one, other)


def test_pages_that_queries_ask_for() -> None:
    """Each layer's pages go where its own queries say, which need not be where those of others go."""
    options = {"order": SEVEN[3:5], "capacities": {"int4": 24}, "aging": "salience", "block_pages": 16}
    together, alone = layers_of(options), layers_of(options)
    fed(together, 90, 1, age)
    fed(alone, 90, 1, each)
    assert len({tuple(layer.where) for layer in together}) > 1
    for one, other in zip(together, alone, strict=True):
        alike(one, other)


def test_layers_that_are_not_alike() -> None:
    """One that is ahead, one with another batch, one that forgets."""
    options = LADDERS["moves"]
    plan = make_plan(config(**options))
    made = []
    for take in (age, each):
        layers = [LayerCache(plan), LayerCache(plan), LayerCache(plan, reach=20), LayerCache(plan)]
        fed(layers[:1], 17, 5, take)
        for layer, rows in zip(layers, (2, 2, 2, 1), strict=True):
            layer.write(*tokens(3, 50, batch=rows))
        take(layers, [])
        made.append(layers)
    assert made[0][2].forgotten
    for one, other in zip(*made, strict=True):
        alike(one, other)


def test_no_more_pages_at_once_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    options = LADDERS["moves"] | {"block_pages": 4}
    layers = layers_of(options, 5)
    sizes = []
    take = turns.take

    def count(found: list[turns.Turn]) -> None:
        sizes.append(len(found) * len(found[0].weights))
        take(found)

    monkeypatch.setattr(turns, "take", count)
    for layer in layers:
        layer.write(*tokens(3, 30))
    age(layers)
    assert sizes
    assert max(sizes) <= 4
    assert all(len(layer.where) == len(layers[0].where) > 0 for layer in layers)


def kept(layer: LayerCache) -> list[list[int]]:
    """Positions of exact tokens, in order, of each row and head."""
    held = layer.exact.positions
    return [] if held is None else [sorted(p for p in head if p >= 0) for head in held.flatten(0, 1).tolist()]


@pytest.mark.parametrize("name", LADDERS)
def test_many_blocks_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies see what they see where one block is handled after another; three whole ones and a rest, all of them known."""
    options = LADDERS[name] | {"block_pages": 3}
    together, alone = layers_of(options, 2), layers_of(options, 2)
    words, padding = torch.randint(9, (2, 95), generator=torch.Generator().manual_seed(1)), torch.tensor([0, 30])
    sizes = []
    bear = turns.bear
    monkeypatch.setattr(turns, "bear", lambda plan, keys, *rest: (sizes.append(keys.shape[:2]), bear(plan, keys, *rest))[1])
    for layers, at_once in ((together, 1 << 20), (alone, 0)):
        monkeypatch.setattr(CpuBackend, "at_once", at_once)
        known = []
        for place, layer in enumerate(layers):
            layer.write(*tokens(place, 95, batch=2))
            known.append(Context(words, padding, tokens(place + 10, 4, batch=2)[0]))
        age(layers, known)
    assert sizes[0] == (10, 4)
    assert sizes[1:] == [(3, 2), (3, 2), (3, 2), (1, 2)] * 2
    for one, other in zip(together, alone, strict=True):
        assert one.where == other.where
        assert kept(one) == kept(other)
        for x, y in zip(read(one), read(other), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_turns_wait_for_those_of_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until they have as many pages as are handled at once, or what was begun ends; and for nothing where nothing was."""
    layers, waiting, sizes = layers_of({"order": ("int4",), "block_pages": 4}, 5), Turns(), []
    monkeypatch.setattr(turns, "age", lambda found, known: (sizes.append(len(found)), age(found, known)))
    for layer in layers:
        layer.write(*tokens(3, 24))
    with waiting.together():
        for layer in (layers[0], *layers[:3]):
            waiting.add(layer, Context())
        with waiting.together():
            waiting.add(layers[3], Context())
        assert sizes == [2, 2]
        waiting.add(layers[4], Context())
        assert len(layers[4].window) == 24
    assert sizes == [2, 2, 1]
    layers[0].write(*tokens(3, 24))
    waiting.add(layers[0], Context())
    assert sizes == [2, 2, 1, 1]
    assert not layers[0].due


def test_turns_of_what_fails_are_not_taken() -> None:
    layers, waiting = layers_of({"order": ("int4",)}), Turns()
    for layer in layers:
        layer.write(*tokens(3, 24))

    def broken() -> None:
        with waiting.together():
            waiting.add(layers[0], Context())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    with waiting.together():
        pass
    assert [len(layer.window) for layer in layers] == [24, 24, 24]


def test_what_is_held_of_each_layer_is_its_own() -> None:
    """No layer's tensors keep the memory of the others."""
    layers = layers_of(LADDERS["moves"])
    fed(layers, 60, 2, age)
    for layer in layers:
        for what, tensor in layer.tensors():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes or what in ("window", "stage.0"), what
    places = [{tensor.untyped_storage().data_ptr() for _, tensor in layer.tensors()} for layer in layers]
    assert not places[0] & places[1]
    assert not places[1] & places[2]


def test_numbers_that_no_tier_keeps_stop_all_of_them() -> None:
    layers = layers_of(LADDERS["moves"])
    for layer in layers:
        layer.write(*tokens(3, 30))
    layers[1].write(torch.full((1, layers[1].shape[1], 1, DIM), 1e6), torch.ones(1, layers[1].shape[1], 1, DIM))
    for layer in (layers[0], layers[2]):
        layer.write(*tokens(4, 1))
    for layer in layers:
        layer.write(*tokens(5, 40))
    with pytest.raises(RangeError, match="1e\\+06"):
        age(layers)
    assert all(layer.length == 71 for layer in layers)
