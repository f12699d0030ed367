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
    """One run of one composed config. In a sweep a run that is done is not run again, and one that fails stops no other."""
    from argus.config import RunConfig, validate
    from argus.runner import execute
    from argus.sweep import is_done

    settings = HydraConfig.get()
    folder, sweep = Path(settings.runtime.output_dir), settings.mode == RunMode.MULTIRUN
    data: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    with one_line(stop=not sweep):
        config = validate(RunConfig, data)
        if sweep and is_done(folder, config):
            print(f"argus: {folder} has the report of this run already", file=sys.stderr, flush=True)
        else:
            execute(config, folder)


class one_line:  # noqa: N801
    """Print one line on stderr where ARGUS raises on purpose, and end the program there if it is to `stop`."""

    def __init__(self, stop: bool = True) -> None:
        self.stop = stop

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, ArgusError):
            return False
        print(f"argus: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if self.stop:
            raise SystemExit(FAILED) from error
        return True


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
    sys.argv = [sys.argv[0], *command.into(folder)]
    job()
    from argus.sweep import summarize

    with one_line():
        summarize(Path(folder))


if __name__ == "__main__":
    main()
