"""Rows become one table and a report; a sweep becomes one table and one picture."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from argus import report, sweep
from argus.__main__ import one_line
from argus.config import RunConfig, compose, validate
from argus.errors import ArgusError, PluginError
from argus.ledger import Match
from argus.sweep import distinguish, figures, summarize, undominated
from argus.tasks.base import STAGE, checked
from argus.tasks.generate import distinct
from argus.tasks.steps import Clock, Scores

MEMORY = {"cache_bytes": 2048, "bits_per_value": 16.0, "compression": 1.0}
ROWS = [
    {"task": "perplexity", "cache": "fp16", "context": 400, "samples": 7, "dnll": 0.0, "kl": 0.0, **MEMORY}
    | {"prefill_tokens_per_s": 500.0, "decode_tokens_per_s": 10.0},
    {"task": "perplexity", "cache": "argus", "context": 400, "samples": 7, "dnll": 0.0123, "kl": 0.0456}
    | {"cache_bytes": 512, "bits_per_value": 4.0, "compression": 4.0}
    | {"prefill_tokens_per_s": 400.0, "decode_tokens_per_s": 8.0},
    {"task": "fidelity", "cache": "argus", "context": 400, "stage": "cold", "tier": "int4", "pages": 3, "tokens": 192}
    | {"bytes": 777, "bits_per_value": 4.5, "cosine_keys": 0.9987, "cosine_values": 0.9912},
    {"task": "fidelity", "cache": "argus", "context": 400, "stage": "empty", "tier": "jl", "pages": 0, "tokens": 0}
    | {"bytes": 0, "bits_per_value": 0.0, "cosine_keys": None, "cosine_values": None},
    {"task": "passkey", "cache": "argus", "context": 512, "accuracy": 0.75, "samples": 4}
    | {"cache_bytes": 600, "bits_per_value": 4.2, "compression": 3.8},
]


@pytest.fixture
def run(tmp_path):
    config = validate(RunConfig, compose(["tiers=int4"]))
    plan = SimpleNamespace(backend=SimpleNamespace(name="cpu"), match=None)
    return SimpleNamespace(config=config, device=torch.device("cpu"), plan=plan, folder=tmp_path, skipped={}, caches={})


def test_the_document(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["argus", "tiers=int4", "seed=0"])
    report.Reporter().end(run, ROWS)
    data = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    assert {"schema", "command", "versions", "device", "config", "rows"} <= set(data)
    assert data["schema"] == 2
    assert data["command"] == "python -m argus tiers=int4 seed=0"
    assert data["rows"] == ROWS
    assert {"argus", "python", "torch", "transformers"} <= set(data["versions"])
    assert data["versions"]["torch"] == torch.__version__
    assert data["device"].startswith("cpu")
    assert RunConfig.model_validate(data["config"]) == run.config
    assert [path.name for path in run.folder.iterdir()] == ["report.json"]
    shown = capsys.readouterr().out
    for figure in ("75% of 4", "+0.0123", "0.0456", "777 B", "0.9987", "0.9912", "cold (int4)", "512 B", "2 KiB", "400"):
        assert figure in shown
    assert max(map(len, shown.splitlines()[:-1])) <= 100


def test_a_report_is_kept_where_its_table_cannot_be_shown(run, monkeypatch):
    """A terminal that is gone, as that of ``argus | head``."""

    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(report.Console, "print", gone)
    with pytest.raises(BrokenPipeError):
        report.Reporter().end(run, ROWS)
    assert sweep.is_done(run.folder, run.config)


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    report.write(path, {"rows": []})
    with pytest.raises(TypeError):
        report.write(path, {"rows": [object()]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"rows": []}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_report_may_be_read_as_the_umask_allows(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        report.write(tmp_path / "report.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == mode


def test_what_was_not_measured_is_blank():
    assert report.number(None, ".2f") == ""
    assert report.size(None) == ""
    assert report.number(0.0, "+.4f") == "+0.0000"
    assert [report.size(n) for n in (0, 1023, 1024, 3 * 2**20, 5 * 2**30)] == ["0 B", "1023 B", "1 KiB", "3 MiB", "5 GiB"]


def test_a_stage_may_lack_figures():
    row = {"task": "mine", "cache": "argus", "context": 64, "stage": "cold"} | dict.fromkeys(STAGE) | {"tier": "int4"}
    assert report.stage_lines([checked(row)]) == [["cold (int4)", *[""] * 7]]


def shown(rows) -> list[list[str]]:
    """The table, heads first."""
    return report.cache_table(rows)


def test_the_table_has_the_columns_that_were_measured():
    """In the main job's order; what no row has is left out."""
    assert shown(ROWS)[0] == ["cache", "tokens", "bytes", "bits", "x less", "passkey", "dNLL", "KL", "prefill/s", "decode/s"]
    assert shown([row for row in ROWS if row["task"] == "passkey"]) == [
        ["cache", "tokens", "bytes", "bits", "x less", "passkey"],
        ["argus", "512", "600 B", "4.20", "3.80", "75% of 4"],
    ]
    assert shown([row for row in ROWS if "stage" in row]) == []


def test_accuracy_is_called_by_what_was_asked():
    rows = [
        {"task": "retrieval", "kind": kind, "cache": cache, "context": 512, "accuracy": share, "samples": 8}
        for cache, shares in (("fp16", (1.0, 0.75)), ("argus", (0.5, 0.0)))
        for kind, share in zip(("multikey", "tracking"), shares, strict=True)
    ]
    assert shown(rows) == [
        ["cache", "tokens", "multikey", "tracking"],
        ["fp16", "512", "100% of 8", "75% of 8"],
        ["argus", "512", "50% of 8", "0% of 8"],
    ]


def test_depths_of_a_needle_are_taken_together():
    cells = ((0.1, 1.0, 3), (0.9, 0.0, 1))
    rows = [
        {"task": "needle", "cache": "fp16", "context": 512, "depth": depth, "accuracy": share, "samples": count}
        for depth, share, count in cells
    ]
    assert shown(rows) == [["cache", "tokens", "needle"], ["fp16", "512", "75% of 4"]]


def test_what_was_decoded_one_by_one_has_a_line_of_its_own():
    more = {"decoded": 32, "decoded_samples": 64, "decoded_dnll": 0.5, "decoded_kl": 0.25}
    rows = [row | more for row in ROWS if row["task"] == "perplexity"]
    heads, *lines = shown(rows)
    assert heads[-4:] == ["dNLL", "KL", "prefill/s", "decode/s"]
    found = [(line[0], line[1], line[-4:]) for line in lines]
    assert found == [
        ("fp16", "400", ["+0.0000", "0.0000", "500", "10.0"]),
        ("fp16", "400 +32", ["+0.5000", "0.2500", "", ""]),
        ("argus", "400", ["+0.0123", "0.0456", "400", "8.0"]),
        ("argus", "400 +32", ["+0.5000", "0.2500", "", ""]),
    ]
    alone = {"task": "mine", "cache": "fp16", "context": 64, "decoded": 8, "decoded_kl": 0.25}
    assert shown([alone, alone | {"cache": "argus", "decoded_kl": None}]) == [
        ["cache", "tokens", "KL"],
        ["fp16", "64", ""],
        ["fp16", "64 +8", "0.2500"],
        ["argus", "64", ""],
    ]


def test_repetition_has_columns():
    row = {"task": "repetition", "cache": "fp16", "context": 540, "samples": 3, "loops": 1 / 3, "texts": ["a"] * 3}
    row |= {"distinct_1": 0.5, "distinct_2": 0.75, "decode_tokens_per_s": 9.0, **MEMORY}
    assert shown([row]) == [
        ["cache", "tokens", "bytes", "bits", "x less", "distinct-1", "distinct-2", "loops", "decode/s"],
        ["fp16", "540", "2 KiB", "16.00", "1.00", "0.500", "0.750", "33%", "9.0"],
    ]


def test_figures_of_a_task_of_ones_own_are_shown(tmp_path, capsys):
    """In the table of a run, and with their spread in that of a sweep."""
    rows = [
        {"task": "mine", "cache": cache, "context": 64, "samples": 2, "turns_taken": turns, "good": True, "notes": [1]} | MEMORY
        for cache, turns in (("fp16", 12.0), ("argus", 12.3456))
    ]
    heads, *lines = shown(rows)
    assert heads == ["cache", "tokens", "bytes", "bits", "x less", "turns taken"]
    assert [line[-1] for line in lines] == ["12", "12.35"]
    for seed, row in enumerate((rows[1], rows[1] | {"turns_taken": 12.5456})):
        run = tmp_path / str(seed)
        (run / ".hydra").mkdir(parents=True)
        (run / ".hydra" / "overrides.yaml").write_text(f"- seed={seed}\n")
        (run / "report.json").write_text(json.dumps({"config": {"reference": "fp16"}, "rows": [rows[0], row]}))
    summarize(tmp_path)
    assert "12.45 ±0.14" in capsys.readouterr().out
    assert "| run | bits | x less | turns taken | seeds | best |" in (tmp_path / "sweep.md").read_text()


def test_undominated():
    assert undominated([(4, 0.1), (8, 0.0), (4, 0.2), (9, 0.0), (2, 1.0)]) == [True, True, False, False, True]
    assert undominated([(4, 0.1), (4, 0.1)]) == [True, True]


def test_what_is_not_a_number_is_never_best(tmp_path, capsys):
    nan = float("nan")
    assert undominated([(4, nan), (8, 0.0), (nan, -1.0)]) == [False, True, False]
    broken = [dict(row, kl=nan, bits_per_value=2.0) if "kl" in row else row for row in ROWS]
    short = dict(ROWS[1], context=100)
    for rows in (broken, report.plain([*broken, short])):
        folder = tmp_path / str(len(rows))
        sweep_of(folder, [(["tiers=int4", "seed=0"], ROWS), (["tiers=int2", "seed=0"], rows), (["tiers=int2", "seed=1"], ROWS)])
        summarize(folder)
        first, second = json.loads((folder / "sweep.json").read_text(), parse_constant=pytest.fail)
        assert (first["best"], second["best"]) == (True, False)
        assert (second["means"]["kl"], second["spreads"]["kl"]) == (None, None)
        assert "nan ±nan" in capsys.readouterr().out
        assert (folder / "pareto.png").exists()


def test_json_holds_null_for_what_is_not_a_number(tmp_path):
    report.write(tmp_path / "report.json", {"rows": ({"kl": float("nan"), "dnll": -float("inf"), "samples": 3},)})
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found == {"rows": [{"kl": None, "dnll": None, "samples": 3}]}


def test_a_run_without_bits_is_shown_without_them(tmp_path, capsys):
    rows = [{"task": "mine", "cache": "argus", "context": 9, "accuracy": 0.5, "samples": 4}]
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    sweep_of(alone, [(["seed=0"], rows)])
    summarize(alone)
    assert "50%" in capsys.readouterr().out
    [line] = json.loads((alone / "sweep.json").read_text())
    assert (line["means"], line["best"]) == ({"accuracy": 0.5}, False)
    sweep_of(beside, [(["task=mine"], rows), (["task=passkey"], [row for row in ROWS if row["task"] == "passkey"])])
    summarize(beside)
    assert [line["best"] for line in json.loads((beside / "sweep.json").read_text())] == [False, True]


def test_figures_are_of_argus_at_the_longest_context():
    """Memory is that of the text whose quality is told."""
    assert figures({"rows": ROWS}, "argus") == {
        "bits_per_value": 4.0,
        "compression": 4.0,
        "kl": 0.0456,
        "dnll": 0.0123,
        "accuracy": 0.75,
        "decode_tokens_per_s": 8.0,
    }


def test_memory_is_of_the_context_whose_quality_is_told():
    """A longer text of another task takes fewer bits."""
    rows = [
        {"task": "perplexity", "cache": "argus", "context": 512, "bits_per_value": 6.8, "compression": 2.35, "kl": 0.05},
        {"task": "passkey", "cache": "argus", "context": 4096, "bits_per_value": 3.1, "accuracy": 1.0, "samples": 3},
    ]
    found = figures({"rows": rows}, "argus")
    assert (found["bits_per_value"], found["compression"], found["kl"], found["accuracy"]) == (6.8, 2.35, 0.05, 1.0)
    for line in (rows, rows[::-1]):
        assert report.combined(line, [])["bits_per_value"] == 6.8


def test_the_reference_stands_for_no_cache_that_is_not_installed(tmp_path, capsys):
    fp16 = [row for row in ROWS if row["cache"] == "fp16"]
    sweep_of(tmp_path, [(["cache=one"], fp16)])
    path = tmp_path / "0" / "report.json"
    report.write(path, json.loads(path.read_text()) | {"skipped": {"one": "needs one; pip install one"}})
    with pytest.raises(ArgusError, match=r"no run of the sweep in .* has figures of a cache to compare"):
        summarize(tmp_path)
    assert "argus: not in the table, cache 'one': needs one; pip install one" in capsys.readouterr().err


def test_stages_alone_make_no_table_of_a_sweep(tmp_path):
    sweep_of(tmp_path, [(["tiers=int4"], [row for row in ROWS if "stage" in row])])
    with pytest.raises(ArgusError, match=r"has figures of a cache to compare; each has its own table"):
        summarize(tmp_path)
    assert not (tmp_path / "sweep.json").exists()


def test_a_run_that_left_out_other_caches_is_not_done(run):
    run.skipped = {"one": "not installed"}
    report.Reporter().end(run, ROWS)
    assert sweep.is_done(run.folder, run.config, run.skipped)
    assert not sweep.is_done(run.folder, run.config, {})


def test_runs_of_one_sweep_that_share_a_folder_are_refused(run, monkeypatch):
    """Their reports would overwrite each other."""
    (run.folder / "multirun.yaml").touch()
    report.Reporter().end(run, ROWS)
    settings = SimpleNamespace(sweep=SimpleNamespace(dir=str(run.folder)))
    monkeypatch.setattr(sweep.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(sweep.HydraConfig, "get", lambda: settings)
    assert sweep.is_done(run.folder, run.config)
    with pytest.raises(ArgusError, match=r"has the report of another run of this sweep; allowed: a hydra.sweep.subdir"):
        sweep.is_done(run.folder, validate(RunConfig, compose(["tiers=int2"])))
    assert (run.folder / "report.json").exists()
    os.utime(run.folder / "report.json", (1, 1))
    assert sweep.is_done(run.folder, run.config)
    with pytest.raises(ArgusError, match=r"has the report of another run of this sweep; allowed: a hydra.sweep.subdir"):
        sweep.is_done(run.folder, validate(RunConfig, compose(["tiers=int2"])))
    os.utime(run.folder / "report.json", (1, 1))
    assert not sweep.is_done(run.folder, validate(RunConfig, compose(["tiers=int2"])))


def test_rows_that_no_report_can_hold_are_refused():
    row = {"task": "mine", "cache": "argus", "context": 9}
    assert checked(row | {"figures": torch.tensor([1.0, 2.0])})["figures"] == [1.0, 2.0]
    with pytest.raises(PluginError, match=r"'where' is a PosixPath, which no report can hold"):
        checked(row | {"where": Path("x")})


def test_accuracy_has_its_spread(tmp_path, capsys):
    rows = [{"task": "passkey", "cache": "argus", "context": 9, "accuracy": share, "samples": 4} for share in (1.0, 0.25)]
    sweep_of(tmp_path, [([f"seed={i}"], [row]) for i, row in enumerate(rows)])
    summarize(tmp_path)
    assert "62% ±53%" in capsys.readouterr().out


def test_words_with_bars_do_not_break_a_table():
    assert "| a\\|b c |" in sweep.markdown(["run", "best"], [["a|b\nc", ""]])


def test_runs_are_named_by_what_differs():
    assert distinguish([("tiers=int4", "seed=1"), ("tiers=int8", "seed=1")]) == ["tiers=int4", "tiers=int8"]
    assert distinguish([("tiers=int4",), ()]) == ["tiers=int4", "default"]
    assert distinguish([("tiers=int4",)]) == ["tiers=int4"]
    assert distinguish([("a={b: 1, c: 2}",), ("a={b: 1, c: 3}",)]) == ["a={b: 1, c: 2}", "a={b: 1, c: 3}"]


def test_overrides_that_hydra_folds_over_lines_tell_runs_apart(tmp_path):
    """YAML folds and quotes long ones."""
    stages = "+tiers.stages.two={{keys: {{tier: int4, group_size: 32}}, values: {{tier: int{}, group_size: 32}}, capacity: 64}}"
    both = [[stages.format(bits), "tiers.order=[two]", "~anchors.sinks", "+note=${seed}", "seed=0"] for bits in (2, 3)]
    sweep_of(tmp_path, [(words, ROWS) for words in both])
    for number, words in enumerate(both):
        path = tmp_path / str(number) / ".hydra" / "overrides.yaml"
        OmegaConf.save(OmegaConf.create(words), path)
        assert len(path.read_text().splitlines()) > len(words)
        assert sweep.overrides_of(tmp_path / str(number)) == tuple(words)
    summarize(tmp_path)
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert [line["overrides"] for line in kept] == [words[:-1] for words in both]
    assert [line["name"] for line in kept] == [words[0] for words in both]


def sweep_of(folder, reports) -> None:
    for number, (words, rows) in enumerate(reports):
        (folder / str(number) / ".hydra").mkdir(parents=True)
        (folder / str(number) / ".hydra" / "overrides.yaml").write_text("".join(f"- {word}\n" for word in words))
        (folder / str(number) / "report.json").write_text(json.dumps({"config": {"reference": "fp16"}, "rows": rows}))


def test_a_sweep_becomes_a_table_and_a_picture(tmp_path, capsys):
    worse = [dict(row, kl=1.5, bits_per_value=4.2) if "kl" in row else row for row in ROWS]
    sweep_of(tmp_path, [(["tiers=int4", "seed=1"], ROWS), (["tiers=int2", "seed=1"], worse)])
    summarize(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if "tiers=int4" in line)
    second = next(line for line in lines if "tiers=int2" in line)
    assert "0.0456" in first
    assert first.rstrip().endswith("*")
    assert "1.5000" in second
    assert not second.rstrip().endswith("*")
    picture = (tmp_path / "pareto.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000


def test_seeds_are_one_line_with_their_spread(tmp_path, capsys):
    other = [dict(row, kl=0.0656) if row.get("kl") else row for row in ROWS]
    sweep_of(tmp_path, [(["tiers=int4", "seed=0"], ROWS), (["tiers=int4", "seed=20"], other), (["tiers=int2", "seed=0"], ROWS)])
    summarize(tmp_path)
    assert "0.0556 ±0.0141" in capsys.readouterr().out
    kept = {line["name"]: line for line in json.loads((tmp_path / "sweep.json").read_text())}
    assert kept["tiers=int4"]["seeds"] == 2
    assert kept["tiers=int4"]["spreads"]["kl"] == pytest.approx(0.0141, abs=1e-4)
    assert kept["tiers=int2"]["spreads"] == {}
    assert "- `tiers=int2`" in (tmp_path / "sweep.md").read_text()


def test_a_run_that_is_there_twice_is_one_seed(tmp_path):
    sweep_of(tmp_path, [([f"seed={seed}"], ROWS) for seed in (0, 0, 20, 0)])
    summarize(tmp_path)
    (line,) = json.loads((tmp_path / "sweep.json").read_text())
    assert line["seeds"] == 2


def test_every_cache_but_the_reference_has_a_line(tmp_path, capsys):
    peers = [dict(row, cache="[kivi4]", kl=0.5) for row in ROWS if row["cache"] == "argus"]
    sweep_of(tmp_path, [(["seed=1"], [*ROWS, *peers])])
    summarize(tmp_path)
    out = capsys.readouterr().out
    assert "[kivi4]" in out
    assert "fp16" not in out


def test_ten_runs_stay_in_order(tmp_path):
    sweep_of(tmp_path, [([f"seed={i}"], ROWS) for i in range(12)])
    assert [sweep.overrides_of(run) for run in sweep.runs_of(tmp_path)] == [(f"seed={i}",) for i in range(12)]


def test_a_run_that_failed_is_named_after_the_table(tmp_path, capsys):
    sweep_of(tmp_path, [([f"seed={i}"], ROWS) for i in range(3)])
    (tmp_path / "1" / "report.json").unlink()
    with pytest.raises(ArgusError, match=r"report.json is missing of runs 1 in .*; the same command runs only these again"):
        summarize(tmp_path)
    assert "0.0456" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 1


def test_figures_of_another_run_do_not_stand_for_one_that_failed(tmp_path, capsys):
    """Hydra has told the overrides of the second of two runs in one folder, but the report is of the first."""
    sweep_of(tmp_path, [(["tiers=int8"], ROWS), (["tiers=int4"], ROWS)])
    with one_line(tmp_path / "1"):
        raise ArgusError("its folder has the report of another run")
    with pytest.raises(ArgusError, match=r"report.json is missing of runs 1 in "):
        summarize(tmp_path)
    assert [line["overrides"] for line in json.loads((tmp_path / "sweep.json").read_text())] == [["tiers=int8"]]
    assert "tiers=int4" not in capsys.readouterr().out


DAMAGED = [b"", b"garbage", b'{"schema": 1, "conf', b"[]", b"null", b"\xff\xfe"]


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_report_counts_as_none(data, run):
    (run.folder / "report.json").write_bytes(data)
    assert not sweep.is_done(run.folder, run.config)
    assert not (run.folder / "report.json").exists()
    report.Reporter().end(run, ROWS)
    assert sweep.is_done(run.folder, run.config)


@pytest.mark.parametrize("data", DAMAGED)
def test_a_run_whose_report_is_damaged_is_named_after_the_table(data, tmp_path):
    sweep_of(tmp_path, [([f"seed={i}"], ROWS) for i in range(3)])
    (tmp_path / "1" / "report.json").write_bytes(data)
    with pytest.raises(ArgusError, match=r"report.json is missing of runs 1 in "):
        summarize(tmp_path)
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 1


def test_how_a_budget_was_met_is_in_the_report(run, capsys):
    pages, sizes = {"int4": 7, "jl": 20}, {"int4": 448, "jl": None}
    run.plan.match = Match(3.0, 2048, reached=2.97, next=3.03, pages=pages, capacities=sizes, aging={})
    run.caches = {"fp16": SimpleNamespace(plan=lambda _: None), "argus": SimpleNamespace(plan=lambda run: run.plan)}
    report.Reporter().end(run, ROWS)
    kept = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))["budget"]["argus"]
    assert (kept["asked"], kept["reached"], kept["pages"], kept["capacities"]) == (3.0, 2.97, pages, sizes)
    line = "argus: budget of 3 bits at 2048 tokens: 2.970 reached, a step more takes 3.030; pages: int4 7, jl 20"
    assert line in capsys.readouterr().out.splitlines()


def test_a_run_is_done_if_its_report_is_of_the_same_config(run):
    assert not sweep.is_done(run.folder, run.config)
    report.Reporter().end(run, ROWS)
    assert sweep.is_done(run.folder, run.config)
    kept = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    for words in (["tiers=int2"], ["tiers=int4", "seed=1"], ["tiers=int4", "task.context=100", "task=perplexity"]):
        assert not sweep.is_done(run.folder, validate(RunConfig, compose(words)))
        assert not (run.folder / "report.json").exists()
        report.write(run.folder / "report.json", kept)
    assert sweep.is_done(run.folder, run.config)
    report.write(run.folder / "report.json", kept | {"schema": 0})
    assert not sweep.is_done(run.folder, run.config)


def test_runs_of_an_earlier_sweep_are_left_out_and_named(tmp_path, capsys):
    sweep_of(tmp_path, [([f"seed={i}"], ROWS) for i in range(3)])
    (tmp_path / "multirun.yaml").write_text("hydra: {}\n")
    for number, seconds in ((0, 30), (1, 20), (2, 10)):
        os.utime(tmp_path / str(number) / ".hydra" / "overrides.yaml", (seconds, seconds))
    os.utime(tmp_path / "multirun.yaml", (20, 20))
    assert [run.name for run in sweep.runs_of(tmp_path)] == ["0", "1"]
    assert capsys.readouterr().err == f"argus: left out, runs of an earlier sweep in {tmp_path}: 2\n"


def test_a_sweep_without_runs(tmp_path):
    with pytest.raises(ArgusError, match=r"no run of the sweep in .* wrote report.json"):
        summarize(tmp_path)


def test_distinct_n():
    assert distinct([1, 2, 3, 4], 1) == 1.0
    assert distinct([1, 1, 1, 1], 1) == 0.25
    assert distinct([1, 2, 1, 2, 1], 2) == 0.5
    assert distinct([1], 2) == 1.0


def test_scores():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0]]).log_softmax(-1)
    targets = torch.tensor([0, 2])
    other = Scores(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 5.0]]).log_softmax(-1), targets)
    one = Scores(logits, targets)
    assert one.nll == pytest.approx(float(torch.nn.functional.nll_loss(logits, targets)))
    assert one.kl(one) == 0
    wanted = float(torch.nn.functional.kl_div(one.logits, other.logits, reduction="batchmean", log_target=True))
    assert wanted > 0.1
    assert one.kl(other) == pytest.approx(wanted)


def test_the_median_is_of_what_was_timed():
    assert Clock(torch.device("cpu"), [3.0, 1.0, 100.0]).median == 3.0
    assert Clock(torch.device("cpu")).median == 0.0


def test_a_narrow_terminal_cuts_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    drawn = report.table(ROWS)
    assert report.terminal(drawn).width == 100
    monkeypatch.setenv("COLUMNS", "140")
    assert report.terminal(drawn).width == 140


def test_a_wide_table_is_drawn_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With square brackets in names, too, which are no markup."""
    monkeypatch.setenv("COLUMNS", "40")
    names = [f"a_long_name_of_a_figure[{i}]" for i in range(6)]
    drawn = report.table([{"task": "mine", "cache": "fp16", "context": 64} | dict.fromkeys(names, 0.25)])
    report.terminal(drawn).print(drawn)
    said = capsys.readouterr().out
    assert said.count("0.25") == 6
    assert all(name.replace("_", " ") in said for name in names)


def test_figures_that_some_rows_lack() -> None:
    """A figure is a number wherever it is told; several rows of one cache and context have one mean."""
    base = {"task": "mine", "context": 64}
    rows = [
        base | {"cache": "fp16", "score": 0.0, "count": 123456789, "mixed": 1, "name": "a"},
        base | {"cache": "fp16", "score": 1.0, "count": None, "mixed": "two", "name": "b"},
        base | {"cache": "argus", "score": None},
    ]
    assert shown(rows) == [
        ["cache", "tokens", "score", "count"],
        ["fp16", "64", "0.5", "123,456,789"],
        ["argus", "64", "", ""],
    ]


def test_a_row_is_looked_at_when_it_is_told() -> None:
    base = {"task": "mine", "cache": "fp16", "context": 64}
    numbers = checked(base | {"score": np.float32(0.5), "loss": torch.tensor(2), "words": ["a"]})
    assert numbers == base | {"score": 0.5, "loss": 2, "words": ["a"]}
    assert [type(numbers[name]) for name in ("score", "loss")] == [float, int]
    for row, fault in (
        ({"task": "mine", "cache": "fp16"}, "a row of task 'mine': 'context' must be a number of tokens"),
        (base | {"cache": None}, "'cache' must be a string"),
        (base | {"accuracy": 0.5}, "'accuracy' needs 'samples', a number of them above 0"),
        (base | {"accuracy": 0.5, "samples": 0}, "'accuracy' needs 'samples', a number of them above 0"),
        (base | {"decoded_kl": 0.5}, "'decoded_kl' needs 'decoded', a number of tokens above 0"),
        (base | {"bits_per_value": "4"}, "a row of task 'mine': 'bits_per_value' must be a number"),
        (base | {"stage": "cold"}, "'stage' needs tier, tokens, bytes"),
        (base | dict.fromkeys(STAGE, "x") | {"stage": "cold"}, "'tokens' must be a number; 'bytes' must be a number"),
        ((1, 2), r"a row of the task is \(1, 2\); allowed: a dict"),
    ):
        with pytest.raises(PluginError, match=fault):
            checked(row)


def test_runs_of_another_program_belong_to_a_sweep(tmp_path, capsys):
    """Those that it named otherwise; earlier ones of the same naming do not."""
    for age, name in ((30, "0"), (30, "kvpress-0"), (30, "multirun/of_others/a"), (0, "1")):
        run = tmp_path / name
        (run / ".hydra").mkdir(parents=True)
        (run / ".hydra" / "overrides.yaml").write_text(f"- tiers=int{len(name)}\n")
        (run / "report.json").write_text(json.dumps({"config": {"reference": "fp16"}, "rows": ROWS}))
        begun = os.stat(run / ".hydra" / "overrides.yaml").st_mtime - age
        os.utime(run / ".hydra" / "overrides.yaml", (begun, begun))
    (tmp_path / "multirun.yaml").write_text("")
    begun = os.stat(tmp_path / "multirun.yaml").st_mtime - 10
    os.utime(tmp_path / "multirun.yaml", (begun, begun))
    assert [run.name for run in sweep.runs_of(tmp_path)] == ["1", "kvpress-0"]
    assert capsys.readouterr().err.rstrip().endswith(": 0")
