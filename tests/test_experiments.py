"""Every experiment is a sweep whose every run is a valid config."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from argus.build import build
from argus.config import RunConfig, compose, validate

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "experiment").glob("*.yaml"))


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
        build(config.argus(), 64)
