"""Johnson-Lindenstrauss archive: the token axis of a page projected to a few rows (Johnson and Lindenstrauss 1984).

The projection is a fast one (Ailon and Chazelle 2009): rows of a Hadamard matrix.
"""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from argus.backends.base import PREFIX, Payload, Plain, Projected
from argus.errors import ConfigError
from argus.hookspecs import hookimpl
from argus.tiers.base import Role, Seed, Tier, TierConfig, Tools


class JlConfig(TierConfig):
    """Options of jl.

    ``ratio`` tokens become one row of coefficients, which the tier ``coefficients`` keeps. ``unbiased`` multiplies what
    is read by ``(P - 1) / R``, so that products with it are right in the mean over projections, at more error in each; that
    holds with ``centre``. ``centre`` keeps the page's mean apart; without it, for comparison, the numbers are projected as
    they are, and their mean is lost where ``ratio`` is more than 1: all rows but a page's last sum to 0.
    """

    ratio: PositiveInt = 4
    coefficients: str | dict[str, Any] = "fp16"
    unbiased: bool = False
    centre: bool = True
    seed: Seed = 0


def projection(page_size: int, rows: int, seed: int) -> Tensor:
    """``W [rows, page_size]`` float32 of ones and minus ones with ``W W^T = page_size I``.

    Rows of a Hadamard matrix in an order drawn by `seed`, the constant one last, with tokens in an order drawn too. So a row
    has as many ones as minus ones, at places drawn evenly, and for ``r`` with a sum of 0 the mean over seeds of ``(w r)^2``
    is ``|r|^2 P / (P - 1)``: of its pairs ``w_i w_j`` have a mean of ``-1 / (P - 1)``, and ``r_i r_j`` sum to ``-|r|^2``.

    Parameters
    ----------
    page_size : int
        A power of two.
    rows : int
        Up to `page_size`.
    seed : int
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = partial(torch.randperm, generator=generator, device="cpu")
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(matrix) < page_size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    # The constant row is row 0.
    order = [*(1 + drawn(page_size - 1)).tolist(), 0]
    return matrix[order[:rows]][:, drawn(page_size)].contiguous()


class Jl(Tier):
    """``x = mean + W^T c`` with ``c = W (x - mean) / P``: the page's mean is kept apart, or the archive is worse than nothing.

    ``W`` has ones and minus ones, see :func:`projection`: with the mean, these are some of the page's coefficients in one
    orthogonal basis. Of what the mean leaves they keep ``R / (P - 1)`` in the mean over seeds, ``R`` rows of ``P`` tokens.

    Payload: ``mean`` float16 ``[n, B, H, D]`` (with ``centre``); ``coefficients.*`` as the tier that keeps them names them,
    for pages of ``P / ratio`` rows.
    """

    Config = JlConfig

    def __init__(self, config: TierConfig, tools: Tools) -> None:
        super().__init__(config, tools)
        self.inner = tools.tier(self.config.coefficients)
        self.matrices: dict[str, Tensor] = {}
        ratio, lost = self.config.ratio, self.inner.error**2
        # Of a residual of norm 1 it keeps a little over 1 / ratio; `unbiased` reads that a little less than ratio times.
        self.error = 1.005 * sqrt(ratio - 1 + ratio * lost if self.config.unbiased else 1 - 1 / ratio + lost / ratio)

    def matrix(self, page_size: int, x: Tensor) -> Tensor:
        """``W [P / ratio, P]`` on the device of `x`, made once."""
        key = f"projection.{page_size}.{x.device}"
        if key not in self.matrices:
            self.matrices[key] = projection(page_size, page_size // self.config.ratio, self.config.seed).to(x.device)
        return self.matrices[key]

    def encode(self, x: Tensor, role: Role) -> Payload:
        form = self.target(role)
        if form is not None:
            return self.tools.backend.encode(x, form)
        kept: Payload = {}
        if self.config.centre:
            kept = self.tools.backend.encode(x, self._form_around(Plain()))
            coefficients = kept.pop(PREFIX + "codes")
        else:
            coefficients = self.tools.backend.project(x, self.matrix(x.shape[-2], x) / x.shape[-2])
        inner = self.inner.encode(coefficients, role)
        return kept | {PREFIX + name: tensor for name, tensor in inner.items()}

    def decode(self, payload: Payload, role: Role) -> Tensor:
        kept = {name.removeprefix(PREFIX): tensor for name, tensor in payload.items() if name.startswith(PREFIX)}
        coefficients = self.inner.decode(kept, role)
        page_size = coefficients.shape[-2] * self.config.ratio
        rest = self.tools.backend.project(coefficients, self.matrix(page_size, coefficients).T)
        if self.config.unbiased:
            rest *= self._form_around(Plain()).factor(page_size)
        return rest.add_(payload["mean"].float().unsqueeze(-2)) if self.config.centre else rest

    def bits(self, role: Role, page_size: int, head_dim: int) -> float:
        rows = page_size // self.config.ratio
        mean = 16 / page_size if self.config.centre else 0.0
        return mean + self.inner.bits(role, rows, head_dim) / self.config.ratio

    def check(self, role: Role, page_size: int, head_dim: int) -> None:
        if page_size & (page_size - 1):
            near = [1 << (page_size.bit_length() - 1), 1 << page_size.bit_length()]
            raise ConfigError(f"jl: page_size {page_size} is no power of two; allowed nearby: {near}")
        if page_size % self.config.ratio:
            divisors = [d for d in range(1, page_size + 1) if page_size % d == 0]
            raise ConfigError(f"jl: ratio {self.config.ratio} does not divide page_size {page_size}; allowed: {divisors}")
        self.inner.check(role, page_size // self.config.ratio, head_dim)

    def form(self, role: Role) -> Projected | None:
        return self._projected(self.inner.form(role))

    def target(self, role: Role) -> Projected | None:
        return self._projected(self.inner.target(role))

    def _projected(self, inner: object | None) -> Projected | None:
        return None if inner is None or not self.config.centre else self._form_around(inner)

    def _form_around(self, inner: object) -> Projected:
        return Projected(inner, self.config.ratio, self.config.unbiased, self.matrix)

    def shared(self) -> dict[str, Tensor]:
        return {**self.matrices, **{PREFIX + name: tensor for name, tensor in self.inner.shared().items()}}


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    return {"jl": Jl}
