"""The command line as a user meets it: on a tiny model in a folder, from the first word to the report."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
import transformers

from argus.__main__ import main, one_line
from argus.config import RunConfig
from argus.models import publish
from argus.tasks.steps import prose
from tests.models import SMALL, tiny

STAGES = ["fp16", "fp8", "int8", "int4", "int2", "sign", "jl"]
SHORT = ["tiers.page_size=16", "tiers.window=16"]
SEVEN = ["tiers=seed", *SHORT, *(f"tiers.stages.{stage}.capacity=32" for stage in STAGES[:-1])]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a random llama and a tokenizer of 600 pieces, as the hub would hold them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("model")
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    pieces.train_from_iterator([prose()[:60000]], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)
    made = tiny("llama")
    made.resize_token_embeddings(len(pieces.get_vocab()), mean_resizing=False)
    made.save_pretrained(folder)
    return folder


def argus(*words: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line in `cwd` and check how it ends."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "argus", *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def is_picture(path: Path) -> bool:
    data = path.read_bytes()
    return data.startswith(b"\x89PNG") and len(data) > 5000


def test_overview(model, tmp_path):
    """The main job on a tiny model: table, report, pictures."""
    words = ["model=hf", f"model.id={model}", *SEVEN, "hydra.run.dir=out", "seed=3"]
    words += ["task.passkey.lengths=[200,280]", "task.passkey.samples=2", "task.fidelity.context=400"]
    words += ["task.perplexity.context=300", "task.perplexity.scored=16"]
    words += ["task.perplexity.windows=1", "task.perplexity.decoded=3"]
    done = argus(*words, cwd=tmp_path)
    out = tmp_path / "out"
    written = sorted(path.name for path in out.iterdir() if path.suffix in (".json", ".png"))
    assert written == ["bytes.png", "pages.png", "report.json"]
    assert is_picture(out / "pages.png")
    assert is_picture(out / "bytes.png")
    data = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert {"schema", "command", "versions", "device", "config", "rows"} <= set(data)
    assert data["schema"] == 2
    assert data["command"] == shlex.join(["python", "-m", "argus", *words])
    assert data["versions"]["torch"] == torch.__version__
    assert data["versions"]["transformers"] == transformers.__version__
    assert data["device"].startswith("cpu")
    config = RunConfig.model_validate(data["config"])
    assert (config.seed, config.model.id, list(config.tiers.order)) == (3, str(model), STAGES)
    check_rows(data["rows"])
    assert "fp16" in done.stdout
    assert all(stage in done.stdout for stage in STAGES)
    assert "passkey: 280 tokens" in done.stderr


def check_rows(rows: list[dict]) -> None:
    """Every row has what its task measures, and the figures fit together."""
    assert all({"task", "cache", "context"} <= set(row) for row in rows)
    values = 2 * SMALL["num_hidden_layers"] * SMALL["num_key_value_heads"] * SMALL["head_dim"]
    prose_rows = [row for row in rows if row["task"] == "perplexity"]
    assert [(row["cache"], row["context"]) for row in prose_rows] == [("fp16", 300), ("argus", 300)]
    first, second = prose_rows
    assert (first["dnll"], first["kl"], first["cache_bytes"]) == (0.0, pytest.approx(0.0, abs=1e-6), 2 * values * 300)
    assert first["bits_per_value"] == 16
    assert first["compression"] == 1
    assert second["kl"] > 0
    assert second["dnll"] != 0
    assert second["cache_bytes"] < first["cache_bytes"]
    assert second["bits_per_value"] == pytest.approx(8 * second["cache_bytes"] / (values * 300))
    for row in prose_rows:
        assert row["prefill_tokens_per_s"] > 0
        assert row["decode_tokens_per_s"] > 0
    stages = [row for row in rows if "stage" in row]
    assert [row["stage"] for row in stages] == [row["tier"] for row in stages] == STAGES
    assert sum(row["tokens"] for row in stages) == 384
    for row in stages:
        assert row["tokens"] == 16 * row["pages"] > 0
        assert row["bytes"] > 0
        assert 0 < row["cosine_values"] <= 1 + 1e-6
        assert 0 < row["cosine_keys"] <= 1 + 1e-6
        assert row["bits_per_value"] == pytest.approx(8 * row["bytes"] / (values * row["tokens"]))
    cosines = [row["cosine_values"] for row in stages]
    assert cosines[0] > 0.9999
    assert min(cosines[:3]) > max(cosines[4:])
    keys = [row for row in rows if row["task"] == "passkey"]
    assert [(row["cache"], row["context"]) for row in keys] == [(c, n) for n in (200, 280) for c in ("fp16", "argus")]
    for row in keys:
        assert row["samples"] == 2
        assert row["accuracy"] in (0.0, 0.5, 1.0)
        assert row["cache_bytes"] > 0


def swept_words(model: Path) -> list[str]:
    """A small task, its sweep in the folder `out`."""
    words = ["task=perplexity", "model=hf", f"model.id={model}", *SHORT, "hydra.sweep.dir=out"]
    return [*words, "task.context=120", "task.scored=8", "task.windows=1", "task.decoded=2"]


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory) -> tuple[Path, str]:
    """Where a sweep of two ladders ended, and what it said. Tests only read there."""
    folder = tmp_path_factory.mktemp("swept")
    done = argus("-m", "tiers=int8,int4", *swept_words(model), cwd=folder)
    return folder / "out", done.stdout


def test_sweep(swept):
    """Two ladders: a report each, and one table and one picture of both."""
    out, said = swept
    reports = [json.loads((out / str(i) / "report.json").read_text(encoding="utf-8")) for i in (0, 1)]
    assert [report["config"]["tiers"]["order"] for report in reports] == [["int8"], ["int4"]]
    bits = [report["rows"][1]["bits_per_value"] for report in reports]
    assert bits[1] < bits[0] < 16
    assert is_picture(out / "pareto.png")
    lines = said.splitlines()
    summary = lines[lines.index(next(line for line in lines if "best" in line and "run" in line)) :]
    for name, figure in (("tiers=int8", bits[0]), ("tiers=int4", bits[1])):
        assert any(name in line and f"{figure:.2f}" in line for line in summary)
    for path in out.glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))


def test_a_sweep_goes_on_where_it_stopped(model, swept, tmp_path):
    """What has its report is not run again; what is missing, cut off or of other overrides is; the table has all of it."""
    words = swept_words(model)
    copytree(swept[0], tmp_path / "out")
    paths = [tmp_path / "out" / str(number) / "report.json" for number in (0, 1)]
    kept = [path.read_bytes() for path in paths]
    paths[1].unlink()
    again = argus("-m", "tiers=int8,int4", *words, cwd=tmp_path)
    assert "out/0 has the report of this run already" in again.stderr
    assert "out/1 has" not in again.stderr
    assert paths[0].read_bytes() == kept[0]
    assert json.loads(paths[1].read_bytes())["config"] == json.loads(kept[1])["config"]
    assert [sum(name in line for line in again.stdout.splitlines()) for name in ("tiers=int8", "tiers=int4")] == [2, 2]
    other = argus("-m", "tiers=int4", *words, cwd=tmp_path)
    assert "already" not in other.stderr
    assert json.loads(paths[0].read_bytes())["config"]["tiers"]["order"] == ["int4"]
    assert "left out, runs of an earlier sweep in out: 1" in other.stderr
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_bytes())) == 1


FAULTY = """
import sys
from argus import runner
from argus.__main__ import main

execute = runner.execute

def failing(config, folder):
    if config.tiers.order == ("int4",):
        raise RuntimeError("out of\\nmemory")
    return execute(config, folder)

runner.execute = failing
sys.argv = ["argus", *{words}]
main()
"""


def test_an_exception_in_a_run_of_a_sweep_stops_no_other(model, tmp_path):
    """Its traceback is kept until the run is done."""
    words = ["-m", "tiers=int4,int8", *swept_words(model)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FAULTY.format(words=words)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("argus: ")]
    assert said[0].startswith("argus: RuntimeError: out of memory; traceback in ")
    assert said[0].endswith("/out/0/error.log")
    assert said[1].startswith("argus: report.json is missing of runs 0 in out")
    assert "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "out" / "0" / "error.log").read_text(encoding="utf-8")
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_bytes())) == 1
    argus(*words, cwd=tmp_path)
    assert not (tmp_path / "out" / "0" / "error.log").exists()
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_bytes())) == 2


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_sweep_in_processes_of_its_own(launcher, model, tmp_path):
    """Runs that fail are named after the table of the others, and each report has a command of its own."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
    words = ["tiers=int8,int4", "task=perplexity", "model=hf", f"model.id={model}", *SHORT, "hydra.sweep.dir=out"]
    words += [f"hydra/launcher={launcher}", "task.scored=8", "task.windows=1", "task.decoded=2"]
    done = argus("-m", *words, "task.context=120,900000", cwd=tmp_path, code=2)
    assert done.stderr.splitlines()[-1].startswith("argus: report.json is missing of runs 1, 3 in out")
    assert "Traceback" not in done.stderr
    for number, name in ((0, "int8"), (2, "int4")):
        data = json.loads((tmp_path / "out" / str(number) / "report.json").read_text(encoding="utf-8"))
        assert data["config"]["tiers"]["order"] == [name]
        assert data["command"].startswith(f"python -m argus tiers={name} ")
        assert data["command"].endswith("task.context=120")
    kept = json.loads((tmp_path / "out" / "sweep.json").read_bytes())
    assert [line["overrides"][0] for line in kept] == ["tiers=int8", "tiers=int4"]


def test_an_experiment_ends_in_a_table_without_the_flag_too(monkeypatch, tmp_path):
    told: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["argus", "+experiment=page_size", "hydra.sweep.dir=out"])
    monkeypatch.setattr("argus.__main__.add_config_paths", lambda paths: None)
    monkeypatch.setattr("argus.__main__.job", lambda: told.append("runs"))
    monkeypatch.setattr("argus.sweep.summarize", lambda folder: told.append(f"table of {folder}"))
    main()
    assert told == ["runs", "table of out"]


def test_a_launcher_that_is_not_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["argus", "-m", "tiers=int4,int8", "hydra/launcher=joblib"])
    monkeypatch.setattr("argus.__main__.add_config_paths", lambda paths: None)
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().err
    assert shown.startswith("argus: launcher 'joblib' is not installed; pip install hydra-joblib-launcher")
    assert shown.count("\n") == 1


def test_two_runs_may_convert_the_embedded_model_at_once(tmp_path):
    """The second one finds it there; what cannot be written is said."""
    first, second, target = (tmp_path / name for name in ("first", "second", "target"))
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
        publish(folder, target)
    assert (target / "config.json").read_text() == "first"
    with pytest.raises(FileNotFoundError):
        publish(second, tmp_path / "nowhere" / "target")


def test_a_missing_model(tmp_path):
    """One line on stderr that says what is allowed, exit code 2, and nothing is left behind."""
    done = argus("model=hf", "model.id=./nowhere", cwd=tmp_path, code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("argus: model './nowhere' does not load: ")
    assert "allowed: model=embedded, a hub name or a folder" in last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.rglob("*")) == []


def test_help_is_light(tmp_path):
    """``--help`` lists the groups and brings neither torch nor transformers."""
    program = (
        "import sys, runpy, atexit\n"
        "heavy = ('torch', 'transformers', 'triton', 'matplotlib')\n"
        "atexit.register(lambda: print('loaded:', [name for name in heavy if name in sys.modules]))\n"
        "sys.argv = ['argus', '--help']\n"
        "runpy.run_module('argus', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loaded: []" in done.stdout
    for word in ("tiers: default", "aging: fifo", "anchors:", "outliers:", "model: embedded", "task:"):
        assert word.split(":")[0] in done.stdout
    assert "seed" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiers=int5"], "'tiers/int5' is no config; allowed: "),
        (["tiers.order=[cold]"], "order names 'cold', which is no stage; allowed: fp16, "),
        (["tiers.stages.int4.capacity=3"], "capacity 3 is below a page; allowed: 64 tokens or more"),
        (["tiers.stages.int4.capacity=100"], "capacity 100 is no number of whole pages; allowed: multiples of 64 tokens"),
        (["-m", "tiers=int4,int5"], "'tiers/int5' is no config; allowed: "),
        (["model=hf"], "model.id"),
        (["cache=[argus,kivi5]"], "'cache/kivi5' is no config; allowed: argus, "),
        (["backend=tpu"], "backend 'tpu' is not known; allowed: "),
        (["nonsense"], "'nonsense'"),
        (["-m", "tiers=int4,int8", "hydra/launcher=nowhere"], "'hydra/launcher/nowhere' is no config; allowed: basic"),
        (["tiers=int4", "tiers.stages.int4.group_size=7"], "group_size 7 does not divide page_size 64; allowed: "),
    ],
)
def test_a_mistake_ends_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["argus", *words])
    monkeypatch.setattr("argus.__main__.job", lambda: pytest.fail("the run started"))
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert shown.err.startswith("argus: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_what_stops_a_run_is_one_line(tmp_path, monkeypatch, capsys):
    """Ctrl-C, and a file that cannot be written."""
    monkeypatch.setattr("sys.argv", ["argus", "tiers=int4"])

    def stop() -> None:
        raise KeyboardInterrupt

    def write() -> None:
        with one_line():
            (tmp_path / "missing" / "report.json").write_text("")

    for job, code, said in ((stop, 130, "stopped; of a sweep"), (write, 2, "report.json: No such file or directory")):
        monkeypatch.setattr("argus.__main__.job", job)
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr().err
        assert (ended.value.code, shown.count("\n")) == (code, 1)
        assert shown.startswith("argus: ")
        assert said in shown


def test_a_ladder_in_a_folder_of_ones_own(model: Path, tmp_path: Path) -> None:
    (tmp_path / "my own" / "tiers").mkdir(parents=True)
    text = "defaults:\n  - int4\n  - _self_\nwindow: 24\n"
    (tmp_path / "my own" / "tiers" / "mine.yaml").write_text(text, encoding="utf-8")
    words = ["--config-dir", "my own", "tiers=mine", "model=hf", f"model.id={model}", "task=generate", "task.tokens=2"]
    argus(*words, "hydra.run.dir=run", cwd=tmp_path)
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["config"]["tiers"]["window"] == 24
    failed = argus("--config-dir=nowhere", "tiers=mine", cwd=tmp_path, code=2)
    assert failed.stderr.splitlines()[-1].startswith("argus: 'nowhere' is no folder; allowed:")
    failed = argus("--config-dir=my own", "tiers=mein", cwd=tmp_path, code=2)
    assert "mine" in failed.stderr.split("allowed:")[1]
