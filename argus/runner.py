"""One run: a validated config becomes a model, a plan, caches and a task, whose rows go to the listeners."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from argus import plugins
from argus.adapters.huggingface import make_plan
from argus.config import CacheChoice, RunConfig, validate
from argus.errors import ConfigError
from argus.models import load
from argus.tasks.base import CacheKind, Row, Run, RunEvents, Task, checked


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A spinner on stderr that says what is going on; one line each where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda sentence: print(sentence, file=sys.stderr, flush=True)
        return
    with console.status("starting") as status:
        yield status.update


def stream(text: str) -> None:
    """Print text as it comes."""
    print(text, end="", flush=True)


@dataclass(frozen=True)
class Parts:
    """The plugins that a run uses."""

    task: Task
    caches: dict[str, CacheKind]
    skipped: dict[str, str]
    listeners: list[RunEvents]


def choose(config: RunConfig) -> Parts:
    """The task, caches and listeners of a run, by name.

    Raises
    ------
    ConfigError
        If a name or an option is not known, or the reference needs what is not installed.
    """
    manager = plugins.load(commands=True)
    kind = plugins.pick("task", config.task.name, plugins.kinds(manager, "argus_tasks"))
    known = plugins.kinds(manager, "argus_caches")
    caches = {name: make_cache(name, choice, known) for name, choice in config.caches().items()}
    skipped = {name: reason for name, cache in caches.items() if (reason := cache.missing()) is not None}
    if config.reference in skipped:
        raise ConfigError(f"reference '{config.reference}': {skipped[config.reference]}")
    return Parts(
        task=kind(validate(kind.Config, config.task.options, "task")),
        caches={name: cache for name, cache in caches.items() if name not in skipped},
        skipped=skipped,
        listeners=[listener() for _, listener in plugins.answers(manager, "argus_run_events", type, "a class")],
    )


def make_cache(name: str, choice: CacheChoice, known: Mapping[str, type]) -> CacheKind:
    """The kind of cache that a choice names, with its options."""
    kind = plugins.pick("cache", choice.kind, known)
    cache: CacheKind = kind(validate(kind.Config, choice.options, f"cache.{name}"))
    return cache


def execute(config: RunConfig, folder: Path) -> list[Row]:
    """Run a task and tell the listeners.

    Raises
    ------
    ArgusError
        Before anything is measured, if a name is not known or something does not fit.
    """
    parts = choose(config)
    for name, reason in parts.skipped.items():
        print(f"argus: cache '{name}' is skipped: {reason}", file=sys.stderr, flush=True)
    with progress() as tell:
        tell("loading the model")
        loaded = load(config.model)
        plan = make_plan(loaded.model, config.argus(), loaded.tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(
            config, loaded.model, loaded.tokenizer, loaded.device, plan, parts.caches, folder, tell, stream, parts.skipped
        )
        for listener in parts.listeners:
            listener.start(run)
        rows: list[Row] = []
        for row in map(checked, parts.task.run(run)):
            rows.append(row)
            for listener in parts.listeners:
                listener.row(run, row)
    for listener in parts.listeners:
        listener.end(run, rows)
    return rows
