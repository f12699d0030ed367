"""Fidelity: what each stage holds, its measured bytes, and the cosine of what it reads back with its source."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import PositiveInt
from torch import Tensor
from transformers.cache_utils import Cache

from argus.adapters.huggingface import ArgusCache
from argus.blocks import EXACT, payload_of
from argus.caches import Half
from argus.engine import LayerCache
from argus.hookspecs import hookimpl
from argus.ledger import measure
from argus.pages import to_pages
from argus.plan import Plan, Stage
from argus.tasks.base import Row, Run, Task, TaskConfig
from argus.tasks.perplexity import window
from argus.tasks.steps import feed
from argus.tiers.base import ROLES, Role


class FidelityConfig(TaskConfig):
    """Options of fidelity: tokens of context."""

    context: PositiveInt = 2048


class Fidelity(Task):
    """One row a stage of the run's first cache with a ladder, else of the run's own, for prose of ``context`` tokens."""

    Config = FidelityConfig

    def run(self, run: Run) -> Iterator[Row]:
        name, plan = next(ladders(run), ("argus", run.plan))
        yield from stage_rows(name, *self.caches(run, name, plan))

    def caches(self, run: Run, name: str, plan: Plan) -> tuple[ArgusCache, Cache]:
        """A cache of `plan` and its source, a dense cache of 16 bits, both with the same context."""
        ids = window(run, self.config.context, 0)
        held, source = ArgusCache(run.model, plan=plan), Half().make(run)
        for called, cache in ((name, held), ("fp16", source)):
            run.tell(f"fidelity: {self.config.context} tokens, {called}")
            feed(run, cache, ids)
        return held, source


def ladders(run: Run) -> Iterator[tuple[str, Plan]]:
    """The run's caches that have a ladder, by name."""
    for name, kind in run.caches.items():
        plan = kind.plan(run)
        if plan is not None:
            yield name, plan


def stage_rows(name: str, held: ArgusCache, source: Cache) -> list[Row]:
    """One row a stage of the cache `name`: pages and tokens a layer, bytes of all layers, cosines of the tokens it codes."""
    rows: list[Row] = []
    layers: list[LayerCache] = [layer.engine for layer in held.layers]
    named = list(held.tensors())
    for place, stage in enumerate(held.plan.stages):
        pages = sum(len(layer.pools[place]) for layer in layers)
        tokens = pages * held.plan.page_size
        batch, heads, dim = layers[0].shape or (0, 0, 0)
        values = batch * heads * (dim + layers[0].value_dim) * tokens
        ledger = measure(((n, x) for n, x in named if n == f"stage.{place}"), values)
        row: Row = {
            "task": "fidelity",
            "cache": name,
            "context": held.get_seq_length(),
            "stage": stage.facts.name,
            "tier": tier_names(stage),
            "pages": pages / len(layers),
            "tokens": tokens / len(layers),
            "bytes": ledger.bytes,
            "bits_per_value": ledger.bits_per_value,
        }
        for role in ROLES:
            row[f"cosine_{role}"] = cosine(layers, [getattr(layer, role) for layer in source.layers], place, role)
        rows.append(row)
    return rows


def tier_names(stage: Stage) -> str:
    """The tiers of a stage, keys before values where they differ."""
    names = [type(stage.tier(role)).__name__.lower() for role in ROLES]
    return names[0] if names[0] == names[1] else "/".join(names)


@torch.inference_mode()
def cosine(layers: list[LayerCache], sources: list[Tensor], place: int, role: Role) -> float | None:
    """Mean cosine, a token and head, of what a stage reads back with its source; None for an empty stage."""
    total, count = 0.0, 0
    for layer, source in zip(layers, sources, strict=True):
        size = layer.plan.page_size
        tier = layer.plan.stages[place].tier(role)
        paged = to_pages(source[:, :, : len(layer.where) * size], size) if layer.where else source[:0]
        for slab, pages in layer.pools[place].blocks():
            read = layer.outliers[role].over(tier.decode(payload_of(slab, role), role), pages)
            close = torch.cosine_similarity(read, paged[pages].float(), dim=-1)
            coded = ~slab[EXACT] if EXACT in slab else torch.ones_like(close, dtype=torch.bool)
            total += float(close[coded].sum())
            count += int(coded.sum())
    return total / count if count else None


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"fidelity": Fidelity}
