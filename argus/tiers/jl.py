"""Johnson-Lindenstrauss archive: the token axis of a page projected to a few rows (Johnson and Lindenstrauss 1984)."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from argus.backends.base import PREFIX, Payload, Plain, Projected
from argus.errors import ConfigError
from argus.hookspecs import hookimpl
from argus.tiers.base import Role, Tier, TierConfig, Tools


class JlConfig(TierConfig):
    """Options of jl.

    ``ratio`` tokens become one row of coefficients, which the tier ``coefficients`` keeps. ``unbiased`` multiplies what
    is read by ``ratio``, so that products with it are right in the mean over projections, at more error in each.
    ``centre`` keeps the page's mean apart; without it, for comparison, the numbers are projected as they are.
    """

    ratio: PositiveInt = 4
    coefficients: str | dict[str, Any] = "fp16"
    unbiased: bool = False
    centre: bool = True
    seed: int = 0


def projection(page_size: int, rows: int, seed: int) -> Tensor:
    """``W [rows, page_size]`` float32 with ``W W^T = I``: QR of a seeded Gaussian matrix."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(page_size, rows, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.T.contiguous().float()


class Jl(Tier):
    """``x = mean + W^T c`` with ``c = W (x - mean)``: the page's mean is kept apart, or the archive is worse than nothing.

    Payload: ``mean`` float16 ``[n, B, H, D]`` (with ``centre``); ``coefficients.*`` as the tier that keeps them names them,
    for pages of ``P / ratio`` rows.
    """

    Config = JlConfig

    def __init__(self, config: TierConfig, tools: Tools) -> None:
        super().__init__(config, tools)
        self.inner = tools.tier(self.config.coefficients)
        self.matrices: dict[str, Tensor] = {}
        ratio, lost = self.config.ratio, self.inner.error**2
        # Of a residual of norm 1 the projection keeps 1 / ratio; read with the factor `ratio`, it errs by ratio - 1.
        self.error = 1.005 * sqrt(ratio - 1 + ratio * lost if self.config.unbiased else 1 - 1 / ratio + lost / ratio)

    def matrix(self, page_size: int, x: Tensor) -> Tensor:
        """``sqrt(P) W [P / ratio, P]`` on the device of `x`, made once: coefficients ``W r / sqrt(P)`` stay in FP16's range."""
        key = f"projection.{page_size}.{x.device}"
        if key not in self.matrices:
            rows = page_size // self.config.ratio
            self.matrices[key] = sqrt(page_size) * projection(page_size, rows, self.config.seed).to(x.device)
        return self.matrices[key]

    def encode(self, x: Tensor, role: Role) -> Payload:
        form = self.target(role)
        if form is not None:
            return self.tools.backend.encode(x, form)
        kept: Payload = {}
        if self.config.centre:
            kept = self.tools.backend.encode(x, Projected(Plain(), self.config.ratio, self.config.unbiased, self.matrix))
            coefficients = kept.pop(PREFIX + "codes")
        else:
            coefficients = self.tools.backend.project(x, self.matrix(x.shape[-2], x) / x.shape[-2])
        inner = self.inner.encode(coefficients, role)
        return kept | {PREFIX + name: tensor for name, tensor in inner.items()}

    def decode(self, payload: Payload, role: Role) -> Tensor:
        kept = {name.removeprefix(PREFIX): tensor for name, tensor in payload.items() if name.startswith(PREFIX)}
        coefficients = self.inner.decode(kept, role)
        matrix = self.matrix(coefficients.shape[-2] * self.config.ratio, coefficients)
        rest = self.tools.backend.project(coefficients, matrix.T)
        if self.config.unbiased:
            rest *= self.config.ratio
        return rest.add_(payload["mean"].float().unsqueeze(-2)) if self.config.centre else rest

    def bits(self, role: Role, page_size: int, head_dim: int) -> float:
        rows = page_size // self.config.ratio
        mean = 16 / page_size if self.config.centre else 0.0
        return mean + self.inner.bits(role, rows, head_dim) / self.config.ratio

    def check(self, role: Role, page_size: int, head_dim: int) -> None:
        if page_size % self.config.ratio:
            divisors = [d for d in range(1, page_size + 1) if page_size % d == 0]
            raise ConfigError(f"jl: ratio {self.config.ratio} does not divide page_size {page_size}; allowed: {divisors}")
        self.inner.check(role, page_size // self.config.ratio, head_dim)

    def form(self, role: Role) -> Projected | None:
        return self._projected(self.inner.form(role))

    def target(self, role: Role) -> Projected | None:
        return self._projected(self.inner.target(role))

    def _projected(self, inner: object | None) -> Projected | None:
        if inner is None or not self.config.centre:
            return None
        return Projected(inner, self.config.ratio, self.config.unbiased, self.matrix)

    def shared(self) -> dict[str, Tensor]:
        return {**self.matrices, **{PREFIX + name: tensor for name, tensor in self.inner.shared().items()}}


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    return {"jl": Jl}
