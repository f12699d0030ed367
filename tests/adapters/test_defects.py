"""What once went wrong between a model, its cache and transformers, and must not again."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from argus import ArgusCache, patch_model_with_argus, unpatch
from argus.adapters.functions import argus_attention
from argus.adapters.graphs import alone
from argus.adapters.transcript import Transcript
from argus.errors import ArgusError, ModelError, RangeError
from tests.conftest import dense_attention
from tests.models import SMALL, tiny

EXACT = ["tiers=exact", "tiers.page_size=4", "tiers.window=4", "tiers.dtype=float32"]
AGING = ["tiers=default", "tiers.page_size=8", "tiers.window=4", "tiers.order=[int8,int4]", "tiers.stages.int8.capacity=16"]
INT4 = ["tiers=int4", "tiers.page_size=8", "tiers.window=8"]


def ids(length: int, rows: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def lengths(cache: ArgusCache) -> list[int]:
    return [layer.engine.length for layer in cache.layers]


@torch.no_grad()
def test_a_static_cache_answers_as_before() -> None:
    """Its keys after the last query are empty places."""
    model, x = tiny("llama"), ids(20)
    model.set_attn_implementation("sdpa")

    def logits() -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=64)
        parts = [model(part, past_key_values=cache).logits for part in (x[:, :12], x[:, 12:])]
        return torch.cat(parts, 1)

    before = logits()
    ArgusCache(model, EXACT)
    torch.testing.assert_close(logits(), before, atol=1e-4, rtol=1e-4)


def test_a_copy_of_a_patched_model_has_its_own_weights() -> None:
    model = patch_model_with_argus(tiny("llama"), EXACT)
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.data.normal_(std=0.3)
    options = {"max_new_tokens": 8, "do_sample": False}
    answers = [one.generate(ids(20), **options) for one in (model, other)]
    assert not torch.equal(*answers)
    assert torch.equal(unpatch(other).generate(ids(20), **options), answers[1])


def test_a_generate_of_the_users_own_comes_back() -> None:
    model = tiny("llama")
    model.generate = own = lambda *args, **kwargs: "own"
    patch_model_with_argus(model, EXACT)
    assert unpatch(model).generate is own


@torch.no_grad()
def test_another_batch_is_refused_and_nothing_is_written() -> None:
    model = tiny("llama")
    cache = ArgusCache(model, EXACT)
    model(ids(20, 3), past_key_values=cache)
    with pytest.raises(ArgusError, match="cannot follow those held"):
        model(ids(1, 1), past_key_values=cache)
    assert lengths(cache) == [20] * len(cache.layers)
    model(ids(1, 3), past_key_values=cache)


@torch.no_grad()
def test_layers_are_cropped_together_or_not_at_all() -> None:
    options = SMALL | {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**options)).eval()
    cache = ArgusCache(model, EXACT)
    model(ids(60), past_key_values=cache)
    with pytest.raises(ArgusError, match="forgotten"):
        cache.crop(-20)
    assert set(lengths(cache)) == {60}
    cache.crop(-2)
    assert set(lengths(cache)) == {58}


@torch.no_grad()
def test_a_pass_that_fails_is_taken_back() -> None:
    model = tiny("llama")
    cache = ArgusCache(model, EXACT)
    want = model(ids(30), past_key_values=cache).logits[:, -1]
    cache.crop(-1)
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.mul_(1e30)
    with pytest.raises(RangeError):
        model(ids(40, seed=4), past_key_values=cache)
    weight.mul_(1e-30)
    assert set(lengths(cache)) == {29}
    torch.testing.assert_close(model(ids(30)[:, -1:], past_key_values=cache).logits[:, -1], want, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_layers_of_different_lengths_are_refused() -> None:
    model = tiny("llama")
    cache = ArgusCache(model, EXACT)
    model(ids(20), past_key_values=cache)
    cache.layers[1].engine.crop(18)
    with pytest.raises(ArgusError, match=r"\[18, 20\] tokens"):
        model(ids(1), past_key_values=cache)
    cache.reset()
    model(ids(3), past_key_values=cache)


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
def test_more_candidates_than_a_page(family: str) -> None:
    """Of a sliding window too, whose older pages are wanted again when candidates are refused."""
    model, x = tiny(family), ids(12).repeat(1, 4)
    options = {"max_new_tokens": 60, "do_sample": False}
    want = model.generate(x, **options)
    cache = ArgusCache(model, EXACT)
    got = model.generate(x, past_key_values=cache, prompt_lookup_num_tokens=14, max_matching_ngram_size=1, **options)
    assert torch.equal(got, want)
    held = [layer.engine for layer in cache.layers if layer.engine.reach]
    assert all(engine.forgotten for engine in held)


def test_sinks_come_after_padding_that_fills_whole_chunks() -> None:
    model, x = tiny("llama"), ids(37, 2)
    mask = torch.ones_like(x)
    mask[0, :15] = 0
    cache = ArgusCache(model, [*INT4, "anchors=sinks"])
    model.generate(x, attention_mask=mask, prefill_chunk_size=7, max_new_tokens=3, past_key_values=cache)
    held = cache.layers[0].engine.exact.positions[0, 0].tolist()
    assert cache.transcript.padding.tolist() == [15, 0]
    assert sorted(position for position in held if position >= 0) == [15, 16, 17, 18]


@torch.no_grad()
@pytest.mark.parametrize("first", ["tokens", "embeddings"])
def test_line_ends_after_embeddings(first: str) -> None:
    """What came as embeddings ends no line, and later tokens keep their places."""
    model = tiny("llama")
    cache = ArgusCache(model, [*INT4, "anchors=lines", "+anchors.lines.ids=[2]", "anchors.lines.tokens=1"])
    embeddings = model.get_input_embeddings()(ids(40))
    if first == "tokens":
        model(ids(5), past_key_values=cache)
    model(inputs_embeds=embeddings, past_key_values=cache)
    held = cache.get_seq_length()
    tokens = ids(30)
    tokens[0, 2] = 2
    model(tokens, past_key_values=cache)
    assert cache.layers[0].engine.exact.positions.unique().tolist() == [*range(4), held + 2]
    cache.reset()
    assert cache.transcript.tokens is None


def test_a_transcript_follows_rows_told_on_another_device() -> None:
    transcript = Transcript(True, torch.zeros(2, 3, dtype=torch.int32, device="meta"), torch.zeros(2, device="meta"))
    transcript.select(torch.tensor([0, 0, 1]))
    assert [x.shape[0] for _, x in transcript.tensors()] == [3, 3]
    assert transcript.context(torch.device("meta")).padding.shape == (3,)


def test_autocast_leaves_a_cache_alone() -> None:
    model = patch_model_with_argus(tiny("llama", head_dim=32), INT4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(ids(200), max_new_tokens=20, min_new_tokens=20).shape == (1, 220)


@pytest.mark.parametrize("ladder", [EXACT, AGING])
def test_inference_mode_and_others_in_turn(ladder: list[str]) -> None:
    model, x, logits = tiny("llama"), ids(60), []
    for modes in ((torch.no_grad,) * 3, (torch.inference_mode, torch.no_grad, torch.inference_mode)):
        cache = ArgusCache(model, ladder)
        for part, mode in zip(x.split(20, 1), modes, strict=True):
            with mode():
                for tokens in part.split([16, 1, 1, 1, 1], 1):
                    out = model(tokens, past_key_values=cache).logits
        logits.append(out.detach().clone())
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_an_activated_model_still_learns(family: str) -> None:
    model, x = tiny(family), ids(20, 2)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.requires_grad_(True)
        model(x, labels=x, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
        ArgusCache(model, EXACT)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_masks_of_each_kind_of_layer() -> None:
    model, causal = tiny("gemma2"), torch.full((1, 1, 10, 10), torch.finfo(torch.float32).min).triu(1)
    masks = {"full_attention": causal, "sliding_attention": causal}
    want = model(ids(10), attention_mask=masks, past_key_values=DynamicCache()).logits
    got = model(ids(10), attention_mask=masks, past_key_values=ArgusCache(model, EXACT)).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_answers_are_contiguous() -> None:
    """Some models view what their attention answers."""
    model, seen = tiny("llama"), []
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    cache = ArgusCache(model, EXACT)
    layer, attend = cache.layers[0], cache.layers[0].attend
    answers: list[Any] = []
    layer.attend = lambda *args, **kwargs: answers.append(attend(*args, **kwargs)) or answers[-1]
    model(ids(5), past_key_values=cache)
    model(ids(20), past_key_values=cache)
    assert [x.is_contiguous() for x in answers] == [True, True]


@torch.no_grad()
def test_hooks_that_transformers_left_do_not_count() -> None:
    model = tiny("llama")
    model(ids(5), output_hidden_states=True)
    assert any(part._forward_hooks for part in model.modules())
    assert alone(model, model.forward)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not alone(model, model.forward)


@torch.no_grad()
def test_attention_weights_are_refused_before_anything_is_written() -> None:
    """Nothing computes them."""
    model = tiny("llama")
    cache = ArgusCache(model, EXACT)
    with pytest.raises(ModelError, match="no attention weights to give; allowed: output_attentions=False"):
        model(ids(20), past_key_values=cache, output_attentions=True)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_a_pass_that_fails_is_taken_back_or_ends_the_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was wrong is told; layers that have forgotten what came before cannot go back, and say so until they are reset."""
    model, x = tiny(name), ids(200)
    cache = ArgusCache(model, EXACT)
    model(x[:, :100], past_key_values=cache)
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        model(x[:, 100:], past_key_values=cache)
    monkeypatch.setattr(model.lm_head, "forward", head)
    if name == "llama":
        assert lengths(cache) == [100] * len(cache.layers)
    else:
        with pytest.raises(ArgusError, match=r"allowed: cache.reset\(\), or a new cache"):
            model(x[:, 100:], past_key_values=cache)
        cache.reset()
        model(x[:, :100], past_key_values=cache)
    got = model(x[:, 100:], past_key_values=cache).logits
    want = model(x, past_key_values=DynamicCache(config=model.config)).logits[:, 100:]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_pages_of_inference_mode_are_left_where_nothing_is_in_the_window() -> None:
    model, x = tiny("llama"), ids(140)
    cache = ArgusCache(model, [*AGING, "graphs=false"])
    with torch.inference_mode():
        model(x[:, :104], past_key_values=cache)
        cache.crop(-8)
    with torch.no_grad():
        for place in range(96, 140):
            model(x[:, place : place + 1], past_key_values=cache)
    assert cache.get_seq_length() == 140


@torch.no_grad()
@pytest.mark.parametrize("decoder", [False, True])
def test_an_encoder_sees_what_comes_later(decoder: bool) -> None:
    """BERT and its kin are loaded as causal models, but see both ways where their config does not call them decoders."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(**SMALL, is_decoder=decoder)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    other = copy.deepcopy(model)
    cache, usual = ArgusCache(model, EXACT), DynamicCache()
    for part in ids(20).split([14, 5, 1], 1):
        found, want = model(part, past_key_values=cache).logits, other(part, past_key_values=usual).logits
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_attention_that_is_not_causal(softcap: float | None) -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    module = SimpleNamespace(is_causal=False, num_key_value_groups=1)
    found, _ = argus_attention(module, q, k, v, None, softcap=softcap)
    want = dense_attention(q, k, v, 8**-0.5, torch.ones(6, 6, dtype=torch.bool), softcap)
    torch.testing.assert_close(found.transpose(1, 2), want.float())
