"""The contract of a tier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from argus import plugins
from argus.backends.base import Backend, Role
from argus.backends.cpu import CpuBackend
from argus.build import tier_maker
from argus.errors import ConfigError
from argus.testing.base import Contract, options, title
from argus.testing.tier_cases import DTYPES, Subject, check_bits, check_pages
from argus.tiers.base import ROLES, Tier, Tools

PAGE_SIZES = (3, 4, 16, 64)
HEAD_DIMS = (5, 8, 64, 80)


def check_tier(
    kind: type[Tier],
    *,
    config: Mapping[str, Any] | None = None,
    page_size: int | None = None,
    head_dim: int | None = None,
    backend: Backend | None = None,
    known: Mapping[str, type] | None = None,
) -> None:
    """Check that a tier keeps its contract.

    Round trip within the declared :attr:`~argus.tiers.base.Tier.error`; declared bits equal to the payload's; payload laid out
    ``[n, B, ...]``; odd shapes; float16, bfloat16 and float32; tiny, large, mixed, constant and zero numbers; NaN and
    infinity; determinism; nothing touched that is not the tier's; pages and batch rows independent of their neighbours.

    Parameters
    ----------
    kind : type of Tier
    config : mapping, optional
        Options, as a config file would give them.
    page_size, head_dim : int, optional
        Tokens a page and numbers a head; by default every shape of several that the tier's ``check`` accepts.
    backend : Backend, optional
        By default the CPU backend.
    known : mapping of str to type, optional
        Tiers that this one may store parts with; by default the built-in and the installed ones.

    Raises
    ------
    ContractError
        If the contract is broken.
    ConfigError
        If `config` is not what the tier's ``Config`` allows, or a size is less than one.
    """
    for name, size in (("page_size", page_size), ("head_dim", head_dim)):
        if size is not None and size < 1:
            raise ConfigError(f"{name} {size} is no size; allowed: 1 or more")
    config = config or {}
    contract = Contract(f"tier {title(kind, config)}")
    known = plugins.kinds(plugins.load(), "argus_tiers") if known is None else known
    make = maker(kind, config, backend or CpuBackend(), known)
    sizes = PAGE_SIZES if page_size is None else (page_size,)
    dims = HEAD_DIMS if head_dim is None else (head_dim,)
    accepted = 0
    for page in sizes:
        for dim in dims:
            if refused(contract, make(torch.float16), page, dim):
                continue
            accepted += 1
            for role in ROLES:
                with contract.at(f"{role} of {page} tokens x head_dim {dim}").keeps_random_state():
                    for dtype in DTYPES:
                        check_bits(subject(make, dtype, role, page, dim, contract))
                    check_pages(subject(make, torch.float16, role, page, dim, contract))
    contract.at("check").require(accepted > 0, f"refuses every shape of page_size {list(sizes)} x head_dim {list(dims)}")


def maker(
    kind: type[Tier], config: Mapping[str, Any], backend: Backend, known: Mapping[str, type]
) -> Callable[[torch.dtype], Tier]:
    """A function that builds the tier anew for a cache that keeps exact tokens in a given dtype."""

    def build(dtype: torch.dtype) -> Tier:
        tools = Tools(backend, dtype, tier_maker(backend, dtype, known))
        return kind(options(kind, config), tools)  # type: ignore[arg-type]

    return build


def subject(
    make: Callable[[torch.dtype], Tier], dtype: torch.dtype, role: Role, page: int, dim: int, contract: Contract
) -> Subject:
    """A fresh tier under one shape and role."""
    return Subject(lambda: make(dtype), make(dtype), role, page, dim, contract)


def refused(contract: Contract, tier: Tier, page: int, dim: int) -> bool:
    """Whether the tier's check refuses a shape; it may do so with :class:`ConfigError` only."""
    words = contract.at(f"check of {page} tokens x head_dim {dim}")
    try:
        for role in ROLES:
            tier.check(role, page, dim)
    except ConfigError:
        return True
    except Exception as error:
        words.require(False, f"raises {type(error).__name__} ({error}), allowed is ConfigError")
    return False
