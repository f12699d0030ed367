"""What the benchmarks share: shapes, ladders, timing, the FP16 kernels to compare with, and how results are kept."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from argus.attention import Query
from argus.build import build
from argus.config import load_cache_config
from argus.engine import LayerCache
from argus.plan import Plan
from argus.tiers.base import ROLES
from argus.turns import age


class Shape(NamedTuple):
    """One attention layer."""

    query_heads: int
    kv_heads: int
    head_dim: int


LLAMA = Shape(32, 8, 128)
"""One attention layer of Llama-3-8B."""
QUERY_HEADS, KV_HEADS, HEAD_DIM = LLAMA
BOUND = 2e-3
"""Relative error beyond which no time is printed."""

PLUGINS = ("rotation3",) if find_spec("argus_rotation") else ()
"""Whole ladders of ``plugins/argus-rotation``, where it is installed."""
LADDERS = ("exact", "fp8", "int8", "int4", "int3", "int2", "sign", "jl", *PLUGINS, "default")
"""Whole ladders of ``conf/tiers``, and stages of ``tiers=default`` alone."""
ALONE = ("fp8", "sign", "jl")


def plan_of(ladder: str, backend: str = "triton", outliers: str = "none", head_dim: int = HEAD_DIM, **options: Any) -> Plan:
    """The plan of a ladder, with no anchors; `options` are those of ``tiers``."""
    chosen = ["tiers=default", f"tiers.order=[{ladder}]"] if ladder in ALONE else [f"tiers={ladder}"]
    chosen += ["anchors=none", f"outliers={outliers}", f"backend={backend}"]
    chosen += [f"tiers.{name}={value}" for name, value in options.items()]
    return build(load_cache_config(chosen), head_dim, torch.float16, "cuda")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a benchmark on a GPU; without one it ends in a line that says so."""
    options = parser.parse_args()
    if vars(options).get("device", "cuda") == "cuda" and not torch.cuda.is_available():
        parser.error("it measures a CUDA GPU, and none is here")
    return options


def filled(plan: Plan, batch: int, context: int, shape: Shape = LLAMA) -> LayerCache:
    """A layer that holds `context` random tokens, every channel of another size."""
    cache = LayerCache(plan)
    size = torch.rand(shape.kv_heads, 1, shape.head_dim, device="cuda") * 1.8 + 0.2
    whole = (batch, shape.kv_heads, context, shape.head_dim)
    keys, values = ((torch.randn(whole, device="cuda", dtype=torch.float16) * size).half() for _ in range(2))
    cache.write(keys, values)
    del keys, values
    age([cache])
    return cache


def query_of(batch: int, steps: int, length: int, shape: Shape = LLAMA) -> Query:
    """Random queries of the last `steps` tokens."""
    q = torch.randn(batch, shape.query_heads, steps, shape.head_dim, device="cuda")
    return Query.of(q, shape.kv_heads, shape.head_dim**-0.5, length - steps)


def reference(cache: LayerCache, query: Query) -> Tensor:
    """Attention in float64 over all that `cache` holds, block by block."""
    rows = query.rows.double()
    best = torch.full(rows.shape[:3], -math.inf, dtype=torch.float64, device=rows.device)
    total, out = torch.zeros_like(best), torch.zeros_like(rows)
    for keys, values in blocks(cache):
        scores = rows @ keys.double().transpose(-1, -2)
        new = torch.maximum(best, scores.amax(-1))
        keep, weights = torch.exp(best - new), torch.exp(scores - new.unsqueeze(-1))
        total = total * keep + weights.sum(-1)
        out = out * keep.unsqueeze(-1) + weights @ values.double()
        best = new
    return out / total.unsqueeze(-1)


def blocks(cache: LayerCache) -> Iterable[tuple[Tensor, Tensor]]:
    """Keys and values ``[B, H, T, D]`` of all that is held, as attention is to see them."""
    for segment in cache.segments():
        pages = [segment.exactly(role, segment.tier(role).decode(segment.payload(role), role)) for role in ROLES]
        yield tuple(x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in pages)  # type: ignore[misc]
    for part in cache.dense():
        yield part.numbers("keys"), part.numbers("values")


def error(got: Tensor, want: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((got.double() - want).norm() / want.norm())


def microseconds(call: Callable[[], object], budget: float = 0.06) -> float:
    """Median time of `call` on the GPU, replayed from a CUDA graph; before each replay the L2 cache is filled with other data.

    That data is only read: what a model reads before attention are weights. (A cache filled by writing would make the call
    pay for writing it back.) `budget` is in seconds, fillings not counted.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        call()
    other = torch.zeros(1 << 26, dtype=torch.int32, device="cuda")

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.amax()
        start.record()
        recorded.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    first = min(once() for _ in range(3))
    return statistics.median(once() for _ in range(max(11, min(500, int(1e6 * budget / first)))))


def eager_microseconds(call: Callable[[], object], budget: float = 0.1) -> float:
    """Mean time of `call` one after another, launched from Python."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < budget:
        call()
        calls += 1
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / calls


def waited_milliseconds(call: Callable[[], object], device: str) -> float:
    """Time of one call, the GPU waited for before and after."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return 1e3 * (time.perf_counter() - start)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a kernel that goes over large tensors once."""
    source = torch.zeros(1 << 29, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-6 * microseconds(lambda: torch.neg(source, out=target)))


def fp16_times(batch: int, context: int, steps: int = 1, shape: Shape = LLAMA) -> dict[str, float]:
    """Microseconds of PyTorch's attention kernels on an FP16 cache, each in the ways it can be called."""
    heads, kv_heads, dim = shape
    k, v = (torch.randn(batch, kv_heads, context, dim, device="cuda", dtype=torch.float16) for _ in range(2))
    q = torch.randn(batch, heads, steps, dim, device="cuda", dtype=torch.float16)
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = q.view(batch, kv_heads, -1, dim)
    calls = {"grouped": lambda: attend(grouped, k, v), "gqa": lambda: attend(q, k, v, enable_gqa=True)}
    times = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        for form, call in calls.items():
            try:
                with sdpa_kernel(backend):
                    times[f"{name}-{form}"] = microseconds(call)
            except RuntimeError as refusal:
                print(f"  {name}-{form}: {str(refusal).splitlines()[0]}")
    return times


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    commit = os.environ.get("COMMIT", "")
    if not commit:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip() if found.returncode == 0 else "not known"
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "commit": commit,
    }


def keep(name: str, folder: Path, facts: dict[str, Any], rows: list[dict[str, Any]], variant: str = "") -> None:
    """Write results of a benchmark, or of a variant of it, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    data = {"benchmark": name, "command": command, "machine": machine(), **facts, "rows": rows}
    (folder / f"{name}{variant}.json").write_text(json.dumps(data, indent=1) + "\n")
