"""What the integer tiers and sign share: affine codes, keys per channel and values per token (KIVI, arXiv:2402.02750)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import PositiveInt
from torch import Tensor

from argus.backends.base import Affine, Axis, Payload
from argus.tiers.base import Role, Tier, TierConfig, check_group, check_packing, group_length


class GroupConfig(TierConfig):
    """Options of tiers that scale groups of numbers.

    ``axis`` null: channel for keys, token for values. ``group_size`` null: the whole axis of a page.
    """

    axis: Axis | None = None
    group_size: PositiveInt | None = None


class GroupedTier(Tier):
    """Packed codes with ``x = code * scale + zero`` for each group, which spans exactly its own range.

    Payload: ``codes`` packed along ``D`` as the backend likes; ``scale`` and, unless symmetric, ``zero`` float16,
    ``[n, B, H, P/g, D]`` for axis ``channel``, ``[n, B, H, P, D/g]`` for ``token``.
    """

    Config: ClassVar[type[TierConfig]] = GroupConfig
    width: ClassVar[int] = 8
    """Bits a code."""
    symmetric: ClassVar[bool] = False

    def form(self, role: Role) -> Affine:
        usual: Axis = "channel" if role == "keys" else "token"
        axis: Axis = self.config.axis or usual
        return Affine(self.width, axis, self.config.group_size, self.symmetric)

    def target(self, role: Role) -> Affine:
        return self.form(role)

    def encode(self, x: Tensor, role: Role) -> Payload:
        return self.tools.backend.quantize(x, self.form(role))

    def decode(self, payload: Payload, role: Role) -> Tensor:
        return self.tools.backend.dequantize(payload, self.form(role))

    def bits(self, role: Role, page_size: int, head_dim: int) -> float:
        form = self.form(role)
        return form.bits + (16 if form.symmetric else 32) / group_length(form.group, form.axis, page_size, head_dim)

    def check(self, role: Role, page_size: int, head_dim: int) -> None:
        form = self.form(role)
        check_group(type(self).__name__.lower(), form.group, form.axis, page_size, head_dim)
        check_packing(type(self).__name__.lower(), form.bits, head_dim)
