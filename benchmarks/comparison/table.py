"""Recall, memory and speed of a transformer, of ARGUS and of Mamba, each measured at each length.

Run from the repository root: ``python -m benchmarks.comparison.table``. It prints a table and writes ``comparison.json`` and
``comparison.md``. The embedded model answers passkeys; where ``benchmarks/comparison/train_all.sh`` has left weights, the
trained trio answers associative recall beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from argus.adapters.huggingface import make_plan
from argus.build import build
from argus.caches import Argus, Half
from argus.caches.ladder import ArgusOptions
from argus.config import RunConfig, compose, load_cache_config, validate
from argus.errors import ArgusError, ConfigError
from argus.models import Loaded, choose_device, load
from argus.report import device_name, size, versions
from argus.tasks.base import CacheKind, Row, Run
from argus.tasks.passkey import Passkey, PasskeyConfig
from benchmarks.comparison import data, models
from benchmarks.comparison.contestants import Contestant, cost, recall

WIDTH = 100
METRICS = ("recall", "memory", "speed")


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(data.LENGTHS), help="even, 64 to 4096")
    parser.add_argument("--ladders", nargs="+", default=["default", "int4"], help="files of conf/tiers")
    parser.add_argument("--sequences", type=int, default=50, help="of associative recall, a length")
    parser.add_argument("--passkeys", type=int, default=10, help="a length; 0 leaves the embedded model out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=models.WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args(words)


def tell(sentence: str) -> None:
    """Say on stderr what is going on."""
    print(sentence, file=sys.stderr, flush=True)


def make_run(loaded: Loaded, config: RunConfig, ladders: Sequence[str], folder: Path) -> Run:
    """A run that compares a cache in 16 bits with one ladder after another."""
    caches: dict[str, CacheKind] = {"fp16": Half()}
    caches |= {f"argus {name}": Argus(ArgusOptions(overrides=(f"tiers={name}",))) for name in ladders}
    plan = make_plan(loaded.model, config.argus(), loaded.tokenizer)
    return Run(config, loaded.model, loaded.tokenizer, loaded.device, plan, caches, folder, tell, tell)


def contestants(run: Run, name: str) -> list[Contestant]:
    """One contestant a cache."""
    return [Contestant(name, cache, run, kind) for cache, kind in run.caches.items()]


def trio(config: RunConfig, options: argparse.Namespace) -> tuple[list[Contestant], dict[str, Any]]:
    """The trained transformer with each cache, the trained Mamba, and the facts of their training."""
    device = choose_device(options.device)
    loaded = {name: models.load(name, options.weights) for name in models.KINDS}
    model, mamba = (loaded[name][0].to(device) for name in ("transformer", "mamba"))
    run = make_run(Loaded(model, None, device), config, options.ladders, options.out)
    rows = [*contestants(run, "transformer"), Contestant("mamba", "states", mamba=mamba)]
    return rows, {name: facts for name, (_, facts) in loaded.items()}


def recall_rows(found: Sequence[Contestant], options: argparse.Namespace) -> Iterator[Row]:
    """Associative recall of every contestant, on the same sequences."""
    for length in options.lengths:
        batch = data.exam(length, options.sequences, options.seed)
        for one in found:
            tell(f"recall: {length} tokens, {one.model}, {one.cache}")
            share, asked = recall(one, batch), batch.answers.numel()
            yield {"model": one.model, "cache": one.cache, "length": length, "recall": share, "questions": asked}


def passkey_rows(run: Run, options: argparse.Namespace) -> Iterator[Row]:
    """Passkeys found by the embedded model with each cache; None at a length that has no room for one."""
    for length in options.lengths:
        task = Passkey(PasskeyConfig(lengths=(length,), samples=options.passkeys))
        try:
            rows = list(task.run(run))
        except ConfigError as error:
            tell(str(error))
            rows = [{"cache": name, "accuracy": None, "samples": 0} for name in run.caches]
        for row in rows:
            figures = {"recall": row["accuracy"], "questions": row["samples"]}
            yield {"model": "embedded", "cache": row["cache"], "length": length, **figures}


def with_cost(rows: Iterable[Row], found: Sequence[Contestant], seed: int) -> Iterator[Row]:
    """Rows with ``memory`` (bytes a sequence) and ``speed`` (decoded tokens a second), of one sequence at that length."""
    by_name = {(one.model, one.cache): one for one in found}
    for row in rows:
        held, speed = cost(by_name[row["model"], row["cache"]], row["length"], seed)
        yield {**row, "memory": held, "speed": speed}


def cell(row: Row, metric: str) -> str:
    """A figure for people."""
    value = row[metric]
    if value is None:
        return "-"
    return {"recall": f"{value:.0%}", "memory": size(value), "speed": f"{value:,.0f} t/s"}[metric]


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The table's lines: model, cache, metric, then one figure a length."""
    names = dict.fromkeys((row["model"], row["cache"]) for row in rows)
    out = []
    for model, cache in names:
        own = sorted((row for row in rows if (row["model"], row["cache"]) == (model, cache)), key=lambda row: row["length"])
        for metric in METRICS:
            out.append([model, cache, metric, *(cell(row, metric) for row in own)])
    return out


def heads(rows: Sequence[Row]) -> list[str]:
    """The table's head."""
    return ["model", "cache", "", *(str(length) for length in sorted({row["length"] for row in rows}))]


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE_HEAD)
    for place, head in enumerate(heads(rows)):
        table.add_column(head, justify="right" if place > 2 else "left", no_wrap=True)
    for line in lines(rows):
        table.add_row(*line, end_section=line[2] == METRICS[-1])
    console.print(table)


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    head = heads(rows)
    marks = ["---"] * 3 + ["---:"] * (len(head) - 3)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, marks, *lines(rows)]) + "\n"


def main() -> None:
    options = options_of()
    words = [f"model.device={options.device}", f"seed={options.seed}"]
    config = validate(RunConfig, compose(words))
    for name in options.ladders:  # A wrong name is told before anything is measured.
        build(load_cache_config(name), 64)
    trained = [name for name in models.KINDS if (options.weights / f"{name}.safetensors").exists()]
    rows: list[Row] = []
    training: dict[str, Any] = {}
    with torch.inference_mode():
        if len(trained) == len(models.KINDS):
            found, training = trio(config, options)
            rows += with_cost(recall_rows(found, options), found, options.seed)
        else:
            tell(f"the trio is left out: {options.weights} has no weights; benchmarks/comparison/train_all.sh trains them")
        if options.passkeys:
            run = make_run(load(config.model), config, options.ladders, options.out)
            rows += with_cost(passkey_rows(run, options), contestants(run, "embedded"), options.seed)
    facts = {
        "benchmark": "comparison",
        "command": shlex.join(["python", "-m", "benchmarks.comparison.table", *sys.argv[1:]]),
        "versions": versions(),
        "device": device_name(choose_device(options.device)),
        "dtypes": {"caches": "16 bits; Mamba's states as it computes"},
        "training": training,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "comparison.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    (options.out / "comparison.md").write_text(markdown(rows))
    show(rows, Console(width=WIDTH))


if __name__ == "__main__":
    try:
        main()
    except (ArgusError, ValueError) as error:
        sys.exit(f"table: {error}")
