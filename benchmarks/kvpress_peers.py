"""Eviction peers by kvpress, in an environment of their own, into the same rows.

``python -m benchmarks.kvpress_peers [overrides of python -m argus]``

kvpress pins transformers below what ARGUS asks for. The environment sees the packages of the one that runs this script (torch
among them) behind its own, so that little is installed twice. ``-m hydra.sweep.dir=DIR`` with the folder of another sweep adds
rows to that sweep's table and picture.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from sysconfig import get_path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-kvpress"
PACKAGES = ("kvpress==0.5.5",)
PLUGIN = ROOT / "plugins" / "argus-kvpress"
DEFAULT = ("cache=[knorm,snapkv,keydiff,expected_attention]", "task=perplexity")
SUBFOLDER = "hydra.sweep.subdir=kvpress-${hydra:job.num}"


def words(given: Sequence[str]) -> list[str]:
    """The words for ``python -m argus``: as given, or all four presses; a sweep's runs in folders of their own."""
    chosen = list(given) or list(DEFAULT)
    sweeps = any(word in ("-m", "--multirun") for word in chosen)
    named = any(word.startswith("hydra.sweep.subdir=") for word in chosen)
    return [*chosen, SUBFOLDER] if sweeps and not named else chosen


def pip(python: Path, *arguments: str) -> None:
    """Run pip; what it says is shown only if it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def prepare(folder: Path) -> Path:
    """The Python of the environment in `folder`, which is made first where it is not whole."""
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        print(f"making {folder} with {', '.join(PACKAGES)}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        site = next((folder / "lib").glob("python*")) / "site-packages"
        (site / "behind.pth").write_text(f"import site; site.addsitedir({get_path('purelib')!r})\n", encoding="utf-8")
        pip(python, *PACKAGES)
        pip(python, "--no-deps", "--editable", str(PLUGIN))
        ready.touch()
    return python


def main() -> None:
    """Make the environment if need be, and run ARGUS in it."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    raise SystemExit(subprocess.call([str(prepare(FOLDER)), "-m", "argus", *words(sys.argv[1:])]))


if __name__ == "__main__":
    main()
