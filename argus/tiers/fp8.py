"""FP8: E4M3 floating point with symmetric scales (Micikevicius et al. 2022, arXiv:2209.05433)."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor

from argus.backends.base import Axis, Float8, Payload
from argus.hookspecs import hookimpl
from argus.tiers.base import Role, Tier, TierConfig, check_group, group_length


class Fp8Config(TierConfig):
    """Options of fp8: whose numbers share a scale, and how many of them (null: the whole axis of a page)."""

    axis: Axis = "channel"
    group_size: PositiveInt | None = None


class Fp8(Tier):
    """``torch.float8_e4m3fn`` codes, each group scaled so that its largest number is 448.

    Payload: ``codes`` float8_e4m3fn ``[n, B, H, P, D]``; ``scale`` float16, ``[n, B, H, P/g, D]`` for axis ``channel``,
    ``[n, B, H, P, D/g]`` for ``token``.
    """

    Config = Fp8Config
    error = 0.027

    def form(self, role: Role) -> Float8:
        return Float8(self.config.axis, self.config.group_size)

    def target(self, role: Role) -> Float8:
        return self.form(role)

    def encode(self, x: Tensor, role: Role) -> Payload:
        return self.tools.backend.to_fp8(x, self.form(role))

    def decode(self, payload: Payload, role: Role) -> Tensor:
        return self.tools.backend.from_fp8(payload, self.form(role))

    def bits(self, role: Role, page_size: int, head_dim: int) -> float:
        form = self.form(role)
        return 8 + 16 / group_length(form.group, form.axis, page_size, head_dim)

    def check(self, role: Role, page_size: int, head_dim: int) -> None:
        form = self.form(role)
        check_group("fp8", form.group, form.axis, page_size, head_dim)


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    return {"fp8": Fp8}
