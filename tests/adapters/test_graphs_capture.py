"""What is recorded itself: graphs that are refused, memory that they share, and garbage meanwhile."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from argus.adapters import graphs
from tests.adapters.recording import CUDA, DEVICE, LADDERS, both, counts, ids, model, one_by_one

__all__ = ["counts", "model"]


def test_what_a_graph_refuses_is_told_and_taken_as_usual(
    model: Any, counts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(call: Callable[[], Any], stream: Any, beside: Any) -> tuple[Any, Any]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", refuse)
    caches = both(model, LADDERS["int4"], 90)
    with caplog.at_level(logging.WARNING):
        one_by_one(model, caches, ids(6, seed=6))
    told = [record for record in caplog.records if "not recorded" in record.message]
    assert len(told) == 1


def test_what_failed_lends_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lent = []

    def capture(call: Callable[[], Any], stream: Any, beside: Any) -> tuple[Any, Any]:
        lent.append(beside)
        return "graph", call()

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(graphs, "capture", capture)
    recorder = graphs.Recorder()
    recorder.record(dict)
    with pytest.raises(RuntimeError, match="out of memory"):
        recorder.record(fail)
    recorder.record(dict)
    assert lent == [None, "graph", None]


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_recording_follows_one_that_failed() -> None:
    recorder, x = graphs.Recorder(), torch.ones(8, device=DEVICE)
    recorder.record(lambda: x + 1)
    with pytest.raises(RuntimeError):
        recorder.record(lambda: (x + 2).item())
    graph, made = recorder.record(lambda: x + 3)
    graph.replay()
    assert made.tolist() == [4.0] * 8


class Ring:
    """Garbage that holds a graph: only a collection frees it."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.ring = graph, self


@pytest.fixture
def eager_collection():
    """The collector looks at what is new whenever anything is made."""
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*before)


def test_no_garbage_is_collected_meanwhile(eager_collection: None) -> None:
    with graphs.uncollected():
        ring = weakref.ref(Ring(None))
        made = [[i] for i in range(1000)]
        assert ring() is not None
    made = [[i] for i in range(1000)]
    assert ring() is None
    assert len(made) == 1000
    with pytest.raises(RuntimeError), graphs.uncollected():
        raise RuntimeError
    assert gc.isenabled()


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_graph_that_is_garbage_spoils_no_other(eager_collection: None) -> None:
    x = torch.ones(8, device=DEVICE)
    old = [graphs.capture(lambda: x + 1)[0]]

    def call() -> torch.Tensor:
        Ring(old.pop())
        made = [[i] for i in range(1000)]
        return x + len(made)

    graph, y = graphs.capture(call)
    graph.replay()
    assert y.tolist() == [1001.0] * 8
