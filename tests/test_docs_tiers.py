"""docs/tiers.md: its example runs and keeps the contract, its table is what the tiers say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from argus import plugins
from argus.backends.cpu import CpuBackend
from argus.build import build
from argus.config import CacheConfig, compose, validate
from argus.engine import LayerCache
from argus.errors import ConfigError
from argus.testing.tiers import maker
from argus.turns import age

TEXT = (Path(__file__).parents[1] / "docs" / "tiers.md").read_text(encoding="utf-8")
TIERS = plugins.kinds(plugins.load(), "argus_tiers")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def ternary() -> ModuleType:
    """The example as a module."""
    module = ModuleType("argus_ternary")
    exec(compile(blocks("python")[0], "docs/tiers.md", "exec"), vars(module))
    return module


def test_the_example_keeps_the_contract(ternary):
    exec(compile(blocks("python")[1], "docs/tiers.md", "exec"), vars(ternary))


def test_the_example_is_a_stage_like_any_other(ternary):
    data = compose(["tiers=int4", "tiers.order=[mine]", "+tiers.stages.mine={tier: ternary}"])
    config = validate(CacheConfig, {name: data[name] for name in CacheConfig.model_fields if name in data})
    with pytest.raises(ConfigError, match="ternary"):
        build(config, head_dim=16)
    plan = build(config, head_dim=16, extra=[ternary])
    assert type(plan.stages[0].keys) is ternary.Ternary
    layer = LayerCache(plan)
    keys, values = torch.randn(2, 1, 2, 256, 16, generator=torch.Generator().manual_seed(0))
    layer.write(keys, values)
    age([layer])
    assert len(layer.where) == 3
    found, _ = layer.read([0, 1, 2])
    assert 0 < (found - keys[:, :, :192]).norm() / keys[:, :, :192].norm() <= plan.stages[0].keys.error


def test_the_example_is_about_thirty_lines():
    assert len([line for line in blocks("python")[0].splitlines() if line]) <= 35


def test_the_entry_point_names_the_group_that_is_loaded():
    assert tomllib.loads(blocks("toml")[0])["project"]["entry-points"] == {"argus": {"ternary": "argus_ternary"}}


def test_the_table_is_what_the_tiers_say():
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(TIERS) - {"int", "rotation"}
    for name, bits, error in rows:
        tier = maker(TIERS[name], {}, CpuBackend(), TIERS)(torch.float16)
        assert {tier.bits(role, 64, 64) for role in ("keys", "values")} == {float(bits)}, name
        assert tier.error == pytest.approx(float(error), rel=0.02), name


def test_jl_of_the_default_ladder_takes_what_the_text_says():
    options = {"coefficients": {"tier": "int4", "axis": "token"}}
    jl = maker(TIERS["jl"], options, CpuBackend(), TIERS)(torch.float16)
    assert f"{jl.bits('keys', 64, 64):g} bits" in TEXT
    stages = compose(["tiers=default"])["tiers"]["stages"]
    assert stages["jl"]["coefficients"] == options["coefficients"]


def test_every_tier_has_a_section():
    sections = " ".join(re.findall(r"^### (.*)$", TEXT, re.MULTILINE)).replace(",", "").split()
    assert set(sections) == set(TIERS) | {"rotation"}
