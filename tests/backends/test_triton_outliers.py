"""Pages with outliers, read in place: exact numbers beside codes, against the same numbers written into decoded pages."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.backends.decoding import (  # isort: skip  Triton is told to interpret before it is imported.
    BOUND,
    DEVICE,
    FORMS,
    Case,
    Kept,
    KeptProjection,
    assembly as assembly,
    poison as poison,
    spiked,
)

from argus.attention import Query
from argus.backends.base import Affine, Plain, Segment
from argus.backends.cpu import CpuBackend
from argus.backends.triton import launch
from argus.backends.triton.backend import TritonBackend
from argus.build import build
from argus.config import load_cache_config
from argus.engine import LayerCache
from argus.turns import age


def check(case: Case, query: Query | None = None, bound: float = BOUND) -> None:
    """Attention is right, is another than without outliers, and decodes no page."""
    query = query or case.query
    want = case.expected(query)
    pages = case.backend.tables.of(case.segments)
    assert pages.runs
    assert not pages.others
    with pytest.MonkeyPatch.context() as patch:
        for tier in (case.segments[0].key_tier, case.segments[0].value_tier):
            patch.setattr(tier, "decode", lambda *_: pytest.fail("a page is decoded"))
        found = case.backend.attend(query, case.segments, case.dense).double()
    assert torch.isfinite(found).all()
    assert float((found - want).norm() / want.norm()) <= bound
    without = copy(case)
    without.segments = [replace(segment, outliers={}) for segment in case.segments]
    plain = without.expected(query)
    assert float((plain - want).norm() / want.norm()) > 0.05


def spiky(key: str, value: str, share: float = 0.02, roles: tuple[str, ...] = ("keys", "values"), **options: Any) -> Case:
    case = Case(FORMS[key], FORMS[value], **{"counts": (1, 1)} | options)
    case.segments = spiked(case.segments, share, roles)
    return case


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plain", "plain"),
        ("fp8", "fp8-token"),
        ("int8", "int8-token"),
        ("int4", "int4-token"),
        ("int4-token", "int4"),
        ("int4-group", "int4-token-group"),
        ("int3", "int3-token"),
        ("int2", "int2-token"),
        ("sign", "sign-token"),
        ("int7-token", "plain"),
    ],
)
def test_forms(key: str, value: str) -> None:
    check(spiky(key, value, exact=True, seed=len(key)))


@pytest.mark.parametrize(
    ("dim", "page", "groups", "steps"),
    [(80, 24, 2, 1), (80, 64, 4, 1), (96, 64, 3, 3), (128, 128, 4, 4), (256, 64, 1, 1)],
)
def test_shapes(dim: int, page: int, groups: int, steps: int) -> None:
    check(spiky("int4", "int2-token", dim=dim, page=page, groups=groups, steps=steps, batch=1, heads=1, counts=(1, 1)))


@pytest.mark.parametrize("roles", [("keys",), ("values",)])
def test_one_role(roles: tuple[str, ...]) -> None:
    check(spiky("int4", "int4-token", roles=roles))


@pytest.mark.parametrize("share", [0.0001, 0.6])
def test_few_and_many(share: float) -> None:
    """Some rows with none, and rows with more than are taken at once."""
    case = spiky("int2", "int2-token", share, counts=(2,), batch=1, heads=1 if share > 0.5 else 2)
    counts = case.segments[0].outliers["keys"].counts
    assert bool((counts == 0).any()) == (share < 0.01)
    assert bool((counts > 2000).any()) == (share > 0.5)
    if share > 0.5:
        check(case)
    else:
        case.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_exact_dtypes(dtype: torch.dtype) -> None:
    check(spiky("plain", "plain", dtype=dtype), bound=1e-5 if dtype == torch.float32 else BOUND)


@pytest.mark.parametrize("kind", ["boolean", "additive", "causal", "softcap"])
def test_masks_and_caps(kind: str) -> None:
    case = spiky("int4", "int2-token", steps=2, exact=True, counts=(2, 1))
    q, mask = case.query, torch.rand(2, 1, 2, case.length, generator=case.generator).to(DEVICE)
    mask = mask > 0.3 if kind == "boolean" else mask * 4 if kind == "additive" else None
    check(case, Query(q.rows, 200 if kind == "causal" else q.start, 2, mask, 5.0 if kind == "softcap" else None))


def test_pages_that_are_forgotten() -> None:
    case = Case(FORMS["int4"], FORMS["int4-token"], counts=(2, 1), batch=1)
    case.segments = spiked(case.segments, first=2)
    assert case.segments[0].outliers["keys"].first == 2
    check(case)


@pytest.mark.parametrize(("inner", "ratio"), [("int4-token", 4), ("int4-token", 16), ("plain", 2), ("fp8-token", 4)])
def test_projected_pages(inner: str, ratio: int) -> None:
    case = Case(Plain(), Plain())
    tiers = [KeptProjection(case.backend, FORMS[inner], ratio == 16, ratio) for _ in range(2)]
    keys, values = (tier.encode(case.random(3, 2, 2, 64, 64)) for tier in tiers)
    positions = torch.arange(3, device=DEVICE) * 64
    case.segments = spiked([Segment(*tiers, keys, values, positions, 3 * 64 - 1, 64)])
    check(case)


def test_one_stage_is_one_run() -> None:
    case = Case(Affine(4, "channel"), Affine(4, "token"), counts=(2, 3))
    case.segments = spiked(case.segments)
    [job] = launch.plan(case.query, TritonBackend().tables.of(case.segments).runs)
    assert job.share == "codes"
    assert job.part.pages == 5


@pytest.mark.parametrize(("dim", "page"), [(64, 64), (128, 128)])
def test_stages_with_few_pages(dim: int, page: int) -> None:
    """Codes of any width in one table, read by one share."""
    case = Case(Plain(), Plain(), dim=dim, page=page, counts=(3,), batch=1, heads=1)
    case.segments = []
    for place, (key, value) in enumerate((("int8", "int8-token"), ("int4", "int2-token"), ("sign", "sign-token"))):
        tiers = [Kept(case.backend, FORMS[form]) for form in (key, value)]
        keys, values = (tier.encode(case.random(1, 1, 1, page, dim)) for tier in tiers)
        first = torch.tensor([place * page], device=DEVICE)
        case.segments.append(Segment(*tiers, keys, values, first, (place + 1) * page - 1, page))
    outliers = spiked(case.segments)[0].outliers
    case.segments = [replace(segment, outliers=outliers) for segment in case.segments]
    [job] = launch.plan(case.query, case.backend.tables.of(case.segments).runs)
    assert job.share == "few"
    check(case)


def test_a_whole_ladder() -> None:
    """All stages, anchors and outliers of a layer's cache, by one launch, against the CPU backend on the same pages."""
    chosen = load_cache_config(["tiers=default", "backend=triton", "outliers=topk", "tiers.block_pages=5"])
    layer = LayerCache(build(chosen, 64, torch.float16, DEVICE))
    generator = torch.Generator().manual_seed(1)
    layer.write(*torch.randn(2, 1, 1, 1100, 64, generator=generator).half().to(DEVICE))
    age([layer])
    query = Query.of(torch.randn(1, 2, 1, 64, generator=generator).half().to(DEVICE), 1, 0.125, layer.length)
    assert len(set(layer.where)) == 7
    jobs = launch.plan(query, layer.plan.backend.tables.of(layer.segments()).runs)
    assert {job.share for job in jobs} == {"few", "pages", "projected"}
    found, want = layer.attend(query), CpuBackend().attend(query, layer.segments(), layer.dense())
    assert float((found - want).norm() / want.norm()) <= BOUND
