"""Dense caches: 16 bits, the reference of every comparison, and the model's own dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from argus.ledger import Ledger, measure
from argus.tasks.base import CacheKind, Run


class HalfLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values in 16 bits, handed out in the model's dtype."""

    keys: Tensor
    values: Tensor
    dtype: torch.dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.dtype.itemsize > 2:
            self.keys, self.values = self.keys.half(), self.values.half()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = super().update(key_states.to(self.keys.dtype), value_states.to(self.values.dtype))
        return keys.to(self.dtype), values.to(self.dtype)


def dense_ledger(cache: Cache) -> Ledger:
    """Measured bytes of a cache whose layers hold dense ``keys`` and ``values``."""
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return measure((("dense", tensor) for tensor in held), sum(tensor.numel() for tensor in held))


class Half(CacheKind):
    """The usual growing cache in 16 bits: what every other is measured against."""

    def make(self, run: Run) -> Cache:
        return Cache(layer_class_to_replicate=HalfLayer)

    def ledger(self, cache: Any) -> Ledger:
        return dense_ledger(cache)


class Dynamic(CacheKind):
    """transformers' DynamicCache in the dtype in which the model computes."""

    def make(self, run: Run) -> Cache:
        return DynamicCache()

    def ledger(self, cache: Any) -> Ledger:
        return dense_ledger(cache)
