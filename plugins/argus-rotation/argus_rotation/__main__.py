"""Print what each width costs on standard normal numbers, computed and measured."""

from __future__ import annotations

from math import sqrt

import torch

from argus.backends.cpu import CpuBackend
from argus.tiers.base import Tools
from argus_rotation.codebook import distortion
from argus_rotation.tier import Rotation, RotationConfig


def measured(bits: int, page_size: int = 64, head_dim: int = 64) -> tuple[float, float]:
    """Mean cosine of a token with its source, and relative error, on ``[32, 1, 4]`` pages of normal numbers."""
    tier = Rotation(RotationConfig(bits=bits), Tools(CpuBackend(), torch.float16, tier=lambda spec: tier))
    x = torch.randn(32, 1, 4, page_size, head_dim, generator=torch.Generator().manual_seed(0))
    found = tier.decode(tier.encode(x, "keys"), "keys")
    return float(torch.cosine_similarity(x, found, -1).mean()), float((found - x).norm() / x.norm())


def main() -> None:
    """Print a table."""
    print("| bits | bits a value, head_dim 64 | cosine, codebook | cosine, measured | relative error |")
    print("|---|---|---|---|---|")
    for bits in range(1, 5):
        cosine, error = measured(bits)
        print(f"| {bits} | {bits + 16 / 64:g} | {sqrt(1 - distortion(bits)):.4f} | {cosine:.4f} | {error:.4f} |")


if __name__ == "__main__":
    main()
