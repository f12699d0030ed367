"""What a user may give: arguments by place, configs, another model's cache, rows in other words; and what is left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig

from argus import ArgusCache, patch_model_with_argus, unpatch
from argus.adapters.activation import implementations
from argus.errors import ModelError
from tests.models import SMALL, tiny

EXACT = ["tiers=exact", "tiers.page_size=4", "tiers.window=4", "tiers.dtype=float32", "tiers.block_pages=3"]
INT4 = ["tiers=int4", "tiers.page_size=8", "tiers.window=16", "anchors=none"]
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "model_type": "clip_vision_model", "projection_dim": 32,
}  # fmt: skip


def ids(length: int, rows: int = 1, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("where", ["keyword", "place", "model"])
def test_no_cache_where_none_is_wanted(where: str) -> None:
    model = tiny("llama")
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
    want = model.generate(ids(30), use_cache=False, **options)
    patch_model_with_argus(model, EXACT)
    config = GenerationConfig(use_cache=False, **options)
    if where == "model":
        model.generation_config.use_cache = False
        got = model.generate(ids(30), **options)
    else:
        got = model.generate(ids(30), config) if where == "place" else model.generate(ids(30), generation_config=config)
    assert torch.equal(got, want)


def test_a_patched_assistant_takes_candidates_back() -> None:
    model, helper = tiny("mistral"), tiny("mistral", seed=1)
    settings = helper.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = 12, "constant"
    settings.assistant_confidence_threshold = 0.0
    want = model.generate(ids(60), max_new_tokens=30, do_sample=False)
    patch_model_with_argus(helper, EXACT)
    assert torch.equal(model.generate(ids(60), max_new_tokens=30, do_sample=False, assistant_model=helper), want)


def test_candidates_drive_no_page_out() -> None:
    """What a crop takes back leaves the window as full as if it had never been written, but for a page."""
    model, prompt = tiny("llama"), ids(20).repeat(1, 5)
    cache, left = ArgusCache(model, INT4), []
    keep = cache.keep
    cache.keep = lambda length: (keep(length), left.append(len(cache.layers[0].engine.window)))
    options = {"max_new_tokens": 40, "do_sample": False}
    found = model.generate(prompt, past_key_values=cache, prompt_lookup_num_tokens=6, max_matching_ngram_size=1, **options)
    assert len(left) > 5
    assert min(left) >= 16
    assert torch.equal(found, model.generate(prompt, past_key_values=ArgusCache(model, INT4), **options))


@torch.no_grad()
def test_arguments_by_place() -> None:
    lossy = ["tiers=int4", "tiers.page_size=8", "tiers.window=8", "anchors.sinks.tokens=4"]
    model, x = tiny("llama"), ids(60, 2)
    mask = torch.ones_like(x)
    mask[0, :9] = 0
    cache = ArgusCache(model, lossy)
    model(x, mask, past_key_values=cache)
    assert cache.transcript.padding.tolist() == [9, 0]
    assert cache.layers[0].engine.exact.positions[0, 0, :4].tolist() == [9, 10, 11, 12]
    broken = ArgusCache(model, EXACT)
    head, model.lm_head.forward = model.lm_head.forward, lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(ids(30), None, None, broken)
    assert broken.get_seq_length() == 0
    model.lm_head.forward = head
    want = model(ids(30), past_key_values=ArgusCache(model, EXACT)).logits
    patch_model_with_argus(model, EXACT)
    assert torch.equal(model(ids(30), None, None, ArgusCache(model, EXACT)).logits, want)


@torch.no_grad()
def test_an_interrupt_is_taken_back() -> None:
    model = tiny("llama")
    cache = ArgusCache(model, EXACT)
    model(ids(40), past_key_values=cache)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for part in (model.model.layers[1].mlp, model.lm_head):
        usual, part.forward = part.forward, stop
        with pytest.raises(KeyboardInterrupt):
            model(ids(1), past_key_values=cache)
        part.forward = usual
        assert {layer.engine.length for layer in cache.layers} == {40}
    model(ids(1), past_key_values=cache)


@torch.no_grad()
def test_a_cache_is_of_its_model() -> None:
    local, other, bare = tiny("mistral"), tiny("llama", seed=1), tiny("llama", seed=2)
    cache = ArgusCache(local, EXACT)
    ArgusCache(other, EXACT)
    with pytest.raises(ModelError, match=r"made for a model with other layers; allowed: an ArgusCache of this model"):
        other(ids(20), past_key_values=cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(ModelError, match=r"attention is not ARGUS's; allowed: the model that its ArgusCache was made for"):
        bare(ids(20), past_key_values=ArgusCache(other, EXACT))
    own = ArgusCache(other, EXACT)
    other.set_attn_implementation("sdpa")
    with pytest.raises(
        ModelError, match=r"attention is 'sdpa', set after ARGUS's; allowed: ArgusCache\(model, ...\) made anew"
    ):
        other(ids(20), past_key_values=own)


def test_models_that_share_a_config_get_their_attention_back() -> None:
    config = transformers.LlamaConfig(**SMALL)
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    for model in (first, second):
        ArgusCache(model, EXACT)
    unpatch(first)
    unpatch(second)
    assert config._attn_implementation != "argus"


def test_parts_of_a_model_get_their_attention_back() -> None:
    text = SMALL | {"num_hidden_layers": 2, "model_type": "llama"}
    config = transformers.LlavaConfig(text_config=text, vision_config=VISION, image_token_index=90)
    kinds = {"text_config": "sdpa", "vision_config": "eager"}
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=kinds)
    ArgusCache(model, EXACT)
    unpatch(model)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"


def test_parts_that_are_not_used_have_no_attention_again() -> None:
    vision = {"embed_dim": 32, "image_size": 28, "patch_size": 14, "intermediate_size": 32, "num_hidden_layers": 1}
    small = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.IdeficsConfig(**small, num_hidden_layers=2, additional_vocab_size=0, vision_config=vision)
    model = transformers.IdeficsForVisionText2Text(config)
    before = implementations(model.config)
    assert before["perceiver_config"] is None
    ArgusCache(model, EXACT)
    assert implementations(unpatch(model).config) == before


ROWS = [torch.tensor([-1]), torch.tensor([True, False, True]), torch.tensor([2, 0]), [0, 2], slice(0, 2), np.array([1, 1])]


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_are_chosen_as_of_a_tensor(rows: Any) -> None:
    model = tiny("llama")
    cache, other = ArgusCache(model, EXACT), DynamicCache()
    x = ids(20, 3)
    for one in (cache, other):
        model(x, past_key_values=one)
        one.batch_select_indices(rows)
    more = x[:, :2][rows]
    got, want = (model(more, past_key_values=one).logits for one in (cache, other))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_mask_shorter_than_what_is_held_hides_the_rest() -> None:
    model = tiny("llama")
    model.set_attn_implementation("sdpa")

    def logits() -> torch.Tensor:
        cache = DynamicCache()
        model(ids(8), past_key_values=cache)
        return model(ids(3, seed=2), attention_mask=torch.ones(1, 3, dtype=torch.long), past_key_values=cache).logits

    before = logits()
    ArgusCache(model, EXACT)
    torch.testing.assert_close(logits(), before, atol=1e-4, rtol=1e-4)


def test_dropout_is_not_left_out_in_silence() -> None:
    model = tiny("gemma2", attention_dropout=0.5).train()
    ArgusCache(model, EXACT)
    with pytest.raises(ModelError, match=r"no dropout is computed with softcap or sinks; allowed: attention_dropout=0"):
        model(ids(9), use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("used", [True, False])
def test_a_model_of_several_parts_takes_a_cache_as_its_text_says(used: bool) -> None:
    text = SMALL | {"model_type": "llama", "use_cache": used}
    config = transformers.LlavaConfig(text_config=text, vision_config=VISION, image_token_index=90)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    x = ids(30)
    want = model(x).logits
    got = patch_model_with_argus(model, EXACT)(x)
    assert isinstance(got.past_key_values, ArgusCache) == used
    torch.testing.assert_close(got.logits, want, atol=1e-4, rtol=1e-4)


def test_a_model_is_served_whose_text_alone_takes_other_attention() -> None:
    vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    vision |= {"patch_size": 14, "mlp_dim": 32, "global_attn_indexes": [0]}
    config = transformers.GotOcr2Config(text_config=SMALL | {"model_type": "qwen2"}, vision_config=vision, image_token_index=90)
    model = transformers.GotOcr2ForConditionalGeneration(config).eval()
    parts = implementations(model.config)
    want = model.generate(ids(30), max_new_tokens=8, do_sample=False)
    assert torch.equal(patch_model_with_argus(model, EXACT).generate(ids(30), max_new_tokens=8, do_sample=False), want)
    cache = ArgusCache(model, EXACT)
    model.config.text_config._attn_implementation = "sdpa"
    with pytest.raises(ModelError, match="attention is 'sdpa', set after ARGUS's"):
        model(ids(30), past_key_values=cache)
    model.config.text_config._attn_implementation = "argus"
    assert implementations(unpatch(model).config) == parts


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_exits_before_the_last_layer(family: str) -> None:
    model = tiny(family)
    options = {"max_new_tokens": 30, "do_sample": False}
    want = model.generate(ids(30), **options)
    assert torch.equal(patch_model_with_argus(model, EXACT).generate(ids(30), assistant_early_exit=1, **options), want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification"])
def test_models_that_do_not_generate(kind: str) -> None:
    model = getattr(transformers, kind)(transformers.LlamaConfig(**SMALL)).eval()
    want = model(ids(30))[0]
    out = patch_model_with_argus(model, EXACT)(ids(30))
    assert isinstance(out.past_key_values, ArgusCache)
    torch.testing.assert_close(out[0], want, atol=1e-4, rtol=1e-4)
    assert not hasattr(unpatch(model), "generate")


@torch.no_grad()
def test_a_patched_model_whose_attention_was_set_is_switched_again() -> None:
    model, x = tiny("llama"), ids(30, 2)
    mask = torch.ones_like(x)
    mask[0, :9] = 0
    want = model(x, attention_mask=mask).logits
    patch_model_with_argus(model, EXACT)
    model.set_attn_implementation("sdpa")
    out = model(x, attention_mask=mask)
    assert out.past_key_values.transcript.padding.tolist() == [9, 0]
    torch.testing.assert_close(out.logits[:, 9:], want[:, 9:], atol=1e-4, rtol=1e-4)
    assert unpatch(model).config._attn_implementation == "sdpa"
    assert "forward" not in vars(model)


@torch.no_grad()
def test_a_patched_model_takes_another_dtype() -> None:
    model = patch_model_with_argus(tiny("llama"), "int4")
    assert model(ids(5)).past_key_values.plan.dtype == torch.float16
    first, second = (model.to(torch.bfloat16)(ids(5)).past_key_values.plan for _ in range(2))
    assert first.dtype == torch.bfloat16
    assert first is second


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_patched_model_takes_another_device() -> None:
    model = patch_model_with_argus(tiny("llama"), "int4").to("cuda")
    assert model(ids(5).to("cuda")).past_key_values.plan.backend.name == "triton"
    assert model.cpu()(ids(5)).past_key_values.plan.backend.name == "cpu"


@torch.no_grad()
def test_a_budget_is_met_where_a_model_that_is_offloaded_computes() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama", head_dim=32)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    cache = ArgusCache(model, ["tiers=quality", "budget.bits=6", "budget.context=400"])
    assert model(ids(30), past_key_values=cache).logits.isfinite().all()
