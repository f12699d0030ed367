"""The tier ``rotation`` for ARGUS, and config files that use it."""

from __future__ import annotations

from argus import hookimpl
from argus.tiers.base import Tier
from argus_rotation.tier import Rotation


@hookimpl
def argus_tiers() -> dict[str, type[Tier]]:
    return {"rotation": Rotation}


@hookimpl
def argus_config_paths() -> str:
    return "pkg://argus_rotation.conf"
