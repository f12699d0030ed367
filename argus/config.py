"""The one boundary to Hydra: what a cache and a run are made of, validated and frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from argus.errors import ConfigError
from argus.plugins import config_paths

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """No unknown names, no change after."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OpenOptions(BaseModel):
    """Named fields and, beside them, options that the plugin's own config validates."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        """What is not a named field."""
        return dict(self.model_extra or {})


class StageConfig(OpenOptions):
    """A stage: a tier, with its options beside it, for each role that has none of its own in ``keys`` or ``values``.

    ``capacity`` is in tokens, for aging policies that look at it; null: any number.
    """

    tier: str | None = None
    keys: str | dict[str, Any] | None = None
    values: str | dict[str, Any] | None = None
    capacity: PositiveInt | None = None


class LadderConfig(Strict):
    """Pages, window and ladder. Sizes are in tokens.

    Pages leave the window when it holds a page and ``slack`` more tokens than ``window``, as many as it has then. Each time
    costs Python's time, whatever leaves, so on a GPU slack makes decoding faster; its tokens take 16 bits.
    ``encode``: a page is encoded from what its present stage keeps, on leaving the window straight for its stage (``once``),
    or through every stage on its way (``cascade``, for comparison). ``anchors``: whether the tokens that anchor policies choose
    stay ``exact`` or are kept in 8 bits with a scale a token (``int8``).
    """

    page_size: PositiveInt = 64
    window: PositiveInt = 64
    slack: NonNegativeInt = 0
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    block_pages: PositiveInt = 32
    allow_growth: bool = False
    encode: Literal["once", "cascade"] = "once"
    anchors: Literal["exact", "int8"] = "exact"
    order: tuple[str, ...]
    stages: dict[str, StageConfig]

    @model_validator(mode="after")
    def _order_names_stages(self) -> LadderConfig:
        if not self.order:
            raise ValueError(f"order names no stage; allowed: {', '.join(self.stages)}")
        for name in self.order:
            if name not in self.stages:
                raise ValueError(f"order names '{name}', which is no stage; allowed: {', '.join(self.stages)}")
        if self.slack % self.page_size:
            raise ValueError(f"slack {self.slack} is no number of whole pages; allowed: multiples of {self.page_size} tokens")
        if len(set(self.order)) < len(self.order):
            raise ValueError(f"order names a stage twice: {', '.join(self.order)}")
        for name in self.order:
            capacity = self.stages[name].capacity
            if capacity is not None and capacity < self.page_size:
                raise ValueError(f"stages.{name}.capacity {capacity} is below a page; allowed: {self.page_size} tokens or more")
            if capacity is not None and capacity % self.page_size:
                allowed = f"allowed: multiples of {self.page_size} tokens"
                raise ValueError(f"stages.{name}.capacity {capacity} is no number of whole pages; {allowed}")
        return self


class PolicyChoice(OpenOptions):
    """A policy by name, with its options beside it."""

    policy: str


class Budget(Strict):
    """Measured bits a value that a cache of ``context`` tokens stays within; null: its stages are as large as they say."""

    bits: PositiveFloat | None = None
    context: PositiveInt = 2048


class CacheConfig(Strict):
    """Everything that makes an ARGUS cache."""

    tiers: LadderConfig
    aging: PolicyChoice
    outliers: PolicyChoice
    anchors: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    backend: str = "auto"
    budget: Budget = Field(default_factory=Budget)
    graphs: bool = True


class ModelConfig(Strict):
    """A model: ``embedded`` (a small one that pip installs) or ``hf`` with its ``id`` or folder."""

    name: Literal["embedded", "hf"]
    id: str | None = None
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    device: str = "auto"

    @model_validator(mode="after")
    def _hf_needs_id(self) -> ModelConfig:
        if self.name == "hf" and not self.id:
            raise ValueError("model=hf needs model.id=..., a name on the hub or a folder")
        return self


class TaskChoice(OpenOptions):
    """A task by name, with its options beside it."""

    name: str


class CacheChoice(OpenOptions):
    """A cache to compare: its kind, with its options beside it."""

    kind: str


class RunConfig(CacheConfig):
    """A run: an ARGUS cache, a model, a task, and the caches to compare by the names that rows call them.

    ``reference`` is compared with first: a name in ``cache``, or a kind that needs no options.
    """

    model: ModelConfig
    task: TaskChoice
    reference: str = "fp16"
    cache: dict[str, CacheChoice] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] = 0

    def caches(self) -> dict[str, CacheChoice]:
        """The caches of the run by name, the reference first."""
        return {self.reference: CacheChoice(kind=self.reference)} | self.cache

    def argus(self) -> CacheConfig:
        """The part that makes the ARGUS cache."""
        return CacheConfig(**{name: getattr(self, name) for name in CacheConfig.model_fields})


def validate(kind: type[Model], data: Mapping[str, Any], where: str = "") -> Model:
    """Validate plain `data`; every fault in one line that names it.

    Raises
    ------
    ConfigError
    """
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError("; ".join(_line(kind, fault, where) for fault in _first(error.errors()))) from error


def _first(faults: Sequence[Any]) -> list[Any]:
    """Faults without those of a group whose parts have some: a tuple is told to be too short for its wrong parts' sake."""
    places = [fault["loc"] for fault in faults]
    return [f for f in faults if not any(len(p) > len(f["loc"]) and p[: len(f["loc"])] == f["loc"] for p in places)]


def _line(kind: type[BaseModel], fault: Mapping[str, Any], where: str) -> str:
    path = ".".join(str(part) for part in (*([where] if where else []), *fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ")
    holder: Any = kind
    for part in fault["loc"][:-1]:
        holder = holder.model_fields[part].annotation if part in getattr(holder, "model_fields", ()) else None
    if fault["type"] == "extra_forbidden" and hasattr(holder, "model_fields"):
        message = f"is not an option; allowed: {', '.join(holder.model_fields) or 'none'}"
    return f"{path}: {message}" if path else message


@contextmanager
def _searching(folders: Sequence[str]) -> Iterator[list[str]]:
    """A Hydra that finds all config groups; gives the overrides that it needs for those of plugins and of `folders`."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import get_gh_backup, restore_gh_from_backup

    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if missing:
        raise ConfigError(f"'{missing[0]}' is no folder; allowed: one with folders named like config groups, such as tiers")
    paths = [*config_paths(), *(f"'file://{Path(folder).absolute()}'" for folder in folders)]
    outer = get_gh_backup()  # The program may use a Hydra of its own.
    GlobalHydra.instance().clear()
    with ExitStack() as stack:
        stack.callback(restore_gh_from_backup, outer)
        stack.enter_context(initialize_config_module("argus.conf", version_base="1.3"))
        yield [f"hydra.searchpath=[{','.join(paths)}]"] if paths else []


def sweep_of(overrides: Sequence[str], folders: Sequence[str] = ()) -> tuple[bool, str, str | None]:
    """Whether `overrides` set ``hydra.mode`` to that of a sweep, as an experiment does; where one goes; where overrides are.

    `folders` as for :func:`compose`.

    Raises
    ------
    ConfigError
        If they do not compose.
    """
    from hydra import compose as hydra_compose
    from hydra.errors import ConfigCompositionException, HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    with _searching(folders) as searched:
        try:
            composed = hydra_compose("config", overrides=[*overrides, *searched], return_hydra_config=True)
            settings = composed.hydra
            return settings.mode == RunMode.MULTIRUN, str(settings.sweep.dir), settings.output_subdir
        except ConfigCompositionException as error:
            raise ConfigError(_not_composed(error, overrides, searched)) from error
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(" ".join(str(error).split())) from error


def compose(overrides: Sequence[str] = (), folders: Sequence[str] = ()) -> dict[str, Any]:
    """Plain data of ``conf/config.yaml`` with Hydra `overrides` (``"tiers=int4"``, ``"anchors.sinks.tokens=8"``).

    Config groups are looked for in `folders` too.

    Raises
    ------
    ConfigError
        If an override names a group, an option or a key that does not exist, or a value is of a wrong type.
    """
    from hydra import compose as hydra_compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
    from yaml import YAMLError

    with _searching(folders) as searched:
        try:
            composed = hydra_compose("config", overrides=[*overrides, *searched])
            return dict(OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]
        except MissingConfigException as error:
            # Hydra tells no choices where one of several is wrong.
            group = str(error.missing_cfg_file).rpartition("/")[0]
            choices = error.options or GlobalHydra.instance().config_loader().get_group_options(group)
            raise ConfigError(f"'{error.missing_cfg_file}' is no config; allowed: {', '.join(choices)}") from error
        except ConfigCompositionException as error:
            raise ConfigError(_not_composed(error, overrides, searched)) from error
        except MissingMandatoryValue as error:
            raise ConfigError(f"{error.full_key} has no value; allowed: one that you give, as {error.full_key}=...") from error
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(" ".join(str(error).split())) from error
        except YAMLError as error:
            raise ConfigError(f"a config file is no YAML: {' '.join(str(error).split())}") from error
        except (TypeError, ValueError) as error:  # Hydra does not look at the type of a value before it uses it.
            message = _no_choice(overrides, searched) or f"{' '.join(overrides)}: {error}"
            raise ConfigError(" ".join(message.split())) from error


def _choices(override: Any, searched: Sequence[str]) -> list[str]:
    """Configs of the group that an override chooses from; none where it sets an option."""
    from hydra.core.global_hydra import GlobalHydra

    if isinstance(override.value(), dict):
        return []
    return GlobalHydra.instance().config_loader().get_group_options(override.key_or_group, overrides=list(searched))


def _no_choice(overrides: Sequence[str], searched: Sequence[str]) -> str | None:
    """What to say of the first override that gives a group what is no name and no list of names."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create().parse_overrides(list(overrides)):
        value, choices = override.value(), _choices(override, searched)
        names = value if isinstance(value, list) else [value]
        if choices and not override.is_delete() and not all(isinstance(name, str) for name in names):
            return f"'{override.input_line}' names no config; allowed: {', '.join(choices)}"
    return None


def _not_composed(error: Exception, overrides: Sequence[str], searched: Sequence[str]) -> str:
    """What to say of overrides that Hydra cannot set."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        return _no_option(str(cause.full_key), overrides, searched)
    message = ": ".join(str(one) for one in (error, cause) if one is not None)
    return " ".join(message.split())


def _no_option(key: str, overrides: Sequence[str], searched: Sequence[str]) -> str:
    """What to say of an option that does not exist: what the chosen configs allow there, and what was set before it."""
    from hydra import compose as hydra_compose
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import DictConfig

    kept: list[str] = []
    reached = False
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if _choices(override, searched):
            kept.append(str(override.input_line))
            continue
        name, adds = override.key_or_group, override.is_add() or override.is_force_add()
        holds = isinstance(override.value(), dict) and key.startswith(f"{name}.")
        reached = reached or f"{name}.".startswith(f"{key}.") or (holds and not adds)
        if not reached:
            kept.append(str(override.input_line))
    hydra = key.startswith("hydra.")
    known: Any = hydra_compose("config", overrides=[*kept, *searched], return_hydra_config=hydra)
    there: list[str] = []
    for part in key.split(".")[:-1]:
        if not isinstance(known, DictConfig) or part not in known:
            break
        known = known[part]
        there.append(part)
    allowed = ", ".join(map(str, known)) if isinstance(known, DictConfig) else ""
    said = f"'{key}' is no option; allowed in {'.'.join(there) or 'a run'}: {allowed or 'none'}"
    return f"{said}, and what its tier takes with +{key}=..." if there[:2] == ["tiers", "stages"] and there[2:] else said


def load_cache_config(choice: str | CacheConfig | Sequence[str] | None = None) -> CacheConfig:
    """A cache's config from a ladder's name, from Hydra overrides, or as it is.

    Raises
    ------
    ConfigError
        Also if `choice` is none of these, or an override is of something else than a cache.
    """
    if isinstance(choice, CacheConfig):
        return choice
    overrides = _cache_overrides(choice)
    data = compose(overrides)
    _of_a_cache(overrides)
    return validate(CacheConfig, {name: data[name] for name in CacheConfig.model_fields if name in data})


def _cache_overrides(choice: Any) -> list[str]:
    """The overrides that `choice` stands for."""
    if choice is None:
        return []
    if isinstance(choice, str) and "=" not in choice:
        return [f"tiers={choice}"]
    if isinstance(choice, Sequence) and not isinstance(choice, str) and all(isinstance(word, str) for word in choice):
        return list(choice)
    raise ConfigError(
        f"{choice!r} is no cache; allowed: a ladder's name such as 'int4', a list of overrides such as ['tiers=int4'], "
        "or a CacheConfig"
    )


def _of_a_cache(overrides: Sequence[str]) -> None:
    """Raise :class:`ConfigError` if one of `overrides`, which Hydra has read, is of another part of a run."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for word, override in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True):
        part = str(override.package or override.key_or_group).partition(".")[0]
        if part not in (*CacheConfig.model_fields, "hydra"):
            raise ConfigError(f"'{word}' is of no part of a cache; allowed: {', '.join(CacheConfig.model_fields)}")
