"""The contracts of policies: decisions that are allowed, repeatable, and made without touching what they look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from argus.policies.base import Aging, Anchors, NewPages, Outliers, PageFacts, StageFacts, TextFacts
from argus.testing.base import Contract, normal, options, other_seeds, same, title

LADDERS: tuple[tuple[int | None, ...], ...] = ((None,), (1, None), (2, 1, None), (3, None, 2), (1, 1, 1, 1, 1, 1, 1))
"""Capacities of the stages of each ladder tried, in pages."""
BIRTHS = ((1,) * 12, (5, 1, 3), (40,))
"""Pages that leave the window together, one time after another."""
LINE_END = 7
QUERIES = 3
"""Query tokens given to a policy that asks for them."""


def check_aging(kind: type[Aging], *, config: Mapping[str, Any] | None = None) -> None:
    """Check that an aging policy keeps its contract.

    Every page gets a stage that exists, also when stages are scaled, no page goes back, equal facts get equal answers, and no
    global random state is touched, for ladders of one to seven stages and pages that come one by one or many at once; where
    the policy asks for queries, with pages' salience and without.

    Raises
    ------
    ContractError
        If the contract is broken.
    ConfigError
        If `config` is not what the policy's ``Config`` allows.
    """
    config = config or {}
    contract = Contract(f"aging policy {title(kind, config)}")
    for capacities in LADDERS:
        stages = [StageFacts(f"stage{i}", capacity) for i, capacity in enumerate(capacities)]
        for births in BIRTHS:
            for name, weights in saliences(kind, sum(births)):
                words = contract.at(f"capacities {list(capacities)}, pages born {list(births)}{name}")
                with words.keeps_random_state():
                    held: list[int] = []
                    for born in births:
                        held = grow(words, kind, config, held, born, stages, weights)
                    for factor in (0.1, 1.0, 30.0):
                        require_scaled(words, kind, config, stages, factor, weights)


def saliences(kind: type[Aging], count: int) -> list[tuple[str, list[float]]]:
    """The salience of each of `count` pages, as no query and as some ask for them."""
    nothing = ("", [0.0] * count)
    return [nothing, (", asked for by queries", normal((count,), 4).tolist())] if kind.needs_queries else [nothing]


def grow(
    words: Contract,
    kind: type[Aging],
    config: Mapping[str, Any],
    held: Sequence[int],
    born: int,
    stages: list[StageFacts],
    weights: Sequence[float],
) -> list[int]:
    """Let pages be born and ask where every page goes."""
    before = [*held, *[None] * born]
    facts = [PageFacts(len(before) - 1 - i, stage, weights[i]) for i, stage in enumerate(before)]
    given = list(facts), list(stages)
    found = kind(options(kind, config)).targets(facts, stages)  # type: ignore[arg-type]
    words.require((facts, stages) == given, "changes the lists it is given")
    words.require(isinstance(found, list | tuple), f"answers with a {type(found).__name__}; allowed: a list of stages")
    words.require(len(found) == len(facts), f"{len(found)} answers for {len(facts)} pages")
    for page, (stage, target) in enumerate(zip(before, found, strict=True)):
        fits = type(target) is int and (stage or 0) <= target < len(stages)
        allowed = f"allowed: {stage or 0} to {len(stages) - 1}"
        words.require(fits, f"page {page}, now in stage {stage}, goes to {target!r}; {allowed}")
    with other_seeds(1234):
        again = kind(options(kind, config)).targets(facts, stages)  # type: ignore[arg-type]
    words.require(again == found, "answers otherwise when asked again")
    return list(found)


def require_scaled(
    words: Contract,
    kind: type[Aging],
    config: Mapping[str, Any],
    stages: list[StageFacts],
    factor: float,
    weights: Sequence[float],
) -> None:
    """Scaled, the policy has the same stages and sends pages to them."""
    answer = kind(options(kind, config)).scaled(list(stages), factor)  # type: ignore[arg-type]
    fits = isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Aging) and isinstance(answer[1], list)
    words.require(fits, f"scaled by {factor:g} it answers {answer!r}; allowed: a policy and a list of stages")
    policy, scaled = answer
    names = [stage.name for stage in scaled]
    words.require(names == [stage.name for stage in stages], f"scaled by {factor:g} its stages are {names}")
    facts = [PageFacts(len(weights) - 1 - i, None, weight) for i, weight in enumerate(weights)]
    found = policy.targets(facts, scaled)
    fits = isinstance(found, list | tuple) and len(found) == len(facts)
    fits = fits and all(type(target) is int and 0 <= target < len(stages) for target in found)
    words.require(fits, f"scaled by {factor:g} it sends {len(facts)} pages to {found}; allowed: 0 to {len(stages) - 1}")


def check_anchors(kind: type[Anchors], *, config: Mapping[str, Any] | None = None, text: TextFacts | None = None) -> None:
    """Check that an anchor policy keeps its contract.

    Its choice is bool and fits ``[n, B, H, P]``, is the same when asked again, touches neither what it looks at nor global
    random states, keeps a batch row's choice apart from the others', and can be made with and without token ids, with padding,
    with tokens taken already, and from constant keys and values; where it asks for queries, with them and without.

    Parameters
    ----------
    kind : type of Anchors
    config : mapping, optional
        Options, as a config file would give them.
    text : TextFacts, optional
        By default a tokenizer in which token 7 ends a line.

    Raises
    ------
    ContractError
        If the contract is broken.
    ConfigError
        If `config` is not what the policy's ``Config`` allows.
    """
    config = config or {}
    contract = Contract(f"anchor policy {title(kind, config)}")
    text = text or TextFacts((LINE_END,))
    for shape in ((1, 1, 1, 4, 8), (2, 2, 3, 16, 8), (3, 2, 1, 5, 7)):
        for name, pages in [*new_pages(shape), *(asked_pages(shape) if kind.needs_queries else ())]:
            words = contract.at(f"pages {list(shape)}, {name}")
            fields = ("keys", "values", "positions", "padding", "tokens", "taken", "queries")
            given = {field: getattr(pages, field) for field in fields if getattr(pages, field) is not None}
            before = {field: tensor.clone() for field, tensor in given.items()}
            with words.keeps_random_state():
                found = kind(options(kind, config), text).choose(pages)  # type: ignore[arg-type]
                with other_seeds(1234):
                    again = kind(options(kind, config), text).choose(pages)  # type: ignore[arg-type]
            for field, tensor in given.items():
                words.require_same(tensor, before[field], f"its input '{field}'")
            for choice in (found, again):
                require_choice(words, choice, shape[:4])
            words.require(same(found, again), "chooses otherwise when asked again")
            # Among equal tokens a choice may fall on any.
            if "constant" not in name and "every token" not in name:
                whole = found.expand(shape[:4])
                for row in range(shape[1]):
                    alone = kind(options(kind, config), text).choose(row_of(pages, row))  # type: ignore[arg-type]
                    kept = same(alone.expand(shape[0], 1, *shape[2:4]), whole[:, row : row + 1])
                    words.require(kept, "a batch row's choice depends on the others")


def row_of(pages: NewPages, row: int) -> NewPages:
    """One batch row of pages."""
    keys, values, taken = (x[:, row : row + 1].contiguous() for x in (pages.keys, pages.values, pages.taken))
    positions = pages.positions[:, row : row + 1].contiguous()
    padding, tokens, queries = (
        None if x is None else x[row : row + 1].contiguous() for x in (pages.padding, pages.tokens, pages.queries)
    )
    return NewPages(keys, values, positions, padding, tokens, taken, queries)  # type: ignore[arg-type]


def new_pages(shape: tuple[int, ...]) -> list[tuple[str, NewPages]]:
    """Pages that leave the window, in several circumstances."""
    n, batch, heads, page, _ = shape
    keys, values = normal(shape, 1), normal(shape, 2)
    none = torch.zeros(n, batch, heads, page, dtype=torch.bool)
    some = normal((n, batch, heads, page), 3) > 1
    no_padding, padding = torch.zeros(batch, dtype=torch.long), torch.arange(batch) * 2
    first = torch.arange(n * page).view(n, 1, page).expand(n, batch, page).contiguous()
    later = first + 1000 * torch.arange(1, batch + 1).unsqueeze(-1)
    tokens = torch.arange(batch * (n * page + 3)).view(batch, -1) % 11
    flat = torch.ones(shape)
    return [
        ("token ids not known", NewPages(keys, values, first, no_padding, None, none)),
        ("token ids known", NewPages(keys, values, first, no_padding, tokens, none)),
        ("left padding, some tokens taken", NewPages(keys, values, first, padding, tokens, some)),
        ("far from the start, each row elsewhere", NewPages(keys, values, later, padding, tokens, none)),
        ("constant keys and values", NewPages(flat, flat.clone(), first, no_padding, tokens, none)),
        ("every token taken", NewPages(keys, values, first, no_padding, tokens, ~none)),
    ]


def asked_pages(shape: tuple[int, ...]) -> list[tuple[str, NewPages]]:
    """The pages of :func:`new_pages`, with queries."""
    _, batch, heads, _, dim = shape
    return [
        (f"{name}, with queries", replace(pages, queries=normal((batch, heads, QUERIES, dim), 5)))
        for name, pages in new_pages(shape)
    ]


def require_choice(words: Contract, found: Tensor, shape: tuple[int, ...]) -> None:
    """A choice is bool and broadcasts to `shape`."""
    require_tensor(words, found)
    words.require(found.dtype == torch.bool, f"chooses with {found.dtype}, not torch.bool")
    fits = found.dim() <= len(shape) and all(a in (1, b) for a, b in zip(found.shape[::-1], shape[::-1], strict=False))
    words.require(fits, f"its choice is {list(found.shape)} and does not broadcast to {list(shape)}")


def require_tensor(words: Contract, found: object) -> None:
    """A choice is a tensor."""
    words.require(isinstance(found, Tensor), f"chooses with a {type(found).__name__}, not a tensor")


def check_outliers(kind: type[Outliers], *, config: Mapping[str, Any] | None = None) -> None:
    """Check that an outlier policy keeps its contract.

    Its choice is bool of the pages' shape (or None, then always), is the same when asked again, leaves the pages and global
    random states alone, keeps the choice of a page and of a batch row apart from the others', and takes constant and extreme
    numbers.

    Raises
    ------
    ContractError
        If the contract is broken.
    ConfigError
        If `config` is not what the policy's ``Config`` allows.
    """
    config = config or {}
    contract = Contract(f"outlier policy {title(kind, config)}")
    answers: set[bool] = set()
    for shape in ((1, 1, 1, 4, 8), (2, 2, 3, 16, 8), (3, 2, 1, 5, 7)):
        x = normal(shape)
        spike = x.clone()
        spike[0, 0, 0, 0, 0] = 30000.0
        cases = {"normal": x, "zero": x * 0, "constant": x * 0 + 3, "tiny": x * 1e-7, "one is large": spike}
        for name, pages in cases.items():
            words = contract.at(f"pages {list(shape)}, numbers {name}")
            before = pages.clone()
            with words.keeps_random_state():
                for role in ("keys", "values"):
                    found = ask(kind, config, pages, role)
                    with other_seeds(1234):
                        again = ask(kind, config, pages, role)
                    words.require_same(pages, before, "its input")
                    answers.add(found is None)
                    words.require(len(answers) == 1, "answers None at times; allowed is always or never")
                    if found is None or again is None:
                        continue
                    for choice in (found, again):
                        require_tensor(words, choice)
                    words.require(found.dtype == torch.bool, f"chooses with {found.dtype}, not torch.bool")
                    words.require(found.shape == pages.shape, f"its choice is {list(found.shape)}, not {list(shape)}")
                    words.require(same(found, again), "chooses otherwise when asked again")
                    alone = ask(kind, config, pages[:1].contiguous(), role)
                    words.require(alone is not None and same(alone, found[:1]), "a page's choice depends on its neighbours")
                    alone = ask(kind, config, pages[:, :1].contiguous(), role)
                    kept = alone is not None and same(alone, found[:, :1])
                    words.require(kept, "a batch row's choice depends on the others")


def ask(kind: type[Outliers], config: Mapping[str, Any], pages: Tensor, role: str) -> Tensor | None:
    """The choice of a fresh policy."""
    chosen: Tensor | None = kind(options(kind, config)).choose(pages, role)  # type: ignore[arg-type]
    return chosen
