"""What a filled cache takes of the GPU's memory beside what its ledger counts, and the most that filling it took.

Two layers are filled by chunks, each asked and aged, and then decode for some steps. Run from the repository root:
``python -m benchmarks.memory [--shapes 1x32768 8x8192] [--ladders int4]``. As it comes, PyTorch may leave up to 1 MB
of a free block to a large tensor; with ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`` it does not.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argus.attention import Query
from argus.engine import LayerCache
from argus.ledger import measure
from argus.turns import age
from benchmarks import common

LAYERS = 2
ALLOWED = 0.02
"""How far the ledger and ``torch.cuda.memory_allocated`` may be apart."""


def step(layer: LayerCache, batch: int, tokens: int) -> None:
    """Write random tokens, ask them, and let pages age."""
    shape = (batch, common.KV_HEADS, tokens, common.HEAD_DIM)
    layer.write(*(torch.randn(shape, device="cuda", dtype=torch.float16) for _ in range(2)))
    q = torch.randn(batch, common.QUERY_HEADS, tokens, common.HEAD_DIM, device="cuda", dtype=torch.float16)
    layer.attend(Query.of(q, common.KV_HEADS, common.HEAD_DIM**-0.5, layer.length - tokens))
    age([layer])


def held(layers: list[LayerCache]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that the layers hold, as the ledger of a cache counts them."""
    plan = layers[0].plan
    for layer in layers:
        yield from layer.tensors()
    yield from plan.shared()
    for tensor in plan.backend.tensors():
        yield "index", tensor


def living() -> dict[str, int]:
    """Bytes of the GPU's memory in use: as the allocator rounds them, and as they were asked for."""
    gc.collect()
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    return {"allocated": stats["allocated_bytes.all.current"], "requested": stats["requested_bytes.all.current"]}


def fill(ladder: str, batch: int, context: int, chunk: int, decoded: int, **options: Any) -> dict[str, Any]:
    """One row."""
    torch.cuda.empty_cache()
    before = living()
    layers = [LayerCache(common.plan_of(ladder, **options))]
    layers += [LayerCache(layers[0].plan) for _ in range(LAYERS - 1)]
    torch.cuda.reset_peak_memory_stats()
    for begin in range(0, context, chunk):
        for layer in layers:
            step(layer, batch, min(chunk, context - begin))
    prefill = torch.cuda.max_memory_allocated() - before["allocated"]
    for _ in range(decoded):
        for layer in layers:
            step(layer, batch, 1)
    found = {name: size - before[name] for name, size in living().items()}
    ledger = measure(held(layers), sum(layer.values for layer in layers), layers[0].plan.backend.workspace)
    return {
        "ladder": ladder,
        "batch": batch,
        "context": context,
        "layers": LAYERS,
        "ledger_bytes": ledger.bytes,
        "parts": ledger.parts,
        "bits_a_value": round(ledger.bits_per_value, 4),
        **{f"{name}_bytes": size for name, size in found.items()},
        "apart": round(found["allocated"] / ledger.bytes - 1, 5),
        "peak_bytes": prefill,
        "chunk_bytes": 4 * batch * common.KV_HEADS * chunk * common.HEAD_DIM,
        "workspace_bytes": ledger.workspace,
        "fp16_bytes": 2 * ledger.values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1x32768", "8x8192"])
    parser.add_argument("--ladders", nargs="+", default=list(common.LADDERS))
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--decoded", type=int, default=130)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--block-pages", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = common.parsed(parser)
    torch.manual_seed(0)
    sizes = {"page_size": options.page_size, "block_pages": options.block_pages}
    # What libraries keep for good (cuBLAS's workspace, loaded kernels) is there before anything is measured.
    for ladder in options.ladders:
        fill(ladder, 1, 2 * options.chunk, options.chunk, 1, **sizes)
    rows = []
    for shape in options.shapes:
        batch, context = (int(number) for number in shape.split("x"))
        for ladder in options.ladders:
            row = fill(ladder, batch, context, options.chunk, options.decoded, **sizes)
            rows.append(row)
            asked = row["requested_bytes"] / row["ledger_bytes"] - 1
            print(
                f"{batch} x {context} {ladder:9s} ledger {row['ledger_bytes'] / 1e6:8.2f} MB"
                f"  allocated {100 * row['apart']:+6.2f} %, asked for {100 * asked:+6.2f} %"
                f"  peak {row['peak_bytes'] / 1e6:8.2f} MB (a chunk {row['chunk_bytes'] / 1e6:.2f})"
                f"  FP16 {row['fp16_bytes'] / 1e6:.2f} MB",
                flush=True,
            )
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "as it comes")
    facts = {"allocator": allocator, "chunk": options.chunk, "decoded": options.decoded, **sizes}
    common.keep("memory", options.out, facts, rows)
    wrong = [f"{row['batch']} x {row['context']} {row['ladder']}" for row in rows if not abs(row["apart"]) <= ALLOWED]
    if wrong:
        raise SystemExit(f"the ledger and torch.cuda.memory_allocated are more than {ALLOWED:.0%} apart: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
