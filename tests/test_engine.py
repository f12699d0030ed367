"""One layer's cache: bounded memory, errors that leave it readable, crops, padding and masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from argus import attention
from argus.backends import cpu
from argus.engine import LayerCache
from argus.errors import ArgusError, RangeError
from argus.ledger import measure, total_bytes
from argus.moves import Context
from argus.turns import age
from tests.conftest import (
    DIM,
    GROUPS,
    HEADS,
    SEVEN,
    Allocations,
    ask,
    contents,
    dense_attention,
    grow,
    make_layer,
    other_defaults,
    queries,
    tokens,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LADDERS = {
    "exact": {"order": ("fp16",), "block_pages": 3},
    "seven": {"order": tuple(SEVEN), "capacities": dict.fromkeys(list(SEVEN)[:-1], 8)},
    "anchors": {"order": ("int4", "sign"), "capacities": {"int4": 16}, "anchors": {"sinks": {}, "novelty": {"share": 0.1}}},
    "one page a block": {"order": ("int4",), "block_pages": 1},
    "outliers": {"order": ("int8", "int2"), "capacities": {"int8": 16}, "outliers": {"policy": "topk", "share": 0.05}},
}


@pytest.fixture(params=sorted(LADDERS))
def layer(request) -> LayerCache:
    return make_layer(**LADDERS[request.param])


def answers_as_it_reads(layer: LayerCache, q: Tensor, **options) -> None:
    found = ask(layer, q, **options)
    wanted = dense_attention(q, *contents(layer), 0.3, **options)
    torch.testing.assert_close(found.double(), wanted, **CLOSE)


@pytest.mark.parametrize("ladder", LADDERS)
def test_defaults_of_torch_change_nothing(ladder: str) -> None:
    """What a program sets for all tensors made without a dtype or a device."""

    def life() -> Tensor:
        layer = make_layer(**LADDERS[ladder])
        with torch.device("cpu"):
            written, asked = [tokens(seed, 40, 2) for seed in range(3)], queries(9, 1, 2)
        for pair in written:
            layer.write(*pair)
            age([layer])
        layer.crop(101)
        layer.select(torch.tensor([1, 0, 1], device="cpu"))
        return ask(layer, asked[torch.tensor([1, 0, 1], device="cpu")])

    wanted = life()
    with other_defaults():
        found = life()
    assert torch.equal(found, wanted)


# Memory

BUDGET = 2048


@pytest.fixture
def small_budget(monkeypatch):
    """Scores held at once, so few that a short context reaches the bound."""
    monkeypatch.setattr(cpu, "DENSE_BUDGET", BUDGET)
    monkeypatch.setattr(attention.answer_bounded, "__defaults__", (BUDGET,))


def decode_step(layer: LayerCache, seed: int) -> None:
    layer.write(*tokens(seed, 1))
    ask(layer, queries(seed, 1))
    age([layer])


@pytest.mark.parametrize("name", ["exact", "seven"])
@pytest.mark.usefixtures("small_budget")
def test_decode_allocates_a_block_at_most(name):
    """Decoding over 4 times the context allocates nothing larger than the budget of scores or a decoded block."""
    for context in (1024, 4096):
        layer = make_layer(**LADDERS[name])
        grow(layer, *tokens(1, context), chunk=256)
        with Allocations() as seen:
            for step in range(layer.plan.page_size + 2):
                decode_step(layer, step)
        bound = 4 * max(BUDGET, layer.plan.block_pages * layer.plan.page_size * HEADS * DIM)
        assert seen.largest[0] <= bound < context * HEADS * DIM * 4 / 4, (context, seen.largest)


@pytest.mark.parametrize("first", [0, 13])
@pytest.mark.parametrize("name", ["exact", "seven", "one page a block"])
def test_prefill_allocates_a_block_at_most(name, first):
    """Compressing a prompt, alone or after earlier tokens, never makes a copy of it."""
    largest = {}
    for context in (256, 1024):
        layer = make_layer(**LADDERS[name])
        if first:
            grow(layer, *tokens(3, first))
        layer.write(*tokens(1, context))
        with Allocations() as seen:
            age([layer])
        largest[context] = seen.largest
        assert len(layer.where) == (first + context - layer.plan.window) // layer.plan.page_size
    assert largest[256][0] == largest[1024][0], largest


@pytest.mark.usefixtures("small_budget")
def test_chunked_prefill_allocates_a_block_at_most():
    """Queries of a chunk over all that is compressed already, however many partial answers that takes."""
    for context in (512, 2048):
        layer = make_layer(**LADDERS["seven"])
        grow(layer, *tokens(1, context), chunk=256)
        layer.write(*tokens(2, 16))
        with Allocations() as seen:
            ask(layer, queries(3, 16))
        assert seen.largest[0] <= 4 * BUDGET, (context, seen.largest)


@pytest.mark.usefixtures("small_budget")
def test_small_budget_answers_the_same(layer):
    grow(layer, *tokens(1, 200), chunk=50)
    layer.write(*tokens(2, 12))
    answers_as_it_reads(layer, queries(3, 12))


def test_freed_memory_is_returned():
    layer = make_layer(**LADDERS["seven"])
    grow(layer, *tokens(1, 400))
    before = total_bytes([tensor for _, tensor in layer.tensors()])
    layer.crop(40)
    small = total_bytes([tensor for _, tensor in layer.tensors()])
    fresh = make_layer(**LADDERS["seven"])
    grow(fresh, *tokens(1, 40))
    assert small < before / 4
    assert small <= total_bytes([tensor for _, tensor in fresh.tensors()]) + 2 * HEADS * 16 * DIM * 4
    layer.reset()
    assert list(layer.tensors()) == []
    assert (layer.length, layer.values, layer.where) == (0, 0, [])


def test_stages_hold_the_bytes_that_their_tiers_declare():
    layer = make_layer(**LADDERS["seven"], dtype="float16")
    grow(layer, *tokens(1, 300))
    parts = measure(layer.tensors(), layer.values).parts
    for place, stage in enumerate(layer.plan.stages):
        numbers = len(layer.pools[place]) * HEADS * 8 * DIM
        declared = sum(stage.tier(role).bits(role, 8, DIM) for role in ("keys", "values"))
        assert parts[f"stage.{place}"] == numbers * declared / 8
    assert parts["window"] == 2 * HEADS * 16 * DIM * 2


# Numbers that no tier can keep


BAD = [float("nan"), float("inf"), float("-inf"), 4e4, -1e30]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bad_numbers_are_refused_and_what_is_held_stays(bad, which, dtype):
    """A sentence that names the number; every page before it reads as before, and cropped it goes on as if never seen."""
    options = LADDERS["seven"] | {"anchors": {"sinks": {}, "novelty": {}}, "outliers": "sigma", "dtype": dtype}
    layer = make_layer(**options)
    first, more = tokens(1, 75), tokens(2, 60)
    grow(layer, *first)
    spoilt = [x.clone() for x in more]
    spoilt[which][0, 1, 40, 3] = bad
    layer.write(*spoilt)
    with pytest.raises(RangeError, match="a tier keeps finite numbers up to 32752"):
        age([layer])
    # Two blocks of pages leave the window: the first is stored, the second holds the number and stays.
    assert (layer.length, len(layer.where), len(layer.window)) == (135, 12, 135 - 96)
    assert all(x.isfinite().all() for x in layer.read(range(12)))
    with pytest.raises(RangeError):
        age([layer])
    assert (layer.length, len(layer.where), sum(map(len, layer.pools))) == (135, 12, 12)
    before = layer.read(range(12))
    layer.crop(75 + 40)
    assert layer.length == 115
    for x, stored, old, new in zip(contents(layer), before, first, more, strict=True):
        assert torch.equal(x[:, :, :96], stored)
        assert torch.equal(x[:, :, 96:], torch.cat([old, new], 2)[:, :, 96:115])
    grow(layer, *tokens(4, 30))
    assert len(layer.where) == 17
    answers_as_it_reads(layer, queries(5, 4))


def test_a_crop_under_autocast():
    """A page that comes back to the window is read in float32."""
    layers = [make_layer(("jl",)) for _ in range(2)]
    for layer in layers:
        grow(layer, *tokens(1, 75))
    with torch.autocast("cpu", torch.bfloat16):
        layers[0].crop(20)
    layers[1].crop(20)
    for x, y in zip(contents(layers[0]), contents(layers[1]), strict=True):
        assert torch.equal(x, y)


def test_bad_numbers_in_the_window_are_no_matter_yet():
    layer = make_layer(**LADDERS["exact"])
    keys, values = tokens(1, 8)
    keys[0, 0, 7] = float("nan")
    grow(layer, keys, values)
    layer.crop(7)
    grow(layer, *tokens(2, 20))
    answers_as_it_reads(layer, queries(3, 2))


# Crops


@pytest.mark.parametrize("length", [0, 1, 8, 11, 16, 63, 64, 65, 95, 96, 97, 100])
def test_crop_anywhere(layer, length):
    """What is kept is what was there, to the bit, and the cache goes on."""
    grow(layer, *tokens(1, 100), chunk=40)
    before = contents(layer)
    layer.crop(length)
    assert layer.length == length
    if length:
        for x, wanted in zip(contents(layer), before, strict=True):
            assert torch.equal(x, wanted[:, :, :length])
    grow(layer, *tokens(2, 50), chunk=9)
    assert layer.length == length + 50
    answers_as_it_reads(layer, queries(3, 5))


def test_crop_to_nothing_is_a_fresh_cache(layer):
    grow(layer, *tokens(1, 100))
    layer.crop(0)
    assert list(layer.tensors()) == []
    grow(layer, *tokens(2, 70))
    fresh = LayerCache(layer.plan)
    grow(fresh, *tokens(2, 70))
    for x, wanted in zip(contents(layer), contents(fresh), strict=True):
        assert torch.equal(x, wanted)


@pytest.mark.parametrize("length", [-1, 101])
def test_crop_beyond_what_is_held(layer, length):
    grow(layer, *tokens(1, 100))
    with pytest.raises(ArgusError, match="allowed is 0 to 100"):
        layer.crop(length)
    assert layer.length == 100


# Rows


def test_rows_do_not_know_each_other(layer):
    """A row of a batch is kept and answered as if it were alone."""
    keys, values = tokens(1, 120, batch=3)
    grow(layer, keys, values, chunk=37)
    q = queries(2, 4, batch=3)
    found = ask(layer, q)
    for row in range(3):
        alone = LayerCache(layer.plan)
        grow(alone, keys[row : row + 1], values[row : row + 1], chunk=37)
        torch.testing.assert_close(contents(layer)[0][row : row + 1], contents(alone)[0], **CLOSE)
        torch.testing.assert_close(found[row : row + 1], ask(alone, q[row : row + 1]), **CLOSE)


def test_rows_can_be_chosen(layer):
    grow(layer, *tokens(1, 100, batch=3), chunk=40)
    before = contents(layer)
    rows = torch.tensor([2, 0, 2, 2])
    layer.select(rows)
    assert layer.shape == (4, HEADS, DIM)
    for x, wanted in zip(contents(layer), before, strict=True):
        assert torch.equal(x, wanted[rows])
    grow(layer, *tokens(2, 30, batch=4))
    answers_as_it_reads(layer, queries(3, 3, batch=4))


def test_a_copy_goes_its_own_way(layer):
    grow(layer, *tokens(1, 100))
    ask(layer, queries(2, 1))
    twin, before = copy.deepcopy(layer), contents(layer)
    assert twin.plan is layer.plan
    grow(twin, *tokens(3, 60))
    twin.crop(20)
    for x, wanted in zip(contents(layer), before, strict=True):
        assert torch.equal(x, wanted)
    answers_as_it_reads(layer, queries(2, 2))
    mine, other = ({x.untyped_storage().data_ptr() for _, x in held.tensors()} for held in (layer, twin))
    assert not mine & other


def test_sinks_count_from_the_first_real_token():
    """Each row's own padding is left out, and the first real tokens of each are kept to the bit."""
    layer = make_layer(("int2",), anchors={"sinks": {"tokens": 4}})
    keys, values = tokens(1, 60, batch=3)
    padding = torch.tensor([0, 5, 9])
    grow(layer, keys, values, text=Context(padding=padding))
    for row, pad in enumerate(padding.tolist()):
        for head in range(HEADS):
            held = layer.exact.positions[row, head]
            assert sorted(held[held >= 0].tolist()) == list(range(pad, pad + 4))
        for x, wanted in zip(contents(layer), (keys, values), strict=True):
            assert torch.equal(x[row, :, pad : pad + 4], wanted[row, :, pad : pad + 4])
            assert not torch.equal(x[row, :, pad + 4], wanted[row, :, pad + 4])


# Masks, softcap, learned sinks


def masked(kind: str, batch: int, steps: int, held: int) -> Tensor:
    """Left padding of row 0, a sliding window of 40, causal."""
    step, token = torch.arange(held - steps, held)[:, None], torch.arange(held)
    seen = ((token <= step) & (token > step - 40)).expand(batch, 1, -1, -1).clone()
    seen[0, :, :, :11] = False
    return seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0}, {"sinks": True}, {"softcap": 2.0, "sinks": True}])
def test_masks(layer, kind, steps, extra):
    grow(layer, *tokens(1, 110, batch=2), chunk=60)
    options = {**extra, "mask": masked(kind, 2, steps, 110)}
    if "sinks" in extra:
        options["sinks"] = torch.linspace(-1, 2, HEADS * GROUPS)
    answers_as_it_reads(layer, queries(2, steps, batch=2), **options)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_rows_that_see_nothing(layer, kind):
    """No NaN, in rows that see nothing at all nor in their neighbours."""
    grow(layer, *tokens(1, 110, batch=2))
    mask = masked(kind, 2, 3, 110)
    mask[1, :, 1] = False if kind == "bool" else -torch.inf
    q = queries(2, 3, batch=2)
    found = ask(layer, q, mask=mask)
    assert torch.equal(found[1, :, 1], torch.zeros(HEADS * GROUPS, DIM))
    assert found[0].abs().amin(-1).gt(0).all()
    answers_as_it_reads(layer, q, mask=mask)


def test_later_tokens_are_not_seen(layer):
    """Queries amid the held tokens, as after several writes, see only up to themselves."""
    grow(layer, *tokens(1, 96))
    layer.write(*tokens(2, 7))
    answers_as_it_reads(layer, queries(3, 7))


def test_reading_outliers_leaves_codes_as_they_are():
    """A tier may decode to what it keeps: exact numbers written over that would widen the ranges of later stages."""
    layer = make_layer(("fp16", "int4"), outliers={"policy": "topk", "share": 0.1}, dtype="float32")
    grow(layer, *tokens(1, 40))
    before = [{name: x.clone() for name, x in slab.items()} for pool in layer.pools for slab in pool.slabs]
    ask(layer, queries(2, 1))
    contents(layer)
    after = [slab for pool in layer.pools for slab in pool.slabs]
    for slab, kept in zip(after, before, strict=True):
        assert all(torch.equal(slab[name], x) for name, x in kept.items())


def test_values_may_have_another_head_dim() -> None:
    layer = make_layer(order=("int8",))
    keys, values = tokens(0, 200)
    layer.write(keys, values[..., : DIM // 2])
    age([layer])
    assert layer.values == HEADS * 200 * (DIM + DIM // 2)
    with pytest.raises(ArgusError, match="cannot follow those held"):
        layer.write(*tokens(1, 1))
