"""A cache of 16 bits from which a press of kvpress evicts tokens once the prompt has been read."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers.cache_utils import Cache

from argus.caches.dense import HalfLayer
from argus.errors import ConfigError
from argus.ledger import Ledger, measure
from argus.tasks.base import CacheKind, CacheOptions, Run

PRESSES = {
    "knorm": "KnormPress",
    "snapkv": "SnapKVPress",
    "keydiff": "KeyDiffPress",
    "expected_attention": "ExpectedAttentionPress",
}
"""The class of kvpress for each press, with its own defaults."""


class PressOptions(CacheOptions):
    """Options of ``kvpress``: the press, and the share of the prompt's tokens that it evicts."""

    press: Literal["knorm", "snapkv", "keydiff", "expected_attention"]
    share: Annotated[float, Field(ge=0, lt=1)] = 0.5


class PressedCache(Cache):  # type: ignore[misc]
    """Dense layers in 16 bits, and what a press needs to know of them.

    Attributes
    ----------
    kind : Pressed
        Whose hooks see to it.
    seen : int
        Tokens read, those evicted among them.
    hooks : ExitStack
        The press's hooks, while the model reads the prompt.
    """

    def __init__(self, kind: Pressed) -> None:
        super().__init__(layer_class_to_replicate=HalfLayer)
        self.kind = kind
        self.seen = 0
        self.hooks = ExitStack()


class Pressed(CacheKind):
    """Eviction by a press; tokens that come after the prompt are all kept.

    A token keeps the position that it was read at, so the model is told each position: what is left of the cache is shorter
    than the text.
    """

    Config = PressOptions

    def __init__(self, config: PressOptions) -> None:
        super().__init__(config)
        self._model: Any = None
        self._press: Any = None

    def missing(self) -> str | None:
        try:
            version("kvpress")
        except PackageNotFoundError:
            return "kvpress is not installed, and needs an environment of its own; python -m benchmarks.kvpress_peers"
        return None

    def make(self, run: Run) -> PressedCache:
        if self._model is not run.model:
            self._press = in_half(self.press())
            run.model.register_forward_pre_hook(self._before, with_kwargs=True)
            run.model.register_forward_hook(self._after, with_kwargs=True, always_call=True)
            self._model = run.model
        return PressedCache(self)

    def press(self) -> Any:
        """The press as kvpress makes it."""
        import kvpress

        return getattr(kvpress, PRESSES[self.config.press])(compression_ratio=self.config.share)

    def ledger(self, cache: Any) -> Ledger:
        """Bytes of the tokens left, over the numbers of all tokens read."""
        held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        values = sum(tensor.numel() // tensor.shape[2] * cache.seen for tensor in held)
        return measure((("dense", tensor) for tensor in held), values)

    def _owns(self, cache: Any) -> bool:
        return isinstance(cache, PressedCache) and cache.kind is self

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if self._owns(cache):
            tokens = args[0] if args else kwargs["input_ids"]
            if cache.seen == 0:
                cache.hooks.enter_context(self._press(model))
            steps = torch.arange(cache.seen, cache.seen + tokens.shape[1], device=tokens.device)
            kwargs["position_ids"] = steps.unsqueeze(0)
            cache.seen += tokens.shape[1]
        return args, kwargs

    def _after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if self._owns(cache):
            cache.hooks.close()


def in_half(press: Any) -> Any:
    """The same press, which scores in the model's dtype what is kept in 16 bits."""
    compress = press.compress

    def compress_half(
        module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        wide = hidden_states.dtype
        try:
            left = compress(module, hidden_states, keys.to(wide), values.to(wide), attentions, kwargs)
        except AssertionError as error:
            raise ConfigError(f"{type(press).__name__}: {error}") from error
        return left[0].to(keys.dtype), left[1].to(values.dtype)

    press.compress = compress_half
    return press
