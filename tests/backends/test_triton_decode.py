"""Decode attention of the Triton backend against the CPU backend in float64."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

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
from argus.backends.base import Affine, Dense, Float8, Plain, Segment
from argus.backends.cpu import CpuBackend
from argus.backends.triton import launch, tuning
from argus.build import build
from argus.engine import LayerCache
from argus.exact import to_eight
from argus.turns import age
from tests.conftest import config

PAIRS = [
    ("plain", "plain"),
    ("fp8", "fp8-token"),
    ("fp8", "int2-token"),
    ("int8", "int8-token"),
    ("int4", "int4-token"),
    ("int4", "int2-token"),
    ("int4-group", "int4-token-group"),
    ("int4-token", "int4"),
    ("int3", "int3-token"),
    ("int2", "int2-token"),
    ("sign", "sign-token"),
    ("int7", "int7-token"),
    ("plain", "int3-token"),
    ("int2", "plain"),
    ("fp8", "fp8"),
    ("fp8-token", "fp8-token"),
]


@pytest.mark.parametrize(("key", "value"), PAIRS)
def test_forms(key: str, value: str) -> None:
    case = Case(FORMS[key], FORMS[value], exact=True, seed=len(key))
    case.check()


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("registers", [None, 112])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_choices_of_tuning(monkeypatch: pytest.MonkeyPatch, bits: int, registers: int | None, prefetch: bool) -> None:
    monkeypatch.setattr(tuning, "prefetch", lambda *_: prefetch)
    monkeypatch.setattr(tuning, "registers", lambda *_: registers)
    monkeypatch.setattr(tuning, "resident", lambda *_: 3)
    Case(Affine(bits, "channel"), Affine(bits, "token"), counts=(3,), batch=1, heads=1, exact=False).check()


@pytest.mark.parametrize(("dim", "bits"), [(48, 4), (80, 1), (80, 3), (80, 4), (96, 3), (128, 3), (256, 3), (256, 4)])
def test_head_dims(dim: int, bits: int) -> None:
    case = Case(Affine(bits, "channel"), Affine(bits, "token"), dim=dim, counts=(2,), batch=1, groups=4, seed=dim)
    [run] = case.backend.tables.of(case.segments).runs
    assert launch.job_of(case.query, run).share == "codes"
    case.check()


@pytest.mark.parametrize(
    ("page", "key", "value"), [(24, "int4", "int4-token"), (128, "int2", "int2-token"), (16, "plain", "int8")]
)
def test_page_sizes(page: int, key: str, value: str) -> None:
    Case(FORMS[key], FORMS[value], page=page, exact=True, seed=page).check()


@pytest.mark.parametrize(("heads", "groups", "steps"), [(2, 1, 1), (2, 3, 2), (2, 4, 1), (2, 4, 8), (2, 7, 1), (1, 8, 8)])
def test_groups_and_steps(heads: int, groups: int, steps: int) -> None:
    sizes = {"batch": 1, "heads": heads, "groups": groups, "steps": steps}
    Case(FORMS["int4"], FORMS["int2-token"], counts=(2,), **sizes, seed=groups).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_dtypes(dtype: torch.dtype) -> None:
    case = Case(Plain(), Plain(), dtype=dtype, exact=True)
    case.check(bound=1e-5 if dtype == torch.float32 else BOUND)


@pytest.mark.parametrize(
    ("dim", "dtype", "pages"),
    [(32, torch.float16, 1), (48, torch.bfloat16, 1), (80, torch.float16, 9), (96, torch.float16, 1), (112, torch.float16, 1)],
)
def test_tokens_of_16_bits_of_other_head_dims(dim: int, dtype: torch.dtype, pages: int) -> None:
    case = Case(Plain(), Plain(), dim=dim, dtype=dtype, exact=True, groups=3, counts=(pages,), batch=1, seed=dim)
    [run] = case.backend.tables.of(case.segments).runs
    assert [launch.job_of(case.query, part).share for part in (run, *case.dense)] == ["pages", "dense", "dense"]
    case.check()


@pytest.mark.parametrize(
    ("key", "value", "dim", "pages"),
    [
        (Float8("channel", None), Float8("token", None), 48, 1),
        (Float8("channel", 32), Float8("channel", 32), 80, 9),
        (Float8("token", 8), Float8("token", 16), 80, 1),
        (Float8("token", None), Float8("channel", 16), 96, 1),
        (Float8("channel", 16), Float8("token", 8), 112, 1),
    ],
)
def test_float8_codes_of_other_head_dims(key: Float8, value: Float8, dim: int, pages: int) -> None:
    case = Case(key, value, dim=dim, groups=3, counts=(pages,), batch=1, heads=1, seed=dim)
    [run] = case.backend.tables.of(case.segments).runs
    assert launch.job_of(case.query, run).share == "pages"
    case.check()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["padding", "per-head", "additive", "additive-min"])
def test_masks(kind: str, steps: int) -> None:
    case = Case(FORMS["int4"], FORMS["int4-token"], exact=True, steps=steps, seed=3)
    batch, heads = 2, case.heads * case.groups
    causal = torch.ones(batch, heads if kind == "per-head" else 1, steps, case.length, dtype=torch.bool)
    causal = causal.tril(case.length - steps)
    causal[0, :, :, :77] = False
    causal[1, :, :, :70] = False
    if kind == "per-head":
        causal[:, 1, :, 100:140] = False
    mask = causal.to(DEVICE)
    if kind.startswith("additive"):
        dtype = torch.float16 if kind == "additive-min" else torch.float32
        noise = torch.randn(mask.shape, generator=case.generator).to(DEVICE, dtype)
        lowest = torch.finfo(dtype).min if kind == "additive-min" else float("-inf")
        mask = noise.masked_fill(~mask, lowest)
    q = case.query
    case.check(Query(q.rows, q.start, q.length, mask))


@pytest.mark.parametrize(("dim", "steps"), [(64, 1), (72, 1), (80, 1), (96, 1), (128, 3)])
def test_anchors_in_eight_bits(dim: int, steps: int) -> None:
    case = Case(Affine(4, "channel"), Affine(4, "token"), dim=dim, counts=(1,), exact=True, steps=steps)
    part = case.dense.pop()
    (keys, key_scale), (values, value_scale) = (to_eight(x.float() * 3) for x in (part.keys, part.values))
    coded = Dense(keys, values, 0, part.last, part.positions, True, (key_scale, value_scale))
    case.dense.append(coded)
    [taken] = launch.apart(case.query, coded)
    assert launch.job_of(case.query, taken).share == ("dense" if dim % 16 == 0 else "any")
    case.check()


@pytest.mark.parametrize(
    ("held", "dim", "dtype"),
    [
        *((held, 64, torch.float16) for held in (1, 15, 16, 17, 33)),
        *((held, 80, torch.float16) for held in (1, 17)),
        *((held, 128, torch.bfloat16) for held in (16, 33)),
    ],
)
def test_tokens_that_are_counted_on_the_device(held: int, dim: int, dtype: torch.dtype) -> None:
    """A window with room: what lies beyond the tokens counted is not read, whatever it is."""
    case = Case(Affine(4, "channel"), Affine(4, "token"), dim=dim, window=held - 1, dtype=dtype, counts=(1,), batch=1)
    part = case.dense[0]
    wide = [torch.nn.functional.pad(x, (0, 0, 0, 50 - held), value=float("nan")) for x in (part.keys, part.values)]
    count = torch.tensor([held, part.start], dtype=torch.int32, device=DEVICE)
    counted = replace(part, keys=wide[0], values=wide[1], count=count)
    want = case.backend.attend(case.query, case.segments, [part])
    got = case.backend.attend(case.query, case.segments, [counted])
    oracle = CpuBackend().attend(case.query, case.segments, [counted])
    for other in (want, oracle, case.expected(case.query)):
        assert float((got - other).norm() / other.norm()) <= BOUND


@pytest.mark.parametrize(
    ("dim", "dtype", "known"),
    [(64, torch.float16, True), (80, torch.float16, True), (72, torch.float16, False), (64, torch.float32, False)],
)
def test_what_can_be_recorded(dim: int, dtype: torch.dtype, known: bool) -> None:
    """Steps of tokens that tensor cores take, over pages that a kernel reads, on a GPU."""
    case = Case(FORMS["int4"], FORMS["int4-token"], dim=dim)
    keys = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(2, 2, 9, dim))
    window = SimpleNamespace(keys=keys, values=keys, scales=None)
    assert case.backend.recordable(case.segments, window) == known
    keys.is_cuda = False
    assert not case.backend.recordable(case.segments, window)
    keys.is_cuda = True
    other = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(2, 2, 9, dim + 16))
    assert not case.backend.recordable(case.segments, SimpleNamespace(keys=keys, values=other, scales=None))
    case.segments = spiked(case.segments)
    assert case.backend.recordable(case.segments, window) == known
    case.segments[0] = replace(case.segments[0], key_tier=SimpleNamespace(form=lambda role: None))
    assert not case.backend.recordable(case.segments, window)


def test_a_row_that_sees_nothing_is_zero() -> None:
    case = Case(FORMS["int4"], FORMS["int4-token"], counts=(2,))
    mask = torch.zeros(2, 1, 1, case.length, dtype=torch.bool, device=DEVICE)
    mask[1] = True
    q = case.query
    query = Query(q.rows, q.start, q.length, mask)
    case.check(query)
    assert not case.backend.attend(query, case.segments, case.dense)[0].any()


def test_softcap_and_sinks() -> None:
    case = Case(FORMS["int4"], FORMS["int4-token"], exact=True, groups=3)
    q = case.query
    sinks = torch.randn(case.heads * case.groups, generator=case.generator).to(DEVICE)
    case.check(Query(q.rows * 4, q.start, q.length, None, 5.0), sinks)
    case.check(sinks=sinks)
    case.check(Query(q.rows * 4, q.start, q.length, None, 5.0))


def test_the_merge_in_several_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "resident", lambda *_: 8)
    monkeypatch.setattr(tuning, "merging", lambda *_: (16, 2, 4))
    case = Case(FORMS["int2"], FORMS["int2-token"], batch=1, heads=1)
    assert sum(job.splits for job in launch.plan(case.query, case.backend.tables.of(case.segments).runs)) > 2
    case.check(sinks=case.random(case.groups))


def test_pages_after_the_query_are_hidden() -> None:
    case = Case(FORMS["int4"], FORMS["int4-token"], steps=2)
    case.check(Query(case.query.rows, 100, 2))


def test_large_scores_stay_exact() -> None:
    case = Case(FORMS["int4"], FORMS["int4-token"], groups=4, seed=5)
    q = case.query
    case.check(Query(q.rows * 8, q.start, q.length))


def test_what_no_kernel_reads_is_decoded() -> None:
    case = Case(FORMS["int4"], FORMS["int2-token"], counts=(1, 1), exact=True)
    unknown = SimpleNamespace(form=lambda role: None, decode=case.tiers[0].decode)
    segment = case.segments[1]
    case.segments[1] = Segment(
        unknown, segment.value_tier, segment.keys, segment.values, segment.positions, segment.last, 64, segment.exact
    )
    case.check()
    long = Case(FORMS["int4"], FORMS["int2-token"], steps=9)
    long.check()


def check_layer(tier: str, options: dict[str, object], dims: tuple[int, int], steps: int) -> None:
    """A layer of one stage, keys and values of these head_dims, against the CPU backend on the same pages."""
    chosen = config((tier,), options={tier: options}, page_size=16, dtype="float16", anchors={"sinks": {}})
    layer = LayerCache(build(chosen.model_copy(update={"backend": "triton"}), dims[0], torch.float16, DEVICE))
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, 2, 70, dim, generator=generator).half().to(DEVICE) for dim in dims)
    layer.write(keys, values)
    age([layer])
    query = Query.of(torch.randn(1, 4, steps, dims[0], generator=generator).to(DEVICE), 2, 0.2, 70 - steps)
    found = layer.attend(query)
    want = CpuBackend().attend(query, layer.segments(), layer.dense())
    assert found.shape == want.shape
    assert float((found - want).norm() / want.norm()) <= BOUND


@pytest.mark.parametrize("tier", ["fp16", "int4"])
@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("dims", [(32, 16), (16, 32)])
def test_values_of_another_head_dim(dims: tuple[int, int], steps: int, tier: str) -> None:
    check_layer(tier, {}, dims, steps)


@pytest.mark.parametrize("steps", [1, 12])
def test_an_archive_of_an_archive(steps: int) -> None:
    check_layer("jl", {"ratio": 2, "coefficients": {"tier": "jl", "ratio": 4}}, (32, 32), steps)


def test_compiling_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(Plain(), Plain(), counts=(1,), batch=1, heads=1)
    with caplog.at_level(logging.INFO, "argus"):
        case.check()
        case.check()
    assert [record.message for record in caplog.records if "compiled" in record.message] == [
        "kernels for attention over 2 kinds of parts are compiled, unless Triton has kept them"
    ]


def test_tables_follow_the_pages() -> None:
    case = Case(FORMS["int4"], FORMS["int4-token"], batch=1, heads=1)
    case.check()
    held = case.backend.tables
    assert case.backend.tables.of(case.segments) is held.of(case.segments)
    shorter = case.segments[:1]
    assert held.of(shorter).runs[0].pages == 2
    del shorter
    case.segments.clear()
    assert not held.tensors()


@pytest.mark.parametrize(
    ("key", "value", "ratio", "dim", "masked"),
    [
        ("int4-token", "int4-token", 4, 64, False),
        ("int4-token", "int4-token", 4, 64, True),
        ("int4-token", "int4-token", 4, 128, False),
        ("int4-token", "int4-token", 8, 128, True),
        ("int4-token", "int4-token", 16, 64, False),
        ("plain", "int2-token", 2, 64, True),
        ("int4-token", "int4-token", 4, 96, True),
        ("int4-token", "int4-token", 8, 80, False),
        ("int4-token", "int4-token", 4, 48, False),
        ("int4-token", "int4-token", 16, 112, True),
        ("int4-token", "int3-token", 32, 80, False),
    ],
)
def test_projected_pages(key: str, value: str, ratio: int, dim: int, masked: bool) -> None:
    case = Case(Plain(), Plain(), dim=dim)
    tiers = [KeptProjection(case.backend, FORMS[form], ratio != 8, ratio) for form in (key, value)]
    case.segments = []
    for first, count in ((0, 2), (2, 1)):
        keys, values = (tier.encode(case.random(count, 2, 2, 64, dim)) for tier in tiers)
        positions = (torch.arange(count) + first).to(DEVICE) * 64
        marks = case.random(count, 2, 2, 64) > 1.0 if masked else None
        case.segments.append(Segment(*tiers, keys, values, positions, (first + count) * 64 - 1, 64, marks))
    [run] = case.backend.tables.of(case.segments).runs
    assert launch.job_of(case.query, run).share == ("projected" if ratio in (4, 8, 16) else "any")
    mask = None
    if masked:
        mask = torch.rand(2, 1, 1, case.length, generator=case.generator).to(DEVICE) > 0.2
    case.check(Query(case.query.rows * 3, case.query.start, 1, mask))


@pytest.mark.parametrize(
    ("dim", "page", "capped", "kind"),
    [
        *((64, 64, True, kind) for kind in ("plain", "marks", "mask", "additive")),
        *((128, 64, False, kind) for kind in ("marks", "additive")),
        *((64, 128, False, kind) for kind in ("plain", "mask")),
    ],
)
def test_stages_with_few_pages(dim: int, page: int, capped: bool, kind: str) -> None:
    """Codes of any width in one table, read by one kernel."""
    case = Case(Plain(), Plain(), dim=dim, page=page, counts=(4,), steps=2)
    widths = [("int8", "int8-token"), ("int4", "int2-token"), ("int2", "int8-token"), ("sign", "sign-token")]
    case.segments = []
    for place, (key, value) in enumerate(widths):
        tiers = [Kept(case.backend, FORMS[form]) for form in (key, value)]
        x = [case.random(1, 2, 2, page, dim) * (0.3 + 2 * case.random(dim).abs()) for _ in tiers]
        keys, values = (tier.encode(one) for tier, one in zip(tiers, x, strict=True))
        marks = case.random(1, 2, 2, page) > 1.0 if kind == "marks" else None
        position = torch.tensor([place * page], device=DEVICE)
        case.segments.append(Segment(*tiers, keys, values, position, (place + 1) * page - 1, page, marks))
    [joint] = case.backend.tables.of(case.segments).runs
    assert [run.pages for run in joint.members] == [1, 1, 1, 1]
    mask = None
    if kind in ("mask", "additive"):
        mask = torch.rand(2, 1, 2, case.length, generator=case.generator).to(DEVICE) > 0.3
        if kind == "additive":
            mask = torch.where(mask, 0.5, torch.finfo(torch.float16).min).half()
    case.check(Query(case.query.rows, case.query.start, 2, mask, 3.0 if capped else None))


def test_stages_with_few_pages_after_the_query_are_hidden() -> None:
    case = Case(Plain(), Plain(), counts=(2,), steps=2)
    case.segments = []
    for place, (key, value) in enumerate([("int8", "int8-token"), ("int4", "int4-token")]):
        tiers = [Kept(case.backend, FORMS[form]) for form in (key, value)]
        keys, values = (tier.encode(case.random(1, 2, 2, 64, 64)) for tier in tiers)
        position = torch.tensor([place * 64], device=DEVICE)
        case.segments.append(Segment(*tiers, keys, values, position, (place + 1) * 64 - 1, 64, None))
    case.check(Query(case.query.rows, 90, 2))
