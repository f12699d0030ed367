"""What tasks share: feed a prompt, decode, score a continuation, each timed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from argus.errors import ConfigError
from argus.ledger import Ledger
from argus.tasks.base import Row, Run

LETTERS, TAIL = 8, 100
"""Letters of the prose that are read for each token, and letters at its end where no passage begins."""


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
        return median(self.seconds) if self.seconds else 0.0


def ids_of(run: Run, *rows: Sequence[int]) -> Tensor:
    """Token ids ``[B, T]`` on the run's device, of `rows` of one length."""
    return torch.tensor([list(row) for row in rows], device=run.device)


@torch.inference_mode()
def forward(run: Run, held: Any, ids: Tensor, last: int = 1) -> Tensor:
    """Run the model over `ids` ``[B, T]`` with the cache `held`: logits ``[B, last, V]`` of the last tokens; 0: of all."""
    logits: Tensor = run.model(ids, past_key_values=held, use_cache=True, logits_to_keep=last).logits
    return logits


def feed(run: Run, held: Any, ids: Tensor, last: bool = True) -> Tensor:
    """What :func:`forward` does, for one row ``[1, T]``: logits ``[V]`` of the last token, or of all ``[T, V]``."""
    logits = forward(run, held, ids, 1 if last else 0)[0]
    return logits[-1] if last else logits


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token ``[B]`` of logits ``[B, V]``."""
    return logits.argmax(-1)


def sampler(temperature: float, seed: int) -> Callable[[Tensor], Tensor]:
    """A chooser of tokens like :func:`greedy` that draws them at a temperature; at 0 it is that."""
    if temperature == 0:
        return greedy
    draw = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        shares = (logits.float().cpu() / temperature).softmax(-1)
        return torch.multinomial(shares, 1, generator=draw)[:, 0].to(logits.device)

    return choose


def decode(
    run: Run,
    held: Any,
    logits: Tensor,
    tokens: int,
    clock: Clock | None = None,
    never: Sequence[int] = (),
    choose: Callable[[Tensor], Tensor] = greedy,
) -> list[list[int]]:
    """Decode `tokens` tokens of every row, the first from `logits` ``[B, V]``; those in `never` are not chosen."""
    timer = clock or Clock(run.device)
    barred = torch.tensor(never, dtype=torch.long, device=run.device)
    out: list[Tensor] = []
    while True:
        out.append(choose(logits.index_fill(-1, barred, -torch.inf)))
        if len(out) == tokens:
            return torch.stack(out, 1).tolist()
        with timer.timed():
            logits = forward(run, held, out[-1][:, None])[:, -1]


@dataclass(frozen=True)
class Change:
    """What a cache costs against another, nats a token: change in negative log-likelihood, and divergence."""

    nll: float
    kl: float


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

    def change(self, reference: Scores) -> Change:
        """What these cost against `reference`."""
        return Change(self.nll - reference.nll, self.kl(reference))


def score(run: Run, held: Any, ids: Tensor) -> Scores:
    """Score `ids` ``[1, T]`` after what `held` holds; the first token is not scored."""
    logits = feed(run, held, ids[:, :-1], last=False).float().log_softmax(-1)
    return Scores(logits, ids[0, 1:])


def memory(ledger: Ledger, rows: int = 1) -> Row:
    """The figures of a ledger, as rows name them: bytes a sequence of a batch of `rows`."""
    figures = {"bits_per_value": ledger.bits_per_value, "compression": ledger.compression}
    return {"cache_bytes": round(ledger.bytes / rows), **figures}


def mean_memory(sizes: Sequence[Row], weights: Sequence[int] | None = None) -> Row:
    """The mean of several caches' figures; compression is of the mean bits."""
    shares = [1] * len(sizes) if weights is None else weights
    means = {
        name: sum(size[name] * share for size, share in zip(sizes, shares, strict=True)) / sum(shares)
        for name in ("cache_bytes", "bits_per_value")
    }
    bits = means["bits_per_value"]
    return {"cache_bytes": round(means["cache_bytes"]), "bits_per_value": bits, "compression": 16 / bits if bits else 0.0}


@cache
def prose() -> str:
    """The Python language reference, which every Python carries: about 460 kB of English."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def passage(tokenizer: Any, length: int, draw: random.Random, more: int = 0) -> list[int]:
    """`length` token ids of the prose from a place that `draw` chooses, and the `more` after them.

    The place depends on `length` alone; at its end the prose begins again.

    Raises
    ------
    ConfigError
        If the prose may be too short.
    """
    text = prose()
    most = (len(text) - TAIL) // LETTERS
    if length + more >= most:
        raise ConfigError(f"{length + more} tokens are more than the prose surely has; allowed: fewer than {most}")
    start = text.index(" ", draw.randrange(len(text) - length * LETTERS - TAIL))
    letters = (text + text)[start : start + (length + more) * LETTERS]
    ids: list[int] = tokenizer(letters, add_special_tokens=False).input_ids
    return ids[: length + more]
