"""What a cache is made of: a ladder of stages, policies and a backend, chosen once and never changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from argus.backends.base import Backend
from argus.ledger import Match
from argus.policies.base import Aging, Anchors, Outliers, StageFacts
from argus.tiers.base import ROLES, Role, Tier


@dataclass(frozen=True)
class Stage:
    """A tier's place in a ladder: which tier keeps keys, which keeps values, and how many pages it may hold."""

    facts: StageFacts
    keys: Tier
    values: Tier

    def tier(self, role: Role) -> Tier:
        """The tier of `role`."""
        return self.keys if role == "keys" else self.values


@dataclass(frozen=True)
class Plan:
    """All that is chosen once, at build.

    Attributes
    ----------
    page_size : int
        Tokens a page.
    window : int
        Newest tokens that are always exact.
    dtype : torch.dtype
        Of everything kept exact.
    block_pages : int
        Pages handled at once, the bound on workspaces, but where a backend moves more (`Backend.at_once`); and what anchor
        policies see at once.
    stages : tuple of Stage
        The ladder, in order.
    eight : bool
        Whether tokens that anchors choose are kept in 8 bits.
    cascade : bool
        Whether a page is encoded by every stage on its way, not only by the one it goes to.
    match : Match or None
        How a byte budget was met, where there is one.
    graphs : bool
        Whether decode steps may be recorded as CUDA graphs.
    leaving : int
        Pages that leave the window at once, at least.
    """

    page_size: int
    window: int
    dtype: torch.dtype
    block_pages: int
    stages: tuple[Stage, ...]
    aging: Aging
    anchors: tuple[Anchors, ...]
    outliers: Outliers
    backend: Backend
    cascade: bool = False
    eight: bool = False
    match: Match | None = None
    graphs: bool = True
    leaving: int = 1

    @property
    def most(self) -> int:
        """Tokens that the window holds when pages leave it, if they come one by one."""
        return self.window + self.leaving * self.page_size

    @property
    def needs_queries(self) -> bool:
        """Whether any policy asks for the newest queries."""
        return self.aging.needs_queries or any(policy.needs_queries for policy in self.anchors)

    def shared(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that all pages of a stage share, named ``shared``."""
        for stage in self.stages:
            for role in ROLES:
                for tensor in stage.tier(role).shared().values():
                    yield "shared", tensor

    def __deepcopy__(self, memo: dict[int, object]) -> Plan:
        return self
