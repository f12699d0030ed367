"""What every contract needs: numbers to try, comparison to the bit, and an eye on the global random state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from pydantic import BaseModel
from torch import Tensor

from argus.config import validate


class ContractError(AssertionError):
    """A plugin breaks its contract; the message names the plugin, the case and the figures."""


@dataclass(frozen=True)
class Contract:
    """Who is checked, in which case."""

    who: str
    case: str = ""

    def at(self, case: str) -> Contract:
        """The same plugin in another case."""
        return Contract(self.who, case)

    def require(self, kept: bool, found: str) -> None:
        """Raise :class:`ContractError` that says what was `found`, unless `kept`."""
        if not kept:
            raise ContractError(f"{self.who}, {self.case}: {found}")

    def require_same(self, found: Tensor, wanted: Tensor, what: str) -> None:
        """Raise unless two tensors are equal to the bit, NaN included."""
        self.require(same(found, wanted), f"{what} changed: {describe(wanted)} became {describe(found)}")

    @contextmanager
    def keeps_random_state(self) -> Iterator[None]:
        """Raise if the body touches the global generators of torch, random or numpy; leave them as they were."""
        python, numbers, torches = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        try:
            yield
            touched = [
                name
                for name, kept in (
                    ("torch", torch.equal(torches, torch.get_rng_state())),
                    ("random", python == random.getstate()),
                    ("numpy", repr_state(numbers) == repr_state(numpy.random.get_state())),
                )
                if not kept
            ]
        finally:
            restore(python, numbers, torches)
        self.require(not touched, f"touches the global random state of {', '.join(touched)}; use a torch.Generator of your own")


def repr_state(state: Any) -> tuple[Any, ...]:
    """numpy's random state as something that compares."""
    return tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in state)


def restore(python: Any, numbers: Any, torches: Tensor) -> None:
    """Put the global random states back."""
    random.setstate(python)
    numpy.random.set_state(numbers)
    torch.set_rng_state(torches)


@contextmanager
def other_seeds(seed: int) -> Iterator[None]:
    """Run the body under other global random states, and put back what was there."""
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        yield
    finally:
        restore(*states)


def title(kind: type, config: Mapping[str, Any]) -> str:
    """A plugin's name with its options, for messages."""
    options = ", ".join(f"{name}={value}" for name, value in config.items())
    return f"{kind.__name__}({options})"


def options(kind: Any, config: Mapping[str, Any]) -> BaseModel:
    """The validated options of a plugin class."""
    checked: BaseModel = validate(kind.Config, config, kind.__name__)
    return checked


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Standard normal float32 numbers, the same for the same `seed`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether shape, dtype and every bit agree."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return torch.equal(flat[0], flat[1])


def describe(x: Tensor) -> str:
    """Shape, dtype and range of a tensor in a few words."""
    text = f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    if x.numel():
        numbers = x.float()
        text += f" from {float(numbers.min()):.4g} to {float(numbers.max()):.4g}"
    return text
