"""One line for a model: plain ``generate`` and ``forward`` with an ARGUS cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch

from argus.adapters.activation import activate, deactivate, named
from argus.adapters.huggingface import ArgusCache, make_plan
from argus.adapters.models import place
from argus.config import CacheConfig, load_cache_config
from argus.errors import ModelError
from argus.plan import Plan


class Plans:
    """Plans of a model's caches, by its dtype and device: either may change after it was patched.

    Parameters
    ----------
    tiers, tokenizer
        As for :class:`ArgusCache`.
    """

    def __init__(self, tiers: str | CacheConfig | Sequence[str] | None, tokenizer: Any) -> None:
        self.config, self.tokenizer = load_cache_config(tiers), tokenizer
        self.made: dict[tuple[torch.dtype, torch.device], Plan] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Plans:
        return self

    def of(self, model: Any) -> Plan:
        """The plan for `model` as it is now."""
        now = (model.dtype, place(model))
        if now not in self.made:
            self.made[now] = make_plan(model, self.config, self.tokenizer)
        return self.made[now]


def patch_model_with_argus(model: Any, tiers: str | CacheConfig | Sequence[str] | None = None, tokenizer: Any = None) -> Any:
    """Make plain ``model.generate(...)`` and ``model(...)`` use an ARGUS cache.

    Parameters
    ----------
    model : PreTrainedModel
    tiers : str, CacheConfig, sequence of str or None
        As for :class:`ArgusCache`.
    tokenizer : PreTrainedTokenizer or None
        As for :class:`ArgusCache`.

    Returns
    -------
    PreTrainedModel
        The same model. :func:`unpatch` restores it.

    Raises
    ------
    ConfigError, ModelError
        Also, when it runs, if it is given a cache of another kind.
    """
    plans = Plans(tiers, tokenizer)
    plans.of(model)
    unpatch(model)
    replaced, generate = vars(model).get("generate"), getattr(model, "generate", None)
    model._argus_patch = (model.register_forward_pre_hook(partial(_use_argus, plans), with_kwargs=True), replaced)
    if generate is not None:
        model.generate = wraps(generate)(partial(_generate, model, generate, plans))
    activate(model)
    return model


def _generate(model: Any, generate: Callable[..., Any], plans: Plans, *args: Any, **kwargs: Any) -> Any:
    """A model's ``generate``, with an ARGUS cache unless it is given one, or none is wanted."""
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    told = (kwargs.get("use_cache"), getattr(config, "use_cache", None), model.generation_config.use_cache)
    if kwargs.get("past_key_values") is None and next((used for used in told if used is not None), True):
        kwargs["past_key_values"] = cache = ArgusCache(model, plan=plans.of(model))
        if getattr(config, "is_assistant", False):  # Transformers tells only caches of its own that candidates come.
            cache.activate_past_recording()
    return generate(*args, **kwargs)


def _use_argus(
    plans: Plans, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a forward pass an ARGUS cache where transformers would make one."""
    if len(args) > 1:
        args, kwargs = (), named(model.forward, args, kwargs)
    cache, used = kwargs.get("past_key_values"), kwargs.get("use_cache")
    if cache is None and (_uses_cache(model) if used is None else used) and not model.training:
        kwargs["past_key_values"] = ArgusCache(model, plan=plans.of(model))
    elif cache is not None and not isinstance(cache, ArgusCache):
        raise ModelError(
            f"this model is patched with ARGUS but was given a {type(cache).__name__}; allowed: an ArgusCache, no cache, "
            "or argus.unpatch(model) first"
        )
    return args, kwargs


def _uses_cache(model: Any) -> bool:
    """Whether `model` makes a cache where it is not told: one of several parts as the config of its text says."""
    config = model.config if hasattr(model.config, "use_cache") else model.config.get_text_config(decoder=True)
    return bool(getattr(config, "use_cache", False))


def unpatch(model: Any) -> Any:
    """Restore a model that :func:`patch_model_with_argus` patched, or that an :class:`ArgusCache` switched."""
    if hasattr(model, "_argus_patch"):
        hook, replaced = model._argus_patch
        hook.remove()
        del model._argus_patch
        vars(model).pop("generate", None)
        if replaced is not None:
            model.generate = replaced
    deactivate(model)
    return model
