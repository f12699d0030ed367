"""README: its commands are accepted, its tier is the one that docs/tiers.md holds to its contract, both languages alike."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from argus.commandline import Command, check

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.tr.md")}
COMMANDS = sorted({line for text in TEXTS.values() for line in re.findall(r"^python -m argus (.+)$", text, re.MULTILINE)})


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "model=hf" not in line])
def test_commands_are_accepted(line):
    words = shlex.split(line, comments=True)
    command = Command.of(words)
    assert command.runs
    check(command)


def test_the_tier_is_the_one_in_docs():
    wanted = blocks((ROOT / "docs" / "tiers.md").read_text(encoding="utf-8"), "python")[0]
    for text in TEXTS.values():
        assert wanted in blocks(text, "python")


def test_both_languages_show_the_same():
    first, second = TEXTS.values()
    assert re.findall(r"^## ", first, re.MULTILINE) == re.findall(r"^## ", second, re.MULTILINE)
    assert blocks(first, "python")[1:] == blocks(second, "python")[1:]
    assert blocks(first, "text") == blocks(second, "text") != []


def test_nothing_is_left_to_fill_in():
    for text in TEXTS.values():
        assert not re.search(r"^@[A-Z]+@$", text, re.MULTILINE)
