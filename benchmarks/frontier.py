"""Quality against measured bits a value on one model: tables and pictures of kept runs.

``python -m benchmarks.frontier`` prints what ``benchmarks/results/frontier.json`` holds: the set `shapes` (one stage for all
pages beside ladders by age, one seed), the set `capacities` (the newest tokens in one form, older ones projected, three seeds)
and the set `eight` (the same with anchors in 8 bits, ``n`` and ``s`` per cent novel and salient). Every row is a run that
anyone can repeat: ``python -m argus <overrides> <run> seed=<seed>``; `--commands` prints them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
from collections import defaultdict
from math import log2
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from argus.report import terminal

Row = dict[str, Any]
NEAR = 0.25
"""Bits a value, and doublings of KL, within which a picture has one name for two points."""


def gather(rows: list[Row], context: int) -> list[Row]:
    """One line a configuration: prose at `context` tokens over its seeds, and the least share of passkeys at any length."""
    prose: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    keys: dict[tuple[str, ...], dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        name = tuple(row["overrides"])
        if row["task"] == "passkey":
            keys[name][row["context"]].append((round(row["accuracy"] * row["samples"]), row["samples"]))
        elif row["context"] == context:
            prose[name].append(row)
    lines = []
    for name, found in prose.items():
        losses = [row["dnll"] for row in found]
        shares = {
            length: sum(right for right, _ in counts) / sum(asked for _, asked in counts)
            for length, counts in keys[name].items()
        }
        lines.append(
            {
                "name": found[0]["name"],
                "bits": statistics.fmean(row["bits_per_value"] for row in found),
                "dnll": statistics.fmean(losses),
                "spread": statistics.stdev(losses) if len(losses) > 1 else None,
                "kl": statistics.fmean(row["kl"] for row in found),
                "seeds": len(found),
                "passkeys": min(shares.values(), default=None),
            }
        )
    return sorted(lines, key=lambda line: line["bits"])


def best(lines: list[Row]) -> set[str]:
    """Names that no other line beats in bits and in KL."""
    return {
        line["name"] for line in lines if not any(other["bits"] <= line["bits"] and other["kl"] < line["kl"] for other in lines)
    }


def show(lines: list[Row]) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("configuration", "bits", "x less", "dNLL", "+-", "KL", "n", "keys", "best"):
        table.add_column(head, justify="left" if head == "configuration" else "right", no_wrap=True)
    marked = best(lines)
    for line in lines:
        spread = "" if line["spread"] is None else f"{line['spread']:.4f}"
        passkeys = "" if line["passkeys"] is None else f"{line['passkeys']:.0%}"
        figures = (f"{line['bits']:.2f}", f"{16 / line['bits']:.2f}", f"{line['dnll']:+.4f}", spread, f"{line['kl']:.4f}")
        table.add_row(line["name"], *figures, str(line["seeds"]), passkeys, "*" if line["name"] in marked else "")
    console = terminal(table)
    console.print(table)
    console.print("+-: spread over n seeds; keys: passkeys found at the length where fewest are;")
    console.print("*: no other line has fewer bits and a smaller KL")


def by_age(name: str) -> bool:
    """Whether a configuration of this name has several stages."""
    return "-jl" in name or name.startswith("default") or name.count("-") > 1


def draw(lines: list[Row], path: Path) -> None:
    """Draw KL against bits; ladders by age apart from one stage for all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    marked = best(lines)
    for label, aged, marker in (("one stage for all pages", False, "o"), ("newest pages in more bits", True, "^")):
        chosen = [line for line in lines if by_age(line["name"]) == aged]
        axes.scatter([line["bits"] for line in chosen], [line["kl"] for line in chosen], marker=marker, label=label)
    last = (0.0, 0.0)
    for line in lines:
        near = abs(line["bits"] - last[0]) < NEAR and abs(log2(line["kl"] / last[1])) < NEAR
        if line["name"] in marked and not near:
            last = (line["bits"], line["kl"])
            axes.annotate(line["name"], (line["bits"], line["kl"]), fontsize=6, xytext=(3, -7), textcoords="offset points")
    axes.set(xlabel="measured bits a value", ylabel="KL, nats", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/frontier.json"))
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text())["rows"]
    if options.commands:
        for row in rows:
            print(shlex.join(["python", "-m", "argus", *row["overrides"], *row["run"], f"seed={row['seed']}"]))
        return
    for name in dict.fromkeys(row["set"] for row in rows):
        lines = gather([row for row in rows if row["set"] == name], options.context)
        show(lines)
        draw(lines, options.rows.with_name(f"frontier-{name}.png"))


if __name__ == "__main__":
    main()
