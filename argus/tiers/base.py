"""A tier: a pair of pure functions between pages and what is kept of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from argus.backends.base import PLANES, ROLES as ROLES, Axis, Backend, Payload as Payload, Role as Role
from argus.errors import ConfigError, RangeError

LIMIT = 32752.0
"""Half of the largest FP16 number: scales, zeros and means are kept in FP16, and a range spans twice its largest number."""


Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
"""A seed as PyTorch's generators take it."""


class TierConfig(BaseModel):
    """Options of a tier. Subclass it to add your own; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Tools:
    """What a tier may ask for.

    Attributes
    ----------
    backend : Backend
        Quantizing, packing, projecting.
    dtype : torch.dtype
        The dtype in which the cache keeps exact tokens.
    tier : callable
        ``tier("int4")`` or ``tier({"tier": "int4", "group_size": 16})`` builds another tier to store parts with.
    """

    backend: Backend
    dtype: torch.dtype
    tier: Callable[[str | Mapping[str, Any]], Tier]


class Tier(ABC):
    """One way to keep pages of keys or of values.

    A tier knows nothing of the engine, of Hydra or of other tiers. It has no state beside its options: equal input
    gives equal output.

    Attributes
    ----------
    Config : type
        The tier's options.
    error : float
        The relative error ``|decode(encode(x)) - x| / |x|`` of normal numbers is at most this, with ``|.|`` the Euclidean
        norm over many pages of 64 tokens x 64 channels; set it in ``__init__`` where it depends on options.
    """

    Config: ClassVar[type[TierConfig]] = TierConfig
    error: float = 0.0

    def __init__(self, config: TierConfig, tools: Tools) -> None:
        self.config: Any = config
        self.tools = tools

    @abstractmethod
    def encode(self, x: Tensor, role: Role) -> Payload:
        """Compress pages.

        Parameters
        ----------
        x : Tensor
            ``[n, B, H, P, D]`` float32 (pages, batch, key-value heads, tokens, head_dim), finite, within +-32752.
        role : {"keys", "values"}

        Returns
        -------
        dict of str to Tensor
            Named tensors, each ``[n, B, ...]``.
        """

    @abstractmethod
    def decode(self, payload: Payload, role: Role) -> Tensor:
        """Pages ``[n, B, H, P, D]`` float32 from what :meth:`encode` returned; never touches `payload`."""

    @abstractmethod
    def bits(self, role: Role, page_size: int, head_dim: int) -> float:
        """Bits a value that :meth:`encode` keeps, scales and all, for pages of `page_size` tokens."""

    def check(self, role: Role, page_size: int, head_dim: int) -> None:
        """Raise :class:`ConfigError` if pages of this shape cannot be kept; the default accepts all."""
        return

    def form(self, role: Role) -> object | None:
        """How a backend may read the codes in place, by a form it knows or :class:`argus.backends.base.Loaded`; None: not."""
        return None

    def target(self, role: Role) -> object | None:
        """The form for which :meth:`argus.backends.base.Backend.encode` does all that :meth:`encode` does; None: it does not.

        With it a backend may encode pages straight from what another tier keeps. Who overrides `encode` overrides this.
        """
        return None

    def shared(self) -> dict[str, Tensor]:
        """Tensors that all pages share, counted once: projections, codebooks."""
        return {}


def gate(x: Tensor) -> Tensor:
    """Let pages pass to a tier: float32, finite, within FP16's range.

    Parameters
    ----------
    x : Tensor
        Keys or values of any floating dtype.

    Returns
    -------
    Tensor
        float32.

    Raises
    ------
    RangeError
        If a number is NaN, infinite, or beyond 32752 in size.
    """
    check_range(extent(x))
    return x.to(torch.float32)


def bounded(x: Tensor) -> Tensor:
    """Pages in float32, with other numbers where a tier may be given none such; nothing waits for the device."""
    return x.to(torch.float32).nan_to_num(0.0).clamp(-LIMIT, LIMIT)


def extent(*parts: Tensor) -> Tensor:
    """The largest size of any number: a scalar on the device, NaN if there is one. Nothing waits for it."""
    sizes = [x.detach().abs().amax().to(torch.float32) for x in parts if x.numel()]
    return torch.stack(sizes).amax() if sizes else torch.zeros((), dtype=torch.float32, device=parts[0].device)


def check_range(largest: Tensor) -> None:
    """Raise :class:`RangeError` if what :func:`extent` found is more than a tier keeps; waits for the device."""
    found = float(largest)
    if not found <= LIMIT:
        raise RangeError(f"keys or values reach {found:g}; a tier keeps finite numbers up to {LIMIT:g}")


def group_length(group: int | None, axis: Axis, page_size: int, head_dim: int) -> int:
    """Numbers that share a scale; None: the whole axis of a page."""
    return group or (page_size if axis == "channel" else head_dim)


def check_group(kind: str, group: int | None, axis: Axis, page_size: int, head_dim: int) -> None:
    """Raise :class:`ConfigError` unless `group` divides the axis that it runs along."""
    length, name = (page_size, "page_size") if axis == "channel" else (head_dim, "head_dim")
    if group is not None and length % group:
        divisors = [d for d in range(1, length + 1) if length % d == 0]
        raise ConfigError(f"{kind}: group_size {group} does not divide {name} {length}; allowed: {divisors}")


def check_packing(kind: str, bits: int, head_dim: int) -> None:
    """Raise :class:`ConfigError` unless codes of `bits` fill whole bytes along ``head_dim``."""
    multiple = 8 // min(PLANES[bits])
    if head_dim % multiple:
        raise ConfigError(f"{kind}: head_dim {head_dim} does not pack into bytes; allowed: multiples of {multiple}")
