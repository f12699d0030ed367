"""One layer of a cache, as transformers asks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from argus.adapters.transcript import Transcript
from argus.attention import Query
from argus.engine import LayerCache, unscaled
from argus.errors import ModelError
from argus.moves import Context
from argus.plan import Plan
from argus.policies.base import RECENT
from argus.turns import Turns


def length_after(tokens_to_remove: int, held: int) -> int:
    """Tokens that a crop of transformers leaves of those held."""
    count = int(tokens_to_remove)
    return min(held, count) if count > 0 else max(held + count, 0)


def module_groups(module: Any) -> int:
    """Query heads a key-value head."""
    return int(getattr(module, "num_key_value_groups", 1))


def is_causal(module: Any, options: Mapping[str, Any]) -> bool:
    """Whether queries without a mask see no later tokens: as an attention function is told, or its module says."""
    told = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if told is None else told)


def chosen(indices: Any, batch: int) -> Tensor:
    """Rows of a batch (int64) that `indices` choose as they would of a tensor: numbers, a mask, or a slice."""
    return torch.arange(batch, device="cpu")[indices.cpu() if isinstance(indices, Tensor) else indices]


def repeated(batch: int, repeats: int) -> Tensor:
    """Rows of a batch (int64), each so many times."""
    return torch.arange(batch, device="cpu").repeat_interleave(repeats)


class ArgusLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's cache: ``update`` returns the layer itself, and the attention function asks it.

    Attributes
    ----------
    engine : LayerCache
    transcript : Transcript
        The cache's.
    turns : Turns
        The cache's.
    recent : Tensor or None
        ``[B, H, R, D]`` float32, where a policy asks for them the queries of the recorded step taken last: each replay writes
        them anew, whatever is taken as usual between.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, plan: Plan, transcript: Transcript, turns: Turns, reach: int | None) -> None:
        super().__init__()
        self.engine = LayerCache(plan, reach)
        self.transcript = transcript
        self.turns = turns
        self.recent: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Rows of the batch, 0 while empty."""
        return self.engine.shape[0] if self.engine.shape else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Asked for by attention that is not ARGUS's.

        Raises
        ------
        ModelError
        """
        raise ModelError("this model's attention is not ARGUS's; allowed: the model that its ArgusCache was made for")

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
        """Answer queries ``[B, Hq, S, D]`` as ``[B, S, Hq, D]``, contiguous; then pages age, or wait for others."""
        with unscaled(query.device):
            return self._attend(module, query, mask, scaling, **options)

    def _attend(self, module: Any, query: Tensor, mask: Tensor | None, scaling: float | None, **options: Any) -> Tensor:
        softcap, sinks = options.get("softcap"), options.get("s_aux")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        length, steps = self.engine.length, query.shape[2]
        if self.engine.window.place is not None:
            mask = self.engine.window.place.masks.get(self.engine.reach)
        if mask is None and steps > 1 and not is_causal(module, options):
            mask = torch.ones(1, 1, steps, length, dtype=torch.bool, device=query.device)
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
        recent, recorded = None, self.engine.window.place is not None
        if self.engine.plan.needs_queries and (recorded or self.engine.due):
            recent = Query.of(query[:, :, -RECENT:], query.shape[1] // module_groups(module), scale, 0).rows
        if recorded:
            self.recent = recent
        if self.engine.due:
            self.turns.add(self.engine, self._known(recent))
        else:
            self.engine.window.settle()
        return out.contiguous()

    def known(self) -> Context:
        """What pages that leave the window after a recorded step are told."""
        return self._known(self.recent)

    def _known(self, recent: Tensor | None) -> Context:
        return self.transcript.context(self.engine.device, recent)

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
        self.recent = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop ``-tokens_to_remove`` tokens; a positive number is the length to keep (transformers 5.17)."""
        length = length_after(tokens_to_remove, self.engine.length)
        if length < self.engine.length:
            self.engine.crop(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(repeated(self.batch_size, repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(chosen(indices, self.batch_size))

    def _select(self, rows: Tensor) -> None:
        if self.engine.length:
            device = next(tensor.device for _, tensor in self.engine.tensors())
            self.engine.select(rows.to(device))

    def offload(self) -> None:
        raise ModelError("an ARGUS cache is compressed where it is and does not offload; leave offloading off")

    prefetch = offload
