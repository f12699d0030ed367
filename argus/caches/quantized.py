"""transformers' QuantizedCache: integers by optimum-quanto or hqq, and 8-bit floating point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import QuantizedCache

from argus.errors import ConfigError, ModelError
from argus.ledger import Ledger, measure
from argus.tasks.base import CacheKind, CacheOptions, Run


def inner_tensors(thing: object) -> Iterator[Tensor]:
    """The plain tensors that a tensor, a tensor subclass of other tensors, or a container of them is made of."""
    flatten = getattr(thing, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            yield from inner_tensors(getattr(thing, name))
    elif isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for part in thing.values():
            yield from inner_tensors(part)
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from inner_tensors(part)


class HalfQuantizedCache(QuantizedCache):  # type: ignore[misc]
    """A QuantizedCache that works in 16 bits, so that scales and residual weigh what they do on a GPU.

    Attributes
    ----------
    values : int
        Numbers that the tokens held have in keys and values together.
    """

    def __init__(self, backend: str, config: Any, **options: Any) -> None:
        try:
            super().__init__(backend, config, **options)
        except (ValueError, ImportError) as error:
            raise ModelError(f"transformers' QuantizedCache with {backend}: {' '.join(str(error).split())}") from error
        self.backend = backend
        self.values = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        dtype = key_states.dtype
        half = dtype if dtype.itemsize <= 2 else torch.float16
        try:
            keys, values = super().update(key_states.to(half), value_states.to(half), layer_idx, *args, **kwargs)
        except (ValueError, AssertionError) as error:
            shape = list(key_states.shape)
            raise ConfigError(f"{self.backend} does not take keys {shape}: {' '.join(str(error).split())}") from error
        self.values += key_states.numel() + value_states.numel()
        return keys.to(dtype), values.to(dtype)

    def ledger(self) -> Ledger:
        """Measured bytes: what is quantized, with its scales, and what waits in 16 bits."""
        held = [
            ("residual" if name in ("keys", "values") else "quantized", tensor)
            for layer in self.layers
            for name, thing in vars(layer).items()
            for tensor in inner_tensors(thing)
        ]
        return measure(held, self.values)


class Quantized(CacheKind):
    """A QuantizedCache; subclasses name its backend and the package that it needs."""

    backend: ClassVar[str]
    package: ClassVar[str]

    def missing(self) -> str | None:
        try:
            version(self.package)
        except PackageNotFoundError:
            return f"{self.package} is not installed; pip install {self.package}"
        return None

    def make(self, run: Run) -> HalfQuantizedCache:
        return HalfQuantizedCache(self.backend, run.model.config, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """The options, as transformers calls them."""
        return {
            "nbits": self.config.bits,
            "q_group_size": self.config.group_size,
            "residual_length": self.config.residual,
            "axis_key": self.config.axis_key,
            "axis_value": self.config.axis_value,
        }

    def ledger(self, cache: Any) -> Ledger:
        ledger: Ledger = cache.ledger()
        return ledger


class IntegerOptions(CacheOptions):
    """Options that quanto and hqq share: numbers that share a scale, and newest tokens in 16 bits at most."""

    group_size: PositiveInt = 64
    residual: NonNegativeInt = 128


class QuantoOptions(IntegerOptions):
    """Options of ``quanto``. Axis 0: groups along head_dim, a token's own. Axis -1: groups along tokens, a channel's own."""

    bits: Literal[2, 4] = 4
    axis_key: Literal[0, -1] = 0
    axis_value: Literal[0, -1] = 0


class Quanto(Quantized):
    """Asymmetric integers over each group's range, by optimum-quanto."""

    Config = QuantoOptions
    backend, package = "quanto", "optimum-quanto"


class HqqOptions(IntegerOptions):
    """Options of ``hqq``. Axis 1: groups along head_dim, a token's own. Axis 0: groups of numbers far apart."""

    bits: Literal[1, 2, 3, 4, 8] = 4
    axis_key: Literal[0, 1] = 1
    axis_value: Literal[0, 1] = 1

    @model_validator(mode="after")
    def _three_bits_need_axis_0(self) -> HqqOptions:
        if self.bits == 3 and (self.axis_key, self.axis_value) != (0, 0):
            raise ValueError("hqq reads 3 bits back along axis 0 only; allowed: axis_key=0 axis_value=0")
        return self


class Hqq(Quantized):
    """Integers whose zeros are fitted to a robust loss (Half-Quadratic Quantization), by hqq."""

    Config = HqqOptions
    backend, package = "hqq", "hqq"


class Fp8(Quantized):
    """E4M3 numbers with one scale for each layer's keys and one for its values, set by the first tokens."""

    backend, package = "fp8", "transformers"

    def missing(self) -> str | None:
        if not hasattr(cache_utils, "Fp8QuantizedLayer"):
            return f"transformers {version('transformers')} has no fp8 cache; pip install --upgrade transformers"
        return None

    def arguments(self) -> dict[str, Any]:
        return {}
