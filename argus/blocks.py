"""Pages as backends see them: a segment a block, made anew only where pages lie elsewhere than before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from argus.backends.base import ExactRows, Segment
from argus.exact import ExactNumbers
from argus.pages import Pool, Slab
from argus.plan import Plan, Stage
from argus.tiers.base import ROLES, Role

EXACT = "exact"
"""The name under which a page's exact-token marks ``[n, B, H, P]`` travel with its codes."""


def payload_of(slab: Slab, role: Role) -> dict[str, Tensor]:
    """What a tier keeps of `role`, out of all that is kept of the pages."""
    return {name.removeprefix(f"{role}."): tensor for name, tensor in slab.items() if name.startswith(f"{role}.")}


@dataclass(frozen=True)
class Known:
    """A segment, and the tensors and pages that it was made of."""

    slab: Slab
    pages: list[int]
    segment: Segment


def key_of(slab: Slab) -> int:
    """What tells a slab from others, whose tensors are replaced together."""
    return id(next(iter(slab.values())))


class Blocks:
    """The segments of one layer.

    Attributes
    ----------
    plan : Plan
    held : list of Segment or None
        Those of all pages; None where pages have moved since.
    known : dict of int to Known
        By the identity of the first tensor that it reads, a segment.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.held: list[Segment] | None = None
        self.known: dict[int, Known] = {}

    def __getstate__(self) -> dict[str, object]:
        """A copy finds its own pages."""
        return self.__dict__ | {"held": None, "known": {}}

    def of(self, pools: Sequence[Pool], outliers: Mapping[Role, ExactNumbers]) -> list[Segment]:
        """The pages of every stage, in bounded blocks."""
        if self.held is None:
            exact = {role: numbers.rows for role, numbers in outliers.items() if numbers.rows is not None}
            blocks = [
                (stage, slab, pages)
                for stage, pool in zip(self.plan.stages, pools, strict=True)
                for slab, pages in pool.blocks()
            ]
            found = [self._found(slab, pages, exact) for _, slab, pages in blocks]
            new = [block for block, one in zip(blocks, found, strict=True) if one is None]
            # One copy to the device for all blocks.
            numbers = [page for _, _, pages in new for page in pages]
            device = next(iter(new[0][1].values())).device if new else None
            starts = torch.tensor(numbers, dtype=torch.int64, device=device) * self.plan.page_size
            places = starts.split([len(pages) for _, _, pages in new])
            made = iter([self._segment(*block, exact, place) for block, place in zip(new, places, strict=True)])
            self.held = [next(made) if one is None else one for one in found]
            self.known = {
                key_of(slab): Known(slab, pages, segment) for (_, slab, pages), segment in zip(blocks, self.held, strict=True)
            }
        return self.held

    def renew(self, pools: Sequence[Pool], outliers: Mapping[Role, ExactNumbers]) -> None:
        """Forget segments of pages that lie elsewhere by now, whose memory they would hold."""
        self.held = None
        there = {key_of(slab) for pool in pools for slab in pool.slabs}
        self.known = {
            key: known
            for key, known in self.known.items()
            if key in there and all(rows is outliers[role].rows for role, rows in known.segment.outliers.items())
        }

    def tensors(self) -> list[Tensor]:
        """Every tensor held that pools do not hold."""
        return [segment.positions for segment in (*(self.held or ()), *(known.segment for known in self.known.values()))]

    def _found(self, slab: Slab, pages: list[int], exact: Mapping[Role, ExactRows]) -> Segment | None:
        """The segment of pages that lie where they did, if it was made before."""
        known = self.known.get(key_of(slab))
        if known is None or known.pages != pages or any(slab[name] is not x for name, x in known.slab.items()):
            return None
        outliers = known.segment.outliers
        same = outliers.keys() == exact.keys() and all(outliers[role] is exact[role] for role in exact)
        return known.segment if same else None

    def _segment(self, stage: Stage, slab: Slab, pages: list[int], exact: Mapping[Role, ExactRows], starts: Tensor) -> Segment:
        size = self.plan.page_size
        payloads = {role: payload_of(slab, role) for role in ROLES}
        return Segment(
            key_tier=stage.keys,
            value_tier=stage.values,
            keys=payloads["keys"],
            values=payloads["values"],
            positions=starts,
            last=(max(pages) + 1) * size - 1,
            page_size=size,
            exact=slab.get(EXACT),
            outliers=exact,
            block_pages=self.plan.block_pages,
            first=min(pages) * size,
        )
