"""Decode steps that are recorded: the same answers as steps that are not, and never where they would be others."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argus import ArgusCache, turns, unpatch
from argus.adapters import graphs
from argus.backends.cpu import CpuBackend
from argus.backends.triton.backend import TritonBackend
from tests.adapters.recording import CUDA, DEVICE, LADDERS, both, close, counts, feed, ids, model, one_by_one

__all__ = ["counts", "model"]


@pytest.mark.parametrize("ladder", LADDERS)
def test_generate_answers_the_same(model: Any, counts: SimpleNamespace, ladder: str) -> None:
    answers = [
        model.generate(ids(150), past_key_values=cache, max_new_tokens=100, do_sample=False, pad_token_id=0)
        for cache in both(model, LADDERS[ladder])
    ]
    # In 16 bits two answers part where two words are as likely.
    assert torch.equal(*answers) or CUDA
    assert counts.replayed > 60
    assert counts.recorded <= 2 + 100 // 16
    assert counts.beside == counts.recorded - 1


@pytest.mark.parametrize("ladder", LADDERS)
def test_what_a_cache_is_asked_between_steps(model: Any, counts: SimpleNamespace, ladder: str) -> None:
    """Tokens cropped, rows chosen, several tokens at once: what was recorded is not replayed where it does not hold."""
    caches = both(model, LADDERS[ladder], 170)
    one_by_one(model, caches, ids(9, seed=6))
    for change in (
        lambda cache: cache.crop(-2),
        lambda cache: feed(model, cache, ids(3, seed=7)),
        lambda cache: cache.crop(-40),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0], device=DEVICE)),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 2], device=DEVICE)),
    ):
        for cache in caches:
            change(cache)
        tokens = ids(7, rows=caches[0].layers[0].batch_size, seed=8)
        one_by_one(model, caches, tokens)
    assert counts.recorded >= 4
    for cache in caches:
        cache.reset()
        feed(model, cache, ids(100))
    one_by_one(model, caches, ids(5, seed=9))


def test_a_crop_in_the_window_is_replayed_on(model: Any, counts: SimpleNamespace) -> None:
    caches = both(model, LADDERS["int4"], 90)
    one_by_one(model, caches, ids(6, seed=6))
    for cache in caches:
        cache.crop(-3)
    one_by_one(model, caches, ids(6, seed=7))
    assert counts.recorded == 1
    assert counts.replayed == 11


def test_queries_of_a_replayed_step_are_told(model: Any, counts: SimpleNamespace) -> None:
    """Whatever was taken as usual since it was recorded."""
    caches = both(model, LADDERS["salience"], 170)
    one_by_one(model, caches, ids(4, seed=6))
    close(*(feed(model, cache, ids(2, seed=7)) for cache in caches))
    held = len(caches[0].layers[0].engine.where)
    one_by_one(model, caches, ids(caches[0].layers[0].engine.room, seed=8))
    assert len(caches[0].layers[0].engine.where) > held
    assert counts.recorded == 1
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert one.engine.salience == pytest.approx(other.engine.salience, rel=1e-2)
        assert all(one.engine.salience)


def test_tokens_that_a_crop_may_take_back_stay_in_the_window(model: Any, counts: SimpleNamespace) -> None:
    caches = both(model, LADDERS["recency"], 100)
    for cache in caches:
        cache.activate_past_recording()
    one_by_one(model, caches, ids(3, seed=6))
    for i in range(40):
        if i % 10 == 0:
            for cache in caches:
                cache.crop(-1)
        one_by_one(model, caches, ids(1, seed=7 + i))
        assert len({len(one.engine.where) for cache in caches for one in cache.layers}) == 1
    assert counts.replayed > 30


def test_a_turn_that_was_broken_off_between_layers(
    model: Any, counts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of other lengths than the first layer's are not written as that one."""
    options = [*LADDERS["recency"], "tiers.block_pages=1"]
    monkeypatch.setattr(TritonBackend, "at_once", 0)
    recorded = ArgusCache(model, options)
    feed(model, recorded, ids(100))
    take, turn = turns.take, []

    def broken(found: list[turns.Turn]) -> None:
        turn.append(found)
        if len(turn) == 2:
            raise RuntimeError("out of memory")
        take(found)

    monkeypatch.setattr(turns, "take", broken)
    while recorded.layers[0].engine.room > 1:
        feed(model, recorded, ids(1, seed=6))
    with pytest.raises(RuntimeError, match="out of memory"):
        feed(model, recorded, ids(1, seed=7))
    assert counts.replayed
    monkeypatch.setattr(turns, "take", take)
    assert len({len(one.engine.window) for one in recorded.layers}) == 2
    launched = copy.deepcopy(recorded)
    launched.steps = None
    one_by_one(model, [recorded, launched], ids(6, seed=50))


@pytest.mark.parametrize("how", ["reset", "crop", "cut"])
def test_pages_that_are_forgotten_are_freed(model: Any, counts: SimpleNamespace, how: str) -> None:
    cache = ArgusCache(model, LADDERS["ladder"])
    feed(model, cache, ids(200))
    for i in range(4):
        feed(model, cache, ids(1, seed=i))
    held = [weakref.ref(tensor) for one in cache.layers for _, tensor in one.engine.tensors()]
    if how == "reset":
        cache.reset()
    else:
        cache.crop(-cache.get_seq_length() if how == "crop" else -150)
    gc.collect()
    kept = {id(tensor) for _, tensor in cache.tensors()}
    assert all(ref() is None or id(ref()) in kept for ref in held)


@pytest.fixture
def unfollowed(monkeypatch: pytest.MonkeyPatch, counts: SimpleNamespace) -> None:
    """No recording can be told of pages that moved."""
    monkeypatch.setattr(TritonBackend if CUDA else CpuBackend, "follow", lambda self, old, new: False)


@pytest.mark.parametrize("ladder", ["int4", "ladder", "recency", "slack", "salience"])
def test_what_was_recorded_is_told_of_pages_that_move(model: Any, counts: SimpleNamespace, ladder: str) -> None:
    """Anchors find room for a while, and stages are full already."""
    caches = both(model, LADDERS[ladder], 300)
    one_by_one(model, caches, ids(4, seed=6))
    moved = len(caches[0].layers[0].engine.where)
    one_by_one(model, caches, ids(70, seed=7))
    turns = len(caches[0].layers[0].engine.where) - moved
    assert turns
    assert counts.recorded <= (1 if ladder in ("int4", "recency") else 1 + turns // 2)
    assert counts.replayed >= 70


def test_a_step_before_which_nothing_moved_and_one_after(model: Any, counts: SimpleNamespace) -> None:
    """The buffers that a recording writes to and reads stay where they are."""
    [cache, _] = both(model, LADDERS["int4"], 90)
    feed(model, cache, ids(1, seed=6))
    engine = cache.layers[1].engine
    before, places = engine.held(), len(engine.where)
    for i in range(70):
        feed(model, cache, ids(1, seed=i))
    assert len(engine.where) > places
    assert engine.held().window is before.window
    assert engine.held().segments is not before.segments


@pytest.mark.usefixtures("unfollowed")
def test_the_first_step_after_pages_moved_is_recorded(model: Any, counts: SimpleNamespace) -> None:
    cache = ArgusCache(model, [*LADDERS["int4"], "anchors=none"])
    feed(model, cache, ids(90))
    recorded = []
    for i in range(60):
        moved = len(cache.layers[0].engine.where)
        feed(model, cache, ids(1, seed=i))
        recorded.append((counts.recorded, len(cache.layers[0].engine.where) - moved))
    turn = [moves for _, moves in recorded].index(1)
    assert [number for number, _ in recorded[:2]] == [0, 1]
    assert [number for number, _ in recorded[turn - 1 : turn + 3]] == [1, 1, 2, 2]
    assert counts.replayed == len(recorded) - 1


@pytest.mark.usefixtures("unfollowed")
def test_a_step_that_cannot_be_recorded_yet_is_taken_as_usual(
    model: Any, counts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other pages may need a kernel that has not been compiled."""
    real, asked = graphs.capture, []

    def refuse(call: Callable[[], Any], stream: Any, beside: Any) -> tuple[Any, Any]:
        asked.append(beside)
        if len(asked) == 2:
            raise RuntimeError("not compiled for this yet")
        return real(call, stream, beside)

    monkeypatch.setattr(graphs, "capture", refuse)
    caches = both(model, LADDERS["int4"], 90)
    with caplog.at_level(logging.WARNING):
        one_by_one(model, caches, ids(60, seed=6))
    assert len(asked) == 3
    assert counts.recorded == 2
    assert not caplog.records


def test_copies_record_for_themselves(model: Any, counts: SimpleNamespace) -> None:
    caches = both(model, LADDERS["int4"], 90)
    one_by_one(model, caches, ids(4, seed=6))
    copies = copy.deepcopy(caches)
    one_by_one(model, copies, ids(4, seed=7))
    one_by_one(model, caches, ids(4, seed=8))
    assert counts.recorded == 2
    assert counts.beside == 1


def test_a_copy_of_the_model_records_its_own_steps(model: Any, counts: SimpleNamespace) -> None:
    caches = both(model, LADDERS["int4"], 90)
    one_by_one(model, caches, ids(4, seed=6))
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.mul_(0.5)
    one_by_one(other, caches, ids(4, seed=7))
    feed(other, ArgusCache(other, LADDERS["int4"]), ids(90))
    unpatch(other)
    assert "forward" not in vars(other)


def test_what_steps_hold_is_in_the_ledger(model: Any, counts: SimpleNamespace) -> None:
    recorded, launched = both(model, LADDERS["int4"], 90)
    for cache in (recorded, launched):
        for _ in range(3):
            feed(model, cache, ids(1, seed=6))
    assert counts.replayed
    held = {tensor.data_ptr() for _, tensor in recorded.tensors()}
    assert {tensor.data_ptr() for tensor in recorded.steps.tensors()} <= held
    assert recorded.ledger().bytes > launched.ledger().bytes


def test_steps_that_are_special_are_not_recorded(model: Any, counts: SimpleNamespace) -> None:
    assert model(ids(1), past_key_values=ArgusCache(model, LADDERS["int4"]), output_hidden_states=True).hidden_states
    cache = ArgusCache(model, LADDERS["int4"])
    feed(model, cache, ids(90))
    for _ in range(3):
        feed(model, cache, ids(1), output_hidden_states=True)
        model(ids(1), past_key_values=cache)  # with gradients
        model.train()
        feed(model, cache, ids(1))
        model.eval()
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        feed(model, cache, ids(1))
    assert len(seen) == 3
    handle.remove()
    assert counts.recorded == 0


def test_another_form_of_inputs_is_recorded_anew(model: Any, counts: SimpleNamespace) -> None:
    caches = both(model, LADDERS["int4"], 90)
    one_by_one(model, caches, ids(3, seed=6))
    for options in ({"logits_to_keep": 1}, {"position_ids": torch.full((1, 1), 93, device=DEVICE)}):
        got, want = (feed(model, cache, ids(1), **options) for cache in caches)
        close(got, want)
    assert counts.recorded == 1


def test_a_model_that_counts_positions_itself_is_not_recorded(model: Any, counts: SimpleNamespace) -> None:
    whole = model.forward

    def forward(input_ids: torch.Tensor, past_key_values: Any = None, use_cache: Any = None) -> Any:
        return whole(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    model.forward = forward
    caches = both(model, LADDERS["int4"], 90)
    one_by_one(model, caches, ids(4, seed=6))
    assert counts.recorded == 0
    unpatch(model)
    assert model.forward is forward


def test_models_with_chunks_are_not_recorded(model: Any) -> None:
    model.config.layer_types = ["chunked_attention"] * 3
    model.config.attention_chunk_size = 16
    cache = ArgusCache(model, "int4")
    assert cache.steps is None
    assert [layer.engine.reach for layer in cache.layers] == [16] * 3


def test_the_model_gets_its_forward_back(model: Any) -> None:
    cache = ArgusCache(model, "int4")
    assert "forward" in vars(model)
    unpatch(model)
    assert "forward" not in vars(model)
    assert cache.steps.graph is None


def test_steps_go_on_outside_of_inference_mode(model: Any, counts: SimpleNamespace) -> None:
    caches = both(model, LADDERS["int4"], 90)
    with torch.inference_mode():
        one_by_one(model, caches, ids(6, seed=6))
    begun = counts.recorded
    one_by_one(model, caches, ids(9, seed=7))
    assert counts.recorded > begun


def test_pages_that_moved_in_inference_mode_move_on_outside_of_it(model: Any, counts: SimpleNamespace) -> None:
    """A replayed step writes nothing from Python that would copy them."""
    caches = both(model, [*LADDERS["ladder"], "anchors=none", "tiers.stages.int4.capacity=160"], 170)
    one_by_one(model, caches, ids(4, seed=6))
    with torch.inference_mode():
        one_by_one(model, caches, ids(40, seed=7))
    begun = counts.recorded
    one_by_one(model, caches, ids(60, seed=8))
    assert counts.recorded > begun


def test_hidden_states_that_a_config_asks_for_are_copies(model: Any, counts: SimpleNamespace) -> None:
    """The next step does not change them."""
    caches = both(model, LADDERS["int4"], 90)
    model.config.output_hidden_states = True
    kept = []
    with torch.no_grad():
        for place in range(6):
            kept.append([model(ids(6, seed=6)[:, place : place + 1], past_key_values=cache).hidden_states for cache in caches])
    for pair in kept:
        for got, want in zip(*pair, strict=True):
            close(got, want)
