"""The integer family at any width: ``int`` with 2 to 8 bits, and ``int3``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from argus.backends.base import Affine
from argus.hookspecs import hookimpl
from argus.tiers.base import Role, Tier, TierConfig, Tools
from argus.tiers.grouped import GroupConfig, GroupedTier


class IntegerConfig(GroupConfig):
    """Options of ``int``."""

    bits: Annotated[int, Field(ge=2, le=8)]


class Int3(GroupedTier):
    """Codes from 0 to 7 over each group's own range: a plane of two bits and a plane of one."""

    width = 3
    error = 0.245


class Int(GroupedTier):
    """Asymmetric codes of ``bits`` bits."""

    Config = IntegerConfig

    def __init__(self, config: TierConfig, tools: Tools) -> None:
        super().__init__(config, tools)
        self.error = 1.72 / (2**self.config.bits - 1)

    def form(self, role: Role) -> Affine:
        base = super().form(role)
        return Affine(self.config.bits, base.axis, base.group)


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    return {"int3": Int3, "int": Int}
