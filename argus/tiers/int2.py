"""INT2: asymmetric, four codes a byte."""

from __future__ import annotations

from argus.hookspecs import hookimpl
from argus.tiers.base import Tier
from argus.tiers.grouped import GroupedTier


class Int2(GroupedTier):
    """Codes from 0 to 3 over each group's own range."""

    width = 2
    error = 0.57


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    return {"int2": Int2}
