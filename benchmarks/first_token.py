"""A whole model's first token: one pass over a prompt with an empty cache, beside the same model with the FP16 cache.

A Llama of a few layers of Llama-3-8B's shape with random weights. The pass includes all that a cache does with the prompt: of
ARGUS, pages that leave the window are encoded, each for its stage. Run from the repository root:
``python -m benchmarks.first_token [--prompts 512 2048 8192 32768] [--ladders int4] [--layers 4]``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, DynamicCache

from argus.adapters.huggingface import ArgusCache
from benchmarks import common
from benchmarks.decode_model import ALIKE, difference, model_of, of_model, overrides

WARM = 2
"""Passes before those that count: kernels are compiled in the first."""


@torch.no_grad()
def first(model: Any, cache: Cache, ids: Tensor) -> Tensor:
    """Logits of the token after a prompt."""
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits


def milliseconds(model: Any, make: Callable[[], Cache], ids: Tensor, passes: int) -> float:
    """The median of so many passes over the prompt after the first ones, each with a new cache."""
    device = str(model.device.type)
    times = [common.waited_milliseconds(partial(first, model, make(), ids), device) for _ in range(WARM + passes)]
    return statistics.median(times[WARM:])


def row(model: Any, ladder: str, ids: Tensor, passes: int, fp16: float, want: Tensor, backend: str) -> dict[str, Any]:
    """One row; raises if its logits are not those of 16 bits, or what is held answers otherwise than ``backend=cpu``."""
    cache, oracle = (ArgusCache(model, overrides(ladder, one)) for one in (backend, "cpu"))
    got = first(model, cache, ids).double()
    different = float((got - want).norm() / want.norm())
    if not different <= ALIKE:
        raise SystemExit(f"{ladder} {ids.shape[1]}: logits differ by {different:.2e} > {ALIKE:g}; no time is told")
    first(model, oracle, ids)
    wrong = difference(cache, oracle, len(ids), common.QUERY_HEADS)
    if not wrong <= common.BOUND:
        raise SystemExit(f"{ladder} {ids.shape[1]}: relative error {wrong:.2e} > {common.BOUND:g}; no time is told")
    ledger = cache.ledger()
    taken = milliseconds(model, partial(ArgusCache, model, plan=cache.plan), ids, passes)
    return {
        "ladder": ladder,
        "prompt": ids.shape[1],
        "error": wrong,
        "logits_differ": different,
        "ms": round(taken, 3),
        "more_ms_a_layer": round((taken - fp16) / len(cache.layers), 3),
        "times_as_long": round(taken / fp16, 3),
        "times_fewer_bytes": round(2 * ledger.values / ledger.bytes, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--ladders", nargs="+", default=["exact", "int4", "quality", "default"])
    parser.add_argument("--passes", type=int, default=9)
    options = common.parsed(of_model(parser))
    torch.manual_seed(0)
    model = model_of(options.layers, options.device)
    rows: list[dict[str, Any]] = []
    tried = {}
    for prompt in options.prompts:
        ids = torch.randint(model.config.vocab_size, (1, prompt), device=options.device)
        want = first(model, DynamicCache(), ids).double()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            flash = milliseconds(model, DynamicCache, ids, options.passes)
        chosen = milliseconds(model, DynamicCache, ids, options.passes)
        fp16 = min(flash, chosen)
        tried[str(prompt)] = {"flash": round(flash, 3), "chosen": round(chosen, 3)}
        print(f"{prompt} tokens: FP16 {fp16:.2f} ms, {options.layers} layers", flush=True)
        for ladder in options.ladders:
            rows.append(row(model, ladder, ids, options.passes, fp16, want, options.backend))
            one = rows[-1]
            print(
                f"  {ladder:8s} {one['ms']:8.2f} ms  {one['times_as_long']:5.2f} times as long  "
                f"{one['more_ms_a_layer']:6.2f} ms more a layer  {one['times_fewer_bytes']:5.2f} x fewer bytes",
                flush=True,
            )
    facts = {"layers": options.layers, "passes": options.passes, "fp16": tried}
    common.keep("first_token", options.out, facts, rows)


if __name__ == "__main__":
    main()
