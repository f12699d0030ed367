"""A whole model's decode steps through the Hugging Face adapter, beside the same model with the FP16 cache of transformers.

A Llama of a few layers of Llama-3-8B's shape with random weights; its cache is filled with random keys and values, then it
decodes one token at a time, as ``model.generate`` does. ARGUS records its steps as CUDA graphs; FP16 is taken launched from
Python, with the attention kernel that PyTorch chooses and with Flash, and recorded too, over transformers' static cache, which
masks the room that it has left. With `--padding` so many tokens of the first row are padding, as in a batch of prompts of two
lengths; FP16 is then taken with what PyTorch chooses. A ladder may come with overrides, as ``default,tiers.slack=192``. Run
from the repository root: ``python -m benchmarks.decode_model [--shapes 1x32768 8x32768] [--ladders int4] [--padding 1000]``.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from argus.adapters.graphs import capture
from argus.adapters.huggingface import ArgusCache
from argus.attention import Query
from argus.turns import age
from benchmarks import common

WORDS = 1024
"""Tokens of the vocabulary: few, so that its products take no time that layers do not."""
FIRST, ALIKE = 4, 5e-3
"""Steps that are compared before they are timed, and how far their logits may be apart, in 16 bits."""
WARM = 64
"""Steps of FP16 before those that count. Of ARGUS, as many as there are between turns, so kernels of a turn are compiled."""
TURNS = 2
"""Turns of pages, at least, among the steps that count."""


def of_model(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """With the options of benchmarks of a whole model."""
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser


def model_of(layers: int, device: str) -> LlamaForCausalLM:
    """A model with random weights."""
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, rope_theta=500000.0,
        num_attention_heads=common.QUERY_HEADS, num_key_value_heads=common.KV_HEADS, max_position_embeddings=1 << 18,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def tokens(batch: int, context: int, layers: int, device: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Random keys and values of each layer, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    for layer in range(layers):
        shape = (batch, common.KV_HEADS, context, common.HEAD_DIM)
        pair = [torch.randn(shape, generator=generator, device=device, dtype=torch.float16) for _ in range(2)]
        yield layer, pair[0], pair[1]


def overrides(ladder: str, backend: str) -> list[str]:
    """Those of a ladder that may come with its own."""
    name, *more = ladder.split(",")
    return [f"tiers={name}", f"backend={backend}", *more]


def compressed(model: Any, ladder: str, batch: int, context: int, backend: str, *options: str) -> ArgusCache:
    """A filled cache of a ladder, with the anchors and outliers that its config names."""
    cache = ArgusCache(model, [*overrides(ladder, backend), *options])
    for layer, keys, values in tokens(batch, context, len(cache.layers), str(model.device)):
        cache.layers[layer].engine.write(keys, values)
        cache.layers[layer].is_initialized = True
        age([cache.layers[layer].engine])
    return cache


def plain(cache: Cache, batch: int, context: int, layers: int, device: str) -> Cache:
    """The same tokens as transformers keeps them."""
    for layer, keys, values in tokens(batch, context, layers, device):
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def next_step(model: Any, cache: Cache, ids: Tensor, context: int, padding: int, number: int) -> Tensor:
    """Logits of one more token after `context` and `number` of them, `padding` of which the first row does not see."""
    positions = torch.full_like(ids, context + number)
    given: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": True}
    if padding:
        given["attention_mask"] = torch.ones(len(ids), context + number + 1, dtype=torch.long, device=ids.device)
        given["attention_mask"][0, :padding] = 0
    logits: Tensor = model(**given, past_key_values=cache).logits
    return logits


class Steps(NamedTuple):
    """Milliseconds a step: the mean over whole turns of pages, all that moves and is recorded included; and the median."""

    mean: float
    median: float


def milliseconds(call: Callable[[int], object], device: str, steps: int, warm: int = WARM) -> Steps:
    """Times of so many steps after the first `warm`, the GPU waited for after each."""
    times = [common.waited_milliseconds(partial(call, number), device) for number in range(warm + steps)]
    kept = times[warm:]
    return Steps(statistics.fmean(kept), statistics.median(kept))


def fp16_times(model: Any, batch: int, context: int, padding: int, steps: int) -> dict[str, Steps]:
    """Milliseconds a step with the caches of transformers: launched from Python, and recorded where there is no padding."""
    device = str(model.device.type)
    layers = model.config.num_hidden_layers
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)
    times = {}
    flash = () if padding else (("flash", sdpa_kernel(SDPBackend.FLASH_ATTENTION)),)
    for name, kernel in (("chosen", nullcontext()), *flash):
        cache = plain(DynamicCache(), batch, context, layers, device)
        with kernel:
            times[name] = milliseconds(partial(next_step, model, cache, ids, context, padding), device, steps)
    if device == "cuda" and not padding:
        static = StaticCache(config=model.config, max_cache_len=context + 2 * (WARM + steps))
        step = partial(next_step, model, plain(static, batch, context, layers, device), ids, context, 0)
        step(0)
        graph, _ = capture(partial(step, 1))
        times["recorded"] = milliseconds(lambda _: graph.replay(), device, steps)
    return times


def difference(one: ArgusCache, other: ArgusCache, batch: int, heads: int) -> float:
    """The largest relative difference between what two caches answer to the same queries, over layers."""
    largest = 0.0
    for first, second in zip(one.layers, other.layers, strict=True):
        q = torch.randn(batch, heads, 1, common.HEAD_DIM, device=first.engine.window.parts()[0][0].device)
        query = Query.of(q, common.KV_HEADS, common.HEAD_DIM**-0.5, first.engine.length - 1)
        largest = max(largest, common.error(first.engine.attend(query), second.engine.attend(query).double()))
    return largest


def apart(model: Any, caches: tuple[ArgusCache, ArgusCache], ids: Tensor, context: int, padding: int) -> float:
    """The largest relative difference between logits of the same few steps, recorded and launched: also of a replayed one."""
    largest = 0.0
    for number in range(FIRST):
        one, other = (next_step(model, cache, ids, context, padding, number).double() for cache in caches)
        largest = max(largest, float((one - other).norm() / other.norm()))
    return largest


def row(
    model: Any, ladder: str, batch: int, context: int, padding: int, steps: int, fp16: Steps, backend: str
) -> dict[str, Any]:
    """One row; raises if attention differs from that with ``backend=cpu`` on the same device, or recorded steps from others."""
    device = str(model.device.type)
    ids = torch.ones(batch, 1, dtype=torch.long, device=device)
    cache = compressed(model, ladder, batch, context, backend)
    wrong = difference(cache, compressed(model, ladder, batch, context, "cpu"), batch, common.QUERY_HEADS)
    if not wrong <= common.BOUND:
        raise SystemExit(f"{ladder} {batch} x {context}: relative error {wrong:.2e} > {common.BOUND:g}; no time is told")
    ledger = cache.ledger()
    launched = compressed(model, ladder, batch, context, backend, "graphs=false")
    different = apart(model, (cache, launched), ids, context, padding)
    if not different <= ALIKE:
        raise SystemExit(f"{ladder} {batch} x {context}: recorded steps differ by {different:.2e} > {ALIKE:g}; no time is told")
    turn = cache.plan.leaving * cache.plan.page_size
    steps = -(-max(steps, TURNS * turn) // turn) * turn
    calls = [partial(next_step, model, one, ids, context + FIRST, padding) for one in (cache, launched)]
    taken, taken_launched = (milliseconds(call, device, steps, turn) for call in calls)
    return {
        "ladder": ladder,
        "batch": batch,
        "context": context,
        "steps": steps,
        "error": wrong,
        "recorded_differs": different,
        "ms": [round(time, 3) for time in taken],
        "launched_ms": [round(time, 3) for time in taken_launched],
        "fp16_ms": [round(time, 3) for time in fp16],
        "times_fp16": [round(other / own, 3) for own, other in zip(taken, fp16, strict=True)],
        "bytes": ledger.bytes,
        "times_fewer_bytes": round(2 * ledger.values / ledger.bytes, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1x8192", "1x32768", "1x131072", "8x8192", "8x32768"])
    parser.add_argument("--ladders", nargs="+", default=["exact", "int8", "int4", "int2", "quality", "default"])
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--padding", type=int, default=0)
    options = common.parsed(of_model(parser))
    torch.manual_seed(0)
    model = model_of(options.layers, options.device)
    rows: list[dict[str, Any]] = []
    tried: dict[str, dict[str, list[float]]] = {}
    for batch, context in (tuple(int(size) for size in shape.split("x")) for shape in options.shapes):
        every = fp16_times(model, batch, context, options.padding, options.steps)
        tried[f"{batch}x{context}"] = {name: [round(time.mean, 3), round(time.median, 3)] for name, time in every.items()}
        fp16 = min(every.values())
        told = ", ".join(f"{name} {time.mean:.2f} ms (median {time.median:.2f})" for name, time in every.items())
        print(f"{batch} x {context}: FP16 a step of {options.layers} layers: {told}")
        for ladder in options.ladders:
            gc.collect()
            rows.append(row(model, ladder, batch, context, options.padding, options.steps, fp16, options.backend))
            one = rows[-1]
            print(
                f"  {ladder:8s} {one['ms'][0]:8.2f} ms  {one['times_fp16'][0]:5.2f} x FP16 (median {one['times_fp16'][1]:5.2f})"
                f"  launched {one['launched_ms'][0]:8.2f} ms  {one['times_fewer_bytes']:5.2f} x fewer bytes",
                flush=True,
            )
    facts = {"layers": options.layers, "steps": options.steps, "padding": options.padding, "fp16": tried}
    common.keep("decode_model", options.out, facts, rows)


if __name__ == "__main__":
    main()
