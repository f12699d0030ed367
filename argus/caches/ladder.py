"""ARGUS's own cache: the run's ladder, or another one beside it."""

from __future__ import annotations

from typing import Any

from argus.adapters.huggingface import ArgusCache, make_plan
from argus.build import build
from argus.config import load_cache_config
from argus.ledger import Ledger
from argus.plan import Plan
from argus.policies.base import TextFacts
from argus.tasks.base import CacheKind, CacheOptions, Run


class ArgusOptions(CacheOptions):
    """Options of ``argus``.

    ``overrides`` are Hydra's, on the defaults of conf/config.yaml: ``[tiers=int4, anchors=none]``. Without any it is the
    cache that the run's own config describes.
    """

    overrides: tuple[str, ...] = ()


class Argus(CacheKind):
    """A ladder with its policies."""

    Config = ArgusOptions
    _plan: Plan | None = None

    def check(self, head_dim: int) -> None:
        if self.config.overrides:
            build(load_cache_config(self.config.overrides), head_dim, text=TextFacts(line_ends=(0,)))

    def make(self, run: Run) -> ArgusCache:
        return ArgusCache(run.model, plan=self.plan(run))

    def plan(self, run: Run) -> Plan:
        """The run's plan, or the one of its own overrides, built once and on the run's backend."""
        if not self.config.overrides:
            return run.plan
        if self._plan is None:
            words = [f"backend={run.config.backend}", *self.config.overrides]
            self._plan = make_plan(run.model, words, run.tokenizer)
        return self._plan

    def ledger(self, cache: Any) -> Ledger:
        ledger: Ledger = cache.ledger()
        return ledger
