"""1-bit: the sign about a centre, with a scale (as in XNOR-Net, arXiv:1603.05279, centred for each group)."""

from __future__ import annotations

from dataclasses import replace

from argus.backends.base import Affine
from argus.hookspecs import hookimpl
from argus.tiers.base import Role, Tier
from argus.tiers.grouped import GroupedTier


class Sign(GroupedTier):
    """``x = centre + scale * sign(x - centre)`` for each group, eight signs a byte.

    The centre is the group's mean and the scale its mean distance from it, the least-squares choice. Kept as one-bit
    affine codes: ``zero = centre - scale``, step ``2 * scale``.
    """

    width = 1
    error = 0.61

    def form(self, role: Role) -> Affine:
        return replace(super().form(role), centred=True)


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    return {"sign": Sign}
