"""Encoding pages into each stage, and each demotion of the default ladder, beside the floor of the bytes they move.

Run from the repository root: ``python -m benchmarks.encode [--pages 2048]``.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argus.backends.base import PREFIX, Affine, Backend, Payload, Projected
from argus.tiers.base import ROLES, Role, Tier
from benchmarks import common


def size_of(payload: Payload) -> int:
    """Bytes of a payload."""
    return sum(tensor.numel() * tensor.element_size() for tensor in payload.values())


def check(tier: Tier, oracle: Tier, x: Tensor, role: Role) -> float:
    """Largest relative difference of what a tier and the CPU oracle decode; raises if codes differ."""
    got = tier.decode(tier.encode(x[:4], role), role).cpu().double()
    want = oracle.decode(oracle.encode(x[:4].cpu(), role), role).double()
    wrong = common.error(got, want)
    if not wrong <= 1e-3:
        raise SystemExit(f"{type(tier).__name__} {role}: differs from the oracle by {wrong:.2e}; no time is told")
    return wrong


def check_demotion(backend: Backend, first: Tier, second: Tier, role: Role, held: Payload) -> None:
    """Raise unless pages of one stage are encoded for the next as if they were decoded between.

    Bit by bit, but for projected pages, whose sums of products may be taken in another order: of these, means are within one
    unit in the last place or 2^-20 of the largest number, at least 99.8 % of bytes of codes equal, and decoded coefficients
    within 1 % in norm.
    """
    some = {name: tensor[:64].clone() for name, tensor in held.items()}
    pages = first.decode(some, role)
    got, want = backend.recode(first, second, some, role), second.encode(pages, role)
    form = second.target(role)
    if isinstance(form, Projected):
        wrong = projected_difference(backend, form, got, want, float(pages.abs().amax()))
    else:
        wrong = next((name for name in want if not torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8))), "")
    if wrong:
        steps = f"{type(first).__name__} to {type(second).__name__} {role}"
        raise SystemExit(f"{steps}: {wrong} differs from decoding and encoding; no time is told")


def projected_difference(backend: Backend, form: Projected, got: Payload, want: Payload, largest: float) -> str:
    """What of two payloads of projected pages is not as near as sums in another order are; empty: nothing."""
    means = [one["mean"].double() for one in (got, want)]
    if bool(((means[0] - means[1]).abs() > 2**-10 * means[1].abs() + 2**-20 * largest).any()):
        return "mean"
    codes = PREFIX + "codes"
    if float((got[codes].view(torch.uint8) == want[codes].view(torch.uint8)).float().mean()) < 0.998:
        return codes
    if isinstance(form.inner, Affine):
        kept = [{name.removeprefix(PREFIX): x for name, x in one.items() if name != "mean"} for one in (got, want)]
        a, b = (backend.dequantize(one, form.inner) for one in kept)
        if not float((a - b).norm()) <= 1e-2 * float(b.norm()):
            return "what coefficients stand for"
    return ""


def row(name: str, role: str, time: float, moved: int, bandwidth: float, **more: Any) -> dict[str, Any]:
    """One row of results, also printed."""
    percent = round(100 * 1e6 * moved / bandwidth / time, 1)
    print(f"  {name:16s} {role:7s} {time:9.1f} us  {percent:5.1f} % of floor", flush=True)
    return {"what": name, "role": role, "us": round(time, 2), "bytes": moved, "percent_of_floor": percent, **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = common.parsed(parser)
    torch.manual_seed(0)
    bandwidth = common.copy_bandwidth()
    ladders = [name for name in common.LADDERS if name != "default"]
    x = torch.randn(options.pages, 1, common.KV_HEADS, 64, common.HEAD_DIM, device="cuda")
    x *= torch.rand(common.HEAD_DIM, device="cuda") + 0.2
    rows = []
    for ladder in ladders:
        stage, oracle = common.plan_of(ladder).stages[0], common.plan_of(ladder, backend="cpu").stages[0]
        for role in ROLES:
            tier = stage.tier(role)
            wrong = check(tier, oracle.tier(role), x, role)
            moved = x.numel() * x.element_size() + size_of(tier.encode(x, role))
            time = common.microseconds(partial(tier.encode, x, role))
            rows.append(row(f"to {ladder}", role, time, moved, bandwidth, error=wrong))
    plan = common.plan_of("default")
    for first, second in pairwise(plan.stages):
        for role in ROLES:
            held = first.tier(role).encode(x, role)
            check_demotion(plan.backend, first.tier(role), second.tier(role), role, held)
            moved = size_of(held) + size_of(second.tier(role).encode(x, role))
            name = f"{first.facts.name} to {second.facts.name}"
            time = common.microseconds(partial(plan.backend.recode, first.tier(role), second.tier(role), held, role))
            rows.append(row(name, role, time, moved, bandwidth))
    common.keep("encode", options.out, {"copy_bandwidth": bandwidth, "pages": options.pages}, rows)


if __name__ == "__main__":
    main()
