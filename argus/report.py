"""Report: rows become one table and ``report.json``."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any
from uuid import uuid4

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from argus import __version__
from argus.commandline import Command
from argus.hookspecs import hookimpl
from argus.ledger import Match
from argus.tasks.base import Row, Run, RunEvents

SCHEMA = 2
NAME = "report.json"
PACKAGES = ("torch", "triton", "transformers", "hydra-core", "pluggy", "pydantic")


def versions() -> dict[str, str]:
    """Versions of what figures depend on."""
    found = {"argus": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    """The device in words, with the threads that a CPU run uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def command() -> str:
    """What repeats this run: the words that were given, or in a sweep the run's own."""
    swept = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    words = sys.argv[1:]
    if swept:
        folders = [f"--config-dir={folder}" for folder in Command.of(words).folders]
        words = [*folders, *HydraConfig.get().overrides.task]
    return shlex.join(["python", "-m", "argus", *words])


def document(run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    """The report as ``report.json`` holds it."""
    return {
        "schema": SCHEMA,
        "command": command(),
        "versions": versions(),
        "device": device_name(run.device),
        "backend": run.plan.backend.name,
        "config": run.config.model_dump(mode="json"),
        "budget": {name: asdict(match) for name, match in budgets(run).items()} or None,
        "skipped": dict(run.skipped),
        "rows": list(rows),
    }


def plain(data: Any) -> Any:
    """Data as JSON can hold it: null for NaN and infinity, lists for tuples."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    return [plain(value) for value in data] if isinstance(data, list | tuple) else data


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    scratch = path.with_name(f"{path.stem}-{uuid4().hex}.json")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            json.dump(plain(data), file, indent=1, allow_nan=False)
            file.write("\n")
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def size(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def number(value: Any, form: str | Callable[[Any], str]) -> str:
    """A figure, or nothing where it was not measured."""
    if value is None:
        return ""
    return format(value, form) if isinstance(form, str) else form(value)


Column = tuple[str, str, str | Callable[[Any], str]]
"""Head, name of the figure, and how it is told."""
MEMORY: tuple[Column, ...] = (
    ("bytes", "cache_bytes", size),
    ("bits", "bits_per_value", ".2f"),
    ("x less", "compression", ".2f"),
)
PROSE: tuple[Column, ...] = (("dNLL", "dnll", "+.4f"), ("KL", "kl", ".4f"))
SPEED: tuple[Column, ...] = (("prefill/s", "prefill_tokens_per_s", ".0f"), ("decode/s", "decode_tokens_per_s", ".1f"))
APART = {
    *("context", "samples", "depth", "accuracy", "decoded", "decoded_samples", "decoded_dnll", "decoded_kl"),
    *("loops", "slowest_step_over_median"),
}
"""Numbers of rows that are drawn as something else, or not at all."""
STAGE_HEADS = ("stage", "tokens", "bytes", "bits", "x less", "pages", "cos keys", "cos values")


def asked(row: Row) -> str:
    """What the accuracy of a row is of: its kind of question, or its task."""
    return str(row.get("kind", row["task"]))


def accuracy(rows: Sequence[Row]) -> str:
    """Mean accuracy of rows and their samples."""
    having = [row for row in rows if row.get("accuracy") is not None]
    count = sum(row["samples"] for row in having)
    return f"{sum(row['accuracy'] * row['samples'] for row in having) / count:.0%} of {count}" if count else ""


def merge(rows: Sequence[Row]) -> dict[tuple[str, int, int], list[Row]]:
    """Rows by cache, context, and tokens that were then decoded one by one; the figures of these are rows of their own."""
    lines: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if "stage" not in row:
            lines.setdefault((row["cache"], row["context"], 0), []).append(row)
            if row.get("decoded_kl") is not None:
                figures = {key: row.get(f"decoded_{key}") for _, key, _ in PROSE}
                lines[row["cache"], row["context"], row["decoded"]] = [{"task": row["task"], **figures}]
    order = list(dict.fromkeys(cache for cache, _, _ in lines))
    return dict(sorted(lines.items(), key=lambda line: (line[0][1], order.index(line[0][0]), line[0][2])))


def is_number(value: object) -> bool:
    """Whether a table can show it as a figure."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def own_figures(rows: Sequence[Row]) -> list[str]:
    """Names of figures, numbers in every row, that only the tasks measuring them know, in the order in which rows tell them."""
    known = APART | {key for _, key, _ in (*MEMORY, *PROSE, *SPEED)}
    told: dict[str, list[object]] = {}
    for row in rows:
        for key, value in row.items() if "stage" not in row else ():
            if key not in known and value is not None:
                told.setdefault(key, []).append(value)
    return [key for key, values in told.items() if all(map(is_number, values))]


def figure(value: float) -> str:
    """A figure of which nothing is known: four digits, or all of a whole number."""
    whole = isinstance(value, int) or (value.is_integer() and abs(value) < 1e15)
    return f"{int(value):,}" if whole else f"{value:.4g}"


def combined(line: Sequence[Row], own: Sequence[str]) -> Row:
    """One row of several: the mean of tasks' own figures, and of anything else what the last tells."""
    # Memory is of the text whose loss stands beside it.
    ordered = sorted(line, key=lambda row: row.get("kl") is not None)
    merged = {key: value for row in ordered for key, value in row.items()}
    for key in own:
        values = [row[key] for row in line if row.get(key) is not None]
        if values:
            merged[key] = fmean(values) if len(values) > 1 else values[0]
    return merged


def head(name: str) -> str:
    """A figure's name as a table has it."""
    return name.replace("_", "-" if name.startswith("distinct_") else " ")


def cache_table(rows: Sequence[Row]) -> list[list[str]]:
    """Heads, then one line a cache and context: memory, accuracy, prose, tasks' own figures, speed; what no row has is not."""
    lines = merge(rows)
    known = {key for line in lines.values() for row in line for key, value in row.items() if value is not None}
    names = own_figures(rows)
    own: list[Column] = [(head(key), key, ".3f" if key.startswith("distinct_") else figure) for key in names]
    after = [column for column in (*PROSE, *own, ("loops", "loops", ".0%"), *SPEED) if column[1] in known]
    before = [column for column in MEMORY if column[1] in known]
    tests = list(dict.fromkeys(asked(row) for line in lines.values() for row in line if row.get("accuracy") is not None))
    drawn = [["cache", "tokens", *(head for head, _, _ in before), *tests, *(head for head, _, _ in after)]]
    for (cache, context, decoded), line in lines.items():
        merged = combined(line, names)
        drawn.append(
            [
                cache,
                f"{context} +{decoded}" if decoded else str(context),
                *(number(merged.get(key), form) for _, key, form in before),
                *(accuracy([row for row in line if asked(row) == test]) for test in tests),
                *(number(merged.get(key), form) for _, key, form in after),
            ]
        )
    return drawn if lines else []


def whole(mean: float) -> str:
    """A mean of layers, of which some may hold what others do not."""
    return f"{mean:.0f}" if float(mean).is_integer() else f"{mean:.1f}"


def stage_lines(rows: Sequence[Row]) -> list[list[str]]:
    """One line a stage."""
    return [
        [
            row["stage"] if row["stage"] == row["tier"] else f"{row['stage']} ({row['tier']})",
            number(row["tokens"], whole),
            size(row["bytes"]),
            number(row["bits_per_value"], ".2f"),
            number(16 / row["bits_per_value"] if row["bits_per_value"] else None, ".2f"),
            number(row["pages"], whole),
            number(row["cosine_keys"], ".4f"),
            number(row["cosine_values"], ".4f"),
        ]
        for row in rows
        if "stage" in row
    ]


def table(rows: Sequence[Row]) -> Table:
    """All rows in one table: caches, then stages."""
    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    caches, stages = cache_table(rows), stage_lines(rows)
    heads, *lines = caches or [list(STAGE_HEADS) if stages else []]
    for place in range(max(len(heads), len(STAGE_HEADS) if stages else 0)):
        head = heads[place] if place < len(heads) else ""
        drawn.add_column(escape(head), justify="right" if place else "left", no_wrap=True)
    for line in lines:
        drawn.add_row(*map(escape, line))
    if caches and stages:
        drawn.add_section()
        drawn.add_row(*STAGE_HEADS, style="bold")
    for line in stages:
        drawn.add_row(*map(escape, line))
    return drawn


WIDTH = 100
"""Columns that tables have at least."""


def terminal(drawn: Table, folds: int = 0) -> Console:
    """Where a table goes, 100 columns wide, or as it or the terminal is: a narrower one breaks lines, but no figure is cut.

    Parameters
    ----------
    drawn : Table
    folds : int
        Columns that it can do without, since what stands in them goes on in the next line.
    """
    console = Console()
    needed = Console(width=10_000).measure(drawn).maximum - folds
    return Console(width=max(WIDTH, needed, console.width if console.is_terminal else 0))


def budgets(run: Run) -> dict[str, Match]:
    """How byte budgets were met, by cache."""
    plans = {name: kind.plan(run) for name, kind in run.caches.items()}
    return {name: plan.match for name, plan in plans.items() if plan is not None and plan.match is not None}


def budget_line(match: Match) -> str:
    """How a byte budget was met, in one line."""
    pages = ", ".join(f"{name} {count}" for name, count in match.pages.items())
    bits = f"{match.reached:.3f} reached, a step more takes {match.next:.3f}"
    return f"budget of {match.asked:g} bits at {match.context} tokens: {bits}; pages: {pages}"


class Reporter(RunEvents):
    """Prints the table and writes ``report.json`` when a run ends."""

    def end(self, run: Run, rows: list[Row]) -> None:
        # First, since a terminal may be gone and a row may not be drawn.
        write(run.folder / NAME, document(run, rows))
        drawn = table(rows)
        console = terminal(drawn)
        console.print(drawn)
        for name, match in budgets(run).items():
            console.print(f"{name}: {budget_line(match)}", soft_wrap=True)
        console.print(f"backend {run.plan.backend.name} on {device_name(run.device)}; report in {run.folder}", soft_wrap=True)


@hookimpl
def argus_run_events() -> type[RunEvents]:
    return Reporter
