"""The ledger is all that lives: no tensor outlives a call, and none that is held goes uncounted."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from argus import plugins
from argus.attention import Query
from argus.build import build
from argus.config import load_cache_config
from argus.engine import LayerCache
from argus.ledger import measure
from argus.plan import Plan
from argus.turns import age
from tests.conftest import tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, HEADS = 72, 2
"""A head_dim of the general kernels, which need nothing that the interpreter lacks."""
BACKENDS = sorted(plugins.kinds(plugins.load(), "argus_backends"))


def storages() -> dict[int, int]:
    """Bytes of every storage that a living tensor has."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) is Tensor]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found if x.device.type == DEVICE}


def plan(*overrides: str) -> Plan:
    return build(load_cache_config(overrides), DIM, torch.float16, DEVICE)


def everything(layers: list[LayerCache]) -> Iterator[tuple[str, Tensor]]:
    """What a cache of these layers counts."""
    made = layers[0].plan
    for layer in layers:
        yield from layer.tensors()
    for stage in made.stages:
        for tier in (stage.keys, stage.values):
            for tensor in tier.shared().values():
                yield "shared", tensor
    for tensor in made.backend.tensors():
        yield "index", tensor


def step(layer: LayerCache, seed: int, steps: int, asked: bool = True) -> None:
    """Write a chunk, ask it, and let pages age."""
    layer.write(*(x.half().to(DEVICE) for x in tokens(seed, steps, heads=HEADS, dim=DIM)))
    if asked:
        q = torch.ones(1, 2 * HEADS, steps, DIM, device=DEVICE).half()
        layer.attend(Query.of(q, HEADS, DIM**-0.5, layer.length - steps))
    age([layer])


@pytest.mark.parametrize("ladder", ["exact", "default"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lives_is_what_the_ledger_counts(backend: str, ladder: str) -> None:
    before = set(storages())
    layers = [LayerCache(plan(f"tiers={ladder}", f"backend={backend}", "tiers.block_pages=4"))]
    layers.append(LayerCache(layers[0].plan))
    for layer in layers:
        step(layer, 1, 420, asked=False)
        step(layer, 2, 64, asked=False)
        step(layer, 3, 12)
        step(layer, 4, 1)
    living = {place: size for place, size in storages().items() if place not in before}
    counted = measure(everything(layers), layers[0].values)
    assert sum(living.values()) == counted.bytes
    assert counted.parts["index"] > 0
    assert (layers[0].plan.backend.workspace > 0) == (backend == "triton")
    layers.clear()
    del layer
    assert not {place for place, size in storages().items() if place not in before and size}
