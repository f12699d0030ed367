"""The composition root: config and classes become a plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch

from argus import plugins
from argus.backends.base import Backend
from argus.config import CacheConfig, PolicyChoice, StageConfig, validate
from argus.errors import ConfigError
from argus.plan import Plan, Stage
from argus.policies.base import StageFacts, TextFacts
from argus.tiers.base import ROLES, Tier, Tools


def build(
    config: CacheConfig,
    head_dim: int | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    text: TextFacts | None = None,
    extra: Iterable[Any] = (),
) -> Plan:
    """Choose tiers, policies and backend once, and check that they fit.

    Parameters
    ----------
    config : CacheConfig
    head_dim : int or None
        Numbers a head of the model's keys; None: not known yet, what depends on it is not checked.
    dtype : torch.dtype
        In which the model computes.
    device : torch.device or str
        Where it computes.
    text : TextFacts or None
        What is known of the tokenizer.
    extra : iterable
        Plugin objects beside the built-in and the installed ones.

    Raises
    ------
    ConfigError
        If a name is not known, an option is not allowed, a group does not divide, the ladder grows, or the backend needs a
        device that is not here.
    PluginError
        If a plugin does not load or answers a hook with what it may not, or two plugins claim one name.
    """
    manager = plugins.load(extra)
    backend = choose_backend(config.backend, torch.device(device), plugins.kinds(manager, "argus_backends"))
    exact = exact_dtype(config.tiers.dtype, dtype)
    make = tier_maker(backend, exact, plugins.kinds(manager, "argus_tiers"))
    ladder = config.tiers
    stages = tuple(make_stage(name, ladder.stages[name], ladder.page_size, make) for name in ladder.order)
    if head_dim is not None:
        check_ladder(stages, ladder.page_size, head_dim, ladder.allow_growth)
    text = text or TextFacts()
    anchors = plugins.kinds(manager, "argus_anchors")
    return Plan(
        page_size=ladder.page_size,
        window=ladder.window,
        leaving=1 + ladder.slack // ladder.page_size,
        dtype=exact,
        block_pages=ladder.block_pages,
        stages=stages,
        aging=make_policy("aging", config.aging, plugins.kinds(manager, "argus_aging")),
        anchors=tuple(make_anchor(name, options, anchors, text) for name, options in config.anchors.items()),
        outliers=make_policy("outliers", config.outliers, plugins.kinds(manager, "argus_outliers")),
        backend=backend,
        cascade=ladder.encode == "cascade",
        eight=ladder.anchors == "int8",
        graphs=config.graphs,
    )


def exact_dtype(choice: str, model: torch.dtype) -> torch.dtype:
    """The dtype of exact tokens: as asked, or 16 bits (the model's own where it computes in 16 bits)."""
    if choice == "auto":
        return model if model.itemsize == 2 else torch.float16
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[choice]


def choose_backend(name: str, device: torch.device, known: Mapping[str, type]) -> Backend:
    """The backend asked for; ``auto``: ``triton`` on a GPU where it is known, else ``cpu``."""
    if name == "auto":
        name = "triton" if device.type == "cuda" and "triton" in known else "cpu"
    kind = plugins.pick("backend", name, known)
    if name == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") == "0":
        others = ", ".join(sorted({"auto", *known} - {name}))
        raise ConfigError(f"backend 'triton' needs a CUDA device, and none is here; allowed: {others}")
    backend: Backend = kind()
    return backend


def tier_maker(backend: Backend, dtype: torch.dtype, known: Mapping[str, type]) -> Callable[..., Tier]:
    """A function ``make(spec, where)`` that builds a tier of `known`.

    ``spec`` is its name, or a mapping of its name (``tier``) and its options; ``where`` is what faults of the options call it.
    """

    def make(spec: str | Mapping[str, Any], where: str = "") -> Tier:
        options = {"tier": spec} if isinstance(spec, str) else dict(spec)
        name = options.pop("tier", None)
        if name is None:
            raise ConfigError(f"{where or 'a tier'}: {options} names no tier; allowed: tier=..., one of {', '.join(known)}")
        kind = plugins.pick("tier", str(name), known)
        tier: Tier = kind(validate(kind.Config, options, where or kind.__name__.lower()), Tools(backend, dtype, make))
        return tier

    return make


def make_stage(name: str, config: StageConfig, page_size: int, make: Callable[..., Tier]) -> Stage:
    """One stage's tiers; a tier or an option beside roles that both have their own would have no use and is refused."""
    shared: dict[str, Any] = {"tier": config.tier, **config.options}
    own = {role: getattr(config, role) for role in ROLES}
    parted = all(own.values())
    if config.tier is None and not parted:
        raise ConfigError(f"stages.{name}: give tier=..., or both keys=... and values=...")
    if parted and (config.tier or config.options):
        raise ConfigError(f"stages.{name}: keys and values have tiers of their own; tier and options beside them have no use")
    tiers = {
        role: make(spec, f"stages.{name}.{role}") if spec else make(shared, f"stages.{name}") for role, spec in own.items()
    }
    capacity = None if config.capacity is None else config.capacity // page_size
    return Stage(StageFacts(name, capacity), tiers["keys"], tiers["values"])


def stage_bits(stage: Stage, page_size: int, head_dim: int) -> float:
    """Bits a value that a stage keeps, keys and values alike."""
    return sum(stage.tier(role).bits(role, page_size, head_dim) for role in ROLES) / len(ROLES)


def check_ladder(stages: tuple[Stage, ...], page_size: int, head_dim: int, allow_growth: bool) -> None:
    """Raise :class:`ConfigError` unless every stage fits the pages and keeps fewer bytes than the one before."""
    for stage in stages:
        for role in ROLES:
            stage.tier(role).check(role, page_size, head_dim)
    if allow_growth:
        return
    for first, second in pairwise(stages):
        before, after = (stage_bits(stage, page_size, head_dim) for stage in (first, second))
        if after >= before:
            raise ConfigError(
                f"stage '{second.facts.name}' keeps {after:g} bits a value, not fewer than '{first.facts.name}' before it "
                f"with {before:g}; allowed: fewer, or tiers.allow_growth=true"
            )


def make_policy(group: str, choice: PolicyChoice, known: Mapping[str, type]) -> Any:
    """An aging or outlier policy."""
    kind = plugins.pick(f"{group} policy", choice.policy, known)
    return kind(validate(kind.Config, choice.options, group))


def make_anchor(name: str, options: Mapping[str, Any] | None, known: Mapping[str, type], text: TextFacts) -> Any:
    """An anchor policy."""
    kind = plugins.pick("anchor policy", name, known)
    return kind(validate(kind.Config, options or {}, f"anchors.{name}"), text)
