"""Pages as backends see them: a segment a block, made anew only where pages lie elsewhere than before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


class Blocks:
    """The segments of one layer.

    Attributes
    ----------
    plan : Plan
    held : list of Segment or None
        Those of all pages; None where pages have moved since.
    known : dict of int to (list of int, Segment)
        By the identity of each tensor that it reads, a segment and its pages.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.held: list[Segment] | None = None
        self.known: dict[int, tuple[list[int], Segment]] = {}

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
                id(tensor): (pages, segment)
                for (_, slab, pages), segment in zip(blocks, self.held, strict=True)
                for tensor in slab.values()
            }
        return self.held

    def renew(self, pools: Sequence[Pool], outliers: Mapping[Role, ExactNumbers]) -> None:
        """Forget segments of pages that lie elsewhere by now, whose memory they would hold."""
        self.held = None
        there = {id(tensor) for pool in pools for slab in pool.slabs for tensor in slab.values()}
        self.known = {
            key: (pages, segment)
            for key, (pages, segment) in self.known.items()
            if key in there and all(rows is outliers[role].rows for role, rows in segment.outliers.items())
        }

    def tensors(self) -> list[Tensor]:
        """Every tensor held that pools do not hold."""
        return [segment.positions for segment in (*(self.held or ()), *(segment for _, segment in self.known.values()))]

    def _found(self, slab: Slab, pages: list[int], exact: Mapping[Role, ExactRows]) -> Segment | None:
        """The segment of pages that lie where they did, if it was made before."""
        found = [self.known.get(id(tensor)) for tensor in slab.values()]
        if not found or found[0] is None:
            return None
        known, segment = found[0]
        same = known == pages and all(one is not None and one[1] is segment for one in found)
        same = same and segment.outliers.keys() == exact.keys()
        return segment if same and all(segment.outliers[role] is exact[role] for role in exact) else None

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
