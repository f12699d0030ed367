"""The cache as transformers uses it: lossy ladders, what generate asks of it, and what a patch leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from argus import ArgusCache, load_cache_config, patch_model_with_argus, turns, unpatch
from argus.adapters.huggingface import line_ends, make_plan
from argus.backends.cpu import CpuBackend
from argus.errors import ArgusError, ConfigError
from argus.pages import Pool
from argus.policies.anchors import Sinks
from tests.models import SMALL, tiny

LOSSY = ["tiers=int4", "tiers.page_size=8", "tiers.window=8", "outliers=topk", "anchors.sinks.tokens=2"]


@pytest.fixture
def model():
    made = tiny("llama")
    yield made
    unpatch(made)


def ids(length: int, rows: int = 1, seed: int = 5) -> torch.Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def feed(model, cache, tokens, **options):
    return model(tokens, past_key_values=cache, **options).logits


def test_beams_with_lossy_stages_are_rows_of_their_own(model):
    """Reordering rows and then decoding is decoding rows that were in that order from the start."""
    tokens, rows = ids(60, 3), torch.tensor([2, 0, 0])
    cache, straight = ArgusCache(model, LOSSY), ArgusCache(model, LOSSY)
    feed(model, cache, tokens)
    cache.reorder_cache(rows)
    feed(model, straight, tokens[rows])
    more = ids(12, 3, seed=6)
    torch.testing.assert_close(feed(model, cache, more), feed(model, straight, more), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("indices", [torch.tensor([1]), torch.tensor([False, True, False])])
def test_rows_are_repeated_and_selected(model, indices):
    tokens = ids(60, 3)
    cache, straight = ArgusCache(model, LOSSY), ArgusCache(model, LOSSY)
    feed(model, cache, tokens)
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].batch_size == 6
    cache.batch_select_indices(indices.repeat_interleave(2) if indices.dtype == torch.bool else torch.tensor([2, 3]))
    assert cache.layers[0].batch_size == 2
    feed(model, straight, tokens[[1, 1]])
    more = ids(12, 2, seed=6)
    torch.testing.assert_close(feed(model, cache, more), feed(model, straight, more), rtol=1e-3, atol=1e-3)


def test_line_ends_are_known_by_their_ids(model):
    """Anchors by token id: also with a padded batch, after a crop, and in later turns."""
    options = ["tiers=int2", "tiers.page_size=8", "tiers.window=8", "anchors=lines", "anchors.sinks.tokens=0"]
    options += ["+anchors.lines.ids=[7]", "anchors.lines.tokens=1"]
    cache = ArgusCache(model, options)
    tokens = ids(40).masked_fill(ids(40) == 7, 8)
    tokens[0, [5, 20]] = 7
    feed(model, cache, tokens)
    cache.crop(-22)
    more = ids(40, seed=6).masked_fill(ids(40, seed=6) == 7, 8)
    more[0, [0, 13]] = 7
    feed(model, cache, more)
    for layer in cache.layers:
        for head in layer.engine.exact.positions[0]:
            assert sorted(p for p in head.tolist() if p >= 0) == [5, 18, 31]


PROMPTS = {
    "lines": [*LOSSY, "anchors=lines", "+anchors.lines.ids=[7]", "tiers.block_pages=3", "tiers.slack=16"],
    "salience": [*LOSSY, "anchors=salience", "aging=salience", "tiers.block_pages=3"],
    "ladder": [
        "tiers=default", "tiers.page_size=8", "tiers.window=8", "tiers.order=[int8,int4]", "tiers.stages.int8.capacity=32",
        "tiers.block_pages=2",
    ],
}  # fmt: skip


@pytest.mark.parametrize("options", PROMPTS.values(), ids=PROMPTS)
def test_prompts_whose_layers_take_their_turn_together(model, options, monkeypatch):
    """The same as layer after layer and block after block: also with padding, and with a second prompt after the first."""
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :21] = 0
    found, sizes = [], []
    take = turns.take
    monkeypatch.setattr(turns, "take", lambda taken: (sizes.append(len(taken)), take(taken)))
    for at_once in (0, 1 << 22):
        monkeypatch.setattr(CpuBackend, "at_once", at_once)
        cache = ArgusCache(model, [*options, "backend=cpu"])
        feed(model, cache, ids(90, 2), attention_mask=mask)
        more = torch.cat([mask, torch.ones(2, 40, dtype=torch.long)], 1)
        logits = feed(model, cache, ids(40, 2, seed=6), attention_mask=more)
        held = [layer.engine.exact.positions.flatten(0, 1).tolist() for layer in cache.layers]
        kept = [[sorted(p for p in head if p >= 0) for head in heads] for heads in held]
        found.append((logits, [layer.engine.where for layer in cache.layers], kept))
    assert set(sizes) >= {1, 3}
    for one, other in zip(*found, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        else:
            assert one == other


def test_a_copy_made_in_a_pass_is_in_none(model, monkeypatch):
    monkeypatch.setattr(CpuBackend, "at_once", 1 << 22)
    cache, made = ArgusCache(model, [*LOSSY, "backend=cpu"]), []
    feed(model, cache, ids(20))
    hook = model.model.layers[1].register_forward_hook(lambda *_: made.append(copy.deepcopy(cache)))
    feed(model, cache, ids(60))
    hook.remove()
    made[0].keep(20)
    for _ in range(2):
        feed(model, made[0], ids(60))
    assert all(len(layer.engine.window) < 16 for layer in made[0].layers)


def test_a_cache_that_was_torn_is_refused_until_it_is_reset(model, monkeypatch):
    """Memory that ran out, or an interrupt, while pages of several layers were put away."""
    monkeypatch.setattr(CpuBackend, "at_once", 1 << 22)
    cache, add, calls = ArgusCache(model, [*LOSSY, "backend=cpu"]), Pool.add, []

    def failing(pool, *given):
        calls.append(pool)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add(pool, *given)

    feed(model, cache, ids(20))
    calls.clear()
    monkeypatch.setattr(Pool, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, ids(60))
    monkeypatch.setattr(Pool, "add", add)
    with pytest.raises(ArgusError, match=r"since a step was broken off; allowed: cache\.reset"):
        feed(model, cache, ids(1))
    cache.reset()
    fresh = ArgusCache(model, [*LOSSY, "backend=cpu"])
    assert torch.equal(feed(model, cache, ids(60)), feed(model, fresh, ids(60)))


@pytest.mark.parametrize("at_once", [0, 1 << 22])
def test_what_was_broken_off_before_pages_were_kept_leaves_no_trace(model, monkeypatch, at_once):
    """Also where numbers that no tier keeps are among them, which are not what is told then."""
    monkeypatch.setattr(CpuBackend, "at_once", at_once)
    cache, fresh = (ArgusCache(model, [*LOSSY, "backend=cpu"]) for _ in range(2))
    for one in (cache, fresh):
        feed(model, one, ids(30))

    def interrupted(policy, pages):
        assert bool(pages.keys.isfinite().all())
        raise KeyboardInterrupt

    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *given: given[2] * torch.nan)
    with monkeypatch.context() as patches:
        patches.setattr(Sinks, "choose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            feed(model, cache, ids(30))
    hook.remove()
    more = ids(40, seed=6)
    torch.testing.assert_close(feed(model, cache, more), feed(model, fresh, more), rtol=1e-4, atol=1e-4)


def test_a_reset_cache_is_empty(model):
    cache = ArgusCache(model, LOSSY)
    feed(model, cache, ids(60))
    assert cache.ledger().bytes > 0
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.ledger().bytes == sum(x.nbytes for name, x in cache.tensors())
    assert {name for name, _ in cache.tensors()} <= {"shared", "tokens"}
    fresh = ArgusCache(model, LOSSY)
    torch.testing.assert_close(feed(model, cache, ids(60, seed=8)), feed(model, fresh, ids(60, seed=8)))


@pytest.mark.parametrize("count", [-70, -60, -59, -13, -1])
def test_crop_by_a_negative_count(model, count):
    cache = ArgusCache(model, LOSSY)
    feed(model, cache, ids(60))
    cache.crop(count)
    assert cache.get_seq_length() == max(0, 60 + count)
    assert feed(model, cache, ids(9, seed=7)).isfinite().all()
    assert cache.get_seq_length() == max(0, 60 + count) + 9


def test_a_copy_is_independent(model):
    cache = ArgusCache(model, LOSSY)
    feed(model, cache, ids(60))
    twin = copy.deepcopy(cache)
    wanted = feed(model, copy.deepcopy(cache), ids(5, seed=9))
    feed(model, cache, ids(40, seed=7))
    assert twin.plan is cache.plan
    torch.testing.assert_close(feed(model, twin, ids(5, seed=9)), wanted)


def test_other_caches_still_work_on_an_activated_model(model):
    """The attention that ARGUS registers computes densely for any other cache, in chunks and padded too."""
    tokens, mask = ids(30, 2), torch.ones(2, 30, dtype=torch.long)
    mask[0, :6] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)

    def through() -> torch.Tensor:
        cache, out = DynamicCache(), []
        for begin, end in ((0, 13), (13, 29), (29, 30)):
            part = {"attention_mask": mask[:, :end], "position_ids": places[:, begin:end]}
            out.append(feed(model, cache, tokens[:, begin:end], **part))
        return torch.cat(out, 1)

    plain = through()
    ArgusCache(model, LOSSY)
    found = through()
    torch.testing.assert_close(found[0, 6:], plain[0, 6:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(dtype):
    model = tiny("llama").to(dtype)
    cache = ArgusCache(model, LOSSY)
    logits = feed(model, cache, ids(60))
    assert logits.dtype == dtype
    assert feed(model, cache, ids(3)).isfinite().all()
    assert cache.plan.dtype == dtype
    assert {part[0].dtype for layer in cache.layers for part in layer.engine.window.parts()} == {dtype}


def test_patched_twice_then_unpatched(model):
    """The second patch replaces the first, and nothing is left after."""
    before = model.config._attn_implementation
    patch_model_with_argus(model, "int8")
    patch_model_with_argus(model, LOSSY)
    out = model.generate(ids(50), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.plan.page_size == 8
    unpatch(model)
    assert model.config._attn_implementation == before
    assert not model._forward_pre_hooks
    assert "generate" not in vars(model)


def test_use_cache_false_is_what_it_says(model):
    patch_model_with_argus(model, LOSSY)
    with torch.no_grad():
        assert model(ids(20), use_cache=False).past_key_values is None
        assert isinstance(model(ids(20)).past_key_values, ArgusCache)


@pytest.mark.parametrize("choice", ["int4", ["tiers=int4", "tiers.window=8"], load_cache_config("int4")])
def test_a_choice_in_every_shape(model, choice):
    plan = make_plan(model, choice)
    assert [stage.facts.name for stage in plan.stages] == ["int4"]
    assert plan.window == (8 if isinstance(choice, list) else load_cache_config("int4").tiers.window)


def test_a_wrong_choice_leaves_the_model_as_it_was(model):
    before = model.config._attn_implementation
    for use in (ArgusCache, patch_model_with_argus):
        with pytest.raises(ConfigError, match="'tiers/int5' is no config; allowed: "):
            use(model, "int5")
        with pytest.raises(ConfigError, match="group_size 7 does not divide"):
            use(model, ["tiers=int4", "tiers.stages.int4.group_size=7"])
    assert model.config._attn_implementation == before
    assert "generate" not in vars(model)


def test_line_ends_are_read_from_the_tokenizer():
    class Tokenizer:
        def __len__(self):
            return 4

        def batch_decode(self, rows):
            return [["a", "b\n", " ", "\n\n"][row[0]] for row in rows]

    assert line_ends(Tokenizer()) == (1, 3)
    assert SMALL["head_dim"] == 8
