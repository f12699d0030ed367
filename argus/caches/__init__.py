"""Caches to compare, each by the kind that a file under ``conf/cache`` names."""

from __future__ import annotations

from argus.caches.dense import Dynamic, Half, dense_ledger
from argus.caches.ladder import Argus
from argus.caches.quantized import Fp8, Hqq, Quanto
from argus.hookspecs import hookimpl
from argus.tasks.base import CacheKind

__all__ = ["Argus", "Dynamic", "Fp8", "Half", "Hqq", "Quanto", "dense_ledger"]


@hookimpl
def argus_caches() -> dict[str, type[CacheKind]]:
    return {"fp16": Half, "dynamic": Dynamic, "argus": Argus, "quanto": Quanto, "hqq": Hqq, "fp8": Fp8}
