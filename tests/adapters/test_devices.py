"""A model whose layers lie on several GPUs: each layer's cache works where the layer is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers

from argus import ArgusCache
from argus.turns import age
from tests.conftest import ask, make_layer, queries, tokens
from tests.models import SMALL

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def test_a_layer_works_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    layer = make_layer(order=("int4",))
    layer.write(*tokens(0, 200))
    assert layer.home == -1
    layer.home = 3
    for work in (
        lambda: age([layer]),
        lambda: ask(layer, queries(1, 1)),
        lambda: layer.read([0]),
        lambda: layer.crop(150),
        lambda: layer.select(torch.tensor([0, 0])),
        layer.forget,
    ):
        entered.clear()
        work()
        assert entered
        assert set(entered) == {3}


def moved(x: Any, device: str) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(device)
    return tuple(moved(one, device) for one in x) if isinstance(x, tuple) else x


@TWO
@pytest.mark.parametrize("tiers", ["int4", "quality"])
def test_layers_on_two_devices_answer_as_on_one(tiers: str) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL | {"head_dim": 64, "hidden_size": 64})
    one = transformers.LlamaForCausalLM(config).half().eval().requires_grad_(False).to("cuda:0")
    two = copy.deepcopy(one)
    for place, part in enumerate((*two.model.layers, two.model.norm)):
        device = "cuda:1" if place == 1 else "cuda:0"
        part.to(device).register_forward_pre_hook(
            lambda _, args, kwargs, to=device: (moved(args, to), {name: moved(x, to) for name, x in kwargs.items()}),
            with_kwargs=True,
        )
    ids = torch.randint(2, 97, (2, 400), generator=torch.Generator().manual_seed(3)).to("cuda:0")
    answers = []
    for model in (one, two):
        cache = ArgusCache(model, [f"tiers={tiers}", "graphs=false"])
        with torch.no_grad():
            logits = [model(ids[:, :300], past_key_values=cache).logits[:, -1]]
            logits += [model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(300, 400)]
        answers.append(torch.stack(logits))
        homes = [layer.engine.home for layer in cache.layers]
    assert homes == [0, 1, *[0] * (len(homes) - 2)]
    assert torch.equal(*answers)
