"""Report: rows become one table, ``report.json``, and after a sweep one table and one picture."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from argus import __version__
from argus.hookspecs import hookimpl
from argus.tasks.base import Row, Run, RunEvents

SCHEMA = 1
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


def document(run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    """The report as ``report.json`` holds it."""
    return {
        "schema": SCHEMA,
        "command": " ".join(["python -m argus", *sys.argv[1:]]),
        "versions": versions(),
        "device": device_name(run.device),
        "backend": run.plan.backend.name,
        "config": run.config.model_dump(mode="json"),
        "rows": list(rows),
    }


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
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


def number(value: Any, form: str) -> str:
    """A figure, or nothing where it was not measured."""
    return "" if value is None else format(value, form)


CACHE_HEADS = ("cache", "tokens", "bytes", "bits", "x less", "passkey", "dNLL", "KL", "prefill/s", "decode/s")
STAGE_HEADS = ("stage", "tokens", "bytes", "bits", "x less", "pages", "cos keys", "cos values", "", "")


def cache_lines(rows: Sequence[Row]) -> list[list[str]]:
    """One line a cache and context: memory, passkey, prose, speed."""
    lines: dict[tuple[str, int], Row] = {}
    for row in rows:
        if "stage" not in row:
            line = lines.setdefault((row["cache"], row["context"]), {})
            line.update(row)
            if "accuracy" in row:
                line["passkey"] = f"{row['accuracy']:.0%} of {row['samples']}"
    order = {name: place for place, name in enumerate(dict.fromkeys(cache for cache, _ in lines))}
    table = []
    for (cache, context), row in sorted(lines.items(), key=lambda item: (item[0][1], order[item[0][0]])):
        table.append(
            [
                cache,
                str(context),
                size(row.get("cache_bytes")),
                number(row.get("bits_per_value"), ".2f"),
                number(row.get("compression"), ".2f"),
                row.get("passkey", ""),
                number(row.get("dnll"), "+.4f"),
                number(row.get("kl"), ".4f"),
                number(row.get("prefill_tokens_per_s"), ".0f"),
                number(row.get("decode_tokens_per_s"), ".1f"),
            ]
        )
    return table


def stage_lines(rows: Sequence[Row]) -> list[list[str]]:
    """One line a stage."""
    return [
        [
            row["stage"] if row["stage"] == row["tier"] else f"{row['stage']} ({row['tier']})",
            str(row["tokens"]),
            size(row["bytes"]),
            number(row["bits_per_value"], ".2f"),
            number(16 / row["bits_per_value"] if row["bits_per_value"] else None, ".2f"),
            f"{row['pages']}",
            number(row["cosine_keys"], ".4f"),
            number(row["cosine_values"], ".4f"),
            "",
            "",
        ]
        for row in rows
        if "stage" in row
    ]


def table(rows: Sequence[Row]) -> Table:
    """All rows in one table of at most 100 columns: caches, then stages."""
    drawn = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    caches = cache_lines(rows)
    stages = stage_lines(rows)
    heads = CACHE_HEADS if caches else STAGE_HEADS
    for place, head in enumerate(heads):
        drawn.add_column(head, justify="right" if place else "left", no_wrap=True)
    for line in caches:
        drawn.add_row(*line)
    if caches and stages:
        drawn.add_section()
        drawn.add_row(*STAGE_HEADS, style="bold")
    for line in stages:
        drawn.add_row(*line)
    return drawn


def terminal() -> Console:
    """Where tables go: the terminal as wide as it is, a file at 100 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


class Reporter(RunEvents):
    """Prints the table and writes ``report.json`` when a run ends."""

    def end(self, run: Run, rows: list[Row]) -> None:
        write(run.folder / NAME, document(run, rows))
        console = terminal()
        console.print(table(rows))
        print_generation(console, rows)
        console.print(f"backend {run.plan.backend.name} on {device_name(run.device)}; report in {run.folder}", soft_wrap=True)


def print_generation(console: Console, rows: Iterable[Row]) -> None:
    """How much each continuation repeats itself."""
    for row in rows:
        shares = ", ".join(f"{name.replace('_', '-')} {row[name]:.3f}" for name in row if name.startswith("distinct_"))
        if shares:
            console.print(f"{row['cache']}: {shares}")


@hookimpl
def argus_run_events() -> type[RunEvents]:
    return Reporter
