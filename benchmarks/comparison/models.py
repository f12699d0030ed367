"""The two architectures of the comparison, of one size, and how their weights are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from benchmarks.comparison.data import VOCABULARY

WEIGHTS = Path(__file__).parent / "weights"
HIDDEN = 128
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    # The usual 0.02 is meant for wide models.
    "initializer_range": HIDDEN**-0.5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def transformer(**options: Any) -> Any:
    """A Llama of two layers, each with two heads of 64 numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **shape, **heads, **COMMON, **options))
    # Embeddings as large as what layers add to them: else a layer sees little of its own token, and recall is learnt late.
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(HIDDEN**0.5)
        model.model.norm.weight.mul_(HIDDEN**-0.5)
    return model


def mamba(**options: Any) -> Any:
    """A Mamba-2 (Dao and Gu 2024, arXiv:2405.21060) of three layers, each with four heads of 64 by 64 numbers of state."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    shape = {"hidden_size": HIDDEN, "state_size": 64, "num_hidden_layers": 3, "head_dim": 64, "num_heads": 4, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(tie_word_embeddings=True, chunk_size=32, **shape, **COMMON, **options))


KINDS = {"transformer": transformer, "mamba": mamba}


def parameters(model: Any) -> int:
    """Numbers that training sets; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save(model: Any, name: str, facts: dict[str, Any], folder: Path) -> None:
    """Write ``name.safetensors`` in 16 bits, and `facts` as ``name.json`` beside it; `model` is left in 16 bits."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model.half().cpu(), str(folder / f"{name}.safetensors"))
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


def load(name: str, folder: Path = WEIGHTS) -> tuple[Any, dict[str, Any]]:
    """A trained model in float32, ready to run, and the facts of its training."""
    model = KINDS[name]()
    load_model(model, str(folder / f"{name}.safetensors"))
    return model.eval(), json.loads((folder / f"{name}.json").read_text())
