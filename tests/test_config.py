"""What is wrong in a config ends in one line that names what is allowed, before anything is written."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from argus import plugins
from argus.build import build
from argus.commandline import Command, check, combinations, sweeps
from argus.config import CacheConfig, RunConfig, compose, load_cache_config, validate
from argus.errors import ConfigError, PluginError
from argus.hookspecs import hookimpl
from argus.runner import choose
from argus.tiers.base import Tier
from argus.tiers.fp16 import Fp16
from tests.conftest import config, make_plan

WRONG = {
    "tiers=int5": r"'tiers/int5' is no config; allowed: .*default.*int4",
    "aging=lifo": r"'aging/lifo' is no config; allowed: .*fifo.*log.*uniform",
    "task=nothing": r"'task/nothing' is no config; allowed: .*overview.*passkey",
    "model=small": r"'model/small' is no config; allowed: embedded, hf",
    "nonsense=1": r"'nonsense' is no option; allowed in a run: .*tiers",
    "tiers.pagesize=4": r"'tiers.pagesize' is no option; allowed in tiers: .*page_size",
    "tiers.stages.int4.groupsize=4": r"'tiers.stages.int4.groupsize' is no option; allowed in tiers.stages.int4: .*group_size",
    "+tiers.stages.int4.groupsize=4": r"int4.*groupsize.*is not an option; allowed: axis, group_size",
    "+nonsense=1": r"nonsense: is not an option; allowed: tiers, aging",
    "tiers.order=[]": r"order names no stage; allowed: fp16, fp8",
    "tiers.order=[fp16,cold]": r"order names 'cold', which is no stage; allowed: fp16, fp8",
    "tiers.order=[int4,int4]": r"order names a stage twice: int4, int4",
    "tiers.stages.int4.capacity=63": r"stages.int4.capacity 63 is below a page; allowed: 64 tokens or more",
    "tiers.stages.int4.tier=int5": r"tier 'int5' is not known; allowed: fp16, fp8, int",
    "tiers.stages.int4.axis=row": r"axis.*'channel' or 'token'",
    "tiers.stages.jl.coefficients=int5": r"tier 'int5' is not known; allowed: fp16",
    "tiers.page_size=0": r"tiers.page_size: .*greater than 0",
    "tiers.page_size=many": r"tiers.page_size: .*integer",
    "tiers.window=-1": r"tiers.window: .*greater than 0",
    "tiers.slack=-64": r"tiers.slack: .*greater than or equal to 0",
    "tiers.slack=100": r"tiers: slack 100 is no number of whole pages; allowed: multiples of 64 tokens",
    "tiers.dtype=int8": r"tiers.dtype: .*'auto', 'float16', 'bfloat16' or 'float32'",
    "backend=tpu": r"backend 'tpu' is not known; allowed: cpu",
    "aging.policy=lifo": r"aging policy 'lifo' is not known; allowed: fifo, log, salience, uniform",
    "+aging.capacity=4": r"aging.capacity: is not an option; allowed: none",
    "outliers.policy=all": r"outliers policy 'all' is not known; allowed: none, sigma, topk",
    "+anchors.nonsense={}": r"anchor policy 'nonsense' is not known; allowed: lines, novelty, salience, sinks",
    "anchors.novelty.share=2": r"anchors.novelty.share: .*less than or equal to 1",
    "anchors.sinks.tokens=-1": r"anchors.sinks.tokens: .*greater than or equal to 0",
    "cache=mine": r"'cache/mine' is no config; allowed: .*argus.*dynamic.*fp16",
    "anchors=null": r"'anchors=null' names no config; allowed: default, lines, none",
    "cache=null": r"'cache=null' names no config; allowed: argus, dynamic, .*fp16",
    "cache=3": r"'cache=3' names no config; allowed: argus, dynamic, .*fp16",
    "cache=[argus,3]": r"'cache=\[argus,3\]' names no config; allowed: argus, dynamic, .*fp16",
    "tiers=true": r"'tiers=True' names no config; allowed: .*default.*int4",
    "+tier@tiers.stages.cold=null": r"'\+tier@tiers.stages.cold=null' names no config; allowed: fp16, fp8",
    "tiers.order.x=1": r"tiers.order.x=1: invalid literal",
    "+cache.mine={kind: mine}": r"cache 'mine' is not known; allowed: argus, dynamic, fp16",
    "+cache.mine={bits: 4}": r"cache.mine.kind: Field required",
    "reference=mine": r"cache 'mine' is not known; allowed: argus, dynamic, fp16",
    "+cache.argus.bits=4": r"cache.argus.bits: is not an option; allowed: overrides",
    "cache.argus.overrides=['tiers=int5']": r"'tiers/int5' is no config; allowed: .*default.*int4",
    "task.name=nothing": r"task 'nothing' is not known; allowed: fidelity, generate, .*overview, passkey, perplexity",
    "+task.samples=4": r"task.samples: is not an option; allowed: passkey, perplexity, fidelity",
    "task.passkey.lengths=[64,128,64]": r"task.passkey.lengths: 64 is there twice; allowed: each once",
    "task.passkey.lengths=[]": r"task.passkey.lengths: .*at least 1 item",
    "task.passkey.lengths=[10]": r"task.passkey.lengths.*greater than or equal to 64",
    "seed=one": r"seed: .*integer",
    "seed=99999999999999999999": r"seed: .*less than 9223372036854775808",
    "tiers.stages.jl.seed=99999999999999999999": r"jl.seed: .*less than 9223372036854775808",
    "model.dtype=int8": r"model.dtype: .*'float16', 'bfloat16' or 'float32'",
    "tiers.order=[": r"'tiers.order=\[' does not parse",
    "aging=[fifo,uniform]": r"'aging=\[fifo,uniform\]': a run has one aging; allowed: one, or -m aging=a,b for a run of each",
    "+experiment=aging,jl": r"'\+experiment=aging,jl': a run has one experiment; allowed: one at a time",
    "tiers.window=interval(1,4)": r"only lists of values can be swept",
    "tiers=glob(int*)": r"'tiers=glob\(int\*\)': only lists of values can be swept here, as in tiers=int8,int4",
    "seed=range(1,3,0)": r"'seed=range\(1,3,0\)': .*must not be zero; allowed: a list of values",
    "seed=range(1,1)": r"'seed=range\(1,1\)' has no value; allowed: a list of values",
    "nonsense": r"'nonsense'.*name=value",
    "anchors={}": r"'anchors=\{\}' sets nothing; allowed: the name of a config, or options",
    "model=hf": r"model.id has no value; allowed: one that you give, as model.id=...",
    "++tiers.foo=1": r"tiers.foo: is not an option; allowed: page_size, window",
    "--config-name=foo": r"--config-name=foo: the config is ARGUS's own; allowed: --config-dir",
}


@pytest.mark.parametrize("word", sorted(WRONG))
def test_one_clear_line(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=WRONG[word]) as caught:
        check(Command.of([word]))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=hf"], r"model\.id"),
        (["model=hf", "model.id=null"], r"model=hf needs model.id=\.\.\."),
        (["tiers=int4", "tiers.stages.int4.group_size=7"], r"group_size 7 does not divide page_size 64; allowed: .*8, 16"),
        (["tiers=int4", "tiers.page_size=36", "tiers.stages.int4.group_size=8"], r"group_size 8 does not divide page_size"),
        (["tiers=int4", "+tiers.stages.int4={keys: int3, values: int2}"], r"tiers of their own; tier and options"),
        (["tiers=quality", "+tiers.stages.near.tier=int4"], r"stages.near: keys and values have tiers of their own; tier and"),
        (["tiers=int4", "tiers.stages.int4.tier=null"], r"stages.int4: give tier=\.\.\., or both keys"),
        (["+tier@tiers.stages.mine=int", "tiers.order=[mine]"], r"tiers.stages.mine.bits"),
        (["+tier@tiers.stages.mine=int", "tiers.order=[mine]", "tiers.stages.mine.bits=9"], r"bits.*less than or equal to 8"),
        (["task=perplexity", "task.scored=1"], r"task.scored: .*greater than or equal to 2"),
        (["task=repetition", "task.temperature=inf"], r"task.temperature: .*finite"),
        (["task=repetition", "task.temperature=nan"], r"task.temperature: .*finite"),
        (["task=passkey", "task.lengths=[10]"], r"^task\.lengths\.0: [^;]*$"),
        (["task=passkey", "+cache.x={kind: argus, overrides: ['seed=3']}"], r"'seed=3' is of no part of a cache"),
        (["tiers=quality", "tiers.stages.near.nope=1"], r"'.*near.nope' is no option; allowed in .*near: .*capacity"),
        (["task=passkey", "task.smaples=2"], r"'task.smaples' is no option; allowed in task: name, .*samples"),
        (["seed=1", "task={smaples: 2}", "task=passkey"], r"'task.smaples' is no option; allowed in task: name, .*samples"),
        (["task=passkey", "task.smaples=2", "sede=1"], r"'task.smaples' is no option; allowed in task: name, .*samples"),
        (["tiers=int4", "tiers.stages.int8.x=1"], r"'tiers.stages.int8' is no option; allowed in tiers.stages: int4$"),
        (
            ["+tiers.stages.two={keys: int4}", "tiers.stages.two.x=1"],
            r"allowed in .*two: keys, and what its tier takes with \+tiers.stages.two.x=...$",
        ),
        (
            ["++tiers.stages.two={keys: int4}", "tiers.stages.two.x=1"],
            r"allowed in .*two: keys, and what its tier takes with \+tiers.stages.two.x=...$",
        ),
        (["tiers.window.x=1"], r"'tiers.window.x' is no option; allowed in tiers.window: none$"),
        (["budget.bits.x=1"], r"'budget.bits.x' is no option; allowed in budget.bits: none$"),
        (["-m", "tiers=int4,int5"], r"'tiers/int5' is no config"),
        (["-m", "tiers=int4,int8", "task=passkey,nothing"], r"'task/nothing' is no config"),
        (["-m", "tiers.stages.int4.capacity=64,1"], r"capacity 1 is below a page"),
    ],
)
def test_one_clear_line_of_several_words(words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(Command.of(words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["tiers.order=[fp16,int4,jl]", "tiers.stages.int4.group_size=32"],
        ["-m", "tiers.order=[fp8,int4],[int4,sign]"],
        ["-m", "tiers=int8,int4,default", "task=passkey"],
        ["+tier@tiers.stages.cold=int4", "tiers.order=[fp16,cold]"],
        ["tiers=int4", "~anchors.sinks"],
        ["+tiers.stages.mixed={keys: int4, values: {tier: int2, group_size: 32}}", "tiers.order=[mixed]"],
        ["anchors=lines", "aging=log", "outliers=topk", "hydra.run.dir=elsewhere"],
        ["task=passkey", "task.lengths=[100,200]", "task.samples=1"],
    ],
)
def test_what_is_right_passes(words):
    check(Command.of(words))


def test_all_faults_in_one_line():
    with pytest.raises(ConfigError, match=r"tiers.page_size: .*; tiers.window: .*; seed: "):
        check(Command.of(["tiers.page_size=0", "tiers.window=0", "seed=one"]))


def test_a_ladder_that_grows_is_refused():
    chosen = load_cache_config(["tiers.order=[int4,int8]"])
    with pytest.raises(ConfigError, match=r"stage 'int8' keeps .* not fewer than 'int4' .*tiers.allow_growth=true"):
        build(chosen, 64)
    build(load_cache_config(["tiers.order=[int4,int8]", "tiers.allow_growth=true"]), 64)


@pytest.mark.parametrize(
    ("options", "head_dim", "message"),
    [
        ({"int4": {"group_size": 7}}, 64, r"int4: group_size 7 does not divide page_size 8; allowed: \[1, 2"),
        ({"int4": {"group_size": 8, "axis": "token"}}, 60, r"group_size 8 does not divide head_dim 60; allowed: .*\b30\b"),
        ({"int4": {}}, 5, r"int4: head_dim 5 does not pack into bytes; allowed: multiples of 2"),
        ({"sign": {}}, 12, r"sign: head_dim 12 does not pack into bytes; allowed: multiples of 8"),
        ({"jl": {"ratio": 3}}, 64, r"jl: ratio 3 does not divide page_size 8; allowed: \[1, 2, 4, 8\]"),
    ],
)
def test_groups_divide(options, head_dim, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(config(tuple(options), options=options), head_dim=head_dim)


def test_archives_are_of_pages_whose_size_is_a_power_of_two():
    with pytest.raises(ConfigError, match=r"jl: page_size 12 is no power of two; allowed nearby: \[8, 16\]"):
        make_plan(config(("jl",), page_size=12))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["tiers=int4", "seed=3"], r"'seed=3' is of no part of a cache; allowed: tiers, aging, .*budget, graphs$"),
        (["task=generate"], r"'task=generate' is of no part of a cache; allowed: tiers"),
        (["+cache@model=dynamic"], r"'\+cache@model=dynamic' is of no part of a cache; allowed: tiers"),
        ("tiers=int4", r"'tiers=int4' is no cache; allowed: a ladder's name such as 'int4', a list of overrides such as "),
        ({"tiers": "int4"}, r"\{'tiers': 'int4'\} is no cache; allowed: a ladder's name"),
        (["tiers=int4", 3], r"is no cache; allowed: a ladder's name"),
        (4, r"4 is no cache; allowed: a ladder's name"),
    ],
)
def test_what_makes_no_cache_is_refused(choice, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_cache_config(choice)
    assert "\n" not in str(caught.value)


def test_what_makes_a_cache_is_taken():
    words = ["+tier@tiers.stages.cold=int4", "tiers.order=[cold]", "~anchors.sinks", "++budget.context=512", "graphs=false"]
    found = load_cache_config(tuple(words))
    assert (found.tiers.order, found.budget.context, found.graphs) == (("cold",), 512, False)
    assert load_cache_config(None) == load_cache_config([]) == load_cache_config("default")


def test_configs_do_not_change():
    chosen = load_cache_config("int4")
    with pytest.raises(Exception, match="frozen"):
        chosen.backend = "cpu"
    with pytest.raises(Exception, match="frozen"):
        chosen.tiers.window = 3


def test_a_run_holds_a_cache():
    run = validate(RunConfig, compose(["tiers=int8"]))
    assert run.argus() == load_cache_config("int8")
    assert type(run.argus()) is CacheConfig


def test_compose_inside_a_program_that_uses_hydra():
    """A program with a Hydra of its own can compose a cache and go on."""
    from hydra import compose as theirs, initialize_config_module

    with initialize_config_module("argus.conf", version_base="1.3"):
        assert theirs("config").seed == 0
        assert load_cache_config("int4").tiers.order == ("int4",)
        assert theirs("config", overrides=["seed=5"]).seed == 5


# Plugins


def claim(hook: str, name: str):
    """A plugin that claims a name."""
    return SimpleNamespace(**{hook: hookimpl(lambda: {name: Fp16})})


HOOKS = ["argus_tiers", "argus_aging", "argus_anchors", "argus_outliers", "argus_backends", "argus_tasks"]


@pytest.mark.parametrize("hook", HOOKS)
def test_two_plugins_with_one_name(hook):
    """The error names both."""
    manager = plugins.load()
    manager.register(claim(hook, "mine"), "first_package")
    manager.register(claim(hook, "mine"), "second_package")
    with pytest.raises(PluginError, match=rf"{hook}: 'mine' is claimed by \w+_package and by \w+_package") as caught:
        plugins.kinds(manager, hook)
    assert "first_package" in str(caught.value)
    assert "second_package" in str(caught.value)


class Rival:
    @hookimpl
    def argus_tiers(self):
        return {"int4": Fp16}


def test_a_plugin_cannot_take_a_built_in_name():
    with pytest.raises(PluginError, match=r"'int4' is claimed by") as caught:
        make_plan(config(("fp16",)), [Rival()])
    assert "argus.tiers.int4" in str(caught.value)
    assert "Rival" in str(caught.value)


def test_a_misspelt_hook():
    with pytest.raises(PluginError, match=r"argus_teirs.*hooks are .*argus_tiers") as caught:
        plugins.load([claim("argus_teirs", "mine")])
    assert "\n" not in " ".join(str(caught.value).split())
    assert "argus_teirs" not in str(caught.value).partition("hooks are")[2]


def test_a_plugin_that_does_not_import(tmp_path, monkeypatch):
    """The error names the plugin, its module and its package."""
    folder = tmp_path / "my_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[argus]\nmine = nowhere.at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = r"plugin 'mine' \(nowhere.at_all\) of package 'my-package' does not load: No module named 'nowhere'$"
    for loads in (plugins.load, plugins.config_paths):
        with pytest.raises(PluginError, match=wanted):
            loads()


def test_two_packages_whose_plugins_have_one_name(tmp_path, monkeypatch):
    """Neither is left out in silence."""
    for package in ("first", "second"):
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[argus]\nmine = {package}_module\n")
        (tmp_path / f"{package}_module.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    for loads in (plugins.load, plugins.config_paths):
        with pytest.raises(PluginError, match=r"^plugin 'mine' .* have one name; allowed: a name of its own") as caught:
            loads()
        for package in ("first", "second"):
            assert f"plugin 'mine' ({package}_module) of package '{package}'" in str(caught.value)


@pytest.mark.parametrize("hook", [*HOOKS, "argus_caches"])
@pytest.mark.parametrize("answer", [None, Fp16, [Fp16], {"mine": 3}, {"mine": None}, {3: Fp16}], ids=str)
def test_a_hook_that_answers_otherwise_is_named(hook, answer):
    manager = plugins.load()
    manager.register(SimpleNamespace(**{hook: hookimpl(lambda: answer)}), "my_package")
    with pytest.raises(PluginError, match=rf"^{hook} of plugin 'my_package' .*; allowed: .*classes by name$"):
        plugins.kinds(manager, hook)


def test_a_hook_that_raises_and_a_class_with_methods_missing_are_named():
    def broken():
        raise KeyError("mine")

    for hook, said in (
        (broken, r"argus_tiers of plugin 'my_package' raises KeyError\('mine'\)"),
        (lambda: {"mine": Tier}, r"plugin 'my_package': 'mine' lacks bits, decode, encode; allowed: classes with all"),
    ):
        manager = plugins.load()
        manager.register(SimpleNamespace(argus_tiers=hookimpl(hook)), "my_package")
        with pytest.raises(PluginError, match=said):
            plugins.kinds(manager, "argus_tiers")


@pytest.mark.parametrize("answer", [None, 3, Fp16], ids=str)
def test_a_path_of_configs_is_text(answer, monkeypatch):
    plugin = SimpleNamespace(argus_config_paths=hookimpl(lambda: answer))
    monkeypatch.setattr(plugins, "_load_entry_points", lambda manager: manager.register(plugin, "my_package"))
    with pytest.raises(PluginError, match=r"^argus_config_paths of plugin 'my_package' answers .*; allowed: a package, as"):
        plugins.config_paths()


@pytest.mark.parametrize("answer", [None, 3], ids=str)
def test_a_listener_is_a_class(answer, monkeypatch):
    plugin = SimpleNamespace(argus_run_events=hookimpl(lambda: answer))
    monkeypatch.setattr(plugins, "_load_entry_points", lambda manager: manager.register(plugin, "my_package"))
    with pytest.raises(PluginError, match=r"^argus_run_events of plugin 'my_package' answers .*; allowed: a class$"):
        choose(validate(RunConfig, compose(["tiers=int4"])))


def test_several_values_without_a_sweep_are_refused():
    assert sweeps(Command.of(["-m", "tiers=int8", "aging=fifo,log"])) is not None
    with pytest.raises(ConfigError, match=r"^'aging' has several values; allowed: one, or -m for a run of each$"):
        sweeps(Command.of(["tiers=int8", "aging=fifo,log"]))


def test_a_sweep_finds_what_its_runs_are():
    words = ["tiers=int8,int4", "hydra.output_subdir=null"]
    with pytest.raises(ConfigError, match=r"^hydra.output_subdir=None: a sweep reads there .*; allowed: .hydra$"):
        sweeps(Command.of(["-m", *words]))
    assert sweeps(Command.of(["tiers=int8", words[1]])) is None


def test_settings_of_hydra_that_do_not_exist_are_told():
    with pytest.raises(ConfigError, match=r"^'hydra.sweep.foo' is no option; allowed in hydra.sweep: dir, subdir$"):
        sweeps(Command.of(["hydra.sweep.foo=1"]))


def test_known_names_are_read_only():
    known = plugins.kinds(plugins.load(), "argus_tiers")
    with pytest.raises(TypeError):
        known["int4"] = Fp16


# The command line's own words


def test_sorting_of_arguments():
    command = Command.of(["-m", "tiers=int4,int8", "~anchors.sinks", "hydra.sweep.dir=there"])
    assert (command.multirun, command.runs) == (True, True)
    assert command.overrides == ("tiers=int4,int8", "~anchors.sinks", "hydra.sweep.dir=there")
    for word in ("--help", "--cfg=job", "--version", "-c", "--info"):
        assert not Command.of([word]).runs
    assert not Command.of(["--help", "-m"]).multirun


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["-m"], ["-m", "hydra.sweep.dir='out'"]),
        (["-m", "seed=0,1"], ["-m", "seed=0,1", "hydra.sweep.dir='out'"]),
        (["task=passkey", "seed=0,1", "-m"], ["-m", "task=passkey", "seed=0,1", "hydra.sweep.dir='out'"]),
        (["task=passkey", "-m", "seed=0,1"], ["-m", "task=passkey", "seed=0,1", "hydra.sweep.dir='out'"]),
        (["-cd", "mine", "seed=0,1", "-m"], ["-cd", "mine", "-m", "seed=0,1", "hydra.sweep.dir='out'"]),
    ],
)
def test_the_folder_of_a_sweep_stands_beside_the_overrides(words, wanted):
    """Wherever the flag is."""
    from hydra._internal.utils import get_args_parser

    assert Command.of(words).into("out") == wanted
    assert get_args_parser().parse_args(wanted).multirun


def test_every_value_of_a_sweep_is_tried_once():
    runs = combinations(["tiers=int8,int4,int2", "seed=1,2", "task=passkey"])
    assert runs[0] == ["tiers=int8", "seed=1", "task=passkey"]
    assert len(runs) == 4
    assert {run[0] for run in runs} == {"tiers=int8", "tiers=int4", "tiers=int2"}
    assert {run[1] for run in runs} == {"seed=1", "seed=2"}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["-m", "seed=0,1"], True),
        (["seed=0"], False),
        (["+experiment=page_size"], True),
        (["+experiment=page_size", "seed=0,1", "hydra.sweep.dir='out'"], True),
        (["+experiment=page_size", "hydra.mode=RUN"], False),
        (["hydra.mode=MULTIRUN"], True),
        (["+experiment=page_size", "--help"], False),
    ],
)
def test_what_is_a_sweep(words, wanted):
    assert (sweeps(Command.of(words)) is not None) == wanted


def test_a_mode_that_hydra_does_not_know():
    with pytest.raises(ConfigError, match=r"hydra.mode.*RUN") as caught:
        sweeps(Command.of(["hydra.mode=many"]))
    assert "\n" not in str(caught.value)


def test_where_a_sweep_goes():
    """As Hydra reads it, quotes and interpolations and all."""
    assert re.fullmatch(r"multirun/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", sweeps(Command.of(["-m"])))
    assert sweeps(Command.of(["-m", "hydra.sweep.dir=there"])) == "there"
    assert sweeps(Command.of(["-m", "hydra.sweep.dir='my sweep'"])) == "my sweep"
    assert re.fullmatch(r"of_\d{4}", sweeps(Command.of(["-m", "hydra.sweep.dir=of_${now:%Y}"])))
    assert sweeps(Command.of(["hydra.sweep.dir=there"])) is None
