"""Triton's interpreter, spared what it does again and again in a launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def language_patched_once_a_launch() -> Iterator[None]:
    """Each call of a function patches ``triton.language`` as its module sees it: within a launch, as it is already.

    The names are Triton's own: one that has others is left as it is.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if torch.cuda.is_available() or not (hasattr(interpreter, "GridExecutor") and hasattr(interpreter, "_patch_lang")):
        yield
        return
    patched: set[int] = set()
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def launched(self: Any, *args: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *args, **options)

    def once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter.GridExecutor, "__call__", launched)
        patches.setattr(interpreter, "_patch_lang", once)
        yield
