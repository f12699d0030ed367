"""With every stage exact, ARGUS answers token for token as DynamicCache does."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from argus import ArgusCache, patch_model_with_argus, unpatch
from tests.models import FAMILIES, tiny

EXACT = ["tiers=exact", "tiers.page_size=4", "tiers.window=4", "tiers.dtype=float32", "tiers.block_pages=3"]
NEW = 24


def prompt(rows: int = 1, length: int = 37) -> torch.Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(5))


def padded() -> dict[str, torch.Tensor]:
    ids = prompt(2)
    mask = torch.ones_like(ids)
    ids[0, :9] = 0
    mask[0, :9] = 0
    return {"input_ids": ids, "attention_mask": mask}


MODES = {
    "greedy": ({"input_ids": prompt()}, {}),
    "left padding": (padded(), {}),
    "beams": ({"input_ids": prompt(2)}, {"num_beams": 4}),
    "several": ({"input_ids": prompt()}, {"num_beams": 4, "num_return_sequences": 3}),
    "prompt lookup": ({"input_ids": prompt().repeat(1, 2)}, {"prompt_lookup_num_tokens": 3}),
    "chunked prefill": ({"input_ids": prompt()}, {"prefill_chunk_size": 7}),
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request):
    return tiny(request.param)


def ask(model, inputs, **options):
    defaults = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(inputs["input_ids"])}
    return model.generate(**{**defaults, **inputs, **options})


@pytest.mark.parametrize("mode", sorted(MODES))
def test_generate(model, mode):
    inputs, options = MODES[mode]
    expected = ask(model, inputs, **options)
    cache = ArgusCache(model, EXACT)
    try:
        found = ask(model, inputs, past_key_values=cache, **options)
    finally:
        unpatch(model)
    assert torch.equal(found, expected)
    assert expected.unique().numel() > 8
    assert all(len(layer.engine.where) > 5 for layer in cache.layers)
    # Local layers forget what no query sees any more.
    assert all((layer.engine.forgotten > 5) == (layer.engine.reach is not None) for layer in cache.layers)


def test_turns(model):
    """A second turn reuses the cache of the first."""
    first = prompt(1, 21)
    cache = ArgusCache(model, EXACT)
    try:
        found = ask(model, {"input_ids": first}, past_key_values=cache)
        more = torch.cat([found, prompt(1, 6)], 1)
        again = ask(model, {"input_ids": more}, past_key_values=cache)
    finally:
        unpatch(model)
    expected = torch.cat([ask(model, {"input_ids": first}), prompt(1, 6)], 1)
    assert torch.equal(again, ask(model, {"input_ids": expected}))


def test_assisted():
    model, helper = tiny("llama"), tiny("llama", seed=0)
    for parameter in helper.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    expected = ask(model, {"input_ids": prompt()})
    found = ask(model, {"input_ids": prompt()}, past_key_values=ArgusCache(model, EXACT), assistant_model=helper)
    assert torch.equal(found, expected)


def test_crop_and_copy():
    model = tiny("llama")
    ids = prompt(2, 40)
    cache, plain = ArgusCache(model, EXACT), DynamicCache()
    with torch.no_grad():
        for held in (cache, plain):
            model(ids, past_key_values=held)
        twin = copy.deepcopy(cache)
        for drop in (1, 6, 13):
            for held in (cache, plain):
                held.crop(-drop)
            assert cache.get_seq_length() == plain.get_seq_length()
            tail = ids[:, :3]
            pair = [model(tail, past_key_values=held).logits for held in (cache, plain)]
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
        assert twin.get_seq_length() == 40
        assert twin.plan is cache.plan
        fresh = DynamicCache()
        model(ids, past_key_values=fresh)
        pair = [model(tail, past_key_values=held).logits for held in (twin, fresh)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_patch_is_used_and_undone():
    """A patched model uses ARGUS, refuses another cache, and comes back as it was."""
    model = tiny("llama")
    expected = ask(model, {"input_ids": prompt()})
    before = model.config._attn_implementation
    assert patch_model_with_argus(model, EXACT) is model
    out = ask(model, {"input_ids": prompt()}, return_dict_in_generate=True)
    assert type(out.past_key_values) is ArgusCache
    assert out.past_key_values.ledger().parts["stage.0"] > 0
    assert torch.equal(out.sequences, expected)
    with torch.no_grad():
        assert type(model(prompt()).past_key_values) is ArgusCache
    with pytest.raises(Exception, match="was given a DynamicCache; allowed: an ArgusCache"):
        model(prompt(), past_key_values=DynamicCache())
    unpatch(model)
    assert model.config._attn_implementation == before
    assert "generate" not in vars(model)
    out = ask(model, {"input_ids": prompt()}, return_dict_in_generate=True)
    assert type(out.past_key_values) is DynamicCache
    assert torch.equal(out.sequences, expected)
