"""A chunk of queries against a cache that already holds compressed pages: time, and peak memory over what is kept.

Run from the repository root: ``python -m benchmarks.prefill [--contexts 32768] [--chunks 512]``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import common


def measure(ladder: str, context: int, chunk: int, block_pages: int) -> dict[str, Any]:
    """One row; raises if the answer is wrong."""
    cache = common.filled(common.plan_of(ladder, block_pages=block_pages), 1, context)
    keys, values = (
        torch.randn(1, common.KV_HEADS, chunk, common.HEAD_DIM, device="cuda", dtype=torch.float16) for _ in range(2)
    )
    cache.write(keys, values)
    query = common.query_of(1, chunk, cache.length)
    probe = query.part(chunk - 1, chunk)
    want = common.reference(cache, probe)
    got = cache.attend(query).unflatten(2, (query.groups, chunk))[:, :, :, -1]
    wrong = common.error(got, want)
    if not wrong <= common.BOUND:
        raise SystemExit(f"{ladder} {context}: relative error {wrong:.2e} is beyond {common.BOUND:g}; no time is told")
    del want, got
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cache.attend(query)
    peak = torch.cuda.max_memory_allocated() - kept
    time = common.microseconds(lambda: cache.attend(query))
    eager = common.eager_microseconds(lambda: cache.attend(query))
    return {
        "ladder": ladder,
        "context": context,
        "chunk": chunk,
        "error": wrong,
        "us": round(time, 1),
        "eager_us": round(eager, 1),
        "cache_bytes": sum(tensor.numel() * tensor.element_size() for _, tensor in cache.tensors()),
        "chunk_bytes": 2 * keys.numel() * keys.element_size(),
        "workspace_bytes": peak,
        "counted_bytes": cache.plan.backend.workspace,
    }


def fp16(context: int, chunk: int) -> float:
    """Microseconds of the best FP16 kernel for the same chunk, its causal corner left out."""
    k, v = (torch.randn(1, common.KV_HEADS, context, common.HEAD_DIM, device="cuda", dtype=torch.float16) for _ in range(2))
    q = torch.randn(1, common.QUERY_HEADS, chunk, common.HEAD_DIM, device="cuda", dtype=torch.float16)
    attend = torch.nn.functional.scaled_dot_product_attention
    return common.microseconds(lambda: attend(q, k, v, enable_gqa=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--ladders", nargs="+", default=["exact", "int4", "int2", "default"])
    parser.add_argument("--block-pages", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for context in options.contexts:
        for chunk in options.chunks:
            best = fp16(context, chunk)
            print(f"{chunk} queries x {context}: FP16 {best:.0f} us")
            for ladder in options.ladders:
                row = measure(ladder, context, chunk, options.block_pages) | {"fp16_us": round(best, 1)}
                rows.append(row)
                print(
                    f"  {ladder:8s} {row['us']:9.0f} us, eager {row['eager_us']:.0f} us"
                    f"  workspace {row['workspace_bytes'] / 1e6:.0f} MB, counted {row['counted_bytes'] / 1e6:.0f} MB"
                    f"  cache {row['cache_bytes'] / 1e6:.0f} MB  error {row['error']:.1e}",
                    flush=True,
                )
    common.keep("prefill", options.out, {"block_pages": options.block_pages}, rows)


if __name__ == "__main__":
    main()
