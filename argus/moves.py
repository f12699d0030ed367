"""A page's birth and its moves: what stays exact, what is encoded, and for which stage. Nothing here holds anything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from argus.blocks import EXACT
from argus.errors import PluginError
from argus.pages import Slab, positions, smooth, to_pages
from argus.plan import Plan
from argus.policies.base import UNKNOWN, NewPages, check_chosen, salience
from argus.tiers.base import ROLES, Role
from argus.window import Window


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

    def since(self, tokens: int) -> Context:
        """The same of later pages: the first `tokens` of those known come before them."""
        return self if self.tokens is None or tokens == 0 else replace(self, tokens=self.tokens[:, tokens:])

    @property
    def shapes(self) -> tuple[torch.Size | None, ...]:
        """Of each tensor."""
        return tuple(None if x is None else x.shape for x in (self.tokens, self.padding, self.queries))


def together(known: Sequence[Context], start: int) -> Context:
    """What is known of all rows of several layers, side by side; tokens from position `start` on."""
    return Context(
        joined([one.since(start).tokens for one in known]),
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
        found = plan.outliers.choose(x, role)
        if found is not None:
            check_chosen(found, x.shape, plan.outliers, broadcasts=False)
            outlying[role] = found if kept is None else found & ~kept.unsqueeze(-1)
        rests[role] = smooth(x, kept, outlying.get(role))
    encoded = []
    for target in sorted(set(targets)):
        rows = [i for i, t in enumerate(targets) if t == target]
        where = positions(rows, keys)
        payload: Slab = {} if kept is None else {EXACT: kept[where]}
        for role in ROLES:
            codes = encode(plan, target, rests[role][where], role)
            check_payload(codes, f"stage '{plan.stages[target].facts.name}' keeps {role}", (len(rows), keys.shape[1]))
            payload |= {f"{role}.{name}": tensor for name, tensor in codes.items()}
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


def chosen_tokens(plan: Plan, keys: Tensor, values: Tensor, start: int, known: Context) -> Tensor | None:
    """Tokens ``[n, B, H, P]`` that the anchor policies keep exact; None where there is no policy.

    They see `block_pages` pages at once: several such blocks as so many batch rows.
    """
    if not plan.anchors:
        return None
    whole = len(keys) - len(keys) % plan.block_pages
    found = []
    for begin, end, size in ((0, whole, plan.block_pages), (whole, len(keys), len(keys) - whole)):
        if begin < end:
            count, first = (end - begin) // size, begin * plan.page_size
            pages = new_pages(keys[begin:end], values[begin:end], start + first, known.since(first), count)
            found.append(as_blocks(chosen(plan, pages), count))
    return torch.cat(found)


def new_pages(keys: Tensor, values: Tensor, start: int, known: Context, count: int) -> NewPages:
    """Pages ``[count * n, B, H, P, D]`` as policies see them, none taken: `count` blocks as rows of one."""
    (n, rows, heads, size, _), device = keys.shape, keys.device
    n //= count
    positions = torch.arange(start, start + count * n * size, device=device).view(count, n, size).transpose(0, 1)
    padding = known.padding if known.padding is not None else torch.zeros(rows, dtype=torch.long, device=device)
    tokens, queries = known.tokens, known.queries
    if tokens is not None:
        width = max(tokens.shape[1], count * n * size)
        more = width - tokens.shape[1] + (count - 1) * n * size
        later = torch.nn.functional.pad(tokens, (0, more), value=UNKNOWN).unfold(1, width, n * size)
        tokens = later.transpose(0, 1).flatten(0, 1)
    return NewPages(
        as_rows(keys, count),
        as_rows(values, count),
        positions.repeat_interleave(rows, 1),
        repeated(padding, count),
        tokens,
        torch.zeros(n, count * rows, heads, size, dtype=torch.bool, device=device),
        None if queries is None else repeated(queries, count),
    )


def repeated(x: Tensor, count: int) -> Tensor:
    """All rows, so many times."""
    return x if count == 1 else torch.cat([x] * count)


def as_rows(x: Tensor, count: int) -> Tensor:
    """``[count * n, B, ...]`` as ``[n, count * B, ...]``: blocks of pages as batch rows."""
    return x if count == 1 else x.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)


def as_blocks(x: Tensor, count: int) -> Tensor:
    """What :func:`as_rows` was given."""
    return x if count == 1 else x.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1)


def chosen(plan: Plan, pages: NewPages) -> Tensor:
    """Tokens that the anchor policies choose of pages, one policy after another."""
    for policy in plan.anchors:
        found = policy.choose(pages)
        check_chosen(found, pages.taken.shape, policy)
        pages = replace(pages, taken=pages.taken | found)
    return pages.taken


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
