"""One line for a model: plain ``generate`` and ``forward`` with an ARGUS cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

from argus.adapters.activation import activate, deactivate, named
from argus.adapters.huggingface import ArgusCache, make_plan
from argus.config import CacheConfig
from argus.errors import ModelError
from argus.plan import Plan


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
    plan = make_plan(model, tiers, tokenizer)
    unpatch(model)
    replaced, generate = vars(model).get("generate"), model.generate
    model._argus_patch = (model.register_forward_pre_hook(partial(_use_argus, plan), with_kwargs=True), replaced)
    model.generate = wraps(generate)(partial(_generate, model, generate, plan))
    activate(model)
    return model


def _generate(model: Any, generate: Callable[..., Any], plan: Plan, *args: Any, **kwargs: Any) -> Any:
    """A model's ``generate``, with an ARGUS cache unless it is given one, or none is wanted."""
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    told = (kwargs.get("use_cache"), getattr(config, "use_cache", None), model.generation_config.use_cache)
    if kwargs.get("past_key_values") is None and next((used for used in told if used is not None), True):
        kwargs["past_key_values"] = cache = ArgusCache(model, plan=plan)
        if getattr(config, "is_assistant", False):  # Transformers tells only caches of its own that candidates come.
            cache.activate_past_recording()
    return generate(*args, **kwargs)


def _use_argus(plan: Plan, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a forward pass an ARGUS cache where transformers would make one."""
    if len(args) > 1:
        args, kwargs = (), named(model.forward, args, kwargs)
    cache, used = kwargs.get("past_key_values"), kwargs.get("use_cache")
    if cache is None and (model.config.use_cache if used is None else used) and not model.training:
        kwargs["past_key_values"] = ArgusCache(model, plan=plan)
    elif cache is not None and not isinstance(cache, ArgusCache):
        raise ModelError(
            f"this model is patched with ARGUS but was given a {type(cache).__name__}; allowed: an ArgusCache, no cache, "
            "or argus.unpatch(model) first"
        )
    return args, kwargs


def unpatch(model: Any) -> Any:
    """Restore a model that :func:`patch_model_with_argus` patched, or that an :class:`ArgusCache` switched."""
    if hasattr(model, "_argus_patch"):
        hook, replaced = model._argus_patch
        hook.remove()
        del model._argus_patch, model.generate
        if replaced is not None:
            model.generate = replaced
    deactivate(model)
    return model
