"""The Triton backend keeps the contract that any backend is asked for."""

from __future__ import annotations

from tests.backends.decoding import DEVICE, assembly as assembly  # isort: skip  Triton is told to interpret before it is imported.

from argus.backends.triton.backend import TritonBackend
from argus.testing import check_backend


def test_the_contract() -> None:
    check_backend(TritonBackend(), device=DEVICE)
