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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--ladders", nargs="+", default=["exact", "int4", "int2", "default"])
    parser.add_argument("--block-pages", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = common.parsed(parser)
    torch.manual_seed(0)
    rows, fp16 = [], {}
    for context in options.contexts:
        for chunk in options.chunks:
            # Of all they see FP16 kernels are given the cache alone, without the chunk's own triangle.
            times = common.fp16_times(1, context, chunk)
            fp16[f"{chunk}x{context}"] = times
            best = min(times.values())
            print(f"{chunk} queries x {context}: FP16 {best:.0f} us " + " ".join(f"{k}={v:.0f}" for k, v in times.items()))
            for ladder in options.ladders:
                row = measure(ladder, context, chunk, options.block_pages)
                row |= {"fp16_us": round(best, 1), "times_fp16": round(best / row["us"], 3)}
                rows.append(row)
                print(
                    f"  {ladder:8s} {row['us']:9.0f} us, {row['times_fp16']:.2f} x FP16, eager {row['eager_us']:.0f} us"
                    f"  workspace {row['workspace_bytes'] / 1e6:.0f} MB, counted {row['counted_bytes'] / 1e6:.0f} MB"
                    f"  cache {row['cache_bytes'] / 1e6:.0f} MB  error {row['error']:.1e}",
                    flush=True,
                )
    common.keep("prefill", options.out, {"fp16_us": fp16, "block_pages": options.block_pages}, rows)


if __name__ == "__main__":
    main()
