"""When pages are encoded and where they go: prompts in chunks, one encoding a page, cascades, and what a policy may answer."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from argus.engine import LayerCache
from argus.errors import ArgusError, PluginError
from argus.hookspecs import hookimpl
from argus.policies.base import Aging, Outliers, PageFacts, StageFacts, check_chosen, check_targets
from argus.testing import check_outliers
from argus.tiers.fp16 import Fp16
from argus.turns import age
from tests.conftest import ask, config, contents, grow, make_layer, make_plan, queries, tokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("chunk", [1, 3, 8, 29, 64])
@pytest.mark.parametrize("anchors", [{}, {"sinks": {"tokens": 3}}])
def test_prefill_in_chunks_is_prefill_at_once(chunk, anchors):
    """With exact stages: tokens, attention and where each page is."""
    options = {"order": ("fp16",), "block_pages": 3, "anchors": anchors}
    whole, parts = make_layer(**options), make_layer(**options)
    keys, values = tokens(1, 130)
    grow(whole, keys, values)
    grow(parts, keys, values, chunk=chunk)
    assert parts.where == whole.where
    for x, wanted in zip(contents(parts), (keys, values), strict=True):
        assert torch.equal(x, wanted)
    q = queries(2, 5)
    torch.testing.assert_close(ask(parts, q), ask(whole, q), **CLOSE)


class Counting(Fp16):
    """fp16 that notes how many pages it encodes."""

    encoded = 0

    def encode(self, x, role):
        type(self).encoded += len(x)
        return super().encode(x, role)


class Sums(Fp16):
    """Keeps one page of all."""

    def encode(self, x, role):
        return {"codes": x.half().sum(0)}


def test_a_payload_without_its_pages_is_refused():
    class Plugin:
        @hookimpl
        def argus_tiers(self):
            return {"sums": Sums}

    layer = make_layer(("sums",), extra=[Plugin()])
    keys, values = tokens(1, 64)
    with pytest.raises(PluginError, match=r"stage 'sums' keeps keys.codes as .*; allowed: \[\d, 1, ...\], pages and"):
        grow(layer, keys, values)
    assert layer.length == 64
    assert not layer.where


def test_a_payload_without_its_pages_is_refused_of_a_later_stage_too():
    class Plugin:
        @hookimpl
        def argus_tiers(self):
            return {"sums": Sums}

    layer = make_layer(("int8", "sums"), {"int8": 16}, extra=[Plugin()])
    keys, values = tokens(1, 40)
    grow(layer, keys[:, :, :28], values[:, :, :28])
    assert layer.where == [0, 0]
    with pytest.raises(PluginError, match=r"stage 'sums' keeps keys\.codes as"):
        grow(layer, keys[:, :, 28:], values[:, :, 28:])
    assert layer.where == [0, 0]
    assert layer.length == 40


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (lambda x: x.half(), "keys as a Tensor; allowed: tensors by name"),
        (lambda x: None, "keys as a NoneType; allowed: tensors by name"),
        (lambda x: {}, "keys as no tensor; allowed: tensors by name"),
        (lambda x: {"codes": x.tolist()}, "keys.codes as a list; allowed: a tensor"),
    ],
)
def test_a_payload_that_is_no_tensors_by_name_is_refused(payload, said):
    class Malformed(Fp16):
        def encode(self, x, role):
            return payload(x)

    class Plugin:
        @hookimpl
        def argus_tiers(self):
            return {"malformed": Malformed}

    layer = make_layer(("malformed",), extra=[Plugin()])
    with pytest.raises(PluginError, match=f"^stage 'malformed' keeps {said}$"):
        grow(layer, *tokens(1, 64))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (torch.ones(3, 8, dtype=torch.bool), r"a tensor of \[3, 8\]"),
        (torch.ones(1, 1, 1, 1, 8, dtype=torch.bool), r"a tensor of \[1, 1, 1, 1, 8\]"),
        (torch.ones(8), "a torch.float32 tensor"),
        ([True] * 8, "a list"),
    ],
    ids=str,
)
def test_what_a_policy_may_choose(chosen, said):
    allowed = r"allowed: a bool tensor that broadcasts to \[7, 1, 2, 8\]"
    with pytest.raises(ArgusError, match=rf"^policy Policy answers with {said}; {allowed}"):
        check_chosen(chosen, (7, 1, 2, 8), type("Policy", (), {})())
    for fine in (torch.ones(8, dtype=torch.bool), torch.zeros(7, 1, 1, 8, dtype=torch.bool)):
        check_chosen(fine, (7, 1, 2, 8), None)


class Broad(Outliers):
    """Whole tokens, by a mask that is not of the pages' shape."""

    def choose(self, x, role):
        return x[..., :1] > 1


class AtTimes(Outliers):
    """Keys and values of the first pages only."""

    first = True

    def choose(self, x, role):
        known, self.first = self.first, self.first and role == "keys"
        return x > 1 if known else None


class Later(AtTimes):
    def choose(self, x, role):
        return None if super().choose(x, role) is not None else x > 1


@pytest.mark.parametrize("anchors", [{}, {"sinks": {}}], ids=["no anchors", "anchors"])
def test_outliers_are_of_the_shape_of_pages(anchors):
    layer = make_layer(("int4",), anchors=anchors, outliers="mine", extra=[outlying(Broad)])
    allowed = r"allowed: a bool tensor of \[1, 1, 2, 8, 8\]"
    with pytest.raises(ArgusError, match=rf"^policy Broad answers with a tensor of \[1, 1, 2, 8, 1\]; {allowed}$"):
        grow(layer, *tokens(1, 24), chunk=8)
    assert not layer.where


@pytest.mark.parametrize("kind", [AtTimes, Later])
def test_outliers_are_chosen_always_or_never(kind):
    """A page without a row would be given its neighbour's numbers."""
    layer = make_layer(("int4",), outliers="mine", extra=[outlying(kind)])
    grow(layer, *tokens(1, 16))
    assert len(layer.where) == 1
    with pytest.raises(ArgusError, match=r"answers None for some pages of \w+, not for all; allowed: always or never"):
        grow(layer, *tokens(2, 16))
    assert len(layer.where) == 1
    assert layer.length == 32


def outlying(kind: type[Outliers]) -> object:
    """A plugin with the outlier policy ``mine``."""

    class Plugin:
        @hookimpl
        def argus_outliers(self):
            return {"mine": kind}

    return Plugin()


def counting(names: list[str]) -> tuple[object, dict[str, type[Counting]]]:
    """A plugin with a counting tier for each name."""
    kinds = {name: type(name, (Counting,), {"encoded": 0}) for name in names}

    class Plugin:
        @hookimpl
        def argus_tiers(self):
            return kinds

    return Plugin(), kinds


def test_a_long_prompt_is_encoded_once_straight_into_its_stage():
    names = ["first", "second", "third", "last"]
    plugin, kinds = counting(names)
    capacities = {"first": 16, "second": 32, "third": 8}
    layer = LayerCache(make_plan(config(names, capacities, options={name: {} for name in names}, window=8), [plugin]))
    grow(layer, *tokens(1, 168))
    assert len(layer.where) == 20
    assert [len(pool) for pool in layer.pools] == [2, 4, 1, 13]
    assert {name: kind.encoded / 2 for name, kind in kinds.items()} == {"first": 2, "second": 4, "third": 1, "last": 13}
    grow(layer, *tokens(2, 8))
    # One page is born, and one moves on from each stage but the last.
    assert {name: kind.encoded / 2 for name, kind in kinds.items()} == {"first": 3, "second": 5, "third": 2, "last": 14}


def test_a_page_moves_once_a_stage():
    names = ["first", "second", "last"]
    plugin, kinds = counting(names)
    chosen = config(names, {"first": 8, "second": 8}, options={name: {} for name in names})
    layer = LayerCache(make_plan(chosen, [plugin]))
    grow(layer, *tokens(1, 88), chunk=1)
    assert len(layer.where) == 10
    assert {name: kind.encoded / 2 for name, kind in kinds.items()} == {"first": 10, "second": 9, "last": 8}


CASCADED = {"capacities": {"int8": 8, "int4": 16}, "window": 8}


def read_all(layer: LayerCache) -> Tensor:
    return torch.cat(layer.read(list(range(len(layer.where)))), -1)


def test_a_cascade_at_once_is_a_decoding_run():
    """A prompt written at once ends as if its pages had gone through every stage one by one."""
    prompt = tokens(1, 120)
    order = ("int8", "int4", "sign")
    once, cascade = (make_layer(order, encode=encode, **CASCADED) for encode in ("once", "cascade"))
    decoding = make_layer(order, **CASCADED)
    for layer in (once, cascade):
        grow(layer, *prompt)
    grow(decoding, *prompt, chunk=1)
    assert once.where == cascade.where == decoding.where
    assert set(cascade.where) == {0, 1, 2}
    torch.testing.assert_close(read_all(cascade), read_all(decoding))
    assert not torch.allclose(read_all(cascade), read_all(once))
    assert {name: len(pool) for name, pool in enumerate(cascade.pools)} == {0: 1, 1: 2, 2: 11}


def test_a_page_that_skips_stages_cascades_through_them():
    """A page of the first stage that moves to the last in one step is encoded by the one between as well."""
    names = ["first", "second", "last"]
    for encode, encoded in (("once", 1), ("cascade", 8)):
        plugin, kinds = counting(names)
        chosen = config(names, {"first": 24, "second": 8}, options={name: {} for name in names}, encode=encode)
        layer = LayerCache(make_plan(chosen, [plugin]))
        grow(layer, *tokens(1, 32))
        assert layer.where == [0, 0, 0]
        assert kinds["second"].encoded == 0
        grow(layer, *tokens(2, 64))
        assert layer.where == [2] * 7 + [1] + [0] * 3
        # Of eleven pages one stays in the second stage; seven pass through it, three of them from the first.
        assert kinds["second"].encoded / 2 == encoded


# What an ageing policy may answer


class Backwards(Aging):
    def targets(self, pages, stages):
        return [0] * len(pages)


class Ageing:
    def __init__(self, kind):
        self.kind = kind

    @hookimpl
    def argus_aging(self):
        return {"mine": self.kind}


def test_a_policy_that_moves_pages_back_is_refused():
    chosen = config(("int4", "int2"), {"int4": 8})
    layer = make_layer(("int4", "int2"), {"int4": 8})
    grow(layer, *tokens(1, 60))
    layer.plan = make_plan(chosen.model_copy(update={"aging": type(chosen.aging)(policy="mine")}), [Ageing(Backwards)])
    before = contents(layer)
    layer.write(*tokens(2, 10))
    with pytest.raises(ArgusError, match="the aging policy sends page 0 to stage 0; allowed are stages 1 to 1"):
        age([layer])
    for x, wanted in zip(contents(layer), before, strict=True):
        assert torch.equal(x[:, :, :60], wanted)


@pytest.mark.parametrize("targets", [[0, 2], [0, -1]])
def test_targets_are_stages(targets):
    with pytest.raises(ArgusError, match=r"page 1 to stage .*; allowed are stages 0 to 1"):
        check_targets([None, None], targets, 2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0], r"gives 1 stages for 2 pages; allowed: one a page"),
        ([0, 0, 0], r"gives 3 stages for 2 pages; allowed: one a page"),
        ([0, 0.0], r"sends page 1 to stage 0\.0; allowed are stages 0 to 1"),
        ([0, None], r"sends page 1 to stage None; allowed are stages 0 to 1"),
        (None, r"answers with a NoneType; allowed: a list of one stage a page"),
        (torch.zeros(2, dtype=torch.long), r"answers with a Tensor; allowed: a list of one stage a page"),
    ],
)
def test_a_policy_that_answers_otherwise_is_refused(answer, message):
    class Answers(Aging):
        def targets(self, pages, stages):
            return answer

    chosen = config(("int4", "int2"), {"int4": 8}, aging="mine")
    layer = LayerCache(make_plan(chosen, [Ageing(Answers)]))
    layer.write(*tokens(1, 24))
    with pytest.raises(ArgusError, match=f"the aging policy {message}$"):
        age([layer])
    assert layer.where == []


class Expanded(Outliers):
    """Whole pages that hold a number beyond 3, as a view of one answer a page."""

    masks: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def choose(self, x, role):
        wide = (x.abs().amax((-1, -2), keepdim=True) > 3).expand_as(x)
        self.masks.append((wide, wide.clone()))
        return wide


class Kept(Outliers):
    """The first number of every token, by a mask that it makes once for each shape."""

    masks: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def choose(self, x, role):
        for mask, _ in self.masks:
            if mask.shape == x.shape:
                return mask
        mask = torch.zeros(x.shape, dtype=torch.bool)
        mask[..., 0] = True
        self.masks.append((mask, mask.clone()))
        return mask


@pytest.mark.parametrize("kind", [Expanded, Kept])
def test_the_masks_of_outlier_policies_are_not_written_to(kind):
    """Beside anchors, whose numbers are no outliers as well."""
    kind.masks.clear()
    check_outliers(kind)
    kind.masks.clear()

    class Plugin:
        @hookimpl
        def argus_outliers(self):
            return {"mine": kind}

    layer = make_layer(("int4",), anchors={"sinks": {"tokens": 3}}, outliers="mine", extra=[Plugin()])
    keys, values = tokens(1, 60)
    grow(layer, keys, values, chunk=20)
    assert layer.exact.positions.shape[-1] == 3
    assert kind.masks
    assert all(torch.equal(mask, before) for mask, before in kind.masks)
    read = contents(layer)[0]
    assert torch.equal(read[:, :, :3], keys[:, :, :3])
    if kind is Kept:
        assert torch.equal(read[..., 0], keys[..., 0])


def test_a_policy_is_asked_of_every_page():
    asked = []

    class Asking(Backwards):
        def targets(self, pages, stages):
            asked.append((pages, stages))
            return super().targets(pages, stages)

    chosen = config(("int4",), {"int4": 24}, aging="mine")
    layer = LayerCache(make_plan(chosen, [Ageing(Asking)]))
    grow(layer, *tokens(1, 24))
    grow(layer, *tokens(1, 8))
    stage = [StageFacts("int4", 3)]
    assert asked == [
        ([PageFacts(1, None), PageFacts(0, None)], stage),
        ([PageFacts(2, 0), PageFacts(1, 0), PageFacts(0, None)], stage),
    ]


@pytest.mark.parametrize("fails", [1, 2, 3, 4, 5])
def test_a_move_that_fails_leaves_what_was_held(monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    """Whichever of its encodings a tier breaks off at: nothing is kept twice, and what is tried again is right."""
    options = {"order": ("int8", "int4"), "capacities": {"int8": 8}, "anchors": {"sinks": {}}}
    options["outliers"] = {"policy": "topk", "share": 0.05}
    layer, sound = make_layer(**options), make_layer(**options)
    for one in (layer, sound):
        grow(one, *tokens(0, 40))
        one.write(*tokens(1, 8))
    real, asked = layer.plan.backend.recode, []

    def recode(*args: Any) -> Any:
        asked.append(args)
        if len(asked) == fails:
            raise RuntimeError("out of memory")
        return real(*args)

    monkeypatch.setattr(layer.plan.backend, "recode", recode)
    for _ in range(2):
        try:
            age([layer])
        except RuntimeError:
            assert len(asked) == fails
    monkeypatch.undo()
    age([layer])
    age([sound])
    assert layer.where == sound.where
    for pool, other in zip(layer.pools, sound.pools, strict=True):
        assert sorted(pool.pages) == sorted(other.pages)
    for got, want in zip(contents(layer), contents(sound), strict=True):
        torch.testing.assert_close(got, want)
    assert layer.exact.positions.tolist() == sound.exact.positions.tolist()


def test_with_slack_pages_leave_together():
    """As many as fit between the window and what it holds; until then all are exact."""
    layer = make_layer(("int4",), window=8, page_size=8, slack=16)
    grow(layer, *tokens(1, 31))
    assert (layer.where, len(layer.window), layer.room) == ([], 31, 1)
    grow(layer, *tokens(2, 1))
    assert (len(layer.where), len(layer.window)) == (3, 8)
    grow(layer, *tokens(3, 45), chunk=45)
    assert (len(layer.where), len(layer.window)) == (8, 13)
    layer.reserve()
    assert layer.room == layer.plan.most - 13 == 19
