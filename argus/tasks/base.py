"""A task: a model and the caches to compare, in; rows, out."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from argus.config import RunConfig
from argus.errors import PluginError
from argus.ledger import Ledger
from argus.plan import Plan

Row = dict[str, Any]
"""One line of the report: ``task``, ``cache``, ``context``, and what was measured."""
NEEDED = (("task", str, "a string"), ("cache", str, "a string"), ("context", int, "a number of tokens"))
STAGE = ("tier", "tokens", "bytes", "bits_per_value", "pages", "cosine_keys", "cosine_values")
"""What a row of a stage tells beside its name."""
FIGURES = (
    *("cache_bytes", "bits_per_value", "compression", "accuracy", "dnll", "kl", "decoded_dnll", "decoded_kl", "loops"),
    *("prefill_tokens_per_s", "decode_tokens_per_s"),
)
"""What tables show as a number of any other row."""


def checked(row: Mapping[str, Any]) -> Row:
    """A row as a report can hold it: numbers of NumPy and PyTorch as Python's.

    Raises
    ------
    PluginError
        If it lacks what every table shows.
    """
    if not isinstance(row, Mapping):
        raise PluginError(f"a row of the task is {row!r}; allowed: a dict")
    plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()}
    faults = [f"'{name}' must be {said}" for name, kind, said in NEEDED if not isinstance(plain.get(name), kind)]
    for name, beside, what in (("accuracy", "samples", "them"), ("decoded_kl", "decoded", "tokens")):
        if plain.get(name) is not None and not (isinstance(plain.get(beside), int) and plain[beside] > 0):
            faults.append(f"'{name}' needs '{beside}', a number of {what} above 0")
    told = [name for name in (STAGE[1:] if "stage" in plain else FIGURES) if plain.get(name) is not None]
    faults += [f"'{name}' must be a number" for name in told if not isinstance(plain[name], int | float)]
    missing = [name for name in STAGE if name not in plain] if "stage" in plain else []
    if missing:
        faults.append(f"'stage' needs {', '.join(missing)}")
    for key, value in plain.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            faults.append(f"'{key}' is a {type(value).__name__}, which no report can hold")
    if faults:
        raise PluginError(f"a row of task {plain.get('task')!r}: {'; '.join(faults)}")
    return plain


class TaskConfig(BaseModel):
    """Options of a task. Subclass it to add your own; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CacheOptions(BaseModel):
    """Options of a kind of cache. Subclass it to add your own; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Run:
    """All that a task may use.

    Attributes
    ----------
    config : RunConfig
    model, tokenizer : Any
        From transformers, on `device`.
    plan : Plan
        Of the ARGUS cache.
    caches : mapping of str to CacheKind
        The caches to compare, the reference first, by the names that rows call them.
    folder : Path
        Where pictures go.
    tell : callable
        ``tell(sentence)`` shows what is going on.
    show : callable
        ``show(text)`` prints text as it streams.
    skipped : mapping of str to str
        Caches that were asked for and cannot be made here, each with what to install.
    """

    config: RunConfig
    model: Any
    tokenizer: Any
    device: torch.device
    plan: Plan
    caches: Mapping[str, CacheKind]
    folder: Path
    tell: Callable[[str], None]
    show: Callable[[str], None]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The seed of everything random."""
        return self.config.seed


class CacheKind(ABC):
    """A way to make caches of one kind and to measure them."""

    Config: ClassVar[type[CacheOptions]] = CacheOptions

    def __init__(self, config: CacheOptions | None = None) -> None:
        self.config: Any = self.Config() if config is None else config

    def missing(self) -> str | None:
        """What is not installed and how to install it, in one line; None where nothing is missing."""
        return None

    def check(self, head_dim: int) -> None:
        """Raise :class:`~argus.errors.ConfigError` if the options do not fit; called before the model is loaded."""
        return

    def plan(self, run: Run) -> Plan | None:
        """The ladder of caches of this kind; None where they have none."""
        return None

    @abstractmethod
    def make(self, run: Run) -> Any:
        """A fresh, empty cache for ``model(past_key_values=...)``."""

    @abstractmethod
    def ledger(self, cache: Any) -> Ledger:
        """Measured bytes of a cache of this kind."""


class Task(ABC):
    """Something to measure."""

    Config: ClassVar[type[TaskConfig]] = TaskConfig

    def __init__(self, config: TaskConfig) -> None:
        self.config: Any = config

    @abstractmethod
    def run(self, run: Run) -> Iterator[Row]:
        """Yield rows as they are measured."""


class RunEvents:
    """A listener to a run; override what you need."""

    def start(self, run: Run) -> None:
        """The model is loaded and the task is about to start."""

    def row(self, run: Run, row: Row) -> None:
        """A row was measured."""

    def end(self, run: Run, rows: list[Row]) -> None:
        """All rows were measured."""
