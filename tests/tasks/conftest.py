"""A run on a tiny model, with a tokenizer of 600 pieces learnt from the prose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from argus import unpatch
from argus.build import build
from argus.caches import Argus, Half
from argus.config import load_cache_config
from argus.tasks.steps import prose
from tests.models import tiny

LADDER = ["tiers=int2", "tiers.page_size=16", "tiers.window=16", "tiers.stages.int2.group_size=8", "tiers.allow_growth=true"]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False)
    pieces.train_from_iterator([prose()[:60000]], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="<pad>")


@pytest.fixture
def run(tokenizer, tmp_path):
    """Two caches: FP16 and a ladder of int2 on pages of 16 tokens."""
    model = tiny("llama")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3, generator=torch.Generator().manual_seed(2))
    yield SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        plan=build(load_cache_config(LADDER), 8),
        caches={"fp16": Half(), "argus": Argus()},
        folder=tmp_path,
        seed=3,
        tell=lambda sentence: None,
        show=lambda text: None,
    )
    unpatch(model)
