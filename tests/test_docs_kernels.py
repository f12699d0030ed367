"""docs/kernels.md names every file of the Triton backend, and none that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_file_is_named() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9_]+\.py)`", page))
    files = {path.name for path in (ROOT / "argus" / "backends" / "triton").glob("*.py")} - {"__init__.py"}
    assert named == files
