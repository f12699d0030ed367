"""1-bit: the sign about a centre, with a scale (as in XNOR-Net, arXiv:1603.05279, centred for each group)."""

from __future__ import annotations

import torch
from torch import Tensor

from argus.backends.base import Payload, grouped
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

    def encode(self, x: Tensor, role: Role) -> Payload:
        form = self.form(role)
        parts, dim = grouped(x, form.axis, form.group)
        centre = parts.mean(dim, keepdim=True)
        scale = (parts - centre).abs().mean(dim)
        codes = (parts >= centre).to(torch.uint8).view(x.shape)
        zero = (centre.squeeze(dim) - scale).to(torch.float16)
        return self.tools.backend.affine(codes, (2 * scale).to(torch.float16), zero, form)


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    return {"sign": Sign}
