"""One decode step of attention, for each ladder, beside the best FP16 kernel of the machine in the same run.

Run from the repository root: ``python -m benchmarks.decode_attention [--contexts 8192] [--batches 1 8] [--ladders int4]
[--outliers topk] [--heads 32 32 --head-dim 96]``. Results of other heads than Llama-3-8B's are kept apart, and have no picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import common


def measure(
    ladder: str, batch: int, context: int, fp16: float, bandwidth: float, shape: common.Shape = common.LLAMA, **options: Any
) -> dict[str, Any]:
    """One row; raises if the answer is wrong."""
    plan = common.plan_of(ladder, head_dim=shape.head_dim, **options)
    cache = common.filled(plan, batch, context, shape)
    query = common.query_of(batch, 1, context, shape)
    wrong = common.error(cache.attend(query), common.reference(cache, query))
    if not wrong <= common.BOUND:
        raise SystemExit(f"{ladder} {batch} x {context}: relative error {wrong:.2e} > {common.BOUND:g}; no time is told")
    read = sum(tensor.numel() * tensor.element_size() for _, tensor in cache.tensors())
    time = common.microseconds(lambda: cache.attend(query))
    floor = 1e6 * read / bandwidth
    return {
        "ladder": ladder,
        "batch": batch,
        "context": context,
        "error": wrong,
        "us": round(time, 2),
        "eager_us": round(common.eager_microseconds(lambda: cache.attend(query)), 2),
        "bytes": read,
        "bits_a_value": round(8 * read / cache.values, 4),
        "percent_of_floor": round(100 * floor / time, 1),
        "fp16_us": round(fp16, 2),
        "times_fp16": round(fp16 / time, 3),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios to FP16, one group of bars a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = sorted({(row["batch"], row["context"]) for row in rows})
    ladders = list(dict.fromkeys(row["ladder"] for row in rows))
    figure, axes = plt.subplots(figsize=(3 + 1.5 * len(shapes), 4), layout="constrained")
    width = 0.8 / len(ladders)
    colours = plt.get_cmap("tab20").colors
    for i, ladder in enumerate(ladders):
        found = {(row["batch"], row["context"]): row["times_fp16"] for row in rows if row["ladder"] == ladder}
        places, heights = [x + i * width for x in range(len(shapes))], [found.get(shape, 0) for shape in shapes]
        axes.bar(places, heights, width, label=ladder, color=colours[i % 20])
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(shapes))], [f"{b} x {c // 1024}k" for b, c in shapes])
    axes.set_ylabel("speed, best FP16 kernel = 1")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ladders", nargs="+", default=list(common.LADDERS))
    parser.add_argument("--heads", type=int, nargs=2, default=common.LLAMA[:2], help="query heads and key-value heads")
    parser.add_argument("--head-dim", type=int, default=common.HEAD_DIM)
    parser.add_argument("--outliers", default="none", help="the outlier policy: none, sigma, topk")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--block-pages", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = common.parsed(parser)
    torch.manual_seed(0)
    bandwidth = common.copy_bandwidth()
    query_heads, kv_heads = options.heads
    shape = common.Shape(query_heads, kv_heads, options.head_dim)
    paging = {"page_size": options.page_size, "block_pages": options.block_pages}
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s")
    rows, fp16 = [], {}
    for batch in options.batches:
        for context in options.contexts:
            times = common.fp16_times(batch, context, shape=shape)
            fp16[f"{batch}x{context}"] = times
            best = min(times.values())
            print(f"{batch} x {context}: FP16 {best:.1f} us " + " ".join(f"{k}={v:.1f}" for k, v in times.items()))
            for ladder in options.ladders:
                row = measure(ladder, batch, context, best, bandwidth, shape, outliers=options.outliers, **paging)
                rows.append(row)
                print(
                    f"  {ladder:8s} {row['us']:8.1f} us  {row['times_fp16']:5.2f} x FP16 {row['percent_of_floor']:5.1f} % floor"
                    f"  {row['bits_a_value']:6.3f} bits  eager {row['eager_us']:.0f} us  error {row['error']:.1e}",
                    flush=True,
                )
    facts = {"shape": shape, "copy_bandwidth": bandwidth, "fp16_us": fp16, "outliers": options.outliers, **paging}
    variant = "" if options.outliers == "none" else f"-{options.outliers}"
    if shape != common.LLAMA:
        variant += f"-{shape.query_heads}-{shape.kv_heads}-{shape.head_dim}"
    common.keep("decode_attention", options.out, facts, rows, variant)
    if shape == common.LLAMA:
        draw(rows, options.out / f"decode_attention{variant}.png")


if __name__ == "__main__":
    main()
