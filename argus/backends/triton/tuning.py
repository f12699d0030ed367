"""Choices that depend on the chip and on sizes, none of which changes a result beyond rounding.

Those of the fused kernel were measured on one H200: a multiprocessor's quarter holds ``16384 / (32 * registers)`` warps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from heapq import heapify, heappop, heapreplace
from typing import Any

import torch

FEWEST, LEAST = 160, 1.5
"""Programs a head that are used however little there is to do, and the least work of one beyond these, as below."""
FEW_PAGES = 8
"""Pages of a stage up to which the size of its kernel counts, not its speed: every processor fetches all code that it runs."""
SIXTEENS = 8
"""Warps of the fused kernel a multiprocessor where all tokens have 16 bits: bytes bind, and more of them are slower."""
PROJECTED, SIXTEEN, EIGHT, DENSE, FEW, BOOK = 0.9, 1.1, 0.9, 1.2, 1.5, 0.7
"""Time that a unit takes of projected pages, of 16 tokens of pages in 16 bits and in E4M3 codes, of 16-bit tokens in a row, of
codes of any width, and of 16 tokens of codes of a codebook, in that of 64 tokens of 2-bit codes. They only divide work."""


CODEC_REGISTERS, NARROW_REGISTERS, ARCHIVE_REGISTERS = 168, 96, 128
"""Registers that a lane may take of the codec's one-warp kernels, of the one that makes codes of codes, and of those that
archive codes."""


def codec_warps(numbers: int, warp: int = 2048) -> int:
    """Warps of a program that holds so many numbers in registers, `warp` of them each."""
    return max(1, min(16, numbers // warp))


def centred_warps(numbers: int, axis: str) -> int:
    """The same where it sums in float64: along tokens a lane does it alone, along channels lanes exchange what they have."""
    return codec_warps(numbers, 4096 if axis == "channel" else 1024)


def over(whole: int, part: int) -> int:
    """How many parts hold `whole`. Triton's own functions take microseconds on the CPU, many times a call."""
    return -(-whole // part)


def power(number: int) -> int:
    """The least power of two not below `number`."""
    return 1 << (number - 1).bit_length()


def tile(dim: int, rows: int) -> int:
    """Tokens that the kernel for any form takes at once."""
    return 32 if dim > 128 or rows > 32 else 64


def options(dim: int, rows: int, decoded: bool) -> dict[str, int]:
    """Warps and stages of the kernels for any form and for any exact tokens; `decoded`: of the first."""
    return {"num_warps": 8 if dim > 128 or rows > 32 else 2 if decoded else 4, "num_stages": 1}


def splits(units: int, heads: int, per_program: int, processors: int, resident: int) -> int:
    """Programs a head: as many as the processors hold at once, each with at least `per_program` units of work."""
    most = max(1, processors * resident // heads)
    return max(1, min(most, over(units, per_program)))


def merging(slots: int, dim: int) -> tuple[int, int, int]:
    """Channels of a program of the merge, answers that it takes at once, and its warps."""
    chunk, at_once = min(16, power(dim)), min(512, max(2, power(slots)))
    return chunk, at_once, max(1, min(4, at_once * chunk // 1024))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; one where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def half_tiles(dim: int, pages: int, outliers: bool) -> int:
    """Tiles of 16 tokens that the 16-bit kernel takes at once: one where there is little to read, which takes less code, and
    beside outliers, which take registers."""
    return 1 if dim > 128 or pages <= FEW_PAGES or outliers else 2


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
        return 112 if all(constants[1] + constants[4] <= 4 for constants in codes) else 128
    return 168


def resident(jobs: Sequence[tuple[str, tuple[Any, ...]]], dim: int) -> int:
    """Warps of the fused kernel that a multiprocessor holds at once."""
    held = registers(jobs, dim)
    if held is not None and all(_only_read(*job) for job in jobs):
        return SIXTEENS
    return 12 if held is None else 16384 // (32 * held) * 4


def _only_read(share: str, constants: tuple[Any, ...]) -> bool:
    """Whether reading is what takes a share its time: of tokens of 16 bits without outliers."""
    return share == "dense" or (share == "pages" and not any((constants[3], *constants[10:])))


@lru_cache(maxsize=1024)
def divide(units: tuple[int, ...], costs: tuple[float, ...], room: int) -> tuple[tuple[int, int], ...]:
    """The first program of each part and how many it has: `room` of them shared out by work.

    A part has at most as many as it has units. Parts with less work than a program's share sit together in one. The others
    get one program after another, each to the part whose programs have most to do. Where there is little work in all, there
    are fewer programs than `room`, since each answer is one more to merge.
    """
    work = [count * cost for count, cost in zip(units, costs, strict=True)]
    room = min(room, max(FEWEST, int(sum(work) / LEAST)))
    share = sum(work) / room * (1 + 1e-9)
    placed: dict[int, tuple[int, int]] = {}
    loads: list[float] = []
    large = []
    for part, one in enumerate(work):
        if one > share:
            large.append(part)
            continue
        program = next((number for number, load in enumerate(loads) if load + one <= share), len(loads))
        if program == len(loads):
            loads.append(0.0)
        loads[program] += one
        placed[part] = (program, 1)
    counts = dict.fromkeys(large, 1)
    busiest = [(-work[part], part) for part in large if units[part] > 1]
    heapify(busiest)
    for _ in range(room - len(loads) - len(large)):
        if not busiest:
            break
        part = busiest[0][1]
        counts[part] += 1
        if counts[part] == units[part]:
            heappop(busiest)
        else:
            heapreplace(busiest, (-work[part] / counts[part], part))
    first = len(loads)
    for part in large:
        placed[part] = (first, counts[part])
        first += counts[part]
    return tuple(placed[part] for part in range(len(units)))
