"""Hugging Face: a cache whose layers hand themselves to a registered attention function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from argus.adapters.graphs import Recorder, Steps
from argus.adapters.models import facts
from argus.adapters.transcript import UNKNOWN, Transcript
from argus.attention import DensePart, Part, Query, SinkPart, answer_bounded
from argus.budget import Shape, meet
from argus.build import build
from argus.config import CacheConfig, load_cache_config
from argus.engine import LayerCache
from argus.errors import ArgusError, ModelError
from argus.ledger import Ledger, measure
from argus.plan import Plan
from argus.policies.base import RECENT, TextFacts

NAME = "argus"
"""Name of the attention and mask functions in the registries of transformers."""


def unscaled(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off where it is on: a cache's dtypes are its own."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def length_after(tokens_to_remove: int, held: int) -> int:
    """Tokens that a crop of transformers leaves of those held."""
    count = int(tokens_to_remove)
    return min(held, count) if count > 0 else max(held + count, 0)


class ArgusLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's cache: ``update`` returns the layer itself, and the attention function asks it."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, plan: Plan, transcript: Transcript, reach: int | None) -> None:
        super().__init__()
        self.engine = LayerCache(plan, reach)
        self.transcript = transcript

    @property
    def batch_size(self) -> int:
        """Rows of the batch, 0 while empty."""
        return self.engine.shape[0] if self.engine.shape else 0

    @property
    def record_past(self) -> bool:
        """Whether all tokens are held until the next crop, which transformers asks for where it tries candidates."""
        return self.engine.patient

    @record_past.setter
    def record_past(self, wanted: bool) -> None:
        self.engine.patient = wanted

    def activate_past_recording(self) -> None:
        """Hold all tokens until the next crop."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[ArgusLayer, ArgusLayer]:
        """Write keys and values ``[B, H, S, D]``."""
        with unscaled(key_states.device):
            self.engine.write(key_states, value_states)
        self.is_initialized = True
        return self, self

    def attend(self, module: Any, query: Tensor, mask: Tensor | None, scaling: float | None, **options: Any) -> Tensor:
        """Answer queries ``[B, Hq, S, D]`` as ``[B, S, Hq, D]``, contiguous, then let pages age."""
        with unscaled(query.device):
            return self._attend(module, query, mask, scaling, **options)

    def _attend(self, module: Any, query: Tensor, mask: Tensor | None, scaling: float | None, **options: Any) -> Tensor:
        softcap, sinks = options.get("softcap"), options.get("s_aux")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        length, steps = self.engine.length, query.shape[2]
        if self.engine.window.place is not None:
            mask = self.engine.window.place.masks.get(self.engine.reach)
        plain = softcap is None and sinks is None and (mask is not None or steps in (1, length))
        parts = self.engine.window.parts()
        if plain and not self.engine.where and len(parts) == 1:
            keys, values = parts[0]
            out, _ = sdpa_attention_forward(
                module, query, keys.to(query.dtype), values.to(query.dtype), mask, scaling=scale, is_causal=True
            )
        else:
            batch, heads = query.shape[:2]
            asked = Query.of(query, heads // module_groups(module), scale, length - steps, mask, softcap)
            out = self.engine.attend(asked, sinks).view(batch, heads, steps, -1).transpose(1, 2).to(query.dtype)
        self.engine.age(self.transcript.context(query.device, self._recent(module, query, scale)))
        return out.contiguous()

    def _recent(self, module: Any, query: Tensor, scale: float) -> Tensor | None:
        """The newest queries ``[B, H, R, D]``, if pages leave the window now and a policy asks for them."""
        if not self.engine.due or not self.engine.plan.needs_queries:
            return None
        return Query.of(query[:, :, -RECENT:], query.shape[1] // module_groups(module), scale, 0).rows

    def get_seq_length(self) -> int:
        return self.engine.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The older name of :meth:`get_max_length` (transformers 5.17)."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.engine.length + query_length, 0

    def reset(self) -> None:
        self.engine.reset()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop ``-tokens_to_remove`` tokens; a positive number is the length to keep (transformers 5.17)."""
        length = length_after(tokens_to_remove, self.engine.length)
        if length < self.engine.length:
            self.engine.crop(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def _select(self, rows: Tensor) -> None:
        if self.engine.length:
            device = next(tensor.device for _, tensor in self.engine.tensors())
            self.engine.select(rows.to(device))

    def offload(self) -> None:
        raise ModelError("an ARGUS cache is compressed where it is and does not offload; leave offloading off")

    prefetch = offload


class ArgusCache(Cache):  # type: ignore[misc]
    """A compressed cache for ``model.generate(past_key_values=...)``.

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
        self.transcript = Transcript(any(policy.needs_tokens for policy in self.plan.anchors))
        self.broken = False
        self.steps = Steps() if self.plan.graphs and not known.chunked else None
        super().__init__(layers=[ArgusLayer(self.plan, self.transcript, reach) for reach in known.reaches])

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

    def reset(self) -> None:
        super().reset()
        self.broken = False
        self.transcript.forget()

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
        for engine in longer:
            engine.crop(length)
        for layer in self.layers:
            if layer.engine.patient:
                layer.engine.forget()

    def age(self) -> None:
        """Let pages move that are due after a step which was replayed; others let them move themselves."""
        for layer in self.layers:
            if layer.engine.due:
                layer.engine.age(self.transcript.context(next(iter(layer.engine.window.tensors())).device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.transcript.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self.layers[0].batch_size
        super().batch_repeat_interleave(repeats)
        self.transcript.select(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.transcript.select(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, each with what it is for."""
        for layer in self.layers:
            yield from layer.engine.tensors()
        for stage in self.plan.stages:
            for tier in (stage.keys, stage.values):
                for tensor in tier.shared().values():
                    yield "shared", tensor
        for tensor in self.plan.backend.tensors():
            yield "index", tensor
        yield from self.transcript.tensors()
        for tensor in self.steps.tensors() if self.steps else ():
            yield "index", tensor

    def ledger(self) -> Ledger:
        """Measured bytes, by what they are for."""
        return measure(self.tensors(), sum(layer.engine.values for layer in self.layers), self.plan.backend.workspace)


def module_groups(module: Any) -> int:
    """Query heads a key-value head."""
    return int(getattr(module, "num_key_value_groups", 1))


def argus_attention(
    module: Any, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention function for :class:`~transformers.AttentionInterface`: asks a layer's handle, or computes densely."""
    if isinstance(key, ArgusLayer):
        return key.attend(module, query, attention_mask, scaling, **kwargs), None
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    if softcap is None and sinks is None:
        steps, held = query.shape[2], key.shape[2]
        if attention_mask is None and 1 < steps < held and kwargs.get("is_causal", getattr(module, "is_causal", True)):
            # argus_mask leaves causal masks out, but SDPA aligns its own to the first key, not to the last.
            attention_mask = torch.ones(steps, held, dtype=torch.bool, device=key.device).tril(held - steps)
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    batch, heads, steps, dim = query.shape
    start = key.shape[2] - steps
    asked = Query.of(query, key.shape[1], scaling or dim**-0.5, start, attention_mask, softcap)
    positions = torch.arange(key.shape[2], device=key.device)
    parts: list[Part] = [DensePart(key, value, lambda query: query.visible(positions, key.shape[2] - 1))]
    if sinks is not None:
        parts.append(SinkPart(sinks))
    out = answer_bounded(asked, parts).out.view(batch, heads, steps, -1).transpose(1, 2)
    return out.to(query.dtype).contiguous(), None


def argus_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask function: none where it is plainly causal, since queries know their positions; else as SDPA's.

    Keys after the last query, as of a static cache, are hidden by a mask.
    """
    padding, local, start = kwargs.get("attention_mask"), kwargs.get("local_size"), kwargs.get("q_offset", 0)
    # A static cache tells where queries start on the device.
    ends = not isinstance(start, Tensor) and kwargs.get("kv_offset", 0) + kwargs["kv_length"] == start + kwargs["q_length"]
    plain = kwargs.get("allow_is_causal_skip", True) and ends and (local is None or kwargs["kv_length"] < local)
    if plain and (padding is None or bool(padding.all())):
        return None
    if not ends:
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _note(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, ArgusCache):
        tokens, embeddings = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        if tokens is None and embeddings is not None:
            tokens = torch.full(embeddings.shape[:2], UNKNOWN, dtype=torch.int32, device=embeddings.device)
        cache.note(tokens, kwargs.get("attention_mask"))


def _forward(model: Any, forward: Callable[..., Any], recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
    """A model's ``forward``, replayed where a step of an :class:`ArgusCache` was recorded.

    What a pass that fails has written is taken back.

    Raises
    ------
    ModelError
        If attention weights are asked for, which nothing computes.
    """
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, ArgusCache):
        return forward(*args, **kwargs)
    weights = kwargs.get("output_attentions")
    if getattr(model.config, "output_attentions", False) if weights is None else weights:
        raise ModelError("with an ARGUS cache there are no attention weights to give; allowed: output_attentions=False")
    before = cache.get_seq_length()
    try:
        if cache.steps is not None and len(args) < 2:
            given = kwargs | dict(zip(("input_ids",), args, strict=False))
            outputs = cache.steps.take(model, forward, recorder, given, [layer.engine for layer in cache.layers])
            if outputs is not None:
                cache.age()
                return outputs
        return forward(*args, **kwargs)
    except Exception:
        try:
            cache.keep(before)
        except ArgusError:  # What comes before is forgotten; the next pass is refused.
            cache.broken = True
        raise


def activate(model: Any) -> None:
    """Switch the attention of `model` to ARGUS's; what it does with other caches stays as it was.

    Raises
    ------
    ModelError
        If the model cannot work with handles to its cache.
    """
    facts(model)
    if model.config._attn_implementation == NAME and hasattr(model, "_argus_before"):
        return
    if hasattr(model, "_argus_before"):
        _let_go(model)
    AttentionInterface.register(NAME, argus_attention)
    AttentionMaskInterface.register(NAME, argus_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    replaced = vars(model).get("forward")
    forward = model.forward
    model.forward = wraps(forward)(partial(_forward, model, forward, Recorder()))
    model._argus_before = (before, model.register_forward_pre_hook(_note, with_kwargs=True), replaced)


def _let_go(model: Any) -> str:
    """Undo :func:`activate`, but for the attention, whose former name is told."""
    before, hook, replaced = model._argus_before
    hook.remove()
    del model._argus_before, model.forward
    if replaced is not None:
        model.forward = replaced
    return str(before)


def deactivate(model: Any) -> None:
    """Undo :func:`activate`."""
    if hasattr(model, "_argus_before"):
        model.set_attn_implementation(_let_go(model))


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
