"""Perplexity of real prose, after a compressed context and while decoding, and speed: every cache on the same text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from torch import Tensor

from argus.hookspecs import hookimpl
from argus.tasks.base import Row, Run, Task, TaskConfig
from argus.tasks.steps import Change, Clock, Scores, feed, ids_of, mean_memory, memory, passage, score

WARM = 64
"""Tokens read on a CPU before anything is timed, at most."""


class PerplexityConfig(TaskConfig):
    """Options of perplexity: tokens of context, tokens read at once, all but the first of them scored, windows of text, and
    tokens then decoded one by one."""

    context: PositiveInt = 2048
    scored: Annotated[int, Field(ge=2)] = 256
    windows: PositiveInt = 2
    decoded: PositiveInt = 32


def window(run: Run, length: int, number: int, more: int = 0) -> Tensor:
    """Token ids ``[1, length + more]`` of window `number` of the prose; where it starts varies with the seed and `length`."""
    return ids_of(run, passage(run.tokenizer, length, random.Random(f"{run.seed} {number}"), more))


def warm(run: Run, ids: Tensor) -> None:
    """Take what is slower once in a process: its first pass, and on a GPU each cache's, for which kernels are compiled."""
    kinds = list(run.caches.values())
    if run.device.type == "cpu":
        kinds, ids = kinds[:1], ids[:, :WARM]
    for kind in kinds:
        feed(run, kind.make(run), ids)


class Perplexity(Task):
    """Change in negative log-likelihood and divergence, against the first cache of the run, in two protocols.

    ``dnll`` and ``kl``: the context is compressed, then ``scored`` tokens are read in one piece. What the model computes of
    the context is exact, only what is kept of it is not.

    ``decoded_dnll`` and ``decoded_kl``: the ``decoded`` tokens after these are fed one by one, as if they were written, and
    compressed while they are. Each is computed from what is kept of those before, so that errors can add up; pages move
    on to later stages. With ``context=64`` nearly all that is held was compressed in this way.
    """

    Config = PerplexityConfig

    def run(self, run: Run) -> Iterator[Row]:
        config: PerplexityConfig = self.config
        prefill = {name: Clock(run.device) for name in run.caches}
        steps = {name: Clock(run.device) for name in run.caches}
        at_once: dict[str, list[Change]] = {name: [] for name in run.caches}
        one_by_one: dict[str, list[Change]] = {name: [] for name in run.caches}
        sizes: dict[str, list[Row]] = {name: [] for name in run.caches}
        warm(run, window(run, config.context, 0))
        for number in range(config.windows):
            ids = window(run, config.context + config.scored, number, config.decoded)
            held: dict[str, Any] = {}
            reference = None
            for name, kind in run.caches.items():
                run.tell(f"perplexity: {config.context} tokens, text {number + 1} of {config.windows}, {name}")
                held[name] = kind.make(run)
                with prefill[name].timed():
                    feed(run, held[name], ids[:, : config.context])
                sizes[name].append(memory(kind.ledger(held[name])))
                found = score(run, held[name], ids[:, config.context : config.context + config.scored])
                reference = reference or found
                at_once[name].append(found.change(reference))
            run.tell(f"perplexity: {config.decoded} tokens one by one with each cache in turn")
            for name, change in written(run, held, ids[:, config.context + config.scored - 1 :], steps).items():
                one_by_one[name].append(change)
        for name in run.caches:
            yield {
                "task": "perplexity",
                "cache": name,
                "context": config.context,
                "samples": config.windows * (config.scored - 1),
                **mean_memory(sizes[name]),
                **figures(at_once[name]),
                **{f"decoded_{key}": value for key, value in figures(one_by_one[name]).items()},
                "decoded": config.decoded,
                "decoded_samples": config.windows * config.decoded,
                "prefill_tokens_per_s": config.context / prefill[name].median,
                "decode_tokens_per_s": 1 / steps[name].median,
                "slowest_step_over_median": max(steps[name].seconds) / steps[name].median,
            }


def figures(changes: Sequence[Change]) -> Row:
    """Means of changes over as many tokens each."""
    return {"dnll": fmean(change.nll for change in changes), "kl": fmean(change.kl for change in changes)}


def written(run: Run, held: Mapping[str, Any], ids: Tensor, clocks: Mapping[str, Clock]) -> dict[str, Change]:
    """Feed all but the last of `ids` ``[1, T]`` one by one to every cache in turn, and compare each next token's score.

    In turn, so that a busy machine slows all alike.
    """
    changes: dict[str, list[Change]] = {name: [] for name in held}
    for place in range(ids.shape[1] - 1):
        reference = None
        for name, cache in held.items():
            with clocks[name].timed():
                logits = feed(run, cache, ids[:, place : place + 1], last=False)
            found = Scores(logits.float().log_softmax(-1), ids[0, place + 1 : place + 2])
            reference = reference or found
            changes[name].append(found.change(reference))
    return {name: Change(fmean(one.nll for one in found), fmean(one.kl for one in found)) for name, found in changes.items()}


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"perplexity": Perplexity}
