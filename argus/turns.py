"""A turn: full pages leave the window, and every page moves to the stage that the aging policy gives it.

Layers that are at the same point take their turn together: what is done to their pages is done once, their batch rows side by
side, since each kernel costs as much to launch for one layer's page as for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from argus.blocks import EXACT, payload_of
from argus.engine import LayerCache, home
from argus.errors import ArgusError
from argus.exact import add_tokens
from argus.moves import Context, bear, check_payload, recode, routes, together, weigh
from argus.pages import Slab, to_pages
from argus.plan import Plan
from argus.policies.base import PageFacts, check_targets
from argus.tiers.base import ROLES, Role, bounded, check_range, extent


@dataclass(frozen=True)
class Turn:
    """What one layer is to do.

    Attributes
    ----------
    layer : LayerCache
    known : Context
    targets : list of int
        The stage of each page, oldest first, those that leave the window last.
    weights : list of float
        Salience of those that leave the window.
    """

    layer: LayerCache
    known: Context
    targets: list[int]
    weights: list[float]

    @property
    def kind(self) -> Hashable:
        """Equal for layers that may take their turn together."""
        layer = self.layer
        dtypes = tuple(x.dtype for part in layer.window.parts() for x in part)
        place = (layer.home, layer.shape, layer.value_dim, dtypes, layer.window.start, layer.forgotten)
        return (id(layer.plan), place, self.known.shapes, tuple(layer.where), tuple(self.targets))


def age(layers: Sequence[LayerCache], known: Sequence[Context] = ()) -> None:
    """Let full pages leave the windows of `layers`, and every page move to its stage.

    Parameters
    ----------
    layers : sequence of LayerCache
    known : sequence of Context
        What is known of each; none: nothing is.

    Raises
    ------
    RangeError
        If a page that leaves a window holds NaN, infinity or numbers that no tier can keep; it stays in the window.
    ArgusError
        If a policy or a tier answers with what its contract does not allow.
    """
    alike: dict[Hashable, list[Turn]] = defaultdict(list)
    asked: dict[Hashable, list[int]] = {}
    for layer, own in zip(layers, known or [Context()] * len(layers), strict=True):
        if not layer.due:
            layer.window.settle()
            continue
        with home(layer):
            turn = decide(layer, own, asked)
        alike[turn.kind].append(turn)
    for turns in alike.values():
        least = min(max(1, len(turns[0].weights)), turns[0].layer.plan.block_pages)
        at_once = most_pages(turns[0].layer) // least
        for begin in range(0, len(turns), at_once):
            with home(turns[0].layer):
                take(turns[begin : begin + at_once])


class Turns:
    """Turns of layers that wait for those of others while a pass goes through a model, so that they are taken together.

    Attributes
    ----------
    waiting : dict of LayerCache to Context
        What is known of each that waits, until they have as many pages as are handled at once.
    """

    def __init__(self) -> None:
        self.waiting: dict[LayerCache, Context] = {}
        self._begun = False

    def __deepcopy__(self, memo: dict[int, object]) -> Turns:
        """A copy that is made in the middle of a pass is in none; pages that are due there move after its next one."""
        return Turns()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let turns wait meanwhile, and take what still waits at the end; where what was done fails, none of it."""
        if self._begun:
            yield
            return
        self._begun = True
        try:
            yield
            self.take()
        finally:
            self._begun = False
            self.waiting.clear()

    def add(self, layer: LayerCache, known: Context) -> None:
        """Let the pages of a layer age, now or later."""
        self.waiting[layer] = known
        # One more like this layer would be too many.
        if not self._begun or sum(one.due for one in self.waiting) + layer.due > most_pages(layer):
            self.take()

    def take(self) -> None:
        """Let the pages of all layers that wait age."""
        layers, known = list(self.waiting), list(self.waiting.values())
        self.waiting.clear()
        age(layers, known)


def most_pages(layer: LayerCache) -> int:
    """Pages that are handled at once, of all layers together."""
    plan, (batch, heads, dim) = layer.plan, layer.shape or (1, 1, 1)
    return max(plan.block_pages, plan.backend.at_once // (4 * batch * heads * plan.page_size * max(dim, layer.value_dim)))


def decide(layer: LayerCache, known: Context, asked: dict[Hashable, list[int]]) -> Turn:
    """Forget what no query will see, and find where all other pages go; `asked`: what the aging policy has answered."""
    born, start = layer.due, layer.window.start
    if not layer.patient:
        layer.leave_out()
    born -= (layer.window.start - start) // layer.plan.page_size
    new, first = weigh(layer.plan, layer.window, born, known), layer.forgotten
    stages, weights = (*layer.where[first:], *[None] * born), (*layer.salience[first:], *new)
    key = (id(layer.plan), first, stages, weights)
    if key not in asked:
        asked[key] = targets_of(layer.plan, stages, weights, first)
    return Turn(layer, known, asked[key], new)


def targets_of(plan: Plan, stages: Sequence[int | None], weights: Sequence[float], first: int) -> list[int]:
    """The stages that the aging policy gives to pages from `first` on, which are in these stages."""
    facts, ages = [stage.facts for stage in plan.stages], range(len(stages) - 1, -1, -1)
    targets = plan.aging.targets([PageFacts(*page) for page in zip(ages, stages, weights, strict=True)], facts)
    check_targets(stages, targets, len(facts), first)
    return list(targets)


def take(turns: Sequence[Turn]) -> None:
    """Move the pages of layers that are alike, as one of them is told."""
    layers, plan = [turn.layer for turn in turns], turns[0].layer.plan
    moved = len(turns[0].targets) - len(turns[0].weights)
    at_once = max(1, most_pages(layers[0]) // len(turns))
    for layer in layers:
        layer.blocks.held = None
    move(layers, turns[0].targets[:moved], at_once)
    # Policies see whole blocks, however many are handled at once.
    at_once -= at_once % plan.block_pages if at_once > plan.block_pages else 0
    for begin in range(0, len(turns[0].weights), at_once):
        end = min(begin + at_once, len(turns[0].weights))
        known = together([turn.known for turn in turns], layers[0].window.start)
        leave_window(layers, turns[0].targets[moved + begin : moved + end], [turn.weights[begin:end] for turn in turns], known)
    for layer in layers:
        layer.window.settle()
        layer.tidy()


def move(layers: Sequence[LayerCache], targets: Sequence[int], at_once: int) -> None:
    """Encode held pages for the stages they go to, from what their present stage keeps."""
    plan, where, first = layers[0].plan, layers[0].where, layers[0].forgotten
    for (source, target), pages in routes(where[first:], targets, first):
        for begin in range(0, len(pages), at_once):
            block = pages[begin : begin + at_once]
            slab = side_by_side([layer.pools[source].take(block) for layer in layers])
            payload: Slab = {EXACT: slab[EXACT]} if EXACT in slab else {}
            rows = sum(layer.shape[0] for layer in layers if layer.shape)
            for role in ROLES:
                kept = recode(plan, source, target, payload_of(slab, role), role)
                check_payload(kept, f"stage '{plan.stages[target].facts.name}' keeps {role}", (len(block), rows))
                payload |= {f"{role}.{name}": tensor for name, tensor in kept.items()}
            with kept_whole(layers):
                for layer, own in zip(layers, apart(payload, len(layers)), strict=True):
                    layer.pools[target].add(own, block)
                    layer.pools[source].remove(block)
                    for page in block:
                        layer.where[page] = target


def leave_window(
    layers: Sequence[LayerCache], targets: Sequence[int], weights: Sequence[Sequence[float]], known: Context
) -> None:
    """Encode the oldest pages of the window, each straight for its stage; `weights`: their salience in each layer."""
    one = layers[0]
    size, n, held, start = one.plan.page_size, len(targets), len(one.where), one.window.start
    oldest = zip(*(layer.window.first(n * size) for layer in layers), strict=True)
    given = [to_pages(x[0] if len(layers) == 1 else torch.cat(x), size) for x in oldest]
    largest, (keys, values) = extent(*given), map(bounded, given)
    born = bear(one.plan, keys, values, targets, start, known)
    check_range(largest)  # Waits for all that was launched.
    for layer in layers:
        check_always(layer, born.outlying)
    with kept_whole(layers):
        if born.kept is not None:
            add_tokens([layer.exact for layer in layers], keys, values, start, born.kept)
        for role, x in zip(ROLES, (keys, values), strict=True):
            if role in born.outlying:
                pages, chosen = (tensor.chunk(len(layers), 1) for tensor in (x, born.outlying[role]))
                for layer, own, own_chosen in zip(layers, pages, chosen, strict=True):
                    layer.outliers[role].add(own, own_chosen, held)
        for target, payload, places in born.encoded:
            for layer, kept in zip(layers, apart(payload, len(layers)), strict=True):
                layer.pools[target].add(kept, [held + i for i in places])
        for layer, own_weights in zip(layers, weights, strict=True):
            layer.where += targets
            layer.salience += own_weights
            layer.window.drop(n * size)


@contextmanager
def kept_whole(layers: Sequence[LayerCache]) -> Iterator[None]:
    """Change what layers hold: all of it, or they are torn."""
    for layer in layers:
        layer.torn = True
    yield
    for layer in layers:
        layer.torn = False


def check_always(layer: LayerCache, outlying: Mapping[Role, object]) -> None:
    """Raise :class:`ArgusError` unless new pages of a role have outliers where those before them do: they are found by page."""
    for role in ROLES:
        if len(layer.where) > layer.forgotten and (role in outlying) != (layer.outliers[role].rows is not None):
            said = f"the outlier policy answers None for some pages of {role}, not for all"
            raise ArgusError(f"{said}; allowed: always or never")


def side_by_side(slabs: Sequence[Slab]) -> Slab:
    """Payloads ``[n, B, ...]`` of several layers as one of all their rows."""
    return slabs[0] if len(slabs) == 1 else {name: torch.cat([slab[name] for slab in slabs], 1) for name in slabs[0]}


def apart(payload: Slab, layers: int) -> list[Slab]:
    """What :func:`side_by_side` would join."""
    split = {name: tensor.chunk(layers, 1) for name, tensor in payload.items()}
    return [{name: parts[place] for name, parts in split.items()} for place in range(layers)]
