"""Launching a compiled kernel again: only one that was compiled for such arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

tl = pytest.importorskip("triton.language")

from argus.backends.triton.dispatch import Dispatch, constants, kind_of  # noqa: E402


class Compiled:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.calls.append((grid, arguments))


class Kernel:
    """A kernel that compiles at every call, as Triton does for arguments that it did not see before."""

    def __init__(self, compiles: bool = True) -> None:
        self.made: list[Compiled] = []
        self.compiles = compiles

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **facts: Any) -> Compiled | None:
            self.made.append(Compiled())
            return self.made[-1] if self.compiles else None

        return run


X = torch.zeros(64, dtype=torch.float16)
SAME = [
    ((X, 5, (X, 7)), (X, 9, (X, 3))),
    ((X, 1, ()), (torch.ones(8, dtype=torch.float16), 16, ())),
    ((X, 2.0), (X, 1.0)),
]
OTHER = [
    ((X, 5), (X.float(), 5)),
    ((X, 5), (X[1:], 5)),
    ((X, 5), (X, 5.0)),
    ((X, 5), (X, 1 << 40)),
    ((X, (X, 5)), (X, (X[3:], 5))),
    ((X, (X,)), (X, (X, X))),
    ((X, (5, (5,))), (X, (5, 5))),
    ((X, constants((1, True))), (X, constants((2, True)))),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_compiled_once(first: Any, second: Any) -> None:
    kernel, dispatch = Kernel(), Dispatch()
    dispatch.launch(kernel, (1, 1, 1), first, {"D": 64}, num_warps=1)
    dispatch.launch(kernel, (2, 3, 1), second, {"D": 64}, num_warps=1)
    assert [one.calls for one in kernel.made] == [[((2, 3, 1), (*second, 64))]]


@pytest.mark.parametrize(("first", "second"), OTHER)
def test_compiled_for_each_kind(first: Any, second: Any) -> None:
    kernel, dispatch = Kernel(), Dispatch()
    for arguments in (first, second, first, second):
        dispatch.launch(kernel, (1, 1, 1), arguments, {"D": 64})
    assert [len(one.calls) for one in kernel.made] == [1, 1]


def test_constants_options_and_kernels_tell_apart() -> None:
    kernel, other, dispatch = Kernel(), Kernel(), Dispatch()
    for facts, options in (({"D": 64}, {}), ({"D": 128}, {}), ({"D": 64}, {"maxnreg": 96})):
        dispatch.launch(kernel, (1, 1, 1), (X,), facts, **options)
    dispatch.launch(other, (1, 1, 1), (X,), {"D": 64})
    assert (len(kernel.made), len(other.made)) == (3, 1)


def test_what_is_interpreted_is_never_kept() -> None:
    kernel, dispatch = Kernel(compiles=False), Dispatch()
    for _ in range(2):
        dispatch.launch(kernel, (1, 1, 1), (X,), {})
    assert len(kernel.made) == 2


def test_a_place_in_memory_is_all_that_may_differ() -> None:
    assert kind_of((X[8:], 3), []) == kind_of((X[16:], 4), [])
    assert kind_of((X[1:], 3), []) != kind_of((X, 3), [])
