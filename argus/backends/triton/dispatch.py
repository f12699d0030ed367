"""Launching kernels again that were compiled before.

Triton looks at every argument of every launch to find the kernel compiled for it, which takes longer on the CPU than a decode
step's kernels take on the GPU. What it looks at is told here in one short tuple.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from argus.errors import NotCompiledError

ALIGNED = 16
"""Bytes; Triton compiles for pointers that are multiples of it, and for others."""


@lru_cache(maxsize=1024)
def constants(facts: tuple[Any, ...]) -> tuple[tl.constexpr, ...]:
    """Facts for which a kernel is compiled, inside of a tuple of arguments."""
    return tuple(tl.constexpr(fact) for fact in facts)


def kind_of(arguments: Sequence[Any], told: list[Any]) -> list[Any]:
    """Add to `told` all that Triton compiles anew for: dtypes, alignment, width of integers and constants."""
    for one in arguments:
        kind = type(one)
        if kind is int:
            told.append(one.bit_length() > 31)
        elif kind is tuple:
            told.append(len(one))
            kind_of(one, told)
        elif kind is tl.constexpr:
            told.append(one.value)
        elif isinstance(one, Tensor):
            told.append(one.dtype)
            told.append(one.data_ptr() % ALIGNED == 0)
        else:
            told.append(kind)
    return told


class Dispatch:
    """Compiled kernels, by what they were compiled for.

    Integers among the arguments of its kernels are not specialized: ``do_not_specialize`` says so, or ``launch.odd`` hides
    what they are.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], facts: dict[str, Any], **options: Any
    ) -> None:
        """Launch a kernel, compiled if it is the first of its kind.

        Parameters
        ----------
        kernel : JITFunction
        grid : tuple of int
        arguments : tuple
            Those that are known when it runs, in order; the first is a tensor on the device that runs it.
        facts : dict
            Its constants, the last of its parameters, in order.
        options
            Warps, registers and the like.

        Raises
        ------
        NotCompiledError
            If it is the first of its kind and a CUDA graph is being recorded, which takes no kernel that must be compiled.
        """
        key = (kernel, arguments[0].device, *facts.values(), *options.items(), *kind_of(arguments, []))
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *facts.values())
            return
        if arguments[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise NotCompiledError(f"{kernel.__name__} is not compiled for this yet")
        compiled = kernel[grid](*arguments, **facts, **options)
        # The interpreter compiles nothing.
        if compiled is not None:
            self._compiled[key] = compiled
