"""The command line before Hydra sees it: check overrides, so that a mistake ends in one line that lists what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INFORMATION = {"--help", "-h", "--hydra-help", "--version", "--info", "-i", "--cfg", "-c", "--shell-completion", "-sc"}
VALUED = {"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p", "--cfg", "-c"}
"""Flags of Hydra whose next word is no override."""
LAUNCHERS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    "ray": "hydra-ray-launcher",
    "ray_aws": "hydra-ray-launcher",
}
"""The package of each launcher that Hydra's makers give out apart."""


SINGLE = ("tiers", "aging", "outliers", "model", "task", "experiment")
"""Groups of which a run has one choice; of a list Hydra would take the last, and of several experiments sweep none."""


OTHERS = ("--config-path", "-cp", "--config-name", "-cn")
"""Flags of Hydra that name another config than ARGUS's."""


FOLDERS = ("--config-dir", "-cd")
"""Flags of Hydra that name a folder of config groups."""


HYDRA = ".hydra"
"""The folder of Hydra's files in that of a run."""


def parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    for before, word in zip(("", *arguments), arguments, strict=False):
        (flags if word.startswith("-") or before in VALUED else overrides).append(word)
    return flags, overrides


@dataclass(frozen=True)
class Command:
    """What was asked for."""

    arguments: tuple[str, ...]
    overrides: tuple[str, ...]
    multirun: bool
    runs: bool
    folders: tuple[str, ...] = ()

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Command:
        """Sort `arguments` into overrides and flags, as Hydra does."""
        flags = ("", *arguments)
        _, overrides = parted(arguments)
        multirun = any(word in ("-m", "--multirun") for word in arguments)
        runs = not any(word.split("=")[0] in INFORMATION for word in arguments)
        folders = [word for flag, word in zip(flags, arguments, strict=False) if flag in FOLDERS]
        folders += [word.split("=", 1)[1] for word in arguments if word.startswith(f"{FOLDERS[0]}=")]
        return cls(tuple(arguments), tuple(overrides), multirun and runs, runs, tuple(folders))

    def into(self, folder: str) -> list[str]:
        """The arguments of a sweep into `folder`; Hydra takes overrides only if they stand together."""
        others, _ = parted(self.arguments)
        quoted = folder.replace("\\", "\\\\").replace("'", "\\'")
        kept = [word for word in self.overrides if not word.startswith("hydra.sweep.dir=")]
        return [*others, *kept, f"hydra.sweep.dir='{quoted}'"]


def check_flags(command: Command) -> None:
    """Raise :class:`ConfigError` if another config than ARGUS's own is asked for."""
    from argus.errors import ConfigError

    for word in command.arguments:
        if word.split("=")[0] in OTHERS:
            raise ConfigError(f"{word}: the config is ARGUS's own; allowed: --config-dir FOLDER with configs of yours")


def check(command: Command) -> None:
    """Compose, validate and choose every value that is asked for, all but what needs the model.

    Raises
    ------
    ConfigError
        If a group, an option or a value is not allowed.
    ModelError
        If the model's config is not there.
    """
    from argus.build import build
    from argus.config import RunConfig, compose, validate
    from argus.models import look
    from argus.policies.base import TextFacts
    from argus.runner import choose

    check_flags(command)
    check_launcher(command.overrides)
    check_choices(command.overrides)
    words = [word for word in command.overrides if not word.startswith("hydra.")]
    for overrides in combinations(words):
        config = validate(RunConfig, compose(overrides, command.folders))
        head_dim = look(config.model)
        for cache in choose(config).caches.values():
            cache.check(head_dim)
        build(config.argus(), head_dim, text=TextFacts(line_ends=(0,)))


def sweeps(command: Command) -> str | None:
    """Where the runs of a sweep go; None where Hydra makes none of it, asked for neither by a flag nor by an experiment.

    Raises
    ------
    ConfigError
        If it makes none, but an override has several values, or if it keeps overrides where no table looks for them.
    """
    from argus.config import sweep_of
    from argus.errors import ConfigError

    if not command.runs:
        return None
    runs = combinations([word for word in command.overrides if not word.startswith("hydra.searchpath=")])
    sweep, folder, kept = sweep_of(runs[0], command.folders)
    if sweep or command.multirun:
        if kept != HYDRA:
            raise ConfigError(f"hydra.output_subdir={kept}: a sweep reads there what its runs are; allowed: {HYDRA}")
        return folder
    if len(runs) > 1:
        named = next(one for one, other in zip(*runs[:2], strict=True) if one != other).split("=")[0]
        raise ConfigError(f"'{named}' has several values; allowed: one, or -m for a run of each")
    return None


def check_choices(words: Sequence[str]) -> None:
    """Raise :class:`ConfigError` if several choices of a group are asked for that has one in a run."""
    from argus.errors import ConfigError

    for word in words:
        group, _, value = word.lstrip("+").partition("=")
        several = value.startswith("[") or (group == "experiment" and "," in value)
        if group in (*SINGLE, "anchors", "cache") and value == "{}":
            raise ConfigError(f"'{word}' sets nothing; allowed: the name of a config, or options")
        if group in SINGLE and several:
            more = "one at a time" if group == "experiment" else f"one, or -m {group}=a,b for a run of each"
            raise ConfigError(f"'{word}': a run has one {group}; allowed: {more}")


def check_launcher(words: Sequence[str]) -> None:
    """Raise :class:`ConfigError` that says what to install if a launcher is asked for whose package is not there."""
    from importlib.util import find_spec

    from argus.errors import ConfigError

    for word in words:
        group, _, name = word.partition("=")
        package = LAUNCHERS.get(name, "") if group == "hydra/launcher" else ""
        module = f"hydra_plugins.{package.replace('-', '_')}"
        if package and (find_spec("hydra_plugins") is None or find_spec(module) is None):
            raise ConfigError(f"launcher '{name}' is not installed; pip install {package}, or leave {word} out")


def combinations(words: Sequence[str]) -> list[list[str]]:
    """Overrides of single runs that together hold every value of every sweep once."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    from argus.errors import ConfigError

    choices: list[list[str]] = []
    for word in words:
        try:
            parsed = OverridesParser.create().parse_override(word)
        except HydraException as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"'{word}' does not parse: {text}; allowed: name=value, +name=value, ~name") from error
        if parsed.is_sweep_override() and (not parsed.is_discrete_sweep() or isinstance(parsed.value(), Glob)):
            raise ConfigError(f"'{word}': only lists of values can be swept here, as in tiers=int8,int4")
        try:
            values = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else [parsed.get_value_element_as_str()]
        except ValueError as error:
            raise ConfigError(f"'{word}': {error}; allowed: a list of values, as in tiers=int8,int4") from error
        if not values:
            raise ConfigError(f"'{word}' has no value; allowed: a list of values, as in tiers=int8,int4")
        prefix = word.split("=")[0]
        choices.append([word] if word.startswith("~") else [f"{prefix}={value}" for value in values])
    first = [values[0] for values in choices]
    runs = [first]
    for place, values in enumerate(choices):
        runs += [[*first[:place], value, *first[place + 1 :]] for value in values[1:]]
    return runs
