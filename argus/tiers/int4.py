"""INT4: asymmetric, two codes a byte."""

from __future__ import annotations

from argus.hookspecs import hookimpl
from argus.tiers.base import Tier
from argus.tiers.grouped import GroupedTier


class Int4(GroupedTier):
    """Codes from 0 to 15 over each group's own range."""

    width = 4
    error = 0.115


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    return {"int4": Int4}
