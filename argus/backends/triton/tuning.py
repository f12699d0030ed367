"""Choices that depend on the chip and on sizes, none of which changes a result beyond rounding.

Those of the fused kernel were measured on one H200: a multiprocessor's quarter holds ``16384 / (32 * registers)`` warps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

FEWEST, LEAST = 160, 1.5
"""Programs a head that are used however little there is to do, and the least work of one beyond these, as below."""
SIXTEENS = 8
"""Warps of the fused kernel a multiprocessor where all tokens have 16 bits: bytes bind, and more of them are slower."""
PROJECTED, SIXTEEN, EIGHT, DENSE = 0.9, 2.2, 1.8, 1.2
"""Time that a unit takes of projected pages, of pages of 16-bit tokens and of E4M3 codes, and of 16-bit tokens in a row, in
that of 64 tokens of 2-bit codes. They only divide work."""


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
    return key_bits + value_bits <= 8 and dim <= 128


def prefetch(key_bits: int, value_bits: int, dim: int) -> bool:
    """Whether the integer kernel loads the next block's codes before it works on this one's."""
    return not few(key_bits, value_bits, dim) and (key_bits + value_bits) * dim <= 8 * 128


def codes(key_bits: int, value_bits: int) -> float:
    """Time that 64 tokens of such codes take, in that of 2-bit codes."""
    return 1 + 0.1 * max(0, key_bits + value_bits - 4)


def registers(jobs: Sequence[tuple[str, tuple[Any, ...]]], dim: int) -> int | None:
    """Registers that a lane may take in the fused kernel of these jobs (share and constants); None: as many as it asks for."""
    if dim > 128:
        return None
    shares = {share for share, _ in jobs}
    codes = [constants for share, constants in jobs if share == "codes"]
    if shares <= {"codes", "dense"} and codes and all(few(constants[1], constants[4], dim) for constants in codes):
        return 96
    return 168


def resident(jobs: Sequence[tuple[str, tuple[Any, ...]]], dim: int) -> int:
    """Warps of the fused kernel that a multiprocessor holds at once."""
    held = registers(jobs, dim)
    if held is not None and all(share == "dense" or (share == "pages" and not constants[3]) for share, constants in jobs):
        return SIXTEENS
    return 12 if held is None else 16384 // (32 * held) * 4


def divide(units: Sequence[int], costs: Sequence[float], room: int) -> list[int]:
    """Programs for each part: `room` of them shared out by work, at least one each and none without a unit of work.

    Where there is little work there are fewer, since each answer is one more to merge. The largest part gives way, so that
    all programs run at once where they can.
    """
    work = [count * cost for count, cost in zip(units, costs, strict=True)]
    room = min(room, max(FEWEST, int(sum(work) / LEAST)))
    counts = [max(1, min(count, int(room * one / sum(work)))) for count, one in zip(units, work, strict=True)]
    if counts:
        largest = work.index(max(work))
        counts[largest] = max(1, min(units[largest], room - sum(counts) + counts[largest]))
    return counts
