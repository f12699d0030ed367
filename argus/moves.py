"""A page's birth and its moves: what stays exact, what is encoded, and for which stage. Nothing here holds anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from argus.blocks import EXACT
from argus.errors import ArgusError, PluginError
from argus.pages import Slab, positions, smooth, to_pages
from argus.plan import Plan
from argus.policies.base import NewPages, check_chosen, salience
from argus.tiers.base import ROLES, Role
from argus.window import Window

SOMETIMES = "the outlier policy answers None for some pages of {role}, not for all"
"""What is said of one."""


@dataclass(frozen=True)
class Context:
    """What is known when pages are born.

    Attributes
    ----------
    tokens : Tensor or None
        ``[B, L]`` token ids from position 0.
    padding : Tensor or None
        ``[B]`` tokens of padding on the left.
    queries : Tensor or None
        As policies are told of them (:class:`argus.policies.base.NewPages`).
    """

    tokens: Tensor | None = None
    padding: Tensor | None = None
    queries: Tensor | None = None

    @property
    def shapes(self) -> tuple[torch.Size | None, ...]:
        """Of each tensor."""
        return tuple(None if x is None else x.shape for x in (self.tokens, self.padding, self.queries))


def together(known: Sequence[Context], start: int) -> Context:
    """What is known of all rows of several layers, side by side; tokens from position `start` on."""
    return Context(
        joined([None if one.tokens is None else one.tokens[:, start:] for one in known]),
        joined([one.padding for one in known]),
        joined([one.queries for one in known]),
    )


def joined(rows: Sequence[Tensor | None]) -> Tensor | None:
    """All rows as one tensor, where there are any."""
    found = [x for x in rows if x is not None]
    return torch.cat(found) if len(found) > 1 else found[0] if found else None


@dataclass(frozen=True)
class Born:
    """What becomes of ``n`` pages that leave the window.

    Attributes
    ----------
    kept : Tensor or None
        ``[n, B, H, P]`` bool, the tokens that anchor policies keep exact; None where there is no policy.
    outlying : dict of str to Tensor
        ``[n, B, H, P, D]`` bool of each role that has outliers.
    encoded : list of (int, dict of str to Tensor, list of int)
        Of each stage that takes some: what it keeps of them, and which of the ``n`` they are.
    """

    kept: Tensor | None
    outlying: dict[Role, Tensor]
    encoded: list[tuple[int, Slab, list[int]]]


def weigh(plan: Plan, window: Window, pages: int, known: Context) -> list[float]:
    """Salience of the window's oldest pages; 0 where the aging policy does not ask for it."""
    if not plan.aging.needs_queries or known.queries is None:
        return [0.0] * pages
    keys, _ = window.first(pages * plan.page_size)
    return salience(to_pages(keys, plan.page_size), known.queries)


def routes(where: Sequence[int], targets: Sequence[int], first: int) -> list[tuple[tuple[int, int], list[int]]]:
    """Pages from `first` on that go from one stage to another, by these, the last stages first."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for page, (source, target) in enumerate(zip(where, targets, strict=True), first):
        if source != target:
            found[source, target].append(page)
    return sorted(found.items(), reverse=True)


def bear(plan: Plan, keys: Tensor, values: Tensor, targets: Sequence[int], start: int, known: Context) -> Born:
    """Encode pages ``[n, B, H, P, D]`` whose first token has position `start`, each straight for its stage in `targets`.

    The tokens that are `known` are those from `start` on.
    """
    kept = chosen_tokens(plan, keys, values, start, known)
    outlying: dict[Role, Tensor] = {}
    rests = {}
    for role, x in zip(ROLES, (keys, values), strict=True):
        chosen = chosen_numbers(plan, x, role)
        if chosen is not None:
            outlying[role] = chosen if kept is None else chosen & ~kept.unsqueeze(-1)
        rests[role] = smooth(x, kept, outlying.get(role))
    encoded = []
    for target in sorted(set(targets)):
        rows = [i for i, t in enumerate(targets) if t == target]
        where = positions(rows, keys)
        payload: Slab = {} if kept is None else {EXACT: kept[where]}
        for role in ROLES:
            found = encode(plan, target, rests[role][where], role)
            check_payload(found, f"stage '{plan.stages[target].facts.name}' keeps {role}", (len(rows), keys.shape[1]))
            payload |= {f"{role}.{name}": tensor for name, tensor in found.items()}
        encoded.append((target, payload, rows))
    return Born(kept, outlying, encoded)


def check_payload(found: Any, said: str, first: tuple[int, int]) -> None:
    """Raise :class:`PluginError` that begins as `said` unless a tier's answer is tensors by name, their `first` axes these."""
    if not isinstance(found, Mapping) or not found:
        raise PluginError(f"{said} as {'no tensor' if found == {} else f'a {type(found).__name__}'}; allowed: tensors by name")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise PluginError(f"{said}.{name} as a {type(tensor).__name__}; allowed: a tensor")
        if tuple(tensor.shape[:2]) != first:
            allowed = f"allowed: [{first[0]}, {first[1]}, ...], pages and batch rows first"
            raise PluginError(f"{said}.{name} as {list(tensor.shape)}; {allowed}")


def blocks(plan: Plan, pages: int) -> list[slice]:
    """Which pages policies see at once."""
    return [slice(begin, begin + plan.block_pages) for begin in range(0, pages, plan.block_pages)]


def chosen_numbers(plan: Plan, x: Tensor, role: Role) -> Tensor | None:
    """Numbers ``[n, B, H, P, D]`` that the outlier policy keeps exact; None where it keeps none.

    Raises
    ------
    ArgusError
        If it answers with None for some pages only.
    """
    found = [plan.outliers.choose(x[block], role) for block in blocks(plan, len(x))]
    chosen = [one for one in found if one is not None]
    if not chosen:
        return None
    if len(chosen) < len(found):
        raise ArgusError(f"{SOMETIMES.format(role=role)}; allowed: always or never")
    for one, block in zip(chosen, blocks(plan, len(x)), strict=True):
        check_chosen(one, x[block].shape, plan.outliers, broadcasts=False)
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def chosen_tokens(plan: Plan, keys: Tensor, values: Tensor, start: int, known: Context) -> Tensor | None:
    """Tokens ``[n, B, H, P]`` that the anchor policies keep exact; None where there is no policy."""
    if not plan.anchors:
        return None
    size, found = plan.page_size, []
    for block in blocks(plan, len(keys)):
        begin = block.start * size
        rest = known if begin == 0 or known.tokens is None else replace(known, tokens=known.tokens[:, begin:])
        found.append(_chosen(plan, keys[block], values[block], start + begin, rest))
    return found[0] if len(found) == 1 else torch.cat(found)


def _chosen(plan: Plan, keys: Tensor, values: Tensor, start: int, known: Context) -> Tensor:
    """Of pages that policies see at once."""
    n, batch, heads, size, _ = keys.shape
    taken = torch.zeros(n, batch, heads, size, dtype=torch.bool, device=keys.device)
    padding = known.padding if known.padding is not None else torch.zeros(batch, dtype=torch.long, device=keys.device)
    numbers = torch.arange(start, start + n * size, device=keys.device).view(n, size)
    for policy in plan.anchors:
        chosen = policy.choose(NewPages(keys, values, numbers, padding, known.tokens, taken, known.queries))
        check_chosen(chosen, taken.shape, policy)
        taken = taken | chosen
    return taken


def encode(plan: Plan, target: int, x: Tensor, role: Role) -> Slab:
    """Pages as stage `target` keeps them, by way of every stage before it if the ladder cascades."""
    first = 0 if plan.cascade else target
    return recode(plan, first, target, plan.stages[first].tier(role).encode(x, role), role)


def recode(plan: Plan, source: int, target: int, payload: Slab, role: Role) -> Slab:
    """What `source` keeps as `target` keeps it, by way of every stage between them if the ladder cascades."""
    for step in range(source + 1, target + 1) if plan.cascade else ((target,) if target != source else ()):
        first, second = plan.stages[source].tier(role), plan.stages[step].tier(role)
        payload, source = plan.backend.recode(first, second, payload, role), step
    return payload
