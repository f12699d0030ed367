"""Repetition: long continuations, greedy or drawn, how many of their n-grams are distinct, and whether they end in a loop.

Greedy text of a language model may fall into loops (Holtzman et al. 2020, arXiv:1904.09751); a compressed cache is said to
bring them on. Texts that loop with one cache only are its doing, so look at the row of the first cache too. Small models loop
in greedy text with any cache: ``temperature`` draws the tokens, from the same seed for every cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Annotated

from pydantic import Field, FiniteFloat, PositiveInt

from argus.hookspecs import hookimpl
from argus.tasks.base import CacheKind, Row, Run, Task, TaskConfig
from argus.tasks.generate import distinct, prompt_ids, stop_ids
from argus.tasks.steps import Clock, decode, forward, ids_of, memory, sampler

REPEATS = 3
"""How often a period must stand at the end of a text to be a loop."""

PROMPTS = (
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain how a bicycle works, part by part.",
    "Describe a day in the life of a baker in a small town.",
)


class RepetitionConfig(TaskConfig):
    """Options of repetition: prompts, tokens to decode after each, at which temperature (0: greedily), orders of the n-grams,
    and the fewest tokens of a loop."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = PROMPTS
    tokens: PositiveInt = 512
    temperature: Annotated[FiniteFloat, Field(ge=0)] = 0
    orders: tuple[PositiveInt, ...] = (1, 2, 3)
    loop: PositiveInt = 32


def loop(tokens: Sequence[int], least: int) -> tuple[int, int] | None:
    """The loop that a text ends in: its period and its length, in tokens; None without any.

    A suffix has period ``p`` where every token equals the one ``p`` before it. The loop is the longest suffix of the smallest
    period whose suffix holds the period three times and has `least` tokens.
    """
    for period in range(1, len(tokens) // REPEATS + 1):
        size = period
        while size < len(tokens) and tokens[-size - 1] == tokens[-size - 1 + period]:
            size += 1
        if size >= max(REPEATS * period, least):
            return period, size
    return None


class Repetition(Task):
    """One row a cache: means over the prompts. Tokens that end a text are not chosen, so that all are equally long."""

    Config = RepetitionConfig

    def run(self, run: Run) -> Iterator[Row]:
        for name, kind in run.caches.items():
            yield {"task": "repetition", "cache": name, **self.row(run, name, kind)}

    def row(self, run: Run, name: str, kind: CacheKind) -> Row:
        """The figures of one cache; its memory is that of the longest text."""
        config: RepetitionConfig = self.config
        clock = Clock(run.device)
        sizes: dict[int, Row] = {}
        texts: list[list[int]] = []
        for number, prompt in enumerate(config.prompts, 1):
            run.tell(f"repetition: {config.tokens} tokens, prompt {number} of {len(config.prompts)}, {name}")
            ids, cache = prompt_ids(run, prompt), kind.make(run)
            logits = forward(run, cache, ids_of(run, ids))[:, -1]
            choose = sampler(config.temperature, run.seed + number)
            texts += decode(run, cache, logits, config.tokens, clock, stop_ids(run), choose)
            # Tokens read, which a cache that evicts does not hold.
            sizes[len(ids) + config.tokens - 1] = memory(kind.ledger(cache))
        loops = [loop(text, config.loop) for text in texts]
        return {
            "context": max(sizes),
            "samples": len(texts),
            **{f"distinct_{order}": fmean(distinct(text, order) for text in texts) for order in config.orders},
            "loops": sum(found is not None for found in loops) / len(texts),
            "loop_periods": [found and found[0] for found in loops],
            "loop_tokens": [found and found[1] for found in loops],
            **sizes[max(sizes)],
            "decode_tokens_per_s": 1 / clock.median if clock.seconds else None,
            "texts": [run.tokenizer.decode(text) for text in texts],
        }


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"repetition": Repetition}
