"""Attention of long chunks by the Triton backend against attention in float64 over everything decoded."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from argus.attention import Query  # noqa: E402
from argus.backends.base import Affine, Dense, Loaded, Plain, Segment  # noqa: E402
from argus.backends.cpu import CpuBackend  # noqa: E402
from argus.backends.triton import expand, prefill, staging  # noqa: E402
from argus.backends.triton.backend import TritonBackend  # noqa: E402
from argus.backends.triton.sight import Sight, Sights, survey  # noqa: E402
from argus.build import build  # noqa: E402
from argus.config import load_cache_config  # noqa: E402
from argus.engine import LayerCache  # noqa: E402
from argus.turns import age  # noqa: E402
from tests.backends.decoding import BOUND, DEVICE, FORMS, Case, KeptProjection, spiked  # noqa: E402
from tests.conftest import other_defaults  # noqa: E402

INT4 = (Affine(4, "channel"), Affine(4, "token"))


def chunk(*forms: object, steps: int = 20, **options: Any) -> Case:
    """A case of a long chunk, whose pages tell where they begin."""
    case = Case(*(forms or INT4), steps=steps, **{"counts": (2, 1), "batch": 1} | options)
    done = 0
    for place, segment in enumerate(case.segments):
        case.segments[place] = replace(segment, first=done * case.page)
        done += len(segment.positions)
    return case


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written before it is read is NaN."""
    empty = torch.empty
    monkeypatch.setattr(
        staging.torch, "empty", lambda *a, **k: x.fill_(torch.nan) if (x := empty(*a, **k)).is_floating_point() else x
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plain", "plain"),
        ("fp8", "fp8-token"),
        ("int8", "int8-token"),
        ("int4-group", "int3-token"),
        ("int3", "plain"),
        ("int2", "int2-token"),
        ("sign", "sign-token"),
        ("int7-token", "int4"),
    ],
)
def test_forms(key: str, value: str) -> None:
    chunk(FORMS[key], FORMS[value], exact=True).check()


@triton.jit
def _times(codes, scale, zero, own, tok, ch, seen, inner, P: tl.constexpr, D: tl.constexpr, OPTION: tl.constexpr):  # noqa: N803
    numbers = tl.load(codes.to(tl.pointer_type(tl.float16)) + inner * P * D + tok * D + ch, mask=seen, other=0.0)
    return numbers.to(tl.float32) * tl.load(own + OPTION)


def test_a_tier_s_own_function() -> None:
    """Pages are read by it, and never decoded by the tier; where it yields rotated numbers, the tier decodes."""
    case = chunk(Plain(), Plain(), exact=True)
    factors = torch.tensor([1.0, 3.0, -2.0], device=DEVICE)
    plain = case.tiers[0].decode
    own = [SimpleNamespace(form=lambda role, i=i: Loaded(lambda: _times, i, lambda like: factors)) for i in (1, 2)]
    pages = list(case.segments)
    case.segments = [replace(segment, key_tier=own[0], value_tier=own[1]) for segment in pages]
    found = case.backend.attend(case.query, case.segments, case.dense).double()
    for i, tier in enumerate(own):
        tier.decode = lambda payload, role, i=i: plain(payload, role) * factors[i + 1]
    want = case.expected(case.query)
    assert float((found - want).norm() / want.norm()) <= BOUND
    own[0].form = lambda role: Loaded(lambda: None, rotation=lambda dim, like: torch.eye(dim))
    case.check()


@pytest.mark.parametrize(
    ("inner", "ratio", "page", "dim"),
    [
        ("int4-token", 4, 64, 64),
        ("int4-token", 16, 64, 128),
        ("int4-token", 2, 64, 64),
        ("plain", 4, 64, 64),
        ("sign", 4, 32, 80),
    ],
)
def test_projected_pages(monkeypatch: pytest.MonkeyPatch, inner: str, ratio: int, page: int, dim: int) -> None:
    """One kernel reads coefficients and writes tokens; no page is decoded by its tier."""
    case = chunk(Plain(), Plain(), counts=(), dim=dim, page=page)
    decoded: list[int] = []
    write = expand._expand_decoded
    monkeypatch.setattr(expand, "_expand_decoded", lambda *args: decoded.append(1) or write(*args))
    tiers = [KeptProjection(case.backend, FORMS[inner], unbiased, ratio) for unbiased in (True, False)]
    keys, values = (tier.encode(case.random(2, 1, 2, page, dim)) for tier in tiers)
    case.segments = [Segment(*tiers, keys, values, torch.arange(2, device=DEVICE) * page, 2 * page - 1, page)]
    case.dense[0] = replace(case.dense[0], start=2 * page, last=2 * page + case.length - 1)
    case.check(replace(case.query, start=2 * page + case.length - case.steps))
    assert not decoded


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_dims(dim: int) -> None:
    chunk(dim=dim, heads=1, groups=3).check()


@pytest.mark.parametrize("page", [8, 24, 128])
def test_page_sizes(page: int) -> None:
    chunk(*INT4, page=page, exact=True, window=3).check()


@pytest.mark.parametrize(("groups", "steps"), [(1, 9), (3, 33), (8, 16), (40, 4), (2, 200)])
def test_groups_and_steps(groups: int, steps: int) -> None:
    chunk(groups=groups, steps=steps, heads=1, batch=2).check()


@pytest.mark.parametrize("kind", ["padding", "per-head", "sliding", "additive", "additive-min"])
def test_masks(kind: str) -> None:
    steps = 20
    case = chunk(*INT4, exact=True, steps=steps, batch=2, counts=(2, 2))
    batch, heads = 2, case.heads * case.groups
    seen = torch.ones(batch, heads if kind == "per-head" else 1, steps, case.length, dtype=torch.bool)
    seen = seen.tril(case.length - steps)
    if kind == "sliding":
        seen = seen.triu(case.length - steps - 80)
    else:
        seen[0, :, :, :77] = False
        seen[1, :, :, :70] = False
    if kind == "per-head":
        seen[:, 1, :, 100:140] = False
    mask = seen.to(DEVICE)
    if kind.startswith("additive"):
        dtype = torch.float16 if kind == "additive-min" else torch.float32
        noise = torch.randn(mask.shape, generator=case.generator).to(DEVICE, dtype)
        mask = noise.masked_fill(~mask, torch.finfo(dtype).min if kind == "additive-min" else float("-inf"))
    case.check(replace(case.query, mask=mask))


def test_a_row_that_sees_nothing_is_zero() -> None:
    case = chunk(batch=2)
    mask = torch.zeros(2, 1, 20, case.length, dtype=torch.bool, device=DEVICE)
    mask[1] = True
    query = replace(case.query, mask=mask)
    case.check(query)
    assert not case.backend.attend(query, case.segments, case.dense)[0].any()
    nothing = replace(query, mask=torch.zeros_like(mask))
    assert not case.backend.attend(nothing, case.segments, case.dense).any()


@pytest.mark.parametrize("shares", [1, 3])
def test_softcap_and_sinks(monkeypatch: pytest.MonkeyPatch, shares: int) -> None:
    monkeypatch.setattr(prefill, "shares_of", lambda query: shares)
    case = chunk(exact=True, groups=3)
    sinks = torch.randn(case.heads * case.groups, generator=case.generator).to(DEVICE)
    loud = replace(case.query, rows=case.query.rows * 4, softcap=5.0)
    case.check(loud, sinks)
    case.check(loud)
    case.check(sinks=sinks + 6)


def test_pages_after_the_query_are_hidden() -> None:
    case = chunk()
    case.check(replace(case.query, start=100))
    case.check(replace(case.query, start=40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_dtypes(dtype: torch.dtype) -> None:
    case = chunk(Plain(), Plain(), dtype=dtype, exact=True)
    case.check(bound=1e-5 if dtype == torch.float32 else BOUND)


def test_numbers_beyond_fp16() -> None:
    """Queries, keys and values of a bfloat16 model may be larger than any FP16 number, and others tiny beside them."""
    case = chunk(dtype=torch.bfloat16, exact=True, heads=2)
    for place, part in enumerate(case.dense):
        size = torch.tensor([1e6, 1e-6], device=DEVICE).to(torch.bfloat16).view(1, 2, 1, 1)
        case.dense[place] = replace(part, keys=part.keys * size, values=part.values * size)
    rows = case.query.rows * torch.tensor([1e-6, 1e5], device=DEVICE).view(1, 2, 1, 1)
    case.check(replace(case.query, rows=rows))


def test_large_scores() -> None:
    case = chunk(groups=4, seed=5)
    case.check(replace(case.query, rows=case.query.rows * 8))


def test_fp16_queries_lose_nothing() -> None:
    """Keys in FP16 and queries that were: products are exact but for sums in float32, however large the scores."""
    case = chunk(Plain(), Plain(), dim=80)
    q = torch.randn(1, case.heads * case.groups, case.steps, 80, generator=case.generator).to(DEVICE).half() * 16
    case.check(Query.of(q, case.heads, 80**-0.5, case.length - case.steps), bound=2e-4)


def test_many_tiny_weights_count() -> None:
    """One token takes nearly all: what the others weigh is below FP16's smallest number, and their sum is not."""
    count = 4096
    keys, values = torch.zeros(1, 1, count, 64), torch.zeros(1, 1, count, 64)
    keys[:, :, 0, 0], values[:, :, 1:] = 1.0, 1000.0
    case = chunk(heads=1, groups=1, steps=16)
    case.segments, case.dense = [], [Dense(keys.half().to(DEVICE), values.half().to(DEVICE), 0, count - 1)]
    rows = torch.zeros(1, 1, 16, 64, device=DEVICE)
    rows[..., 0] = 17.625  # exp(-17.625) is 2.2e-8
    case.check(Query(rows, count, 16))


@pytest.mark.parametrize("tight", [False, True])
def test_what_no_kernel_reads_is_decoded(monkeypatch: pytest.MonkeyPatch, tight: bool) -> None:
    """Tiers without a form, and pages with outliers: through the tier's own decoding, in bounded pieces."""
    case = chunk(exact=True, counts=(3, 2))
    sizes: list[int] = []

    def decode(payload: dict[str, torch.Tensor], role: str) -> torch.Tensor:
        sizes.append(len(payload["codes"]))
        return case.tiers[0].decode(payload, role)

    if tight:
        page = 2 * 64 * 64 * 4
        monkeypatch.setattr(staging, "BLOCK", 2 * page)
        monkeypatch.setattr(expand, "DECODED", page)
    unknown = SimpleNamespace(form=lambda role: None, decode=decode)
    case.segments[0] = replace(case.segments[0], key_tier=unknown)
    plain = case.backend.attend(case.query, case.segments, case.dense)
    assert max(sizes) == (1 if tight else 3)
    case.check()
    case.segments = spiked(case.segments)
    found = case.backend.attend(case.query, case.segments, case.dense)
    assert not torch.allclose(found, plain, rtol=0.05)
    case.check()


@pytest.mark.parametrize("outliers", ["none", "sigma"])
def test_a_whole_ladder(outliers: str) -> None:
    """All stages, anchors and outliers of a layer's cache, against the CPU backend on the same pages."""
    chosen = load_cache_config(["tiers=default", "backend=triton", f"outliers={outliers}", "tiers.block_pages=5"])
    layer = LayerCache(build(chosen, 64, torch.float16, DEVICE))
    generator = torch.Generator().manual_seed(1)
    for steps in (1100, 30):
        layer.write(*torch.randn(2, 1, 2, steps, 64, generator=generator).half().to(DEVICE))
        age([layer])
    layer.write(*torch.randn(2, 1, 2, 30, 64, generator=generator).half().to(DEVICE))
    q = torch.randn(1, 4, 30, 64, generator=generator).half().to(DEVICE)
    query = Query.of(q, 2, 0.125, layer.length - 30)
    assert len(set(layer.where)) == 7
    found = layer.attend(query)
    want = CpuBackend().attend(query, layer.segments(), layer.dense())
    assert float((found - want).norm() / want.norm()) <= BOUND


def test_blocks_are_bounded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "shares_of", lambda _: 1)
    case = chunk(*INT4, counts=(3, 3, 1), exact=True)
    case.check()
    held = 2 * 7 * case.heads * 64 * 64 * 2
    state = case.query.rows.numel() * 4 * 66 // 64
    assert case.backend.workspace == held + state
    monkeypatch.setattr(staging, "BLOCK", 2 * held // 7)
    case.backend.workspace = 0
    case.check()
    assert case.backend.workspace == 2 * held // 7 + state


def test_what_no_row_sees_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    case = chunk(*INT4, counts=(1, 1, 1, 1), exact=False, steps=16)
    staged: list[int] = []
    write = staging.expand
    tell = lambda pieces: staged.extend(piece.segment.first for piece in pieces)  # noqa: E731
    monkeypatch.setattr(staging, "expand", lambda pieces, role, out: tell(pieces) or write(pieces, role, out))
    begin = case.length - 16
    seen = torch.ones(1, 1, 16, case.length, dtype=torch.bool, device=DEVICE).tril(begin).triu(begin - 100)
    case.check(replace(case.query, mask=seen))
    assert staged == [128, 128, 192, 192]


@pytest.mark.parametrize("outliers", [False, True])
def test_slabs_of_a_stage_are_written_out_at_once(monkeypatch: pytest.MonkeyPatch, outliers: bool) -> None:
    """Pages that follow one another in a stage's table take one launch a role and block."""
    case = chunk(*INT4, counts=(7, 1), exact=True)
    whole, last = case.segments
    case.segments = [whole.part(0, 2), whole.part(2, 5), whole.part(5, 7), last]
    if outliers:
        case.segments = spiked(case.segments)
    groups: list[tuple[str, int]] = []
    write = staging.expand

    def told(pieces: list[expand.Piece], role: str, out: torch.Tensor) -> int:
        groups.append((role, sum(piece.count for piece in pieces)))
        return write(pieces, role, out)

    monkeypatch.setattr(staging, "expand", told)
    monkeypatch.setattr(staging, "BLOCK", 4 * 4 * case.heads * case.page * 64)
    case.check()
    assert groups == [("keys", 4), ("values", 4)] * 2


def test_sight_of_masks() -> None:
    seen = torch.zeros(2, 1, 3, 10, dtype=torch.bool)
    assert survey(seen) == Sight(0, -1, 0, -1)
    seen[:, :, :, 2:8] = True
    seen[0, 0, 1, 3] = False
    seen[1, 0, 0, 9] = True
    assert survey(seen) == Sight(2, 9, 4, 7)
    for dtype in (torch.float16, torch.float32):
        added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        assert survey(added) == Sight(2, 9, 4, 7)
        added[0, 0, 0, 7] = -1
        assert survey(added) == Sight(2, 9, 4, 6)
    assert survey(torch.ones(1, 1, 2, 5, dtype=torch.bool)) == Sight(0, 4, 0, 4)
    assert Sights().of(Query(torch.zeros(1, 1, 3, 4), 7, 3)) == Sight(0, 9, 0, 7)


def test_a_mask_is_surveyed_once() -> None:
    sights, mask = Sights(), torch.ones(1, 1, 3, 10, dtype=torch.bool)
    query = Query(torch.zeros(1, 1, 3, 4), 7, 3, mask)
    first = sights.of(query)
    assert sights.of(replace(query, start=6)) is first
    others = [mask.tril(place) for place in (7, 6)]
    second = sights.of(replace(query, mask=others[0]))
    assert second == Sight(0, 9, 0, 7)
    # Two masks that layers take in turn are both kept; a third takes the place of the older one.
    assert sights.of(query) is first
    assert sights.of(replace(query, mask=others[0])) is second
    assert sights.of(replace(query, mask=others[1])) == Sight(0, 8, 0, 6)
    assert sights.of(replace(query, mask=others[0])) is second
    assert sights.of(query) is not first
    mask[..., :4] = False
    assert sights.of(query) == Sight(4, 9, 4, 9)


def test_sight_cuts_consecutive_tokens() -> None:
    assert list(staging.cut(10, 29, Sight(0, 40, 0, 19))) == [(0, 10, 10, 19), (10, 20, 20, 29)]
    assert list(staging.cut(10, 29, Sight(15, 25, 18, 18))) == [(5, 8, 15, 17), (8, 9, 18, 18), (9, 16, 19, 25)]
    assert list(staging.cut(10, 29, Sight(0, 40, 0, -1))) == [(0, 20, 10, 29)]
    assert list(staging.cut(10, 29, Sight(30, 40, 30, 40))) == list(staging.cut(10, 29, Sight(0, -1, 0, -1))) == []


@pytest.mark.parametrize("steps", [1, 20])
def test_defaults_of_torch_change_nothing(steps: int) -> None:
    """What a program sets for all tensors made without a dtype or a device; of a few queries, too, and with a mask."""
    case = Case(FORMS["int4"], FORMS["int4-token"], dim=72, counts=(2,), exact=True, steps=steps)
    mask = torch.ones(2, 1, steps, case.length, dtype=torch.bool, device=DEVICE).tril(case.length - steps)
    mask[0, :, :, :9] = False
    query = Query(case.query.rows, case.query.start, steps, mask=mask)
    wanted = TritonBackend().attend(query, case.segments, case.dense)
    with other_defaults():
        found = TritonBackend().attend(query, case.segments, case.dense)
    assert torch.equal(found, wanted)
