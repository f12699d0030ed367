"""Which models can work with handles to their cache, and what is known of them."""

from __future__ import annotations

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
    "mllama": "its cross-attention reads the cache directly",
    "mpt": "it reads the keys that the cache returns",
}
"""Model types that touch keys or values between the cache and the attention function, and how."""

HANDLED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


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
    elif getattr(text, "kv_lora_rank", None):
        reason = "it caches latents instead of keys and values (multi-head latent attention)"
    elif getattr(text, "num_kv_shared_layers", 0):
        reason = "its layers share keys and values"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "its attention does not go through the attention interface of transformers"
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
    return ModelFacts(reaches, heads, head_dim, model.dtype, model.device, "chunked_attention" in kinds)
