"""The script that runs eviction peers in an environment of their own, without making one."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from benchmarks import kvpress_peers
from benchmarks.kvpress_peers import DEFAULT, SUBFOLDER, prepare, words


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], list(DEFAULT)),
        (["cache=knorm"], ["cache=knorm"]),
        (["-m", "cache=knorm,snapkv"], ["-m", "cache=knorm,snapkv", SUBFOLDER]),
        (["-m", "hydra.sweep.subdir=mine"], ["-m", "hydra.sweep.subdir=mine"]),
    ],
)
def test_the_words_for_argus(given, wanted):
    assert words(given) == wanted


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where an environment goes that is nothing but an empty folder for packages."""

    def create(folder, with_pip, clear):
        (folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(kvpress_peers.venv, "create", create)
    return tmp_path / "env"


def test_packages_are_installed_once_and_the_plugin_without_its_own(folder, monkeypatch):
    said = []

    def run(command, **options):
        said.append(command[5:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert prepare(folder) == prepare(folder) == folder / "bin" / "python"
    assert said == [[*kvpress_peers.PACKAGES], ["--no-deps", "--editable", str(kvpress_peers.PLUGIN)]]
    assert "addsitedir" in next(folder.glob("lib/*/site-packages/*.pth")).read_text(encoding="utf-8")


def test_what_pip_says_is_shown_when_it_fails_and_the_next_call_tries_again(folder, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: SimpleNamespace(returncode=1, stdout="", stderr="no such package")
    )
    for _ in range(2):
        with pytest.raises(SystemExit, match="no such package"):
            prepare(folder)
