"""ARGUS: a tiered key-value cache for language models. Tiers, policies, backends and tasks are plugins."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ArgusCache": "argus.adapters.huggingface",
    "patch_model_with_argus": "argus.adapters.patch",
    "unpatch": "argus.adapters.patch",
    "CacheConfig": "argus.config",
    "load_cache_config": "argus.config",
    "ArgusError": "argus.errors",
    "hookimpl": "argus.hookspecs",
}
__all__ = ["ArgusCache", "ArgusError", "CacheConfig", "hookimpl", "load_cache_config", "patch_model_with_argus", "unpatch"]

if TYPE_CHECKING:
    from argus.adapters.huggingface import ArgusCache
    from argus.adapters.patch import patch_model_with_argus, unpatch
    from argus.config import CacheConfig, load_cache_config
    from argus.errors import ArgusError
    from argus.hookspecs import hookimpl


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'argus' has no attribute '{name}'; public names: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
