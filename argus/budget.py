"""A byte budget: how large stages may be for the measured bits a value to stay within it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf, log, sqrt

import torch
from torch import Tensor

from argus.config import Budget
from argus.engine import LayerCache
from argus.errors import ConfigError
from argus.ledger import Match, measure
from argus.moves import Context
from argus.plan import Plan
from argus.policies.base import RECENT
from argus.turns import age

LEAST, MOST = 2.0**-12, 2.0**12
"""Factors between which stages are scaled: from none of the pages in all but the last to all of them in the first."""


@dataclass(frozen=True)
class Shape:
    """What a model caches: the reach of each layer, key-value heads, numbers a head, and their dtype and device."""

    reaches: tuple[int | None, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Trial:
    """A plan with its stages scaled, and what it takes: measured bits a value, and the pages that each stage holds."""

    plan: Plan
    bits: float
    pages: tuple[int, ...]


def meet(plan: Plan, budget: Budget, shape: Shape) -> Plan:
    """The plan whose stages are scaled until its measured bits a value at the budget's context are just within it.

    The cache is filled with random numbers and measured, all bytes counted, and the factor by which the aging policy scales
    its stages is bisected until one page more would exceed the budget. What depends on the text (line ends, outliers beyond
    a threshold) is not in it.

    Parameters
    ----------
    plan : Plan
    budget : Budget
        Its ``bits`` null: the plan stays as it is.
    shape : Shape

    Raises
    ------
    ConfigError
        If the budget is out of reach, or the policy has nothing to scale.
    """
    asked = budget.bits
    if asked is None:
        return plan
    generator = torch.Generator("cpu").manual_seed(0)
    size = (2, 1, shape.heads, budget.context, shape.head_dim)
    keys, values = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(shape.device, shape.dtype)
    low, high = LEAST, MOST
    under, over = (attempt(plan, factor, keys, values, shape.reaches) for factor in (low, high))
    if under.pages == over.pages:
        raise ConfigError(
            f"budget.bits={asked:g}: this ladder takes {under.bits:.2f} bits whatever its stages hold; allowed: several "
            "stages, all but the last with a capacity, and a context longer than the window, its slack and a page"
        )
    if under.bits > over.bits:  # A ladder that grows takes least where all is in its first stage.
        low, high, under, over = high, low, over, under
    if not under.bits <= asked <= over.bits:
        allowed = f"{ceil(under.bits * 100) / 100:g} to {floor(over.bits * 100) / 100:g}"
        raise ConfigError(f"budget.bits={asked:g} is out of this ladder's reach at {budget.context} tokens; allowed: {allowed}")
    # Moving one page to another stage changes two counts by one each.
    while abs(log(high / low)) > 1e-6 and sum(abs(a - b) for a, b in zip(under.pages, over.pages, strict=True)) > 2:
        middle = sqrt(low * high)
        found = attempt(plan, middle, keys, values, shape.reaches)
        if found.bits <= asked:
            low, under = middle, found
        else:
            high, over = middle, found
    return replace(under.plan, match=describe(under, over, budget.context, asked))


def attempt(plan: Plan, factor: float, keys: Tensor, values: Tensor, reaches: Sequence[int | None]) -> Trial:
    """Scale the stages of `plan` and measure a cache of layers of these reaches that each hold `keys` and `values`.

    The window holds its slack.
    """
    policy, facts = plan.aging.scaled([stage.facts for stage in plan.stages], factor)
    stages = tuple(replace(stage, facts=fact) for stage, fact in zip(plan.stages, facts, strict=True))
    scaled = replace(plan, aging=policy, stages=stages)
    first = max(0, keys.shape[2] - (plan.leaving - 1) * plan.page_size)
    layers = {reach: LayerCache(scaled, reach) for reach in reaches}
    for layer in layers.values():
        layer.write(keys[:, :, :first], values[:, :, :first])
        age([layer], [Context(queries=keys[:, :, max(0, first - RECENT) : first].float())])
        layer.write(keys[:, :, first:], values[:, :, first:])
    own = [measure(layers[reach].tensors(), layers[reach].values) for reach in reaches]
    shared = measure(scaled.shared(), 0)
    bits = 8 * (sum(one.bytes for one in own) + shared.bytes) / sum(one.values for one in own)
    return Trial(scaled, bits, tuple(len(pool) for pool in layers[max(reaches, key=lambda reach: reach or inf)].pools))


def describe(under: Trial, over: Trial, context: int, asked: float) -> Match:
    """How the budget was met."""
    plan = under.plan
    names = [stage.facts.name for stage in plan.stages]
    capacities = [None if s.facts.capacity is None else s.facts.capacity * plan.page_size for s in plan.stages]
    return Match(
        asked=asked,
        context=context,
        reached=under.bits,
        next=over.bits,
        pages=dict(zip(names, under.pages, strict=True)),
        capacities=dict(zip(names, capacities, strict=True)),
        aging=plan.aging.config.model_dump(),
    )
