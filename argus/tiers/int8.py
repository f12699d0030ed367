"""INT8: symmetric, one byte a code."""

from __future__ import annotations

from argus.hookspecs import hookimpl
from argus.tiers.base import Tier
from argus.tiers.grouped import GroupedTier


class Int8(GroupedTier):
    """Signed codes from -127 to 127 about zero."""

    width = 8
    error = 0.0075
    symmetric = True


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    return {"int8": Int8}
