"""KIVI (Liu et al. 2024, arXiv:2402.02750) for ARGUS: config files only, since its codes are ARGUS's integer tiers."""

from __future__ import annotations

from argus import hookimpl


@hookimpl
def argus_config_paths() -> str:
    return "pkg://argus_kivi.conf"
