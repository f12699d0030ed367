"""Plugins: the built-in ones, those of installed packages (entry-point group ``argus``), and name to class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import isabstract
from types import MappingProxyType
from typing import Any

import pluggy

from argus import hookspecs
from argus.errors import ConfigError, PluginError

BUILTIN = (
    "argus.tiers.fp16",
    "argus.tiers.fp8",
    "argus.tiers.int8",
    "argus.tiers.int4",
    "argus.tiers.int2",
    "argus.tiers.integer",
    "argus.tiers.sign",
    "argus.tiers.jl",
    "argus.policies.aging",
    "argus.policies.anchors",
    "argus.policies.outliers",
    "argus.backends.cpu",
    "argus.backends.triton",
)
COMMANDS = (
    "argus.caches",
    "argus.tasks.overview",
    "argus.tasks.passkey",
    "argus.tasks.perplexity",
    "argus.tasks.fidelity",
    "argus.tasks.generate",
    "argus.tasks.retrieval",
    "argus.tasks.needle",
    "argus.tasks.recall",
    "argus.tasks.repetition",
    "argus.tasks.harness",
    "argus.report",
)
"""Plugins that only the command line needs: they may import transformers."""


def load(extra: Iterable[Any] = (), commands: bool = False) -> pluggy.PluginManager:
    """A plugin manager with the built-in plugins, those of installed packages, and `extra` plugin objects.

    Raises
    ------
    PluginError
        If an installed plugin cannot be imported, two of them have one name, or one implements a hook that does not exist.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for name in (*BUILTIN, *(COMMANDS if commands else ())):
        manager.register(import_module(name), name)
    _load_entry_points(manager)
    for plugin in extra:
        manager.register(plugin, getattr(plugin, "__name__", None) or f"{type(plugin).__module__}.{type(plugin).__qualname__}")
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        hooks = sorted(name for name in vars(hookspecs) if name.startswith("argus_"))
        raise PluginError(f"{error}; hooks are {', '.join(hooks)}") from error
    return manager


def _load_entry_points(manager: pluggy.PluginManager) -> None:
    loaded: dict[str, EntryPoint] = {}
    for entry in entry_points(group=hookspecs.PROJECT):
        first = loaded.setdefault(entry.name, entry)
        if first is not entry:
            raise PluginError(f"{described(first)} and {described(entry)} have one name; allowed: a name of its own for each")
        try:
            manager.register(entry.load(), entry.name)
        except Exception as error:
            raise PluginError(f"{described(entry)} does not load: {' '.join(str(error).split())}") from error


def described(entry: EntryPoint) -> str:
    """A plugin by its name, module and package."""
    return f"plugin '{entry.name}' ({entry.value}) of package '{entry.dist.name if entry.dist else 'unknown'}'"


def answers(manager: pluggy.PluginManager, hook: str, kind: type, allowed: str) -> Iterator[tuple[str, Any]]:
    """Each plugin's name and its answer to a hook, the plugin loaded first at the beginning.

    Raises
    ------
    PluginError
        If an answer is not of `kind`, which `allowed` describes, or there is none.
    """
    for implementation in reversed(getattr(manager.hook, hook).get_hookimpls()):
        name = implementation.plugin_name
        try:
            answer = implementation.function()
        except Exception as error:
            raise PluginError(f"{hook} of plugin '{name}' raises {' '.join(repr(error).split())}") from error
        if not isinstance(answer, kind):
            raise PluginError(f"{hook} of plugin '{name}' answers {answer!r}; allowed: {allowed}")
        yield name, answer


def kinds(manager: pluggy.PluginManager, hook: str) -> Mapping[str, type]:
    """Name to class of one hook, from all plugins.

    Raises
    ------
    PluginError
        If two plugins claim one name; the message names both. If a plugin answers with something else.
    """
    found: dict[str, type] = {}
    owner: dict[str, str] = {}
    for plugin, named in answers(manager, hook, Mapping, "a dict of classes by name"):
        for name, kind in named.items():
            if not isinstance(name, str) or not isinstance(kind, type):
                raise PluginError(f"{hook} of plugin '{plugin}' has {name!r}: {kind!r}; allowed: classes by name")
            if name in found:
                raise PluginError(f"{hook}: '{name}' is claimed by {owner[name]} and by {plugin}")
            if isabstract(kind):
                lacking = ", ".join(sorted(getattr(kind, "__abstractmethods__", ())))
                raise PluginError(f"{hook} of plugin '{plugin}': '{name}' lacks {lacking}; allowed: classes with all methods")
            found[name], owner[name] = kind, plugin
    return MappingProxyType(found)


def pick(what: str, name: str, known: Mapping[str, type]) -> Any:
    """The class called `name`, or a :class:`ConfigError` that lists the known names."""
    if name not in known:
        raise ConfigError(f"{what} '{name}' is not known; allowed: {', '.join(sorted(known))}")
    return known[name]


def config_paths() -> list[str]:
    """Config packages of installed plugins, for Hydra to search; the built-in plugins need no loading for it."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    _load_entry_points(manager)
    return [path for _, path in answers(manager, "argus_config_paths", str, "a package, as 'pkg://its_package.conf'")]
