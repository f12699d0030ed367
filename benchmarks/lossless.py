"""One or two bits a value against lossless coding of the same pages: bytes and error.

Pages of 64 tokens are keys and values of the embedded model on prose, in FP16. Lossless coders see one page at a time, as a
cache would, and every page is decoded and compared. Run from the repository root: ``python -m benchmarks.lossless``.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import shlex
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from argus.build import build
from argus.config import ModelConfig, load_cache_config
from argus.errors import ArgusError
from argus.models import load
from argus.report import versions
from argus.tasks.steps import passage
from argus.tiers.base import ROLES, Role

Array = np.ndarray[Any, Any]
PAGE = 64
TIERS = ("int8", "int4", "int2", "sign")
PACKERS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "zlib": (lambda raw: zlib.compress(raw, 9), zlib.decompress),
    "lzma": (lzma.compress, lzma.decompress),
}


def ordered(page: Array) -> Array:
    """FP16 numbers as 16-bit integers in the same order, so that near numbers have near integers."""
    bits = page.view(np.uint16)
    return np.where(bits >> 15 == 1, ~bits, bits | 0x8000).astype(np.uint16)


def unordered(codes: Array) -> Array:
    """What :func:`ordered` was made from, as integers that hold FP16."""
    return np.where(codes >> 15 == 1, codes & 0x7FFF, ~codes).astype(np.uint16)


def difference(codes: Array) -> Array:
    """Each token's integers ``[H, P, D]`` less those of the token before, modulo 2^16."""
    return np.diff(codes, axis=1, prepend=np.zeros_like(codes[:, :1]))


def total(codes: Array) -> Array:
    """What :func:`difference` was made from."""
    return np.cumsum(codes, axis=1, dtype=np.uint16)


def planes(codes: Array) -> bytes:
    """High bytes, then low bytes, each channel's tokens side by side."""
    turned = np.ascontiguousarray(codes.swapaxes(1, 2))
    return (turned >> 8).astype(np.uint8).tobytes() + (turned & 0xFF).astype(np.uint8).tobytes()


def unplanes(raw: bytes, shape: tuple[int, ...]) -> Array:
    """What :func:`planes` was made from."""
    high, low = np.frombuffer(raw, np.uint8).reshape(2, shape[0], shape[2], shape[1]).astype(np.uint16)
    return np.asarray((high << 8 | low).swapaxes(1, 2))


def lossless(page: Array, packer: str, delta: bool) -> int:
    """Bytes of an FP16 page ``[H, P, D]``, split in byte planes and packed, with or without differences along tokens.

    Raises
    ------
    ValueError
        If the page does not come back bit by bit.
    """
    pack, unpack = PACKERS[packer]
    codes = ordered(page)
    packed = pack(planes(difference(codes) if delta else codes))
    back = unplanes(unpack(packed), page.shape)
    if not np.array_equal(unordered(total(back) if delta else back), page.view(np.uint16)):
        raise ValueError(f"{packer}: a page came back changed")
    return len(packed)


def pages_of(tokens: int, layers: list[int], seed: int) -> dict[Role, Tensor]:
    """Keys and values of some layers of the embedded model over prose, as FP16 pages ``[n, 1, H, 64, D]``."""
    loaded = load(ModelConfig(name="embedded", dtype="float32", device="cpu"))
    ids = torch.tensor([passage(loaded.tokenizer, tokens, random.Random(seed))])
    with torch.inference_mode():
        held = loaded.model(ids, use_cache=True, logits_to_keep=1).past_key_values
    kept = [held.layers[layer] for layer in layers]
    found = {role: torch.cat([getattr(layer, role) for layer in kept]).half() for role in ROLES}
    return {role: x.unflatten(2, (-1, PAGE)).movedim(2, 1).flatten(0, 1).unsqueeze(1) for role, x in found.items()}


def tier_row(name: str, role: Role, pages: Tensor) -> dict[str, Any]:
    """Bits a value and relative error of a tier."""
    words = ["tiers=default", f"tiers.order=[{name}]", "backend=cpu"]
    tier = build(load_cache_config(words), pages.shape[-1]).stages[0].tier(role)
    held = tier.encode(pages.float(), role)
    spent = sum(tensor.nbytes for tensor in held.values())
    error = float((tier.decode(held, role) - pages.float()).norm() / pages.float().norm())
    return {"method": name, "role": role, "bits_per_value": 8 * spent / pages.numel(), "relative_error": error}


def coder_row(packer: str, delta: bool, role: Role, pages: Tensor) -> dict[str, Any]:
    """Bits a value of a lossless coder, whose error is none."""
    spent = sum(lossless(page[0].numpy(), packer, delta) for page in pages)
    method = f"{'delta, ' if delta else ''}planes, {packer}"
    return {"method": method, "role": role, "bits_per_value": 8 * spent / pages.numel(), "relative_error": 0.0}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table, keys and values side by side."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("pages kept as", no_wrap=True)
    for role in ROLES:
        for head in ("bits", "x less", "error"):
            table.add_column(f"{role[0].upper()} {head}", justify="right", no_wrap=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["role"]: row for row in rows if row["method"] == method}
        figures = [(own[role]["bits_per_value"], own[role]["relative_error"]) for role in ROLES]
        table.add_row(method, *(text for bits, lost in figures for text in (f"{bits:.2f}", f"{16 / bits:.2f}", f"{lost:.4f}")))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="of prose, a multiple of 64")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 5, 10, 15, 20, 25, 29])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.tokens < PAGE or options.tokens % PAGE:
        raise ArgusError(f"--tokens {options.tokens} is no number of whole pages; allowed: multiples of {PAGE}")
    pages = pages_of(options.tokens, options.layers, options.seed)
    rows = [tier_row(name, role, pages[role]) for name in TIERS for role in ROLES]
    rows += [coder_row(packer, delta, role, pages[role]) for packer in PACKERS for delta in (False, True) for role in ROLES]
    facts = {
        "benchmark": "lossless",
        "command": shlex.join(["python", "-m", "benchmarks.lossless", *sys.argv[1:]]),
        "versions": versions(),
        "layers": options.layers,
        "tokens": options.tokens,
        "pages": len(pages["keys"]),
        "page_shape": list(pages["keys"].shape[1:]),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "lossless.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    show(rows, Console(width=100))


if __name__ == "__main__":
    try:
        main()
    except ArgusError as error:
        sys.exit(f"lossless: {error}")
