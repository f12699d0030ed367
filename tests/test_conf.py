"""Every file under conf/ composes, builds, and every ladder runs on a tiny model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import argus.conf
import pytest
import torch
import yaml

from argus import ArgusCache, unpatch
from argus.build import build, check_ladder, stage_bits
from argus.config import CacheConfig, RunConfig, compose, load_cache_config, validate
from argus.errors import ConfigError
from argus.policies.base import TextFacts
from argus.runner import choose
from tests.models import tiny

ROOT = Path(argus.conf.__file__).parent
FILES = sorted(ROOT.rglob("*.yaml"))
NEEDED = {"hf": ["model.id=somewhere"], "int": ["tiers.stages.mine.bits=5"]}
"""What must be given beside an option that has no default for it."""


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / group).glob("*.yaml"))


def test_every_group_is_tried_here():
    groups = {path.parent.name for path in FILES} - {"conf"}
    assert groups <= {"tiers", "aging", "anchors", "outliers", "model", "task", "tier", "ladder", "cache", "experiment"}
    assert {path.parent.name for path in FILES if path.parent == ROOT} == {"conf"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_config_can_import_code(path):
    text = path.read_text(encoding="utf-8")
    assert "_target_" not in text
    assert isinstance(yaml.safe_load(text), dict)


def checked(overrides: list[str]) -> RunConfig:
    """Compose, validate and choose everything that a run would."""
    config = validate(RunConfig, compose(overrides))
    choose(config)
    build(config.argus(), head_dim=64, text=TextFacts((0,)))
    return config


GROUPS = [
    (group, name)
    for group in ("tiers", "aging", "anchors", "outliers", "model", "task", "cache", "experiment")
    for name in options(group)
]


@pytest.mark.parametrize(("group", "name"), GROUPS, ids=lambda word: word)
def test_every_option_builds(group, name):
    config = checked([f"{'+' if group == 'experiment' else ''}{group}={name}", *NEEDED.get(name, [])])
    written = yaml.safe_load((ROOT / group / f"{name}.yaml").read_text(encoding="utf-8"))
    if group in ("aging", "outliers"):
        assert getattr(config, group).policy == written["policy"] == name
    elif group in ("model", "task"):
        assert getattr(config, group).name == name
    elif group == "anchors":
        assert config.anchors == written
    elif group == "cache":
        assert list(config.cache) == list(written) == [name]
    elif group == "tiers":
        assert list(config.tiers.order) == written["order"]


@pytest.mark.parametrize("name", options("tier"))
def test_every_tier_can_be_a_stage(name):
    overrides = [f"+tier@tiers.stages.mine={name}", "tiers.order=[mine]", *NEEDED.get(name, [])]
    config = checked(overrides)
    assert config.tiers.stages["mine"].tier == name


def test_every_tier_has_a_file():
    """Each built-in kind can be put into a ladder from the command line, with every one of its options shown."""
    from argus import plugins

    found = plugins.kinds(plugins.load(), "argus_tiers")
    known = {name: kind for name, kind in found.items() if kind.__module__.startswith("argus.")}
    assert set(options("tier")) == set(known)
    for name, kind in known.items():
        written = yaml.safe_load((ROOT / "tier" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert set(written) == {"tier", "capacity", *kind.Config.model_fields}
        for option, field in kind.Config.model_fields.items():
            assert written[option] == ("???" if field.is_required() else field.default)


@pytest.mark.parametrize("group", ["task", "outliers", "aging"])
def test_files_say_the_defaults(group):
    """What a file writes is what the class does without it, but for what the main job chooses on purpose."""
    from argus import plugins

    manager = plugins.load(commands=True)
    hook = {"task": "argus_tasks", "outliers": "argus_outliers", "aging": "argus_aging"}[group]
    for name, kind in plugins.kinds(manager, hook).items():
        if not kind.__module__.startswith("argus.") or name == "overview":
            continue
        written = yaml.safe_load((ROOT / group / f"{name}.yaml").read_text(encoding="utf-8"))
        written = {key: value for key, value in written.items() if key not in ("name", "policy")}
        assert kind.Config(**written) == kind.Config()
        assert set(written) == set(kind.Config.model_fields)


@pytest.mark.parametrize("name", options("tiers"))
def test_bytes_fall_from_stage_to_stage(name):
    """Or the file says that they may grow."""
    plan = build(load_cache_config(name), 64, text=TextFacts((0,)))
    bits = [stage_bits(stage, plan.page_size, 64) for stage in plan.stages]
    falls = all(after < before for before, after in pairwise(bits))
    grows = load_cache_config(name).tiers.allow_growth
    assert falls != grows
    if grows:
        with pytest.raises(ConfigError, match=r"not fewer than .*allowed: fewer, or tiers.allow_growth=true"):
            check_ladder(plan.stages, plan.page_size, 64, allow_growth=False)


def test_the_documents_ladders():
    order = ["fp16", "fp8", "int8", "int4", "int2", "sign", "jl"]
    for name in ("default", "seed"):
        assert list(load_cache_config(name).tiers.order) == order
    assert {"exact", "int8", "int4", "int3", "int2", "default", "seed"} <= set(options("tiers"))
    seed = load_cache_config("seed").tiers
    assert seed.stages["jl"].options["ratio"] == 4
    assert seed.stages["jl"].options["coefficients"] == "fp16"


@pytest.fixture(scope="module")
def model():
    made = tiny("llama")
    yield made
    unpatch(made)


@pytest.mark.parametrize("name", options("tiers"))
def test_every_ladder_runs(model, name):
    """A few hundred tokens through every stage of each, on pages small enough that all stages are reached."""
    ladder = load_cache_config(name).tiers
    order = ladder.order
    small = [f"tiers={name}", "tiers.page_size=16", "tiers.window=16"]
    small += [f"tiers.stages.{stage}.capacity=32" for stage in order[:-1]]
    # At head_dim 8 no group of 32 divides, and the scales of a token weigh more.
    small += [f"tiers.stages.{stage}.group_size=8" for stage in order if ladder.stages[stage].options.get("group_size")]
    small.append("tiers.allow_growth=true")
    cache = ArgusCache(model, small)
    ids = torch.randint(2, 97, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(ids[:, :260], past_key_values=cache)
        for step in range(260, 300):
            logits = model(ids[:, step : step + 1], past_key_values=cache).logits
    assert logits.isfinite().all()
    assert cache.get_seq_length() == 300
    ledger = cache.ledger()
    for place, stage in enumerate(order):
        assert all(len(layer.engine.pools[place]) for layer in cache.layers), stage
        assert ledger.parts[f"stage.{place}"] > 0


def test_a_cache_config_comes_in_every_shape():
    chosen = load_cache_config("int4")
    assert isinstance(chosen, CacheConfig)
    assert load_cache_config(chosen) is chosen
    assert load_cache_config(["tiers=int4"]) == chosen
    assert load_cache_config(None) == load_cache_config("default")
