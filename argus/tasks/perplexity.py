"""Perplexity of real prose after a compressed context, and speed: every cache on the same text in one run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from pydantic import PositiveInt
from torch import Tensor

from argus.hookspecs import hookimpl
from argus.tasks.base import Row, Run, Task, TaskConfig
from argus.tasks.steps import Clock, feed, ids_of, memory, prose, score


class PerplexityConfig(TaskConfig):
    """Options of perplexity: tokens of context, tokens scored, windows of text, and tokens decoded for the speed."""

    context: PositiveInt = 2048
    scored: PositiveInt = 256
    windows: PositiveInt = 2
    decoded: PositiveInt = 32


def window(run: Run, length: int, number: int) -> Tensor:
    """Token ids ``[1, length]`` of window `number` of the prose; where it starts varies with the seed."""
    text = prose()
    size = length * 8
    draw = random.Random(f"{run.seed} {number}")
    start = text.index(" ", draw.randrange(len(text) - size - 100))
    tokens = run.tokenizer(text[start : start + size], add_special_tokens=False).input_ids
    return ids_of(run, tokens[:length])


class Perplexity(Task):
    """Change in negative log-likelihood and divergence, against the first cache of the run."""

    Config = PerplexityConfig

    def run(self, run: Run) -> Iterator[Row]:
        yield from (row for row, _ in self.rows(run))

    def rows(self, run: Run) -> Iterator[tuple[Row, Any]]:
        """Rows, and with each the cache as it stood after its last context."""
        config = self.config
        prefill = {name: Clock(run.device) for name in run.caches}
        steps = {name: Clock(run.device) for name in run.caches}
        changes: dict[str, list[tuple[float, float]]] = {name: [] for name in run.caches}
        held: dict[str, Any] = {}
        sizes: dict[str, Row] = {}
        for number in range(config.windows):
            ids = window(run, config.context + config.scored, number)
            reference = None
            for name, kind in run.caches.items():
                run.tell(f"perplexity: {config.context} tokens, text {number + 1} of {config.windows}, {name}")
                held[name] = kind.make(run)
                with prefill[name].timed():
                    feed(run, held[name], ids[:, : config.context])
                sizes[name] = memory(kind.ledger(held[name]))
                found = score(run, held[name], ids[:, config.context :])
                reference = reference or found
                changes[name].append((found.nll - reference.nll, found.kl(reference)))
        speeds(run, held, config.decoded, steps)
        for name in run.caches:
            dnll, kl = (sum(pair[i] for pair in changes[name]) / config.windows for i in (0, 1))
            yield (
                {
                    "task": "perplexity",
                    "cache": name,
                    "context": config.context,
                    "samples": config.windows * (config.scored - 1),
                    **sizes[name],
                    "dnll": dnll,
                    "kl": kl,
                    "prefill_tokens_per_s": config.context / prefill[name].median,
                    "decode_tokens_per_s": 1 / steps[name].median,
                    "slowest_step_over_median": max(steps[name].seconds) / steps[name].median,
                },
                held[name],
            )


def speeds(run: Run, held: dict[str, Any], tokens: int, clocks: dict[str, Clock]) -> None:
    """Decode token by token with every cache in turn, so that a busy machine slows all alike."""
    last = dict.fromkeys(held, 0)
    run.tell(f"speed: {tokens} tokens with each cache in turn")
    for _ in range(tokens):
        for name, cache in held.items():
            with clocks[name].timed():
                last[name] = int(feed(run, cache, ids_of(run, [last[name]])).argmax())


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"perplexity": Perplexity}
