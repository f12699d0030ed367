"""Recorded steps that hide tokens, padded rows and sliding windows: the same answers as steps that are launched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argus import unpatch
from tests.adapters.recording import (
    CUDA,
    DEVICE,
    DTYPE,
    EXACT,
    LADDERS,
    both,
    close,
    counts,
    feed,
    ids,
    model,
    one_by_one,
    padded,
)
from tests.models import tiny

__all__ = ["counts", "model"]


@pytest.mark.parametrize("ladder", LADDERS)
def test_padded_rows_answer_the_same(model: Any, counts: SimpleNamespace, ladder: str) -> None:
    answers = [
        model.generate(
            ids(150), attention_mask=padded(150, 37, 0), past_key_values=cache, max_new_tokens=100, do_sample=False,
            pad_token_id=0,
        )
        for cache in both(model, LADDERS[ladder])
    ]  # fmt: skip
    assert torch.equal(*answers) or CUDA
    assert counts.replayed > 60
    assert counts.recorded <= (2 + 100 // 16 if ladder == "outliers" else 1 + 100 // 32)


@pytest.mark.parametrize("pad", [(0, 0), (37, 0)])
def test_masks_have_room_for_some_turns(counts: SimpleNamespace, pad: tuple[int, int]) -> None:
    """Recorded anew when they are full, and when a layer begins to forget; what is shown changes from step to step."""
    local = tiny("gemma2", head_dim=64, hidden_size=64, sliding_window=120).to(DEVICE, DTYPE)
    caches = both(local, [*EXACT, "anchors=sinks"])
    for cache in caches:
        feed(local, cache, ids(80), attention_mask=padded(80, *pad))
    for i in range(300):
        mask = padded(81 + i, *pad)
        mask[0, 90 : 90 + i // 7] = 0
        mask[1, 80 + i // 2] = 0
        got, want = (feed(local, cache, ids(1, seed=i), attention_mask=mask) for cache in caches)
        close(got, want)
    assert counts.recorded <= 5
    assert counts.replayed > 285
    assert all(bool(layer.engine.forgotten) == (layer.engine.reach is not None) for layer in caches[0].layers)
    unpatch(local)


@pytest.mark.parametrize("options", [["tiers.slack=32"], ["tiers.slack=160"], ["tiers.page_size=24"]])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_masks_are_never_too_short(counts: SimpleNamespace, options: list[str], family: str) -> None:
    """However many tokens come before pages move again, and wherever the last ones were that masks have room for."""
    more = {"sliding_window": 40} if family == "mistral" else {}
    local = tiny(family, head_dim=64, hidden_size=64, **more).to(DEVICE, DTYPE)
    caches = both(local, [*EXACT, "anchors=sinks", *options])
    for cache in caches:
        feed(local, cache, ids(190), attention_mask=padded(190, 37, 0))
    for i in range(200):
        close(*(feed(local, cache, ids(1, seed=i), attention_mask=padded(191 + i, 37, 0)) for cache in caches))
    assert counts.recorded <= 3
    assert counts.replayed > 190
    unpatch(local)


def test_each_step_sees_what_its_mask_shows(model: Any, counts: SimpleNamespace) -> None:
    """Masks that change from step to step; none; and one that is too short, which is taken as usual."""
    caches = both(model, LADDERS["int4"])
    for cache in caches:
        feed(model, cache, ids(90), attention_mask=padded(90, 8, 3))
    recorded = []
    for i in range(12):
        mask = padded(91 + i, *((0, 0) if i in (7, 8) else (8, 3)))
        if i in (4, 6):
            mask[1, 20:60] = 0
        if i == 10:
            mask = mask[:, :-2]
        got, want = (feed(model, cache, ids(1, seed=i), attention_mask=mask) for cache in caches)
        close(got, want)
        recorded.append(counts.recorded)
    assert recorded == [0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3]
    assert counts.replayed == 6 + 1 + 1


@pytest.mark.parametrize("pad", [(0, 0), (37, 0)])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt_oss"])
def test_layers_of_a_sliding_window(counts: SimpleNamespace, family: str, pad: tuple[int, int]) -> None:
    """Each step sees its own newest tokens; pages that are seen no more are forgotten."""
    local = tiny(family, head_dim=64, hidden_size=64, sliding_window=40).to(DEVICE, DTYPE)
    caches = both(local, EXACT)
    for cache in caches:
        feed(local, cache, ids(90), attention_mask=padded(90, *pad))
    for i in range(40):
        mask = padded(91 + i, *pad)
        got, want = (feed(local, cache, ids(1, seed=i), attention_mask=mask) for cache in caches)
        close(got, want)
    if family != "gpt_oss" or not CUDA:
        assert counts.replayed > 30
    assert any(layer.engine.forgotten for layer in caches[0].layers)
    for cache in caches:
        cache.crop(-3)
    close(*(feed(local, cache, ids(1), attention_mask=padded(128, *pad)) for cache in caches))
    unpatch(local)


def test_a_window_that_all_tokens_fit_needs_no_mask(counts: SimpleNamespace) -> None:
    local = tiny("mistral", head_dim=64, hidden_size=64, sliding_window=200).to(DEVICE, DTYPE)
    [recorded, launched] = both(local, EXACT, 90)
    one_by_one(local, [recorded, launched], ids(4))
    assert counts.replayed == 3
    assert recorded.steps.place.masks == {}
    for cache in (recorded, launched):
        feed(local, cache, ids(110))
    one_by_one(local, [recorded, launched], ids(3))
    assert list(recorded.steps.place.masks) == [200]
    unpatch(local)
