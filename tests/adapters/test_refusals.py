"""Models whose cache is not keys and values, or which touch them, are refused with a sentence."""

from __future__ import annotations

import pytest
import torch
import transformers

from argus import ArgusCache, patch_model_with_argus
from argus.errors import ModelError
from tests.models import SMALL, tiny

MLLAMA = SMALL | {"cross_attention_layers": [1]}
BERT = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
CROSSED = {"vocab_size": 97, "n_embd": 16, "n_layer": 1, "n_head": 2, "add_cross_attention": True}
T5 = {"vocab_size": 97, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
LATENT = SMALL | {"kv_lora_rank": 4, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1}
HYBRID = SMALL | {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "num_experts": 2}
STATE = {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
UNSAFE = {
    "deepseek_v2": ("DeepseekV2Config", LATENT, "AutoModelForCausalLM", "latents"),
    "gemma3n_text": ("Gemma3nTextConfig", {}, "AutoModelForCausalLM", "share keys and values"),
    "mpt": ("MptConfig", {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 97}, "AutoModelForCausalLM", "attention"),
    "t5": ("T5Config", T5, "AutoModelForSeq2SeqLM", "encoder-decoder"),
    "mamba": ("MambaConfig", {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1}, "AutoModelForCausalLM", ""),
    "jamba": ("JambaConfig", HYBRID, "AutoModelForCausalLM", "attention"),
    "bamba": ("BambaConfig", SMALL | STATE, "AutoModelForCausalLM", ""),
    "falcon_h1": ("FalconH1Config", SMALL, "AutoModelForCausalLM", ""),
    "qwen3_next": ("Qwen3NextConfig", SMALL, "AutoModelForCausalLM", "attention"),
    "lfm2": ("Lfm2Config", SMALL | {"layer_types": ["conv", "full_attention", "conv"]}, "AutoModelForCausalLM", "conv"),
    "diffllama": ("DiffLlamaConfig", SMALL, "AutoModelForCausalLM", "splits the values"),
    "doge": ("DogeConfig", SMALL, "AutoModelForCausalLM", "computes a mask"),
    "mllama_text_model": ("MllamaTextConfig", MLLAMA, "MllamaForCausalLM", "cross-attention"),
    "gpt2": ("GPT2Config", CROSSED, "AutoModelForCausalLM", "cross-attention has a cache of another kind"),
    "bert": ("BertConfig", BERT, "AutoModelForMaskedLM", "takes no cache"),
    "moshi": ("MoshiConfig", SMALL | {"ffn_dim": 48}, "AutoModelForCausalLM", "masks do not tell"),
}


def make(kind: str):
    """The model with no memory behind its weights."""
    name, options, auto, _ = UNSAFE[kind]
    config = getattr(transformers, name)(**options)
    with torch.device("meta"):
        return getattr(getattr(transformers, auto), "from_config" if auto.startswith("Auto") else "_from_config")(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(UNSAFE))
def test_unsafe_models_are_refused(kind):
    """By the cache and by the patch, before anything about the model is changed."""
    model = make(kind)
    before = model.config._attn_implementation
    for use in (ArgusCache, patch_model_with_argus):
        with pytest.raises(ModelError, match=f"model type '{kind}' cannot use ARGUS: .*{UNSAFE[kind][3]}") as caught:
            use(model, "int4")
        line = str(caught.value)
        assert "\n" not in line
        assert "allowed are decoders that cache keys and values" in line
    assert model.config._attn_implementation == before
    assert "generate" not in vars(model)
    assert not model._forward_pre_hooks
    assert not hasattr(model, "_argus_before")


def test_an_offloaded_cache_is_refused():
    cache = ArgusCache(tiny("llama"), "int4")
    with pytest.raises(ModelError, match="does not offload"):
        cache.layers[0].offload()


def test_layers_of_different_sizes_are_refused(monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model.config), "per_layer_attributes", {"num_key_value_heads", "head_dim"}, raising=False)
    with pytest.raises(ModelError, match="cannot use ARGUS: its layers differ in head_dim, num_key_value_heads; allowed are"):
        ArgusCache(model, "int4")
