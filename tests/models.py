"""Tiny random models of the families that ARGUS promises to serve."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOWED = {"sliding_window": 12}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", WINDOWED),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", WINDOWED | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", WINDOWED | {"query_pre_attn_scalar": 8}),
    "gpt_oss": ("GptOssConfig", WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3Config", {}),
}


def tiny(family: str, seed: int = 0, **more: Any) -> torch.nn.Module:
    """A random model of `family` in float32, its weights large enough that greedy answers vary; `more`: of its config."""
    name, options = FAMILIES[family]
    config = getattr(transformers, name)(**SMALL | options | more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
            elif family == "gpt_oss" and parameter.numel() == SMALL["num_attention_heads"]:
                torch.nn.init.normal_(parameter)
    return model.eval()
