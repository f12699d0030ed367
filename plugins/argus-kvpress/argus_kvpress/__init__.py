"""Caches that evict tokens as kvpress does, for ARGUS to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from argus import hookimpl

if TYPE_CHECKING:
    from argus.tasks.base import CacheKind


@hookimpl
def argus_caches() -> dict[str, type[CacheKind]]:
    # Imported when a run starts: the command line loads plugins for their config paths alone.
    from argus_kvpress.cache import Pressed

    return {"kvpress": Pressed}


@hookimpl
def argus_config_paths() -> str:
    return "pkg://argus_kvpress.conf"
