"""docs/hooks.md and the hooks agree, and every hook has a plugin that uses it."""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import transformers

import argus
from argus import hookspecs, plugins
from argus.backends.base import Backend
from argus.backends.cpu import CpuBackend
from argus.errors import PluginError
from argus.ledger import measure
from argus.policies.base import Aging, Anchors, Outliers
from argus.tasks.base import CacheKind, RunEvents, Task
from argus.testing import check_aging, check_anchors, check_backend, check_outliers, check_tier
from argus.tiers.base import Tier
from argus.tiers.fp16 import Fp16

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("argus_")}
SHIPPED = sorted((ROOT / "plugins").glob("*/pyproject.toml"))


def code(hook: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", SECTIONS[hook], re.DOTALL)


def shipped_modules() -> list[ModuleType]:
    """The modules that the packages under plugins/ name as entry points."""
    entries = [tomllib.loads(path.read_text(encoding="utf-8"))["project"]["entry-points"]["argus"] for path in SHIPPED]
    return [import_module(module) for entry in entries for module in entry.values()]


def test_every_hook_is_documented_and_every_hook_documented_exists():
    assert list(SECTIONS) == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_signature_documented_is_the_hook_s(hook):
    returns = inspect.signature(HOOKS[hook]).return_annotation
    assert code(hook)[0].strip() == f"def {hook}() -> {returns}"


@pytest.mark.parametrize("hook", HOOKS)
def test_it_is_said_when_a_hook_is_called(hook):
    assert re.search(r"^Called when (a cache is built|a run starts|a config is composed)\. ", SECTIONS[hook], re.MULTILINE)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_one_line_of_documentation(hook):
    assert (HOOKS[hook].__doc__ or "").strip()


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_used_by_a_plugin_that_ships(hook, monkeypatch):
    for path in SHIPPED:
        monkeypatch.syspath_prepend(str(path.parent))
    built_in = [import_module(name) for name in (*plugins.BUILTIN, *plugins.COMMANDS)]
    users = [
        module.__name__ for module in [*built_in, *shipped_modules()] if hasattr(getattr(module, hook, None), "argus_impl")
    ]
    assert users, f"no built-in or shipped plugin implements {hook}"


def test_no_hook_answers_with_nothing():
    manager = plugins.load(commands=True)
    for hook in HOOKS:
        assert all(getattr(manager.hook, hook)()), hook


def example(hook: str) -> ModuleType:
    """A hook's example as a plugin module, with what its text takes for granted."""
    module = ModuleType(f"example_{hook}")
    space = vars(module)
    space |= {kind.__name__: kind for kind in (Aging, Anchors, Backend, CacheKind, CpuBackend, Outliers, RunEvents, Task, Tier)}
    space |= {"hookimpl": argus.hookimpl, "transformers": transformers, "measure": measure}
    if hook == "argus_tiers":
        whole = (ROOT / "docs" / "tiers.md").read_text(encoding="utf-8")
        exec(re.findall(r"```python\n(.*?)```", whole, re.DOTALL)[0], space)
    exec(compile(code(hook)[1], "docs/hooks.md", "exec"), space)
    return module


@pytest.mark.parametrize("hook", HOOKS)
def test_every_example_is_a_plugin(hook):
    manager = plugins.load(extra=[example(hook)])
    assert getattr(manager.hook, hook)()


CHECKS = {
    "argus_tiers": check_tier,
    "argus_aging": check_aging,
    "argus_anchors": check_anchors,
    "argus_outliers": check_outliers,
    "argus_backends": lambda kind: check_backend(kind()),
}


@pytest.mark.parametrize("hook", CHECKS)
def test_the_examples_keep_their_contract(hook):
    (kind,) = getattr(example(hook), hook)().values()
    CHECKS[hook](kind)


def test_a_hook_that_does_not_exist_is_refused():
    plugin = ModuleType("misspelt")
    plugin.argus_teirs = argus.hookimpl(lambda: {"int5": Tier})
    with pytest.raises(PluginError, match=r"argus_teirs.*hooks are .*argus_tiers"):
        plugins.load(extra=[plugin])


def test_a_name_claimed_twice_names_both():
    plugin = ModuleType("second")
    plugin.argus_tiers = argus.hookimpl(lambda: {"int4": Fp16})
    manager = plugins.load()
    manager.register(plugin, "second")
    with pytest.raises(
        PluginError, match=r"'int4' is claimed by (argus\.tiers\.int4 and by second|second and by argus\.tiers\.int4)"
    ):
        plugins.kinds(manager, "argus_tiers")
