"""Pictures: the sequence as a strip of pages, bytes by stage, accuracy by length and depth, and quality against bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from argus.adapters.huggingface import ArgusCache
from argus.tasks.base import Row

WINDOW_COLOUR = "#d9d9d9"


def colours(count: int) -> list[Any]:
    """One colour a stage, from the warm of the newest to the cold of the archive."""
    scale = matplotlib.colormaps["turbo"]
    return [scale(0.92 - 0.82 * i / max(1, count - 1)) for i in range(count)]


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG."""
    figure.savefig(path, dpi=150, bbox_inches="tight")


def draw_strip(cache: ArgusCache, path: Path) -> None:
    """The sequence, one row a layer, each page in its stage's colour; below, how many heads keep each token exact."""
    layers = [layer.engine for layer in cache.layers]
    plan, names = cache.plan, [stage.facts.name for stage in cache.plan.stages]
    palette = colours(len(names))
    length, size = cache.get_seq_length(), plan.page_size
    figure = Figure(figsize=(12, 5))
    pages, marks = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for row, layer in enumerate(layers):
        for page, stage in enumerate(layer.where[layer.forgotten :], layer.forgotten):
            pages.broken_barh([(page * size, size)], (row, 1), facecolors=[palette[stage]], edgecolor="white", linewidth=0.2)
        pages.broken_barh([(layer.window.start, len(layer.window))], (row, 1), facecolors=WINDOW_COLOUR)
    pages.set_ylim(len(layers), 0)
    pages.set_ylabel("layer")
    pages.set_title(f"Where {length} tokens are kept, page by page")
    legend = [Patch(color=colour, label=name) for name, colour in zip(names, palette, strict=True)]
    legend.append(Patch(color=WINDOW_COLOUR, label="window, exact"))
    pages.legend(handles=legend, ncols=len(legend), loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False, fontsize=8)
    counts = [0] * length
    heads = 0
    for layer in layers:
        if layer.exact.positions is not None:
            held = layer.exact.positions[0]
            heads += held.shape[0]
            for position in held.flatten().tolist():
                if position >= 0:
                    counts[position] += 1
    share = [100 * count / heads if heads else 0.0 for count in counts]
    marks.vlines(range(length), 0, share, color="black", linewidth=0.6)
    marks.set_ylim(0, 105)
    marks.set_xlim(0, length)
    marks.set_ylabel("% of heads")
    marks.set_xlabel("position, tokens; above zero: sinks and anchors, kept exact")
    save(figure, path)


def draw_bytes(cache: ArgusCache, dense_bytes: int, path: Path) -> None:
    """Measured bytes of each stage and of all that is exact, beside the `dense_bytes` of an FP16 cache of the same tokens."""
    plan, ledger = cache.plan, cache.ledger()
    own = {*ledger.parts, "FP16", "ARGUS"}
    names = {
        f"stage.{i}": f"{stage.facts.name} (stage)" if stage.facts.name in own else stage.facts.name
        for i, stage in enumerate(plan.stages)
    }
    palette = dict(zip(names.values(), colours(len(names)), strict=True))
    figure = Figure(figsize=(9, 4.5))
    axes = figure.subplots()
    dense = dense_bytes / 2**20
    axes.bar(["FP16"], [dense], color="#555555")
    axes.text(0, dense, f"{dense:.1f} MiB", ha="center", va="bottom")
    bottom = 0.0
    for part, count in ledger.parts.items():
        name = names.get(part, part)
        colour = palette.get(name, WINDOW_COLOUR)
        axes.bar(["ARGUS"], [count / 2**20], bottom=bottom, color=colour, edgecolor="white")
        bottom += count / 2**20
    axes.text(1, bottom, f"{bottom:.1f} MiB\n{ledger.bits_per_value:.2f} bits", ha="center", va="bottom")
    for place, (part, count) in enumerate(ledger.parts.items(), start=2):
        name = names.get(part, part)
        axes.bar([name], [count / 2**20], color=palette.get(name, WINDOW_COLOUR), edgecolor="white")
        axes.text(place, count / 2**20, f"{count / 2**20:.2f}", ha="center", va="bottom", fontsize=8)
    axes.set_ylabel("MiB, measured")
    axes.set_title(f"Bytes of {cache.get_seq_length()} tokens, all layers")
    axes.tick_params(axis="x", rotation=30)
    save(figure, path)


def draw_heat(rows: Sequence[Row], path: Path) -> None:
    """Accuracy by context and depth, one panel a cache, of rows with ``cache``, ``context``, ``depth`` and ``accuracy``."""
    found = {(row["cache"], row["depth"], row["context"]): row["accuracy"] for row in rows}
    names, depths, lengths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("cache", "depth", "context"))
    wide = max(1.6, 0.65 * len(lengths))
    figure = Figure(figsize=(1.6 + wide * len(names), 1.3 + 0.42 * len(depths)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        grid = [[found[name, depth, length] for length in lengths] for depth in depths]
        shown = axes.pcolormesh(grid, vmin=0, vmax=1, cmap="RdYlBu", edgecolors="white", linewidth=1.5)
        for y, line in enumerate(grid):
            for x, share in enumerate(line):
                colour = "black" if 0.2 < share < 0.8 else "white"
                axes.text(x + 0.5, y + 0.5, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=colour)
        axes.set_title(name, fontsize=11)
        axes.set_xticks([x + 0.5 for x in range(len(lengths))], [str(length) for length in lengths])
        axes.set_yticks([y + 0.5 for y in range(len(depths))], [f"{100 * depth:g} %" for depth in depths])
        axes.set_ylim(len(depths), 0)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("depth of the needle")
    figure.supxlabel("context, tokens", fontsize=10)
    bar = figure.colorbar(
        shown, ax=list(panels), label="accuracy, %", ticks=[0, 0.5, 1], format=lambda share, _: f"{100 * share:.0f}"
    )
    bar.outline.set_visible(False)
    save(figure, path)


def draw_pareto(points: Sequence[tuple[str, float, float]], path: Path, quality: str) -> None:
    """Quality against measured bits a value: ``(name, bits, quality)`` of each run."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for name, bits, value in points:
        axes.plot(bits, value, "o", color="#1f77b4")
        axes.annotate(name, (bits, value), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set_xlabel("bits a value, measured")
    axes.set_ylabel(quality)
    axes.grid(alpha=0.3)
    save(figure, path)
