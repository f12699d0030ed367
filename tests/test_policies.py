"""Policies choose what they say: pages never go back, newest first; anchors and outliers are the tokens and numbers meant."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from argus import plugins
from argus.build import make_anchor
from argus.config import validate
from argus.errors import ConfigError
from argus.moves import Context
from argus.policies import anchors
from argus.policies.base import NewPages, PageFacts, StageFacts, TextFacts
from argus.turns import age
from tests.conftest import HEADS, contents, grow, make_layer, tokens

RUN = settings(max_examples=80, deadline=None)
MANAGER = plugins.load()


def policy(hook: str, name: str, **options):
    kind = plugins.kinds(MANAGER, hook)[name]
    return kind(validate(kind.Config, options))


def anchor(name: str, text: TextFacts | None = None, **options):
    return make_anchor(name, options, plugins.kinds(MANAGER, "argus_anchors"), text or TextFacts((7,)))


# Ageing

LADDERS = st.lists(st.one_of(st.none(), st.integers(1, 4)), min_size=1, max_size=6)
BIRTHS = st.lists(st.integers(1, 7), min_size=1, max_size=8)
AGEING = st.one_of(
    st.just(("fifo", {})),
    st.just(("uniform", {})),
    st.tuples(st.just("log"), st.fixed_dictionaries({"first": st.integers(1, 3), "ratio": st.sampled_from([1.0, 1.5, 3.0])})),
)


@RUN
@given(chosen=AGEING, capacities=LADDERS, births=BIRTHS, crops=st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_pages_go_forward_newest_first(chosen, capacities, births, crops):
    """Also after crops: no page goes back, none overtakes an older one, and no stage but the last is over its capacity."""
    ageing = policy("argus_aging", chosen[0], **chosen[1])
    stages = [StageFacts(f"s{i}", capacity) for i, capacity in enumerate(capacities)]
    if chosen[0] == "log":
        limits = [max(1, round(chosen[1]["first"] * chosen[1]["ratio"] ** i)) for i in range(len(stages))]
    else:
        limits = list(capacities)
    held: list[int] = []
    for born, crop in zip(births, crops, strict=False):
        held = held[: len(held) - crop] if crop <= len(held) else held
        before = [*held, *[None] * born]
        held = ageing.targets([PageFacts(len(before) - 1 - i, stage) for i, stage in enumerate(before)], stages)
        assert all((old or 0) <= new < len(stages) for old, new in zip(before, held, strict=True))
        assert held == sorted(held, reverse=True)
        counts = Counter(held)
        if chosen[0] == "uniform":
            assert set(held) == {len(stages) - 1}
            continue
        for stage, limit in enumerate(limits[:-1]):
            assert limit is None or counts[stage] <= limit


@RUN
@given(capacities=st.lists(st.integers(1, 4), min_size=1, max_size=6), births=BIRTHS)
def test_stages_are_full_before_the_next_has_any(capacities, births):
    ageing = policy("argus_aging", "fifo")
    stages = [StageFacts(f"s{i}", capacity) for i, capacity in enumerate(capacities)]
    held: list[int] = []
    for born in births:
        before = [*held, *[None] * born]
        held = ageing.targets([PageFacts(len(before) - 1 - i, stage) for i, stage in enumerate(before)], stages)
        counts = Counter(held)
        for stage, capacity in enumerate(capacities[:-1]):
            assert counts[stage] == max(0, min(capacity, len(held) - sum(capacities[:stage])))


def test_log_sizes_grow_geometrically():
    ageing = policy("argus_aging", "log", first=1, ratio=2.0)
    stages = [StageFacts(f"s{i}", None) for i in range(5)]
    held = ageing.targets([PageFacts(39 - i, None) for i in range(40)], stages)
    assert [held.count(stage) for stage in range(5)] == [1, 2, 4, 8, 25]


@pytest.mark.parametrize(
    ("first", "ratio", "wanted"),
    [
        (1.0, 1e12, [1] * 9 + [0]),
        (1.0, 1e300, [1] * 9 + [0]),
        (1e300, 2.0, [0] * 10),
        (1e-300, 1e200, [2] * 8 + [1, 0]),
    ],
)
def test_log_sizes_may_be_larger_than_memory(first, ratio, wanted):
    stages = [StageFacts(f"s{i}", None) for i in range(5)]
    ageing = policy("argus_aging", "log", first=first, ratio=ratio)
    assert ageing.targets([PageFacts(9 - i, None) for i in range(10)], stages) == wanted


@pytest.mark.parametrize("option", ["first", "ratio"])
@pytest.mark.parametrize("number", [float("inf"), float("nan"), 0.0])
def test_log_sizes_are_finite(option, number):
    with pytest.raises(ConfigError, match=option):
        policy("argus_aging", "log", **{option: number})


def test_a_capacity_may_be_larger_than_memory():
    stages = [StageFacts("a", 1), StageFacts("b", 10**14), StageFacts("c", None)]
    held = policy("argus_aging", "fifo").targets([PageFacts(4 - i, None) for i in range(5)], stages)
    assert held == [1, 1, 1, 1, 0]


def test_a_stage_without_capacity_keeps_all():
    held = policy("argus_aging", "fifo").targets(
        [PageFacts(9 - i, None) for i in range(10)], [StageFacts("a", 2), StageFacts("b", None), StageFacts("c", 1)]
    )
    assert held == [1] * 8 + [0] * 2


# Anchors


def pages(seed: int, n: int = 2, batch: int = 2, heads: int = 2, size: int = 8, start: int = 0, ids: Tensor | None = None):
    keys, values = torch.randn(2, n, batch, heads, size, 8, generator=torch.Generator().manual_seed(seed))
    taken = torch.zeros(n, batch, heads, size, dtype=torch.bool)
    positions = torch.arange(start, start + n * size).view(n, 1, size).expand(n, batch, size)
    return NewPages(keys, values, positions, torch.zeros(batch, dtype=torch.long), ids, taken)


def chosen_positions(kept: Tensor, given_: NewPages) -> list[list[set[int]]]:
    """Positions kept of each row and head."""
    kept = kept.broadcast_to(given_.taken.shape)
    n, batch, heads, _ = kept.shape
    return [
        [{int(p) for i in range(n) for p in given_.positions[i, row][kept[i, row, head]]} for head in range(heads)]
        for row in range(batch)
    ]


@pytest.mark.parametrize("start", [0, 8, 16])
def test_sinks_are_the_first_real_tokens(start):
    given_ = pages(1, start=start)
    padded = NewPages(given_.keys, given_.values, given_.positions, torch.tensor([0, 6]), None, given_.taken)
    found = chosen_positions(anchor("sinks", tokens=5).choose(padded), padded)
    here = set(range(start, start + 16))
    assert found == [[set(range(5)) & here] * 2, [set(range(6, 11)) & here] * 2]
    assert not anchor("sinks", tokens=0).choose(given_).any()


def test_lines_are_the_last_tokens_of_each_line():
    """With the tokens before each end, also where the end lies on the next page or still in the window."""
    ids = torch.ones(2, 20, dtype=torch.int64)
    ids[0, [3, 8, 17]] = 7
    ids[1, [0, 16]] = 9
    given_ = pages(1, ids=ids)
    lines = anchor("lines", TextFacts((7, 9)), tokens=3)
    found = chosen_positions(lines.choose(given_), given_)
    assert found == [[{1, 2, 3, 6, 7, 8, 15}] * 2, [{0, 14, 15}] * 2]
    mine = anchor("lines", tokens=1, ids=[9])
    assert chosen_positions(mine.choose(given_), given_) == [[set()] * 2, [{0}] * 2]
    assert not lines.choose(pages(1)).any()


def test_lines_need_something_that_ends_one():
    with pytest.raises(ConfigError, match="no token ids end a line"):
        anchor("lines", TextFacts(()))


def likeness(x: Tensor, mean: Tensor) -> Tensor:
    """Each token's largest cosine with another, of ``[T, D]``, by two loops."""
    x = x - mean
    return torch.tensor(
        [max(float(torch.cosine_similarity(x[i], x[j], dim=0)) for j in range(len(x)) if j != i) for i in range(len(x))]
    )


@pytest.mark.parametrize("scope", ["page", "block"])
@pytest.mark.parametrize("by", ["keys", "values"])
def test_novelty_keeps_the_tokens_least_like_any_other(scope, by):
    given_ = pages(3, n=3, batch=1)
    kept = anchor("novelty", share=0.25, by=by, scope=scope).choose(given_).broadcast_to(given_.taken.shape)
    source = getattr(given_, by)
    for head in range(2):
        if scope == "page":
            groups = [(source[i, 0, head], kept[i, 0, head]) for i in range(3)]
        else:
            groups = [(source[:, 0, head].flatten(0, 1), kept[:, 0, head].flatten())]
        for x, marks in groups:
            scores = likeness(x, x.mean(0))
            assert int(marks.sum()) == len(x) // 4
            assert scores[marks].max() <= scores[~marks].min() + 1e-6


def test_novelty_by_both_keeps_half_of_each():
    given_ = pages(3, n=1, batch=1, size=16)
    kept = anchor("novelty", share=0.25, by="both", scope="page").choose(given_)
    values = anchor("novelty", share=0.125, by="values", scope="page").choose(given_)
    assert (kept.sum(-1) == 4).all()
    assert bool((kept | ~values).all())


def test_novelty_leaves_what_is_taken():
    """What another policy keeps does not count against the share."""
    given_ = pages(3, n=2, batch=1)
    novelty = anchor("novelty", share=0.25)
    first = novelty.choose(given_)
    taken = NewPages(given_.keys, given_.values, given_.positions, given_.padding, None, first)
    second = novelty.choose(taken)
    assert not (first & second).any()
    assert (second.sum((0, -1)) == 4).all()


def test_a_needle_is_novel():
    """Tokens that repeat are let go, the one that does not is kept."""
    given_ = pages(3, n=4, batch=1, heads=1)
    unit = given_.values[0]
    values = unit.repeat(4, 1, 1, 1, 1)
    values[2, 0, 0, 5] = 3 * values[0, 0, 0, 5].roll(3)
    needle = NewPages(given_.keys, values, given_.positions, given_.padding, None, given_.taken)
    assert chosen_positions(anchor("novelty", share=1 / 32).choose(needle), needle) == [[{21}]]


def test_anchors_add_up_in_the_cache():
    """Several policies together, each with what the others left, and all of it exact."""
    anchors = {"sinks": {"tokens": 3}, "lines": {"tokens": 2}, "novelty": {"share": 0.1}}
    layer = make_layer(("int2",), anchors=anchors, block_pages=20)
    ids = torch.ones(1, 88, dtype=torch.int64)
    ids[0, [20, 50]] = 7
    keys, values = tokens(1, 88)
    grow(layer, keys, values, text=Context(ids))
    assert len(layer.where) == 10
    for head in range(HEADS):
        held = {int(p) for p in layer.exact.positions[0, head] if p >= 0}
        assert {0, 1, 2, 19, 20, 49, 50} < held
        assert len(held) == 7 + 8
        for x, wanted in zip(contents(layer), (keys, values), strict=True):
            same = (x == wanted).all(-1)[0, head, :80].nonzero().flatten()
            assert set(same.tolist()) == held


def asked_for(place: int, batch: int = 1, heads: int = HEADS, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of 88 tokens, and queries ``[B, H, R, D]`` that ask for the token at `place` only."""
    keys, values = tokens(5, 88, batch, heads, dim)
    wanted = torch.randn(batch, heads, 1, dim, generator=torch.Generator().manual_seed(6))
    keys[:, :, place] = 4 * wanted[:, :, 0]
    return keys, values, wanted.expand(-1, -1, 4, -1) * 2


def test_salience_keeps_the_tokens_that_are_asked_for():
    keys, values, wanted = asked_for(37)
    layer = make_layer(("int2",), anchors={"salience": {"share": 1 / 80}}, block_pages=20)
    layer.write(keys, values)
    age([layer], [Context(queries=wanted)])
    assert layer.exact.positions is not None
    assert (layer.exact.positions == 37).all()
    assert layer.exact.positions.shape == (1, HEADS, 1)


def test_salience_chooses_none_where_nobody_asks():
    keys, values, _ = asked_for(37)
    layer = make_layer(("int2",), anchors={"salience": {"share": 0.1}})
    grow(layer, keys, values)
    assert layer.where
    assert layer.exact.positions is None


@pytest.mark.parametrize("most", [1, 1 << 12, 1 << 24])
def test_likeness_of_tokens_in_parts_and_in_16_bits(most, monkeypatch):
    monkeypatch.setattr(anchors, "COSINES", most)
    x = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(3)) * 100 + 300
    unit = x.double() - x.double().mean(-2, keepdim=True)
    unit = unit / unit.norm(dim=-1, keepdim=True)
    want = (unit @ unit.transpose(-1, -2) - 3 * torch.eye(40)).amax(-1)
    torch.testing.assert_close(anchors.nearest(x, torch.float32).double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(anchors.nearest(x, torch.float16).double(), want, rtol=2e-3, atol=2e-3)


def test_salient_pages_stay_in_the_first_stage_whatever_their_age():
    keys, values, wanted = asked_for(19)
    layer = make_layer(("fp16", "int2"), {"fp16": 16}, aging="salience", block_pages=3)
    layer.write(keys, values)
    age([layer], [Context(queries=wanted)])
    assert len(layer.where) == 10
    assert layer.where.count(0) == 2
    assert layer.where[2] == 0
    assert layer.salience[2] == max(layer.salience)
    layer.crop(40)
    assert len(layer.salience) == len(layer.where) == 5
    more = tokens(7, 24)
    layer.write(*more)
    age([layer], [Context(queries=wanted)])
    assert layer.where[2] == 0
    assert layer.where.count(0) <= 2


def test_salience_never_brings_a_page_back():
    ageing = policy("argus_aging", "salience")
    stages = [StageFacts("a", 1), StageFacts("b", None)]
    held = [PageFacts(2, 1, 9.0), PageFacts(1, 0, 1.0), PageFacts(0, None, 0.5)]
    assert ageing.targets(held, stages) == [1, 1, 1]
    assert ageing.targets([PageFacts(1, 0, 1.0), PageFacts(0, None, 2.0)], stages) == [1, 0]


def test_anchors_in_eight_bits_are_near_and_take_half_the_bytes():
    layers = {}
    keys, values = tokens(3, 200, dim=64)
    for kept in ("exact", "int8"):
        layers[kept] = make_layer(
            ("int2",), anchors={"novelty": {"share": 0.25}}, head_dim=64, kept=kept, dtype="float16", block_pages=50
        )
        grow(layers[kept], keys, values)
    exact, eight = (layers[kept].exact for kept in ("exact", "int8"))
    assert torch.equal(exact.positions, eight.positions)
    sizes = [sum(x.nbytes for x in held.tensors()) for held in (exact, eight)]
    places = exact.positions.numel()
    assert sizes == [places * (4 + 2 * 64 * 2), places * (4 + 2 * (64 + 2))]
    for place, x in enumerate((keys, values)):
        codes, scale = (eight.keys, eight.values)[place], eight.scales[place]
        true = x.gather(2, exact.positions.long().unsqueeze(-1).expand(-1, -1, -1, 64))
        off = codes.float() * scale.float().unsqueeze(-1) - true
        assert (off.abs() <= 0.5001 * scale.float().unsqueeze(-1)).all()
        read = contents(layers["int8"])[place].gather(2, exact.positions.long().unsqueeze(-1).expand(-1, -1, -1, 64))
        assert torch.equal(read, codes.float() * scale.float().unsqueeze(-1))
    layers["int8"].crop(64)
    layers["int8"].select(torch.tensor([0, 0]))
    assert layers["int8"].exact.scales[0].shape == layers["int8"].exact.positions.shape


# Outliers


def numbers(seed: int = 1) -> Tensor:
    return torch.randn(3, 2, 2, 16, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threshold", [1.0, 2.0, 3.0])
def test_sigma_is_beyond_so_many_deviations(threshold):
    x = numbers()
    found = policy("argus_outliers", "sigma", threshold=threshold).choose(x, "keys")
    for page, row, head in [(0, 0, 0), (2, 1, 1), (1, 0, 1)]:
        one = x[page, row, head].double()
        wanted = (one - one.mean()).abs() > threshold * one.std(correction=0)
        assert torch.equal(found[page, row, head], wanted)
    assert found.any()
    assert not policy("argus_outliers", "sigma").choose(torch.ones(1, 1, 1, 4, 4), "keys").any()


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3])
def test_topk_is_the_furthest_share(share):
    x = numbers()
    found = policy("argus_outliers", "topk", share=share).choose(x, "values")
    distance = (x - x.mean((-2, -1), keepdim=True)).abs()
    assert (found.flatten(-2).sum(-1) == max(1, round(share * 128))).all()
    inside = distance.masked_fill(found, -1).flatten(-2).amax(-1)
    outside = distance.masked_fill(~found, torch.inf).flatten(-2).amin(-1)
    assert (inside <= outside).all()


def test_none_is_none():
    assert policy("argus_outliers", "none").choose(numbers(), "keys") is None


@pytest.mark.parametrize("outliers", [{"policy": "sigma", "threshold": 1.5}, {"policy": "topk", "share": 0.1}])
def test_outliers_are_read_to_the_bit_and_widen_no_scale(outliers):
    """A page with a huge number reads as well as one without it, and gives that number back."""
    plain, spiked = (make_layer(("int4",), outliers=outliers) for _ in range(2))
    keys, values = tokens(1, 40)
    loud = keys.clone()
    loud[0, 1, 13, 4] = 3000.0
    grow(plain, keys, values)
    grow(spiked, loud, values)
    read, calm = contents(spiked)[0], contents(plain)[0]
    assert read[0, 1, 13, 4] == 3000.0
    rest = torch.ones_like(keys, dtype=torch.bool)
    rest[0, 1, 13, 4] = False
    off = ((read - loud) * rest)[:, :, :32].norm() / ((calm - keys) * rest)[:, :, :32].norm()
    assert off < 2
    for role in ("keys", "values"):
        assert len(spiked.outliers[role].rows.numbers) > 0
