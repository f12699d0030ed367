"""Switching a model to ARGUS's attention and back. With any other cache it works as before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from argus.adapters.functions import NAME, register
from argus.adapters.graphs import Recorder
from argus.adapters.models import attention, facts
from argus.policies.base import UNKNOWN


@runtime_checkable
class Taking(Protocol):
    """A cache that is told of each forward pass over it, and takes it."""

    def note(self, tokens: Tensor | None, mask: Tensor | None) -> None:
        """Note what a pass is about to write."""

    def take(
        self,
        model: Any,
        forward: Callable[..., Any],
        recorder: Recorder,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run `forward`, the model's own, or what stands for it."""


def activate(model: Any) -> None:
    """Switch the attention of `model` to ARGUS's; what it does with other caches stays as it was.

    Raises
    ------
    ModelError
        If the model cannot work with handles to its cache.
    """
    facts(model)
    held = getattr(model, "_argus_before", None)
    if held is not None and attention(model) == NAME:
        return
    register()
    # Of a config that another activated model has too, or had, the name is ARGUS's own.
    usual = model.get_correct_attn_implementation(None)
    before = {part: usual if name == NAME else name for part, name in implementations(model.config).items()}
    model.set_attn_implementation(NAME)
    if held is not None:  # Its attention was set since. Hooks stay: this may be called from one.
        model._argus_before = (before, *held[1:])
        return
    replaced = vars(model).get("forward")
    forward = model.forward
    model.forward = wraps(forward)(partial(_forward, model, forward, Recorder()))
    model._argus_before = (before, model.register_forward_pre_hook(_note, with_kwargs=True), replaced)


def implementations(config: Any) -> dict[str, str | None]:
    """The attention of a model and of its parts, as ``set_attn_implementation`` takes it; None of a part that is not used."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    held = {"": config} | {name: part for name, part in parts.items() if part is not None}
    return {name: part._attn_implementation for name, part in held.items()}


def named(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `forward` by name, those given by place too."""
    return dict(zip(inspect.signature(forward).parameters, args, strict=False)) | kwargs


def _let_go(model: Any) -> dict[str, str | None]:
    """Undo :func:`activate`, but for the attention, whose former name is told."""
    before, hook, replaced = model._argus_before
    hook.remove()
    del model._argus_before, model.forward
    if replaced is not None:
        model.forward = replaced
    return dict(before)


def deactivate(model: Any) -> None:
    """Undo :func:`activate`."""
    if hasattr(model, "_argus_before"):
        before = _let_go(model)
        model.set_attn_implementation({part: name for part, name in before.items() if name is not None})
        for part in (part for part, name in before.items() if name is None):
            getattr(model.config, part)._attn_implementation = None


def _note(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    kwargs = named(model.forward, args, kwargs) if len(args) > 1 else kwargs
    cache = kwargs.get("past_key_values")
    if isinstance(cache, Taking):
        tokens, embeddings = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        if tokens is None and embeddings is not None:
            tokens = torch.full(embeddings.shape[:2], UNKNOWN, dtype=torch.int32, device=embeddings.device)
        cache.note(tokens, kwargs.get("attention_mask"))


def _forward(model: Any, forward: Callable[..., Any], recorder: Recorder, *args: Any, **kwargs: Any) -> Any:
    """A model's ``forward``; with a cache that takes passes itself, as it does."""
    if len(args) > 1:
        args, kwargs = (), named(forward, args, kwargs)
    cache = kwargs.get("past_key_values")
    if isinstance(cache, Taking):
        return cache.take(model, forward, recorder, args, kwargs)
    return forward(*args, **kwargs)
