"""What is compared: a model, how it keeps what it has read, and how many bytes that takes."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from argus.caches.quantized import inner_tensors
from argus.ledger import total_bytes
from argus.tasks.base import CacheKind, Run
from argus.tasks.steps import Clock, forward
from benchmarks.comparison.data import Batch

TIMED = 32
"""Decoded tokens that a speed is the median of."""


class Memory(ABC):
    """What one model has read of one batch."""

    @abstractmethod
    def read(self, tokens: Tensor) -> Tensor:
        """Read ``[B, S]`` more tokens: logits ``[B, V]`` after the last of them."""

    @abstractmethod
    def bytes(self) -> int:
        """Bytes kept now: the sum of unique storages."""


class Cached(Memory):
    """A transformer with a cache."""

    def __init__(self, run: Run, kind: CacheKind) -> None:
        self.run, self.kind, self.held = run, kind, kind.make(run)

    def read(self, tokens: Tensor) -> Tensor:
        return forward(self.run, self.held, tokens)[:, -1]

    def bytes(self) -> int:
        return self.kind.ledger(self.held).bytes


class Recurrent(Memory):
    """A Mamba with its states. What follows the first call is read one token at a time: its scan begins from nothing."""

    def __init__(self, model: Any) -> None:
        self.model, self.held = model, None

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        for piece in [tokens] if self.held is None else tokens.split(1, 1):
            out = self.model(piece, cache_params=self.held, use_cache=True, logits_to_keep=1)
            self.held = out.cache_params
        return out.logits[:, -1]

    def bytes(self) -> int:
        layers = getattr(self.held, "layers", [self.held])
        return total_bytes([tensor for layer in layers for thing in vars(layer).values() for tensor in inner_tensors(thing)])


@dataclass(frozen=True)
class Contestant:
    """One row of the comparison.

    Attributes
    ----------
    model, cache : str
        What the row calls them.
    run : Run or None
        Model, plan and device; None for Mamba.
    kind : CacheKind or None
        The cache; None for Mamba.
    mamba : model or None
    """

    model: str
    cache: str
    run: Run | None = None
    kind: CacheKind | None = None
    mamba: Any = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.mamba.device if self.run is None else self.run.device

    @property
    def vocabulary(self) -> int:
        """Token ids that it knows."""
        return (self.mamba if self.run is None else self.run.model).config.vocab_size

    def begin(self) -> Memory:
        """An empty memory."""
        return Recurrent(self.mamba) if self.run is None or self.kind is None else Cached(self.run, self.kind)


def recall(contestant: Contestant, batch: Batch) -> float:
    """Share of questions answered by the likeliest token, the right answers to earlier questions given."""
    memory = contestant.begin()
    tokens = batch.tokens.to(contestant.device)
    memory.read(tokens[:, : batch.context])
    right = 0
    for place in range(batch.context, tokens.shape[1], 2):
        right += int((memory.read(tokens[:, place : place + 1]).argmax(-1) == tokens[:, place + 1]).sum())
        memory.read(tokens[:, place + 1 : place + 2])
    return right / batch.answers.numel()


def cost(contestant: Contestant, length: int, seed: int) -> tuple[int, float]:
    """Bytes kept of one sequence of `length` random tokens, and tokens a second over the last 32, decoded one by one."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(contestant.vocabulary, (1, length), generator=draw).to(contestant.device)
    memory, clock = contestant.begin(), Clock(contestant.device)
    memory.read(tokens[:, :-TIMED])
    for place in range(length - TIMED, length):
        with clock.timed():
            memory.read(tokens[:, place : place + 1])
    return memory.bytes(), 1 / statistics.median(clock.seconds)
