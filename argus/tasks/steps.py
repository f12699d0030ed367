"""What tasks share: feed a prompt, decode greedily, score a continuation, each timed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from argus.ledger import Ledger
from argus.tasks.base import Row, Run


@dataclass
class Clock:
    """Seconds of each timed piece."""

    device: torch.device
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time a block, the device's work included."""
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self.seconds.append(time.perf_counter() - begin)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def median(self) -> float:
        """The median piece, in seconds; 0 without any."""
        ordered = sorted(self.seconds)
        return ordered[len(ordered) // 2] if ordered else 0.0


def ids_of(run: Run, tokens: list[int]) -> Tensor:
    """Token ids ``[1, T]`` on the run's device."""
    return torch.tensor([tokens], device=run.device)


@torch.inference_mode()
def feed(run: Run, held: Any, ids: Tensor, last: bool = True) -> Tensor:
    """Run the model over `ids` ``[1, T]`` with the cache `held`: logits ``[V]`` of the last token, or of all ``[T, V]``."""
    logits: Tensor = run.model(ids, past_key_values=held, use_cache=True, logits_to_keep=1 if last else 0).logits[0]
    return logits[-1] if last else logits


def decode(run: Run, held: Any, logits: Tensor, tokens: int, clock: Clock | None = None) -> list[int]:
    """Decode `tokens` tokens greedily, the first from `logits`."""
    out = [int(logits.argmax())]
    timer = clock or Clock(run.device)
    while len(out) < tokens:
        with timer.timed():
            logits = feed(run, held, ids_of(run, out[-1:]))
            out.append(int(logits.argmax()))
    return out


@dataclass(frozen=True)
class Scores:
    """Log-probabilities ``[T, V]`` of a continuation and its targets ``[T]``."""

    logits: Tensor
    targets: Tensor

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats a token."""
        return -float(self.logits.gather(1, self.targets[:, None]).mean())

    def kl(self, reference: Scores) -> float:
        """Mean divergence of these next-token distributions from those of `reference`, nats."""
        return float((reference.logits.exp() * (reference.logits - self.logits)).sum(-1).mean())


def score(run: Run, held: Any, ids: Tensor) -> Scores:
    """Score `ids` ``[1, T]`` after what `held` holds; the first token is not scored."""
    logits = feed(run, held, ids[:, :-1], last=False).float().log_softmax(-1)
    return Scores(logits, ids[0, 1:])


def memory(ledger: Ledger) -> Row:
    """The figures of a ledger, as rows name them."""
    return {"cache_bytes": ledger.bytes, "bits_per_value": ledger.bits_per_value, "compression": ledger.compression}


@cache
def prose() -> str:
    """The Python language reference, which every Python carries: about 460 kB of English."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
