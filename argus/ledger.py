"""Measured memory: the sum of unique storages, by what they are for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Ledger:
    """What a cache holds.

    Attributes
    ----------
    parts : dict of str to int
        Bytes by what they are for.
    values : int
        Numbers that the tokens held have in keys and values together.
    workspace : int
        Bytes of the largest workspace that a call has taken, given back when it ended: no part of `bytes`. 0: not counted.
    """

    parts: dict[str, int]
    values: int
    workspace: int = 0

    @property
    def bytes(self) -> int:
        """All bytes."""
        return sum(self.parts.values())

    @property
    def bits_per_value(self) -> float:
        """Bits kept for each number: codes, scales, zeros, means, indices, exact tokens and window; 0 while empty."""
        return 8 * self.bytes / self.values if self.values else 0.0

    @property
    def compression(self) -> float:
        """How many times fewer bytes than 16 bits a number; 0 while empty."""
        return 16 / self.bits_per_value if self.bytes and self.values else 0.0


@dataclass(frozen=True)
class Match:
    """How a budget of bits a value was met.

    Attributes
    ----------
    asked : float
        Bits a value.
    context : int
        Tokens at which they are measured.
    reached, next : float
        Bits measured, and those with one step more: pages are whole.
    pages : dict of str to int
        Pages that each stage holds there.
    capacities : dict of str to int or None
        Of each stage, in tokens, as scaled; a policy may look at its own options instead.
    aging : dict of str to object
        Options of the aging policy, as scaled.
    """

    asked: float
    context: int
    reached: float
    next: float
    pages: dict[str, int]
    capacities: dict[str, int | None]
    aging: dict[str, object]


def measure(tensors: Iterable[tuple[str, Tensor]], values: int, workspace: int = 0) -> Ledger:
    """Sum the unique storages of named tensors; a storage counts for the first name that brings it."""
    seen: set[int] = set()
    parts: dict[str, int] = defaultdict(int)
    for name, tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            parts[name] += storage.nbytes()
    return Ledger(dict(parts), values, workspace)


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the unique storages of `tensors`."""
    return measure((("all", tensor) for tensor in tensors), 0).bytes
