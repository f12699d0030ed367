"""Tests of plugins run as those of ARGUS do: kernels in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import tests.conftest  # noqa: F401
from tests.backends.conftest import language_patched_once_a_launch

__all__ = ["language_patched_once_a_launch"]
