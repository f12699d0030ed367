"""The attention and mask functions that ARGUS registers with transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from argus.adapters.layer import ArgusLayer, is_causal
from argus.attention import DensePart, Part, Query, SinkPart, answer_bounded
from argus.errors import ModelError

NAME = "argus"
"""Their name in the registries of transformers."""


def argus_attention(
    module: Any, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention function for :class:`~transformers.AttentionInterface`: asks a layer's handle, or computes densely.

    Raises
    ------
    ModelError
        If dropout is asked for with softcap or sinks.
    """
    if isinstance(key, ArgusLayer):
        return key.attend(module, query, attention_mask, scaling, **kwargs), None
    softcap, sinks, causal = kwargs.pop("softcap", None), kwargs.pop("s_aux", None), is_causal(module, kwargs)
    if softcap is None and sinks is None:
        steps, held = query.shape[2], key.shape[2]
        if attention_mask is None and 1 < steps < held and causal:
            # argus_mask leaves causal masks out, but SDPA aligns its own to the first key, not to the last.
            attention_mask = torch.ones(steps, held, dtype=torch.bool, device=key.device).tril(held - steps)
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    if kwargs.get("dropout"):
        raise ModelError("no dropout is computed with softcap or sinks; allowed: attention_dropout=0, or argus.unpatch(model)")
    batch, heads, steps, dim = query.shape
    start = key.shape[2] - steps
    asked = Query.of(query, key.shape[1], scaling or dim**-0.5, start, attention_mask, softcap)
    positions = torch.arange(key.shape[2], device=key.device)
    seen = attention_mask is None and not causal
    parts: list[Part] = [DensePart(key, value, lambda query: None if seen else query.visible(positions, key.shape[2] - 1))]
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
    if plain and (padding is None or (padding.shape[-1] >= kwargs["kv_length"] and bool(padding.all()))):
        return None
    if not ends:
        kwargs["allow_is_causal_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def register() -> None:
    """Tell transformers of both."""
    AttentionInterface.register(NAME, argus_attention)
    AttentionMaskInterface.register(NAME, argus_mask)
