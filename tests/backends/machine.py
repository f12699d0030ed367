"""Blocks of PTX instructions on named registers, in NumPy: what ``words.py`` writes as one operation (PTX ISA 9.7).

Registers are 32-bit words, one for each lane; 16-bit halves exist only between the two instructions that make and use them.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

import numpy as np
import torch


def number(word: np.ndarray) -> np.ndarray:
    return word.view(np.float32)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """One rounding of ``a * b + c``: the product is exact in float64, and the sum's error there decides ties."""
    product = a.astype(np.float64) * b.astype(np.float64)
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    # A float64 that lies midway between two float32 is moved off it by what its sum lost.
    middle = (total.view(np.int64) & ((1 << 29) - 1)) == 1 << 28
    away = np.where(lost > 0, np.inf, -np.inf)
    return np.where(middle & (lost != 0), np.nextafter(total, away), total).astype(np.float32)


def arithmetic(name: str, a: Sequence[np.ndarray]) -> np.ndarray:
    if name == "fma.rn.f32":
        return fused(*a)
    if name == "neg.f32":
        return -a[0]
    return {"sub.rn.f32": np.subtract, "add.rn.f32": np.add, "mul.rn.f32": np.multiply}[name](*a)


def prmt(a: np.ndarray, b: np.ndarray, which: int) -> np.ndarray:
    pool = np.concatenate([x.view(np.uint8).reshape(-1, 4) for x in (a, b)], 1)
    picks = np.ascontiguousarray(pool[:, [(which >> (4 * i)) & 7 for i in range(4)]])
    for i in range(4):
        if which >> (4 * i) & 8:
            picks[:, i] = np.where(picks[:, i] & 128, 255, 0)
    return picks.view(np.int32)[:, 0]


def run(asm: str, args: Sequence[np.ndarray], outputs: int) -> list[np.ndarray]:
    """The outputs of a block ``{ ...; }``, int32 words."""
    lanes = len(args[0])
    held: dict[str, np.ndarray] = {
        f"${outputs + i}": x if x.dtype == np.int64 or x.dtype == np.uint64 else np.ascontiguousarray(x).view(np.int32)
        for i, x in enumerate(args)
    }

    def read(name: str) -> np.ndarray:
        if name.startswith("0f"):
            return np.full(lanes, int(name[2:], 16), np.uint32).view(np.int32)
        if re.match(r"^(0x)?[0-9A-Fa-f]+$", name) and name not in held:
            return np.full(lanes, int(name, 0), np.uint32).view(np.int32)
        return held[name]

    for line in asm.strip().removeprefix("{").removesuffix("}").split(";"):
        text = " ".join(line.split())
        if not text or text.startswith(".reg"):
            continue
        guard = None
        if text.startswith("@"):
            guard, text = text[1:].split(" ", 1)
        name, rest = text.split(" ", 1)
        if name.startswith("st.global"):
            where, what = re.match(r"\[(\$\d+)\], \{?([^}]*)\}?", rest).groups()  # type: ignore[union-attr]
            words = [held[one.strip()] for one in what.split(",")]
            size = 2 if name.endswith("b16") else 4 * len(words)
            for lane in range(lanes) if guard is None else np.flatnonzero(held[guard]):
                data = b"".join(word[lane].astype(np.int32).tobytes() for word in words)[:size]
                at = int(held[where][lane])
                assert at % size == 0
                ctypes.memmove(at, data, size)
            continue
        if name == "mov.b32" and rest.startswith("{"):
            low, high, word = re.match(r"\{(\w+), (\w+)\}, (\S+)", rest).groups()  # type: ignore[union-attr]
            held[low], held[high] = read(word) & 0xFFFF, (read(word) >> 16) & 0xFFFF
            continue
        if name == "mov.b32" and rest.endswith("}"):
            to, low, high = re.match(r"(\S+), \{(\w+), (\w+)\}", rest).groups()  # type: ignore[union-attr]
            held[to] = held[low] | (held[high] << 16)
            continue
        to, *sources = (part.strip() for part in rest.split(","))
        x = [read(one) for one in sources]
        if name == "mov.b32":
            y = x[0]
        elif name == "prmt.b32":
            y = prmt(x[0], x[1], int(sources[2], 16))
        elif name == "xor.b32":
            y = x[0] ^ x[1]
        elif name == "cvt.rn.satfinite.e4m3x2.f32":
            high, low = (torch.from_numpy(number(one)).to(torch.float8_e4m3fn).view(torch.uint8).numpy() for one in x)
            y = low.astype(np.int32) | (high.astype(np.int32) << 8)
        elif name == "cvt.rn.bf16x2.f32":
            high, low = (torch.from_numpy(number(one)).to(torch.bfloat16).view(torch.int16).numpy() for one in x)
            y = (low.astype(np.int32) & 0xFFFF) | (high.astype(np.int32) << 16)
        elif name == "setp.ne.b32":
            y = x[0] != x[1]
        elif name in ("max.s32", "max.u32"):
            y = np.maximum(*(one.view(np.int32 if name == "max.s32" else np.uint32) for one in x)).view(np.int32)
        elif name == "not.b32":
            y = ~x[0]
        else:
            y = arithmetic(name, [number(one) for one in x]).view(np.int32)
        held[to] = y
    return [held[f"${i}"] for i in range(outputs)]
