"""After a sweep: one table, one picture of quality against measured bits a value, and the runs that no other beats."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, isnan, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich import box
from rich.markup import escape
from rich.table import Table

from argus.commandline import HYDRA
from argus.config import RunConfig
from argus.errors import ERROR_LOG, ArgusError
from argus.pictures import draw_pareto
from argus.report import NAME, SCHEMA, Column, figure, head, number, own_figures, plain, terminal

SPREADS = {"kl": ".4f", "dnll": ".4f", "accuracy": ".0%"}
"""How the spread of quality is told."""
QUALITY = (("kl", "KL, nats"), ("dnll", "change in NLL, nats"), ("accuracy", "accuracy"))
COLUMNS: tuple[Column, ...] = (
    ("bits", "bits_per_value", ".2f"),
    ("x less", "compression", ".2f"),
    ("accuracy", "accuracy", ".0%"),
    ("dNLL", "dnll", "+.4f"),
    ("KL", "kl", ".4f"),
    ("loops", "loops", ".0%"),
    ("decode/s", "decode_tokens_per_s", ".1f"),
)
PICTURE = "pareto.png"
NAMED = 40
"""Columns that the names of runs have at least, if they are as long."""
OVERRIDES = Path(HYDRA) / "overrides.yaml"
FIGURES = tuple(key for _, key, _ in COLUMNS)


@dataclass(frozen=True)
class Line:
    """One line of a sweep.

    Attributes
    ----------
    name : str
        What tells it from the others.
    overrides : tuple of str
        Of its runs, their seeds left out.
    cache : str
    seeds : int
        Runs taken together.
    means, spreads : dict of str to float
        Figures, and their sample standard deviations over seeds (empty for one seed).
    """

    name: str
    overrides: tuple[str, ...]
    cache: str
    seeds: int
    means: dict[str, float]
    spreads: dict[str, float]


def is_done(folder: Path, config: RunConfig, skipped: Collection[str] = ()) -> bool:
    """Whether `folder` has the report of a run of just this config that left out the same caches; another one is removed.

    A report is written last, whole or not at all, and holds the whole config: a run that was cut off has none, and one of
    other overrides, or of a file under conf/ that has changed since, has another config. A damaged one is removed too.

    Raises
    ------
    ArgusError
        If another run of this very sweep wrote it.
    """
    report = report_of(folder)
    wanted = (SCHEMA, json.loads(config.model_dump_json()), set(skipped))
    if report is not None and (report.get("schema"), report.get("config"), set(report.get("skipped", ()))) == wanted:
        (folder / NAME).touch()  # It is of the sweep that runs now.
        return True
    if report is not None and is_of_this_sweep(folder):
        raise ArgusError(f"{folder} has the report of another run of this sweep; allowed: a hydra.sweep.subdir for each run")
    (folder / NAME).unlink(missing_ok=True)
    return False


def is_of_this_sweep(folder: Path) -> bool:
    """Whether the report in `folder` was written after the sweep that runs now began."""
    begun = Path(HydraConfig.get().sweep.dir) / "multirun.yaml" if HydraConfig.initialized() else None
    return begun is not None and begun.exists() and (folder / NAME).stat().st_mtime_ns >= begun.stat().st_mtime_ns


def report_of(run: Path) -> dict[str, Any] | None:
    """A run's report; None where there is none, or a file that is damaged."""
    if not (run / NAME).is_file():
        return None
    try:
        report = json.loads((run / NAME).read_text(encoding="utf-8"))
    except ValueError:
        return None
    return report if isinstance(report, dict) else None


def naming(run: Path) -> str:
    """A run's folder without its number."""
    return re.sub(r"\d+", "", run.name)


def result_of(run: Path) -> dict[str, Any] | None:
    """The report of a run of a sweep; None where the run failed: what lies in its folder then is of another run."""
    return None if (run / ERROR_LOG).exists() else report_of(run)


def runs_of(folder: Path) -> list[Path]:
    """Folders of the runs of the last sweep in `folder`, in order; what an earlier, longer one left there is named.

    Hydra writes ``multirun.yaml`` when a sweep starts, and a run's overrides when that run starts, done before or not. Runs
    that a sweep with another ``hydra.sweep.subdir`` left there, as that of another program, belong to it.
    """
    begun = (folder / "multirun.yaml").stat().st_mtime_ns if (folder / "multirun.yaml").exists() else 0
    started = {path.parents[1]: path.stat().st_mtime_ns for path in folder.glob(f"**/{OVERRIDES}")}
    depths = {len(run.parts) for run in started if started[run] >= begun}
    runs = sorted((run for run in started if len(run.parts) in depths), key=lambda run: (len(run.name), run.name))
    namings = {naming(run) for run in runs if started[run] >= begun}
    earlier = [run for run in runs if started[run] < begun and naming(run) in namings]
    old = [run.name for run in earlier if (run / NAME).exists()]
    if old:
        print(f"argus: left out, runs of an earlier sweep in {folder}: {', '.join(old)}", file=sys.stderr, flush=True)
    return [run for run in runs if run not in earlier]


def overrides_of(run: Path) -> tuple[str, ...]:
    """A run's overrides."""
    listed = OmegaConf.to_container(OmegaConf.load(run / OVERRIDES))
    return tuple(str(word) for word in listed) if isinstance(listed, list) else ()


def distinguish(words: Sequence[Sequence[str]]) -> list[str]:
    """Overrides without those that all runs share."""
    shared = set(words[0]).intersection(*words[1:]) if len(words) > 1 else set()
    return [" ".join(word for word in line if word not in shared) or "default" for line in words]


def lines(runs: Sequence[tuple[Sequence[str], Mapping[str, Any]]]) -> list[Line]:
    """One line for each cache of each run but the reference, runs that differ only in their seed taken together.

    Of runs that do not differ at all one counts: they are no two seeds.
    """
    found: dict[tuple[tuple[str, ...], str], dict[tuple[str, ...], dict[str, float]]] = {}
    for words, report in runs:
        reference = report["config"]["reference"]
        caches = list(dict.fromkeys(row["cache"] for row in report["rows"]))
        setting = tuple(word for word in words if not word.lstrip("+").startswith("seed="))
        compared = [cache for cache in caches if cache != reference]
        for cache in compared or ([] if report.get("skipped") else caches):
            found.setdefault((setting, cache), {}).setdefault(tuple(words), figures(report, cache))
    names = distinguish([setting for setting, _ in found])
    several = len({cache for _, cache in found}) > 1
    taken = [list(ones.values()) for ones in found.values()]
    return [
        Line(f"{name} {cache}".removeprefix("default ") if several else name, setting, cache, len(ones), *spread(ones))
        for name, (setting, cache), ones in zip(names, found, taken, strict=True)
    ]


def figures(report: Mapping[str, Any], cache: str) -> dict[str, float]:
    """Mean figures of a cache's rows in a report, at the longest context that has each; accuracy by samples.

    A change in NLL or a KL that the report holds as null is NaN.
    """
    own = own_figures(report["rows"])
    rows = [
        row | {name: nan for name in ("dnll", "kl", *own) if name in row and row[name] is None}
        for row in report["rows"]
        if row["cache"] == cache and "stage" not in row
    ]
    out: dict[str, float] = {}
    told = next((name for name, _ in QUALITY if any(row.get(name) is not None for row in rows)), None)
    for name in (*FIGURES, *own):
        having = [row for row in rows if row.get(name) is not None]
        if name in ("bits_per_value", "compression") and told is not None:  # Of the very rows whose quality is told.
            having = [row for row in having if row.get(told) is not None]
        longest = max((row["context"] for row in having), default=0)
        chosen = [row for row in having if row["context"] == longest]
        if chosen:
            weights = [row.get("samples", 1) if name == "accuracy" else 1 for row in chosen]
            out[name] = sum(row[name] * weight for row, weight in zip(chosen, weights, strict=True)) / sum(weights)
    return out


def spread(ones: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Means of what all have, NaN of tasks' own figures that some lack; and sample standard deviations of several."""
    names = dict.fromkeys(name for one in ones for name in one)
    shared = {
        name: [one.get(name, nan) for one in ones] for name in names if name not in FIGURES or all(name in one for one in ones)
    }
    means = {name: fmean(values) for name, values in shared.items()}
    return means, {name: deviation(values) for name, values in shared.items()} if len(ones) > 1 else {}


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; NaN if a value is not finite."""
    return stdev(values) if all(map(isfinite, values)) else nan


def undominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (bits, loss) pairs no other beats in both; one that holds NaN is none of them."""
    return [
        not (isnan(bits) or isnan(loss) or any((b <= bits and q <= loss) and (b < bits or q < loss) for b, q in points))
        for bits, loss in points
    ]


def summarize(folder: Path) -> None:
    """Print the table of a sweep; write ``sweep.json``, ``sweep.md`` and ``pareto.png`` into its folder.

    Raises
    ------
    ArgusError
        If a run wrote no report, after the table of those that did.
    """
    runs = runs_of(folder)
    done = {run: report for run in runs if (report := result_of(run)) is not None}
    if not done:
        raise ArgusError(f"no run of the sweep in {folder} wrote {NAME}")
    found = lines([(overrides_of(run), report) for run, report in done.items()])
    skipped = [pair for report in done.values() for pair in report.get("skipped", {}).items()]
    for name, why in dict.fromkeys(skipped):
        print(f"argus: not in the table, cache '{name}': {why}", file=sys.stderr, flush=True)
    if not any(line.means for line in found):
        raise ArgusError(f"no run of the sweep in {folder} has figures of a cache to compare; each has its own table")
    quality = next((pair for pair in QUALITY if all(pair[0] in line.means for line in found)), None)
    best, points = [False] * len(found), []
    if quality is not None:
        sign = -1 if quality[0] == "accuracy" else 1
        points = [(line.name, line.means.get("bits_per_value", nan), line.means[quality[0]]) for line in found]
        best = undominated([(bits, sign * value) for _, bits, value in points])
    measured = dict.fromkeys(key for line in found for key in line.means)
    columns = [column for column in COLUMNS if column[1] in measured]
    columns += [(head(key), key, figure) for key in measured if key not in FIGURES]
    heads = ["run", *(title for title, _, _ in columns), "seeds", "best"]
    cells = [
        [line.name, *(cell(line, key, form) for _, key, form in columns), str(line.seeds), "*" if mark else ""]
        for line, mark in zip(found, best, strict=True)
    ]
    table = Table(box=box.SIMPLE_HEAD)
    longest = max(len(line.name) for line in found)
    table.add_column(heads[0], overflow="fold", min_width=min(NAMED, longest))
    for title in heads[1:]:
        table.add_column(escape(title), justify="right", no_wrap=True)
    for line in cells:
        table.add_row(*map(escape, line))
    console = terminal(table, folds=longest - min(NAMED, longest))
    console.print(table)
    keep = [{**asdict(line), "best": mark} for line, mark in zip(found, best, strict=True)]
    (folder / "sweep.json").write_text(json.dumps(plain(keep), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "sweep.md").write_text(markdown(heads, cells), encoding="utf-8")
    (folder / PICTURE).unlink(missing_ok=True)
    if quality is not None and (shown := [point for point in points if isfinite(point[1]) and isfinite(point[2])]):
        draw_pareto(shown, folder / PICTURE, quality[1])
    console.print(f"*: no other run has fewer bits and better quality; sweep in {folder}", soft_wrap=True, markup=False)
    failed = [run.name for run in runs if run not in done]
    if failed:
        raise ArgusError(f"{NAME} is missing of runs {', '.join(failed)} in {folder}; the same command runs only these again")


def cell(line: Line, key: str, form: str | Callable[[Any], str]) -> str:
    """A mean, with its spread over seeds for quality."""
    text = number(line.means.get(key), form)
    if key not in line.spreads or (key in FIGURES and key not in SPREADS):
        return text
    return f"{text} ±{line.spreads[key]:{SPREADS.get(key, '.2g')}}"


def markdown(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The table as Markdown, and the list of runs that no other beats."""
    marks = ["---", *["---:"] * (len(heads) - 1)]
    cells = [[" ".join(text.split()).replace("|", "\\|") for text in line] for line in cells]
    table = ["| " + " | ".join(line) + " |" for line in (heads, marks, *cells)]
    return "\n".join([*table, "", "Not beaten in bits and quality together:", *(f"- `{c[0]}`" for c in cells if c[-1])]) + "\n"
