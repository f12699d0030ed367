"""The two architectures of the comparison, of one size, and how their weights are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model

from benchmarks.comparison.data import VOCABULARY

WEIGHTS = Path(__file__).parent / "weights"
HIDDEN = 128


def transformer(**options: Any) -> Any:
    """A Llama of four layers with two heads of 64 numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    # The usual 0.02 is meant for wide models: at this width scores would begin near zero, and recall late.
    more = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "initializer_range": HIDDEN**-0.5}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **shape, **heads, **more, **options))


def mamba(**options: Any) -> Any:
    """A Mamba (Gu and Dao 2023, arXiv:2312.00752) of six layers; ``use_mambapy=True`` scans in parallel."""
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"hidden_size": HIDDEN, "state_size": 16, "num_hidden_layers": 6}
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **shape, **ids, **options))


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
