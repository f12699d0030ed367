"""After a sweep: one table and one picture of quality against measured bits a value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from argus.errors import ArgusError
from argus.pictures import draw_pareto
from argus.report import NAME, number, terminal

QUALITY = (("kl", "KL, nats"), ("dnll", "change in NLL, nats"), ("accuracy", "passkey accuracy"))


def read(folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Every run of a sweep: its overrides and its report.

    Raises
    ------
    ArgusError
        If there is none.
    """
    found = []
    for path in sorted(folder.glob(f"*/{NAME}"), key=lambda path: (len(path.parent.name), path.parent.name)):
        listed = path.parent / ".hydra" / "overrides.yaml"
        words = [line[2:] for line in listed.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]
        found.append((" ".join(words), json.loads(path.read_text(encoding="utf-8"))))
    if not found:
        raise ArgusError(f"no run of the sweep in {folder} wrote {NAME}")
    return found


def distinguish(names: Sequence[str]) -> list[str]:
    """Overrides without the words that all runs share."""
    words = [name.split() for name in names]
    shared = set(words[0]).intersection(*words[1:]) if len(words) > 1 else set()
    return [" ".join(word for word in line if word not in shared) or "default" for line in words]


def figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Mean figures of the ARGUS rows of a report, at the longest context that has each."""
    rows = [row for row in report["rows"] if row["cache"] == "argus" and "stage" not in row]
    out: dict[str, float] = {}
    for name in ("bits_per_value", "compression", "kl", "dnll", "accuracy", "decode_tokens_per_s"):
        having = [row for row in rows if row.get(name) is not None]
        longest = max((row["context"] for row in having), default=0)
        values = [row[name] for row in having if row["context"] == longest]
        if values:
            out[name] = sum(values) / len(values)
    return out


def undominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (bits, loss) pairs no other beats in both."""
    return [
        not any((b <= bits and q <= loss) and (b < bits or q < loss) for b, q in points) for bits, loss in points
    ]


def summarize(folder: Path) -> None:
    """Print the table of a sweep and draw ``pareto.png`` into its folder."""
    runs = read(folder)
    names = distinguish([name for name, _ in runs])
    found = [figures(report) for _, report in runs]
    quality = next((pair for pair in QUALITY if all(pair[0] in one for one in found)), None)
    table = Table(box=box.SIMPLE_HEAD)
    heads = {"bits_per_value": ".2f", "compression": ".2f", "accuracy": ".0%", "dnll": "+.4f", "kl": ".4f"}
    heads["decode_tokens_per_s"] = ".1f"
    table.add_column("run", overflow="fold")
    for head in ("bits", "x less", "passkey", "dNLL", "KL", "decode/s", "best"):
        table.add_column(head, justify="right", no_wrap=True)
    best = [False] * len(found)
    if quality is not None:
        sign = -1 if quality[0] == "accuracy" else 1
        best = undominated([(one["bits_per_value"], sign * one[quality[0]]) for one in found])
        draw_pareto(
            [(name, one["bits_per_value"], one[quality[0]]) for name, one in zip(names, found, strict=True)],
            folder / "pareto.png",
            quality[1],
        )
    for name, one, mark in zip(names, found, best, strict=True):
        table.add_row(name, *(number(one.get(head), form) for head, form in heads.items()), "*" if mark else "")
    console = terminal()
    console.print(table)
    console.print(f"*: no other run has fewer bits and better quality; sweep in {folder}", soft_wrap=True)
