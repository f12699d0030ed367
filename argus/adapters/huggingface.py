"""Hugging Face: a cache whose layers hand themselves to a registered attention function."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from argus.adapters.activation import activate
from argus.adapters.functions import NAME
from argus.adapters.graphs import Recorder, Steps
from argus.adapters.layer import ArgusLayer, chosen, length_after, repeated
from argus.adapters.models import attention, facts
from argus.adapters.transcript import Transcript
from argus.budget import Shape, meet
from argus.build import build
from argus.config import CacheConfig, load_cache_config
from argus.errors import ArgusError, ModelError
from argus.ledger import Ledger, measure
from argus.plan import Plan
from argus.policies.base import TextFacts
from argus.turns import Turns, age


class ArgusCache(Cache):  # type: ignore[misc]
    """A compressed cache for ``model.generate(past_key_values=...)``.

    It is for inference: gradients pass through the tokens of one call, not through what is held of those before.

    Parameters
    ----------
    model : PreTrainedModel
        Its attention is switched to ARGUS's; with any other cache it works as before.
    tiers : str, CacheConfig, sequence of str or None
        A ladder's name (``"int4"``), a config, or Hydra overrides; None: ``tiers=default``.
    tokenizer : PreTrainedTokenizer or None
        Tells line ends to the ``lines`` anchors.
    plan : Plan or None
        A plan built before, instead of `tiers`.

    Raises
    ------
    ConfigError, ModelError
    """

    def __init__(
        self,
        model: Any,
        tiers: str | CacheConfig | Sequence[str] | None = None,
        tokenizer: Any = None,
        plan: Plan | None = None,
    ) -> None:
        known = facts(model)
        self.plan = plan or make_plan(model, tiers, tokenizer)
        activate(model)
        self.model = weakref.ref(model)
        self.transcript = Transcript(any(policy.needs_tokens for policy in self.plan.anchors))
        self.broken = False
        self.steps = Steps() if self.plan.graphs and not known.chunked else None
        self.turns = Turns()
        super().__init__(layers=[ArgusLayer(self.plan, self.transcript, self.turns, reach) for reach in known.reaches])

    def note(self, tokens: Tensor | None, mask: Tensor | None) -> None:
        """Note what a forward pass is about to write.

        Raises
        ------
        ArgusError
            If a pass over this cache was broken off and could not be taken back.
        """
        lengths = sorted({layer.engine.length for layer in self.layers})
        if len(lengths) > 1 or self.broken:
            held = f"layers hold {lengths} tokens since a step was broken off"
            raise ArgusError(f"{held}; allowed: cache.reset(), or a new cache")
        self.transcript.note(self.get_seq_length(), tokens, mask)

    def take(
        self,
        model: Any,
        forward: Callable[..., Any],
        recorder: Recorder,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A forward pass over this cache, replayed where a step was recorded. What one that fails has written is taken back.

        Raises
        ------
        ModelError
            If attention weights are asked for, which nothing computes; if the model's attention is not ARGUS's any more; or if
            it is another one, with other layers.
        """
        self._check(model)
        weights = kwargs.get("output_attentions")
        if getattr(model.config, "output_attentions", False) if weights is None else weights:
            raise ModelError("with an ARGUS cache there are no attention weights to give; allowed: output_attentions=False")
        before = self.get_seq_length()
        try:
            if self.steps is not None:
                given = kwargs | dict(zip(("input_ids",), args, strict=False))
                outputs = self.steps.take(model, forward, recorder, given, [layer.engine for layer in self.layers])
                if outputs is not None:
                    self.age()
                    return outputs
            with self.turns.together():
                return forward(*args, **kwargs)
        except BaseException:  # An interrupt too.
            self._take_back(before)
            raise

    def _take_back(self, length: int) -> None:
        """Forget tokens from position `length` on where that can be; else the next pass is refused."""
        if any(layer.engine.torn for layer in self.layers):
            self.broken = True
            return
        try:
            self.keep(length)
        except ArgusError:  # What comes before is forgotten.
            self.broken = True

    def _check(self, model: Any) -> None:
        """Raise unless this cache is one for `model`."""
        if model.config._attn_implementation != NAME and attention(model) != NAME:
            now = attention(model)
            raise ModelError(f"this model's attention is '{now}', set after ARGUS's; allowed: ArgusCache(model, ...) made anew")
        if self.model() is not model:
            # Exits before the last layer have fewer.
            pairs = zip(self.layers, facts(model).reaches, strict=False)
            if any(layer.engine.reach != reach for layer, reach in pairs):
                raise ModelError("this cache was made for a model with other layers; allowed: an ArgusCache of this model")
            self.model = weakref.ref(model)

    def reset(self) -> None:
        super().reset()
        self.broken = False
        self.transcript.forget()
        if self.steps is not None:
            self.steps.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop ``-tokens_to_remove`` tokens of every layer, or of none; a positive number is the length to keep (5.17)."""
        self.keep(length_after(tokens_to_remove, self.get_seq_length()))

    def keep(self, length: int) -> None:
        """Forget tokens from position `length` on.

        Raises
        ------
        ArgusError
            If a layer cannot; then none does.
        """
        longer = [layer.engine for layer in self.layers if layer.engine.length > length]
        for engine in longer:
            engine.check_crop(length)
        # A window that begins anew is not the one that was recorded: what steps hold of these pages goes with them.
        if self.steps is not None and any(length < engine.window.start for engine in longer):
            self.steps.forget()
        for engine in longer:
            engine.crop(length)
        for layer in self.layers:
            if layer.engine.patient:
                layer.engine.forget()

    def age(self) -> None:
        """Let pages move that are due after a step which was replayed; others let them move themselves."""
        due = [layer for layer in self.layers if layer.engine.due]
        age([layer.engine for layer in due], [layer.known() for layer in due])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.transcript.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self.layers[0].batch_size
        super().batch_repeat_interleave(repeats)
        self.transcript.select(repeated(rows, repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = chosen(indices, self.layers[0].batch_size)
        super().batch_select_indices(rows)
        self.transcript.select(rows)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, each with what it is for."""
        for layer in self.layers:
            yield from layer.engine.tensors()
            if layer.recent is not None:
                yield "index", layer.recent
        yield from self.plan.shared()
        for tensor in self.plan.backend.tensors():
            yield "index", tensor
        yield from self.transcript.tensors()
        for tensor in self.steps.tensors() if self.steps else ():
            yield "index", tensor

    def ledger(self) -> Ledger:
        """Measured bytes, by what they are for."""
        return measure(self.tensors(), sum(layer.engine.values for layer in self.layers), self.plan.backend.workspace)


def line_ends(tokenizer: Any) -> tuple[int, ...]:
    """Ids of every token of `tokenizer` whose text holds a line end."""
    ids = range(len(tokenizer))
    return tuple(i for i, text in zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True) if "\n" in text)


def make_plan(model: Any, tiers: str | CacheConfig | Sequence[str] | None = None, tokenizer: Any = None) -> Plan:
    """The plan of a cache for `model`, its stages as large as its byte budget allows."""
    config = load_cache_config(tiers)
    known = facts(model)
    text = TextFacts(line_ends(tokenizer) if tokenizer is not None and "lines" in config.anchors else ())
    plan = build(config, known.head_dim, known.dtype, known.device, text)
    return meet(plan, config.budget, Shape(known.reaches, known.heads, known.head_dim, known.dtype, known.device))
