"""Every experiment is a sweep whose every run is a valid config."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from argus.budget import Shape, meet
from argus.build import build
from argus.config import RunConfig, compose, validate
from argus.policies.base import TextFacts

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "experiment").glob("*.yaml"))

EMBEDDED = Shape(reaches=(None,) * 30, heads=3, head_dim=64, dtype=torch.float32, device=torch.device("cpu"))
"""What the small model caches."""


def params_of(name: str) -> dict[str, str]:
    GlobalHydra.instance().clear()
    with initialize_config_module("argus.conf", version_base="1.3"):
        config = hydra_compose("config", overrides=[f"+experiment={name}"], return_hydra_config=True)
    GlobalHydra.instance().clear()
    assert config.hydra.mode.name == "MULTIRUN"
    return dict(config.hydra.sweeper.params)


def runs_of(name: str) -> list[list[str]]:
    words = [f"{key}={value}" for key, value in params_of(name).items()]
    parsed = OverridesParser.create().parse_overrides(words)
    [batch] = BasicSweeper.split_arguments(parsed, None)
    return [list(run) for run in batch]


@pytest.mark.parametrize("name", NAMES)
def test_every_run_composes(name):
    runs = runs_of(name)
    seeds = {word for run in runs for word in run if word.startswith("seed=")}
    assert len(seeds) == 3
    settings = [run for run in runs if "seed=0" in run]
    assert len(settings) >= 2
    for run in islice(settings, 12):
        if name == "peers" and "cache=argus" not in run:
            continue  # plugins of their own
        config = validate(RunConfig, compose([f"+experiment={name}", *run]))
        build(config.argus(), 64, text=TextFacts(line_ends=(0,)))


def test_ages_are_compared_at_the_same_bytes():
    """Each policy of the experiment takes as many bits as the others, to what a page or two weigh."""
    reached: dict[str, list[float]] = {}
    for run in runs_of("aging"):
        if "seed=0" in run:
            config = validate(RunConfig, compose(["+experiment=aging", *run]))
            match = meet(build(config.argus(), 64), config.budget, EMBEDDED).match
            assert match.reached <= config.budget.bits
            reached.setdefault(str(config.budget.bits), []).append(match.reached)
    assert len(reached) >= 2
    assert all(len(found) >= 3 for found in reached.values())
    assert all(max(found) - min(found) < 0.15 for found in reached.values())
