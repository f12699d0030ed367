"""docs/sweeps.md: its commands are accepted, it names every experiment, and its own is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from argus.commandline import Command, check

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python -m argus (.+)$", TEXT.replace("\\\n ", ""), re.MULTILINE)
EXPERIMENTS = ROOT / "conf" / "experiment"


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_accepted(line):
    """Whatever launchers are installed."""
    words = [word for word in shlex.split(line) if not word.startswith("hydra/launcher")]
    command = Command.of(words)
    assert command.multirun
    check(command)


def test_the_table_has_every_experiment():
    table = re.findall(r"^\| (`.*`) \| [^|]+ \|$", TEXT.split("## Resume")[0], re.MULTILINE)
    named = sorted(name for line in table for name in re.findall(r"`(\w+)`", line))
    assert named == sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def test_the_example_has_the_form_of_the_others():
    [text] = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    example = yaml.safe_load(text)
    like = yaml.safe_load((EXPERIMENTS / "page_size.yaml").read_text(encoding="utf-8"))
    assert text.startswith("# @package _global_\n")
    assert {key: value for key, value in example.items() if key != "hydra"} == {
        key: value for key, value in like.items() if key != "hydra"
    }
    [swept] = set(example["hydra"]["sweeper"]["params"]) - {"seed"}
    options = [f"task.{key}={value}" for key, value in example["task"].items()]
    check(Command.of(["task=perplexity", *options, f"{swept}=32,64,128"]))
