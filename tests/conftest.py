"""What several tests share: caches of one layer built without Hydra, random tokens, and attention computed densely."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from argus.attention import Query
from argus.build import build
from argus.config import CacheConfig, LadderConfig, PolicyChoice, StageConfig
from argus.engine import LayerCache
from argus.plan import Plan
from argus.policies.base import TextFacts
from argus.turns import age

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Read when triton is first imported, whichever test does it.
torch.set_num_threads(1)  # Tests compute on tiny tensors: waking a second thread costs more than it brings.

HEADS, DIM, GROUPS = 2, 8, 2

SEVEN: dict[str, dict[str, Any]] = {
    "fp16": {},
    "fp8": {"group_size": 4},
    "int8": {},
    "int4": {},
    "int2": {},
    "sign": {},
    "jl": {"ratio": 4, "coefficients": {"tier": "int4", "axis": "token"}},
}
"""The seven tiers with options that fit pages of 8 tokens."""


def config(
    order: Sequence[str] = ("fp16",),
    capacities: Mapping[str, int] | None = None,
    aging: str | dict[str, Any] = "fifo",
    anchors: Mapping[str, Any] | None = None,
    outliers: str | dict[str, Any] = "none",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    kept: str = "exact",
    **ladder: Any,
) -> CacheConfig:
    """A cache's config; a stage is named after its tier. Capacities are in tokens; `kept`: how anchors are."""
    chosen = SEVEN | dict(options or {})
    stages = {name: StageConfig(tier=name, capacity=(capacities or {}).get(name), **chosen.get(name, {})) for name in order}
    sizes = {"page_size": 8, "window": 8, "block_pages": 4, "dtype": "float32", "allow_growth": True, "anchors": kept} | ladder
    return CacheConfig(
        tiers=LadderConfig(order=tuple(order), stages=stages, **sizes),
        aging=PolicyChoice(**({"policy": aging} if isinstance(aging, str) else aging)),
        outliers=PolicyChoice(**({"policy": outliers} if isinstance(outliers, str) else outliers)),
        anchors=dict(anchors or {}),
    )


def make_plan(chosen: CacheConfig, extra: Sequence[Any] = (), head_dim: int = DIM) -> Plan:
    """The plan of a config; token 7 ends a line."""
    return build(chosen, head_dim, extra=extra, text=TextFacts((7,)))


def make_layer(*args: Any, extra: Sequence[Any] = (), head_dim: int = DIM, **options: Any) -> LayerCache:
    """One empty layer of :func:`config`."""
    return LayerCache(make_plan(config(*args, **options), extra, head_dim))


def tokens(seed: int, steps: int, batch: int = 1, heads: int = HEADS, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, S, D]``, float32 numbers that FP16 holds too."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, heads, steps, dim, generator=generator, dtype=torch.float32).half().float()
    return keys, values


@contextmanager
def other_defaults() -> Iterator[None]:
    """PyTorch with another default dtype, and a default device on which nothing can be computed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def queries(seed: int, steps: int, batch: int = 1, heads: int = HEADS * GROUPS, dim: int = DIM) -> Tensor:
    """Queries ``[B, Hq, S, D]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, steps, dim, generator=generator, dtype=torch.float32)


def dense_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention ``[B, Hq, S, D]`` by definition, in float64; causal without a mask; zero where nothing is visible."""
    groups = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (keys, values))
    scores = q.double() @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    steps, held = scores.shape[-2:]
    if mask is None:
        mask = torch.ones(steps, held, dtype=torch.bool).tril(held - steps)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = torch.where(mask > torch.finfo(mask.dtype).min, scores + mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., :held]
    return weights @ values


def ask(layer: LayerCache, q: Tensor, scale: float = 0.3, sinks: Tensor | None = None, **options: Any) -> Tensor:
    """A layer's answer ``[B, Hq, S, D]`` to queries whose last is of its last token."""
    query = Query.of(q, q.shape[1] // GROUPS, scale, layer.length - q.shape[2], **options)
    return layer.attend(query, sinks).reshape(q.shape)


def contents(layer: LayerCache) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, T, D]`` of all tokens held, as they read."""
    parts = [layer.read(range(len(layer.where)))] if layer.where else []
    parts += [(keys.float(), values.float()) for keys, values in layer.window.parts()]
    return torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)


def grow(layer: LayerCache, keys: Tensor, values: Tensor, chunk: int | None = None, text: Any = None) -> None:
    """Write tokens in chunks and let pages age after each."""
    steps = keys.shape[2]
    for begin in range(0, steps, chunk or steps):
        end = min(begin + (chunk or steps), steps)
        layer.write(keys[:, :, begin:end], values[:, :, begin:end])
        age([layer], [text] if text else ())


def reachable(thing: Any, skip: Sequence[Any] = ()) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object through attributes and containers, but not through `skip`."""
    seen = {id(other) for other in skip}
    waiting = [thing]
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, type):
            continue
        seen.add(id(found))
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, Mapping):
            waiting += found.values()
        elif isinstance(found, list | tuple | set | frozenset):
            waiting += found
        elif type(found).__module__.startswith(("argus", "tests")):
            waiting += vars(found).values() if hasattr(found, "__dict__") else []


def unique_bytes(found: Iterator[Tensor] | Sequence[Tensor]) -> int:
    """Bytes of the storages of tensors, each storage once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


class Allocations(TorchDispatchMode):
    """Bytes of every new storage that torch makes within the block, with the shape that brought it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, tuple[int, ...], str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.made.append((x.untyped_storage().nbytes(), tuple(x.shape), str(func)))
        return out

    @property
    def largest(self) -> tuple[int, tuple[int, ...], str]:
        """The largest of them."""
        return max(self.made)
