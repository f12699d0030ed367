"""The tier ``rotation`` for ARGUS, and config files that use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from argus import hookimpl

if TYPE_CHECKING:
    from argus.tiers.base import Tier


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    # Imported when a cache is built: the command line loads plugins for their config paths alone.
    from argus_rotation.tier import Rotation

    return {"rotation": Rotation}


@hookimpl
def argus_config_paths() -> str:
    return "pkg://argus_rotation.conf"
