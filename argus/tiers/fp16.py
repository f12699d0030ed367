"""FP16: 16-bit storage as is."""

from __future__ import annotations

from torch import Tensor

from argus.backends.base import Payload, Plain
from argus.hookspecs import hookimpl
from argus.tiers.base import Role, Tier


class Fp16(Tier):
    """Numbers in the cache's exact dtype (``tiers.dtype``: 16 bits, unless float32 is asked for) and nothing else.

    Payload: ``codes`` in that dtype, ``[n, B, H, P, D]``.
    """

    error = 0.00022

    def encode(self, x: Tensor, role: Role) -> Payload:
        return {"codes": x.to(self.tools.dtype)}

    def decode(self, payload: Payload, role: Role) -> Tensor:
        return payload["codes"].float()

    def bits(self, role: Role, page_size: int, head_dim: int) -> float:
        return 8.0 * self.tools.dtype.itemsize

    def form(self, role: Role) -> Plain:
        return Plain()

    def target(self, role: Role) -> Plain:
        return Plain(self.tools.dtype)


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    return {"fp16": Fp16}
