"""Which models can work with handles to their cache, and what is known of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from argus.errors import ModelError

REFUSED = {
    "gemma3n": "its layers share keys and values",
    "gemma3n_text": "its layers share keys and values",
    "gemma4": "its layers share keys and values",
    "gemma4_text": "its layers share keys and values",
    "gemma4_unified": "its layers have heads of different sizes",
    "gemma4_unified_text": "its layers have heads of different sizes",
    "diffllama": "it splits the values that the cache returns",
    "doge": "it computes a mask from the values that the cache returns",
    "jetmoe": "it repeats the keys that the cache returns",
    "kyutai_speech_to_text": "its masks do not tell that its layers see the newest tokens only",
    "mllama": "its cross-attention reads the cache directly",
    "mllama_text_model": "its cross-attention reads the cache directly",
    "moshi": "its masks do not tell that its layers see the newest tokens only",
    "mpt": "it reads the keys that the cache returns",
}
"""Model types that touch keys or values between the cache and the attention function, and how."""

HANDLED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
ALIKE = {"attention_chunk_size", "head_dim", "kv_lora_rank", "num_key_value_heads", "sliding_window"}
"""What transformers lets layers of one config have different, but a plan takes as one."""


@dataclass(frozen=True)
class ModelFacts:
    """What a cache needs to know of a model: key-value heads, numbers a head, and layers.

    ``reaches``: of each layer how many of the newest tokens a query sees, or None where it sees all. ``chunked``: whether some
    layers see tokens of a query's own chunk only, up to their reach.
    """

    reaches: tuple[int | None, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    chunked: bool = False


def takes_cache(model: Any) -> bool:
    """Whether a forward pass of `model` can be given a cache: by name or, where it generates, with what it tells its parts."""
    parameters = inspect.signature(model.forward).parameters
    passed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return "past_key_values" in parameters or (passed_on and hasattr(model, "generate"))


def place(model: Any) -> torch.device:
    """Where `model` computes: parameters that accelerate brings there for each pass are on no device before."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    hooks = (getattr(part, "_hf_hook", None) for part in model.modules())
    told = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((found for found in told if found is not None), "cpu"))


def attention(model: Any) -> str:
    """The attention of the part of `model` that decodes."""
    text = model.config.get_text_config(decoder=True)
    return str(text._attn_implementation)


def facts(model: Any) -> ModelFacts:
    """What a cache needs to know of `model`.

    Raises
    ------
    ModelError
        If the model cannot work with handles to its cache; the sentence says why.
    """
    config = model.config
    kind = config.model_type
    text = config.get_text_config(decoder=True)
    reason = REFUSED.get(kind) or REFUSED.get(text.model_type)
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder, whose cross-attention has a cache of another kind"
    elif getattr(text, "add_cross_attention", False):
        reason = "its cross-attention has a cache of another kind"
    elif differing := sorted(ALIKE & set(getattr(text, "per_layer_attributes", None) or ())):
        reason = f"its layers differ in {', '.join(differing)}"
    elif getattr(text, "kv_lora_rank", None):
        reason = "it caches latents instead of keys and values (multi-head latent attention)"
    elif getattr(text, "num_kv_shared_layers", 0):
        reason = "its layers share keys and values"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "its attention does not go through the attention interface of transformers"
    elif not takes_cache(model):
        reason = "its forward takes no cache"
    else:
        other = sorted(set(getattr(text, "layer_types", None) or ()) - HANDLED_LAYERS)
        if other:
            reason = f"it has layers without keys and values: {', '.join(other)}"
    if reason:
        raise ModelError(f"model type '{kind}' cannot use ARGUS: {reason}; allowed are decoders that cache keys and values")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    # As transformers tells its own cache.
    window, chunk = getattr(text, "sliding_window", None), getattr(text, "attention_chunk_size", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "chunked_attention" if chunk else "full_attention"] * text.num_hidden_layers
    reaches = tuple({"sliding_attention": window, "chunked_attention": chunk}.get(layer) for layer in kinds)
    # One that exits early has the types of all its layers.
    reaches = reaches[: text.num_hidden_layers]
    return ModelFacts(reaches, heads, head_dim, model.dtype, place(model), "chunked_attention" in kinds)
