"""Random-sign Hadamard rotation and Lloyd-Max codes, as TurboQuant (arXiv:2504.19874) without its QJL stage."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from argus.backends.base import Loaded, Payload
from argus.backends.cpu import pack, unpack
from argus.tiers.base import Role, Seed, Tier, TierConfig, Tools, check_packing
from argus_rotation.codebook import codebook, distortion


class RotationConfig(TierConfig):
    """Options of rotation: bits a code, and the seed of the signs."""

    bits: Annotated[int, Field(ge=1, le=4)] = 3
    seed: Seed = 0


def blocks(length: int) -> list[int]:
    """The powers of two that add up to `length`, largest first: 80 is 64 + 16."""
    return [1 << i for i in reversed(range(length.bit_length())) if length >> i & 1]


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last axis, block by block; its own inverse.

    Parameters
    ----------
    x : Tensor
        ``[..., D]`` floating.

    Returns
    -------
    Tensor
        Of the same shape and dtype.
    """
    parts = []
    for part in x.split(blocks(x.shape[-1]), -1):
        size = part.shape[-1]
        half = 1
        while half < size:
            pair = part.unflatten(-1, (-1, 2, half))
            first, second = pair[..., 0, :], pair[..., 1, :]
            part = torch.stack([first + second, first - second], -2).flatten(-3)
            half *= 2
        parts.append(part / sqrt(size))
    return torch.cat(parts, -1)


def random_signs(length: int, seed: int) -> Tensor:
    """``[length]`` float32, ones and minus ones."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return 2.0 * torch.randint(0, 2, (length,), generator=generator, device="cpu").float() - 1.0


def identity(length: int) -> Tensor:
    """``[length, length]`` float32."""
    return torch.eye(length, dtype=torch.float32, device="cpu")


def kernel() -> Any:
    """The function that reads codes on a GPU; Triton is imported here and nowhere before."""
    from argus_rotation.kernel import load

    return load


class Rotation(Tier):
    """``x = scale * signs * H(levels[code])`` for each token, ``H`` the Hadamard transform along ``head_dim``.

    The rotation makes a token's numbers nearly normal whatever they were, so that one codebook, made for the normal
    distribution, fits all.

    Payload: ``codes`` uint8 ``[n, B, H, P, D * bits / 8]``, packed; ``scale`` float16 ``[n, B, H, P]``, the token's
    norm over ``sqrt(D)``.
    """

    Config = RotationConfig

    def __init__(self, config: TierConfig, tools: Tools) -> None:
        super().__init__(config, tools)
        self.error = 1.05 * sqrt(distortion(self.config.bits))
        self.constants: dict[str, Tensor] = {}

    def rotation(self, dim: int, like: Tensor) -> Tensor:
        """``R [D, D]`` float32 with ``x = y R``, ``H`` with random signs, on the device of `like`, made once."""
        return self._constant(f"rotation.{dim}", like, lambda: hadamard(identity(dim)) * random_signs(dim, self.config.seed))

    def signs(self, dim: int, like: Tensor) -> Tensor:
        """The signs ``[D]`` float32 of :meth:`rotation` on the device of `like`, made once."""
        return self._constant(f"signs.{dim}", like, lambda: random_signs(dim, self.config.seed))

    def levels(self, like: Tensor) -> Tensor:
        """The codebook ``[2 ** bits]`` float32 on the device of `like`, made once."""
        return self._constant("levels", like, self._levels)

    def bounds(self, like: Tensor) -> Tensor:
        """``[2 ** bits - 1]`` float32, midway between levels."""
        return self._constant("bounds", like, lambda: (self._levels()[1:] + self._levels()[:-1]) / 2)

    def _levels(self) -> Tensor:
        return torch.tensor(codebook(self.config.bits), dtype=torch.float32, device="cpu")

    def _constant(self, name: str, like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        key = f"{name}.{like.device}"
        if key not in self.constants:
            self.constants[key] = make().to(like.device)
        return self.constants[key]

    def encode(self, x: Tensor, role: Role) -> Payload:
        if self.tools.backend.name == "triton":
            made = self._encode_by_kernel(x)
            if made is not None:
                return made
        scale = x.square().mean(-1).sqrt().to(torch.float16)
        step = scale.float().masked_fill(scale == 0, 1.0).unsqueeze(-1)
        turned = x @ self.rotation(x.shape[-1], x).T
        codes = torch.bucketize(turned / step, self.bounds(x))
        return {"codes": pack(codes.to(torch.uint8), self.config.bits), "scale": scale}

    def _encode_by_kernel(self, x: Tensor) -> Payload | None:
        from argus_rotation.encoding import encode, width

        dim, bits = x.shape[-1], self.config.bits
        size = width(dim, bits)
        if size is None:
            return None
        turn = self._constant(f"turn.{size}", x, lambda: (hadamard(identity(size)) * sqrt(size)).round().half())
        return encode(x, turn, self.signs(dim, x), self.bounds(x), bits, size)

    def decode(self, payload: Payload, role: Role) -> Tensor:
        codes = unpack(payload["codes"], self.config.bits)
        turned = self.levels(codes)[codes.int()].mul_(payload["scale"].float().unsqueeze(-1))
        return turned @ self.rotation(codes.shape[-1], codes)

    def form(self, role: Role) -> Loaded:
        return Loaded(kernel, self.config.bits, self.levels, self.rotation, self.signs, book=True)

    def bits(self, role: Role, page_size: int, head_dim: int) -> float:
        width: int = self.config.bits
        return width + 16 / head_dim

    def check(self, role: Role, page_size: int, head_dim: int) -> None:
        check_packing("rotation", self.config.bits, head_dim)

    def shared(self) -> dict[str, Tensor]:
        return dict(self.constants)
