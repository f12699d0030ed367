"""What tests of recorded steps share. Where there is no GPU, a recorded step is replayed by calling it again."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from argus import ArgusCache, turns, unpatch
from argus.adapters import graphs
from argus.backends.cpu import CpuBackend
from argus.engine import LayerCache
from tests.models import SMALL

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.float16 if CUDA else torch.float32
LADDERS = {
    "int4": ["tiers=int4", "tiers.page_size=64", "tiers.window=16"],
    "ladder": [
        "tiers=default", "tiers.page_size=16", "tiers.window=8", "tiers.order=[int8,int4,int2]",
        "tiers.stages.int8.capacity=32", "tiers.stages.int4.capacity=32",
    ],
    "recency": ["tiers=int2", "tiers.page_size=16", "tiers.window=32", "anchors=none"],
    "slack": ["tiers=int4", "tiers.page_size=16", "tiers.window=8", "tiers.slack=32"],
    "outliers": ["tiers=int2", "tiers.page_size=64", "tiers.window=16", "outliers=topk"],
    "salience": [
        "tiers=default", "tiers.page_size=16", "tiers.window=8", "tiers.order=[int8,int4]", "tiers.stages.int8.capacity=32",
        "aging=salience", "anchors=salience",
    ],
}  # fmt: skip
EXACT = ["tiers=exact", "tiers.page_size=16", "tiers.window=8", *([] if CUDA else ["tiers.dtype=float32"])]
"""Codes differ where numbers differ in their last bit; exact pages do not."""


class Again:
    """Stands for a CUDA graph: a replay calls the step again and writes its outputs over the first ones.

    What a step does beside launching kernels is not done again: no page moves, and layers note nothing.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.outputs = call, call()
        self.layers = call.args[1].layers
        self.recent = [one.recent for one in self.layers]

    @torch.inference_mode()
    def replay(self) -> None:
        noted = [one.recent for one in self.layers]
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(LayerCache, "write", lambda engine, *new: engine.window.append(*new))
            patches.setattr(turns.Turns, "add", lambda *_: None)
            made = self.call()
        for one, held, before in zip(self.layers, self.recent, noted, strict=True):
            if held is not None:
                held.copy_(one.recent)
            one.recent = before
        for name, x in made.items():
            pairs = zip(self.outputs[name], x, strict=True) if isinstance(x, tuple) else [(self.outputs[name], x)]
            for held, new in pairs:
                if isinstance(new, torch.Tensor):
                    held.copy_(new)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """How many steps were recorded, and how many were replayed."""
    told = SimpleNamespace(recorded=0, replayed=0, beside=0)
    real = graphs.capture

    def capture(call: Callable[[], Any], stream: Any, beside: Any) -> tuple[Any, Any]:
        told.recorded += 1
        told.beside += beside is not None
        again = None if CUDA else Again(call)
        graph, outputs = real(call, stream, beside) if again is None else (again, again.outputs)

        def replay() -> None:
            told.replayed += 1
            graph.replay()

        return SimpleNamespace(replay=replay, pool=None if again else graph.pool), outputs

    monkeypatch.setattr(graphs, "capture", capture)
    if not CUDA:
        monkeypatch.setattr(CpuBackend, "recordable", lambda self, segments, window: True)
        monkeypatch.setattr(CpuBackend, "follow", lambda self, old, new: True)
    return told


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | {"head_dim": 64, "hidden_size": 64}))
    made = made.to(DEVICE, DTYPE).eval().requires_grad_(False)
    for weight in made.parameters():
        weight.mul_(2.0)
    yield made
    unpatch(made)


def ids(length: int, rows: int = 2, seed: int = 5) -> torch.Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@torch.no_grad()
def feed(model: Any, cache: ArgusCache, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(tokens, past_key_values=cache, **options).logits


def both(model: Any, options: list[str], length: int = 0) -> list[ArgusCache]:
    """A cache whose steps are recorded, and one whose are not, both fed so many tokens."""
    caches = [ArgusCache(model, [*options, f"graphs={wanted}"]) for wanted in ("true", "false")]
    for cache in caches if length else ():
        feed(model, cache, ids(length))
    return caches


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert float((got - want).float().norm() / want.float().norm()) <= (1e-2 if CUDA else 1e-4)


def one_by_one(model: Any, caches: list[ArgusCache], tokens: torch.Tensor) -> None:
    """Feed tokens one at a time, the same to each cache, and compare: a window in two parts is summed in another order."""
    for i in range(tokens.shape[1]):
        got, want = (feed(model, cache, tokens[:, i : i + 1]) for cache in caches)
        close(got, want)
        assert caches[0].get_seq_length() == caches[1].get_seq_length()


def padded(length: int, *hidden: int) -> torch.Tensor:
    """A mask of two rows, the first `hidden` tokens of each."""
    mask = torch.ones(len(hidden), length, dtype=torch.long, device=DEVICE)
    for row, count in enumerate(hidden):
        mask[row, :count] = 0
    return mask
