"""The few PTX instructions that kernels use, in NumPy: the Triton interpreter knows no inline assembly.

Semantics: PTX ISA 9.7 (``prmt``, ``shfl.sync``, ``movmatrix``, ``ld.global``) and its fragment layouts of ``mma.m16n8k32``.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from tests.backends import machine


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run kernels with inline assembly."""
    monkeypatch.setattr("triton.language.inline_asm_elementwise", inline_asm)
    # The interpreter leaves constants in tuples wrapped, and counts loops in plain integers.
    for name, operation in (("mod", operator.mod), ("lshift", operator.lshift), ("rshift", operator.rshift)):
        reflected = lambda self, other, operation=operation: operation(other, self.value)  # noqa: E731
        monkeypatch.setattr(f"triton.language.constexpr.__r{name}__", reflected, raising=False)


G, T = np.arange(32) // 4, np.arange(32) % 4


def inline_asm(
    asm: str, constraints: str, args: Sequence[Any], dtype: Any, is_pure: bool, pack: int, **_: object
) -> tl.tensor | tuple[tl.tensor, ...]:
    """Stands for ``triton.language.inline_asm_elementwise`` on tensors of 32 lanes."""
    arrays = [np.broadcast_to(np.asarray(arg.handle.data), (32,)) for arg in args]
    name = asm.split()[0]
    if name.startswith("ld.global.nc") and ".b32" in name:
        width = 4 if ".v4." in name else 2 if ".v2." in name else 1
        words = np.stack([np.frombuffer(ctypes.string_at(int(at), 4 * width), np.int32) for at in arrays[0]])
        assert all(int(at) % (4 * width) == 0 for at in arrays[0])
        results = [words[:, i] for i in range(width)]
    elif name == "prefetch.global.L2":
        results = [np.zeros(32, np.int32)]
    elif name in ("max.u16x2", "min.u16x2"):
        a, b = (np.ascontiguousarray(x.astype(np.int32)).view(np.uint16) for x in arrays)
        results = [(np.maximum if name.startswith("max") else np.minimum)(a, b).view(np.int32)]
    elif name == "prmt.b32":
        results = [prmt(*arrays)]
    elif name.startswith("shfl.sync.bfly"):
        results = [arrays[0][np.arange(32) ^ int(asm.split(", ")[2])]]
    elif name.startswith("shfl.sync.idx"):
        results = [arrays[0][arrays[1]]]
    elif name.startswith("movmatrix"):
        halves = np.ascontiguousarray(arrays[0]).view(np.int16).reshape(8, 8)
        results = [np.ascontiguousarray(halves.T).reshape(-1).view(np.int32)]
    elif name.startswith("mma.sync.aligned.m16n8k32"):
        results = mma(arrays, *(np.int8 if kind == "s8" else np.uint8 for kind in name.split(".")[-3:-1]))
    elif ".b1.b1." in name:
        results = bits_in_common(arrays)
    elif name.startswith("mma.sync.aligned.m16n8k16"):
        results = mma16(arrays, bf16="bf16" in name)
    elif name.startswith("ld.global.nc.u8"):
        results = [np.array([ctypes.string_at(int(at), 1)[0] for at in arrays[0]], np.int32)]
    elif "@p ld.global.nc" in asm:
        size = 2 if "nc.b16" in asm else 4
        read = lambda at: int.from_bytes(ctypes.string_at(int(at), size), "little", signed=size == 4)  # noqa: E731
        results = [np.array([read(at) if held else 0 for at, held in zip(*arrays, strict=True)], np.int32)]
    elif "ld.global.nc.b16" in asm:
        results = [np.array([int.from_bytes(ctypes.string_at(int(at), 2), "little") for at in arrays[0]], np.int32)]
    elif name == "cvt.rn.f16x2.f32":
        halves = np.stack(arrays, 1).astype(np.float32).astype(np.float16)
        results = [np.ascontiguousarray(halves).view(np.int32)[:, 0]]
    elif "cvt.f32.f16" in asm:
        halves = np.ascontiguousarray(arrays[0].astype(np.int32)).view(np.float16).reshape(32, 2)
        results = [halves[:, i].astype(np.float32) for i in range(2)]
    elif "cvt.rn.f16x2.e4m3x2" in asm:
        results = e4m3(arrays[0])
    elif name in ("sub.rn.f16x2", "set.eq.f16x2.f16x2"):
        a, b = (np.ascontiguousarray(x.astype(np.int32)).view(np.float16) for x in arrays)
        results = [(a - b if name.startswith("sub") else (a == b).astype(np.float16)).view(np.int32)]
    elif "sub.rn.f16x2" in asm:
        halves = as_bytes(arrays[0], np.int8).astype(np.float16)
        results = [np.ascontiguousarray(halves[:, i : i + 2]).view(np.int32)[:, 0] for i in (0, 2)]
    elif name == "mul.rn.f16x2":
        a, b = (np.ascontiguousarray(x.astype(np.int32)).view(np.float16) for x in arrays)
        results = [(a * b).view(np.int32)]
    else:
        outputs = len(dtype) if isinstance(dtype, tuple) else 1
        results = machine.run(asm, arrays, outputs)
    kinds = dtype if isinstance(dtype, tuple) else (dtype,)
    outs = tuple(
        tl.tensor(TensorHandle(as_kind(result, kind), kind), tl.block_type(kind, [32]))
        for result, kind in zip(results, kinds, strict=True)
    )
    return outs if isinstance(dtype, tuple) else outs[0]


def as_kind(result: np.ndarray, kind: Any) -> np.ndarray:
    """What a register holds, as the type that the caller asks for."""
    result = np.ascontiguousarray(result)
    return result.view(np.float32) if kind == tl.float32 and result.dtype == np.int32 else result


def as_bytes(x: np.ndarray, kind: type = np.uint8) -> np.ndarray:
    return np.ascontiguousarray(x.astype(np.int32)).view(kind).reshape(32, 4)


def prmt(a: np.ndarray, b: np.ndarray, which: np.ndarray) -> np.ndarray:
    assert not (which & 0x8888).any(), "a digit of 8 or more spreads a sign"
    pool = np.concatenate([as_bytes(a), as_bytes(b)], 1)
    picks = np.stack([(which >> (4 * i)) & 7 for i in range(4)], 1)
    return np.ascontiguousarray(np.take_along_axis(pool, picks, 1)).view(np.int32)[:, 0]


def mma(args: Sequence[np.ndarray], kind: type, other: type) -> list[np.ndarray]:
    a, b, c = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64), np.zeros((16, 8), np.int64)
    for r in range(4):
        for i in range(4):
            a[G + 8 * (r % 2), 16 * (r // 2) + 4 * T + i] = as_bytes(args[r], kind)[:, i]
    for r in range(2):
        for i in range(4):
            b[16 * r + 4 * T + i, G] = as_bytes(args[4 + r], other)[:, i]
    for r in range(4):
        c[G + 8 * (r // 2), 2 * T + r % 2] = args[6 + r]
    d = a @ b + c
    assert np.abs(d).max() < 1 << 31
    return [d[G + 8 * (r // 2), 2 * T + r % 2].astype(np.int32) for r in range(4)]


def bits_in_common(args: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``mma.m16n8k128`` and ``mma.m16n8k256`` of single bits, with ``and.popc``."""
    parts = (len(args) - 4) // 3
    a, b, c = np.zeros((16, 4 * parts, 32), int), np.zeros((8, 4 * parts, 32), int), np.zeros((16, 8), np.int64)
    words = [x.astype(np.int64)[:, None] >> np.arange(32) & 1 for x in args[: 3 * parts]]
    for part in range(parts):
        for r in range(2):
            a[G + 8 * r, 4 * part + T] = words[2 * part + r]
        b[G, 4 * part + T] = words[2 * parts + part]
    for r in range(4):
        c[G + 8 * (r // 2), 2 * T + r % 2] = args[3 * parts + r]
    d = a.reshape(16, -1) @ b.reshape(8, -1).T + c
    return [d[G + 8 * (r // 2), 2 * T + r % 2].astype(np.int32) for r in range(4)]


def shorts(x: np.ndarray, bf16: bool) -> np.ndarray:
    """The two 16-bit numbers of each word, float32."""
    words = np.ascontiguousarray(x.astype(np.int32))
    if bf16:
        return (words.view(np.uint16).reshape(32, 2).astype(np.uint32) << 16).view(np.float32)
    return words.view(np.float16).reshape(32, 2).astype(np.float32)


def mma16(args: Sequence[np.ndarray], bf16: bool) -> list[np.ndarray]:
    a, b, c = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32), np.zeros((16, 8), np.float32)
    halves = [shorts(x, bf16) for x in args[:6]]
    for r in range(4):
        for i in range(2):
            a[G + 8 * (r % 2), 8 * (r // 2) + 2 * T + i] = halves[r][:, i]
    for r in range(2):
        for i in range(2):
            b[8 * r + 2 * T + i, G] = halves[4 + r][:, i]
    for r in range(4):
        c[G + 8 * (r // 2), 2 * T + r % 2] = args[6 + r]
    d = a @ b + c
    return [d[G + 8 * (r // 2), 2 * T + r % 2].astype(np.float32) for r in range(4)]


def e4m3(words: np.ndarray) -> list[np.ndarray]:
    """Two words of two FP16 each from four E4M3 codes."""
    codes = torch.from_numpy(as_bytes(words).copy()).view(torch.float8_e4m3fn)
    halves = codes.to(torch.float16).view(torch.int16).numpy().reshape(32, 2, 2)
    return [np.ascontiguousarray(halves[:, i]).view(np.int32)[:, 0] for i in range(2)]
