"""Choices that depend on the chip and on sizes, none of which changes a result beyond rounding.

Those of the warp kernels were measured on one H200: a multiprocessor's quarter holds ``16384 / (32 * registers)`` warps.
"""

from __future__ import annotations

from functools import cache

import torch

PROJECTED = 12
"""Warps of the kernel for projected pages that a multiprocessor holds at once."""
HALF_WARPS = 16
"""Warps of the 16-bit kernel that a multiprocessor holds at once."""
HALF_REGISTERS = 128
"""Registers that a lane of the 16-bit kernel may take."""


def codec_warps(numbers: int) -> int:
    """Warps of a program that holds so many numbers in registers."""
    return max(1, min(16, numbers // 2048))


def tile(dim: int, rows: int) -> int:
    """Tokens that the kernel for any form takes at once."""
    return 32 if dim > 128 or rows > 32 else 64


def options(dim: int, rows: int) -> dict[str, int]:
    """Warps and stages of the kernel for any form."""
    return {"num_warps": 8 if dim > 128 or rows > 32 else 4, "num_stages": 1}


def splits(units: int, heads: int, per_program: int, processors: int, resident: int) -> int:
    """Programs a head: as many as the processors hold at once, each with at least `per_program` units of work."""
    most = max(1, processors * resident // heads)
    return max(1, min(most, -(-units // per_program)))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; one where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def half_tiles(dim: int) -> int:
    """Tiles of 16 tokens that the 16-bit kernel takes at once."""
    return 1 if dim > 128 else 2


def few(key_bits: int, value_bits: int, dim: int) -> bool:
    """Whether a block's codes take so few registers that more warps pay better than loads ahead."""
    return 2 < key_bits + value_bits <= 6 and dim <= 128


def prefetch(key_bits: int, value_bits: int, dim: int) -> bool:
    """Whether the integer kernel loads the next block's codes before it works on this one's."""
    return not few(key_bits, value_bits, dim) and (key_bits + value_bits) * dim <= 8 * 128


def code_registers(key_bits: int, value_bits: int, dim: int) -> int | None:
    """Registers that a lane of the integer kernel may take; None: as many as it asks for."""
    return 96 if key_bits + value_bits <= 6 and dim <= 128 else None


def code_warps(key_bits: int, value_bits: int, dim: int, blocks: int) -> int:
    """Warps of the integer kernel for each multiprocessor, which has so many blocks to do."""
    if code_registers(key_bits, value_bits, dim):
        return 20
    resident = 12 if prefetch(key_bits, value_bits, dim) or dim > 128 else 16
    return 2 * resident if blocks >= 32 * resident else resident
