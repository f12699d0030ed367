"""The Triton backend: kernels for CUDA GPUs. Importing this package does not import triton."""

from __future__ import annotations

from importlib.util import find_spec

from argus.backends.base import Backend
from argus.hookspecs import hookimpl


@hookimpl
def argus_backends() -> dict[str, type[Backend]]:
    if find_spec("triton") is None:
        return {}
    from argus.backends.triton.backend import TritonBackend

    return {"triton": TritonBackend}
