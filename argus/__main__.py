"""``python -m argus tiers=default``: compose a config with Hydra, validate it, run a task."""

from __future__ import annotations

import io
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from argus.errors import ERROR_LOG, ArgusError

FAILED = 2
"""Exit code of a run that ends in one clear line."""
STOPPED = 130
"""Exit code of a run that Ctrl-C ends."""


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
    from argus.runner import choose, execute
    from argus.sweep import is_done

    settings = HydraConfig.get()
    folder, sweep = Path(settings.runtime.output_dir), settings.mode == RunMode.MULTIRUN
    with one_line(folder if sweep else None):
        data: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        config = validate(RunConfig, data)
        if sweep and is_done(folder, config, choose(config).skipped):
            print(f"argus: {folder} has the report of this run already", file=sys.stderr, flush=True)
        else:
            execute(config, folder)


class one_line:  # noqa: N801
    """Print one line on stderr where ARGUS raises on purpose, or a file cannot be read or written, and end the program there.

    In a run of a sweep, which has a `folder`, the program goes on, after any other exception too: the line, or there the
    traceback, goes to ``error.log`` in the folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        if self.folder is not None:
            (self.folder / ERROR_LOG).unlink(missing_ok=True)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        unusable = isinstance(error, OSError) and error.filename is not None and self.folder is None
        if isinstance(error, ArgusError) or unusable:
            said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            line = " ".join(said.split())
            print(f"argus: {line}", file=sys.stderr, flush=True)
            if self.folder is None:
                raise SystemExit(FAILED) from error
            (self.folder / ERROR_LOG).write_text(f"{line}\n", encoding="utf-8")
            return True
        if self.folder is None or not isinstance(error, Exception):
            return False
        path = self.folder / ERROR_LOG
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        said = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"argus: {said}; traceback in {path}", file=sys.stderr, flush=True)
        return True


def main() -> None:
    """The command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that has no sign for what a model writes stops no run.
            stream.reconfigure(errors="replace")
    try:
        run()
    except KeyboardInterrupt as error:
        print("argus: stopped; of a sweep, runs that ended are kept", file=sys.stderr, flush=True)
        raise SystemExit(STOPPED) from error


def run() -> None:
    """What was asked for."""
    from argus.commandline import Command, check, parted, sweeps

    command = Command.of(sys.argv[1:])
    with one_line():
        from argus.plugins import config_paths

        paths = config_paths()
        add_config_paths(paths)
        if command.runs:
            check(command)
        folder = sweeps(command)
    if folder is None:
        # Hydra takes overrides only if they stand together.
        flags, overrides = parted(command.arguments)
        sys.argv = [sys.argv[0], *flags, *overrides]
        job()
        return
    sys.argv = [sys.argv[0], *command.into(folder)]
    job()
    from argus.sweep import summarize

    with one_line():
        summarize(Path(folder))


if __name__ == "__main__":
    main()
