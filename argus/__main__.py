"""``python -m argus tiers=default``: compose a config with Hydra, validate it, run a task."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from argus.errors import ArgusError

FAILED = 2
"""Exit code of a run that ends in one clear line."""


def add_config_paths(paths: Sequence[str]) -> None:
    """Let Hydra find the config groups of plugin packages."""

    class PluginPaths(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for path in paths:
                search_path.append(provider="argus-plugin", path=path)

    Plugins.instance().register(PluginPaths)


@hydra.main(version_base="1.3", config_path="pkg://argus.conf", config_name="config")
def job(composed: DictConfig) -> None:
    """One run of one composed config; a sweep's run that its folder has a report of already is not run again."""
    from argus.config import RunConfig, validate
    from argus.runner import execute
    from argus.sweep import is_done

    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    data: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    with one_line():
        config = validate(RunConfig, data)
        if settings.mode == RunMode.MULTIRUN and is_done(folder, config):
            print(f"argus: {folder} has the report of this run already", file=sys.stderr, flush=True)
            return
        execute(config, folder)


class one_line:  # noqa: N801
    """End the program with one line on stderr where ARGUS raises on purpose."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ArgusError):
            print(f"argus: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(FAILED) from error


def main() -> None:
    """The command line."""
    from argus.commandline import Command, check, sweep_folder

    command = Command.of(sys.argv[1:])
    with one_line():
        from argus.plugins import config_paths

        paths = config_paths()
        add_config_paths(paths)
        if command.runs:
            check(command)
    if not command.multirun:
        job()
        return
    folder = sweep_folder(command, datetime.now())
    sys.argv = [sys.argv[0], *command.arguments, f"hydra.sweep.dir={folder}"]
    job()
    from argus.sweep import summarize

    with one_line():
        summarize(Path(folder))


if __name__ == "__main__":
    main()
