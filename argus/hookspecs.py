"""Every hook of ARGUS. Hooks return classes, or where configs are; none is called for a page or a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from argus.backends.base import Backend
    from argus.policies.base import Aging, Anchors, Outliers
    from argus.tasks.base import CacheKind, RunEvents, Task
    from argus.tiers.base import Tier

PROJECT = "argus"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def argus_tiers() -> dict[str, type[Tier]]:  # type: ignore[empty-body]
    """Tiers by the name that ``tiers.stages.<stage>.tier`` selects."""


@hookspec
def argus_aging() -> dict[str, type[Aging]]:  # type: ignore[empty-body]
    """Aging policies by the name that ``aging.policy`` selects."""


@hookspec
def argus_anchors() -> dict[str, type[Anchors]]:  # type: ignore[empty-body]
    """Anchor policies by the name that a key of ``anchors`` selects."""


@hookspec
def argus_outliers() -> dict[str, type[Outliers]]:  # type: ignore[empty-body]
    """Outlier policies by the name that ``outliers.policy`` selects."""


@hookspec
def argus_backends() -> dict[str, type[Backend]]:  # type: ignore[empty-body]
    """Backends by the name that ``backend`` selects."""


@hookspec
def argus_caches() -> dict[str, type[CacheKind]]:  # type: ignore[empty-body]
    """Caches to compare, by the name that ``cache.<name>.kind`` selects."""


@hookspec
def argus_tasks() -> dict[str, type[Task]]:  # type: ignore[empty-body]
    """Tasks by the name that ``task.name`` selects."""


@hookspec
def argus_config_paths() -> str:  # type: ignore[empty-body]
    """A package with config groups of its own, as ``pkg://its_package.conf``."""


@hookspec
def argus_run_events() -> type[RunEvents]:  # type: ignore[empty-body]
    """A listener that is told when a run starts, yields a row, and ends."""
