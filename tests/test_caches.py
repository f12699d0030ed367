"""Caches to compare: chosen by name, skipped where a package is missing, and weighed to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import argus.conf
import pytest
import torch
import yaml
from transformers import cache_utils

from argus import ArgusCache, plugins, runner, unpatch
from argus.adapters.huggingface import make_plan
from argus.caches import Argus, Fp8, Half, Hqq, Quanto, quantized
from argus.caches.ladder import ArgusOptions
from argus.caches.quantized import HalfQuantizedCache, HqqOptions, QuantoOptions, inner_tensors
from argus.commandline import Command, check
from argus.config import RunConfig, compose, load_cache_config, validate
from argus.errors import ConfigError, ModelError
from argus.models import Loaded
from argus.runner import choose, execute
from argus.tasks.steps import score
from tests.models import SMALL, tiny

FILES = sorted((Path(argus.conf.__file__).parent / "cache").glob("*.yaml"))
WIDTH = 2 * SMALL["num_hidden_layers"] * SMALL["num_key_value_heads"] * SMALL["head_dim"]
"""Numbers a token in the tiny model."""


def composed(*words: str) -> RunConfig:
    return validate(RunConfig, compose(words))


def ids(length):
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(5))


def letters(text, add_special_tokens=True):
    """A tokenizer: one token for every fourth character."""
    return SimpleNamespace(input_ids=[2 + ord(character) % 95 for character in text[::4]])


@pytest.fixture
def model():
    made = tiny("llama")
    yield made
    unpatch(made)


@pytest.fixture
def run(model):
    """What a cache kind needs of a run."""
    return SimpleNamespace(
        model=model, plan=make_plan(model, "int8"), tokenizer=None, config=composed("backend=cpu"), device=torch.device("cpu")
    )


def read(model, cache, tokens):
    with torch.no_grad():
        return model(tokens, past_key_values=cache).logits


# By name


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["fp16", "argus"]),
        (["cache=fp16"], ["fp16"]),
        (["cache=dynamic"], ["fp16", "dynamic"]),
        (["+cache=dynamic"], ["fp16", "argus", "dynamic"]),
        (["cache=[dynamic,fp8,argus]"], ["fp16", "dynamic", "fp8", "argus"]),
        (["cache=[argus,fp16]", "reference=dynamic"], ["dynamic", "argus", "fp16"]),
        (["+cache.mine={kind: quanto, bits: 2}"], ["fp16", "argus", "mine"]),
    ],
)
def test_the_reference_then_those_that_are_named(words, names):
    assert list(composed(*words).caches()) == names


def test_a_reference_may_have_options_of_its_own():
    config = composed("cache=[dynamic,argus]", "reference=argus", "cache.argus.overrides=['tiers=int4']")
    parts = choose(config)
    assert list(parts.caches) == ["argus", "dynamic"]
    assert parts.caches["argus"].config.overrides == ("tiers=int4",)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_show_every_option(path):
    """A file is named as its cache, and can be told from another of its kind by what it writes."""
    ((name, written),) = yaml.safe_load(path.read_text(encoding="utf-8")).items()
    kind = plugins.kinds(plugins.load(commands=True), "argus_caches")[written.pop("kind")]
    assert name == path.stem
    assert set(written) == set(kind.Config.model_fields)
    kind.Config(**written)


def test_a_sweep_over_caches_is_checked_before_it_starts():
    check(Command.of(["-m", "cache=fp16,argus,[dynamic,quanto4],hqq2"]))
    with pytest.raises(ConfigError, match="'cache/quanto5' is no config"):
        check(Command.of(["-m", "cache=argus,quanto5"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cache=quanto4", "cache.quanto4.bits=3"], r"cache.quanto4.bits: .*2 or 4"),
        (["cache=hqq4", "cache.hqq4.bits=3"], r"cache.hqq4: hqq reads 3 bits back along axis 0 only; allowed: axis_key=0"),
        (["cache=fp8", "+cache.fp8.bits=8"], r"cache.fp8.bits: is not an option; allowed: none"),
        (["cache.argus.overrides=['tiers=int4','tiers.stages.int4.group_size=7']"], r"group_size 7 does not divide"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(words, message):
    with pytest.raises(ConfigError, match=message):
        check(Command.of(words))


# Missing packages


def nothing_installed(monkeypatch):
    def version(name):
        raise quantized.PackageNotFoundError(name)

    monkeypatch.setattr(quantized, "version", version)


def test_a_missing_package_skips_its_cache_and_says_how_to_install_it(monkeypatch, model, tmp_path, capsys):
    nothing_installed(monkeypatch)
    monkeypatch.setattr(runner, "load", lambda config: Loaded(model, letters, torch.device("cpu")))
    short = ["tiers=int8", "task=perplexity", "task.context=64", "task.scored=8", "task.windows=1", "task.decoded=1"]
    rows = execute(composed("cache=[quanto4,dynamic,hqq2]", *short), tmp_path)
    assert [row["cache"] for row in rows] == ["fp16", "dynamic"]
    told = capsys.readouterr().err
    assert "cache 'quanto4' is skipped: optimum-quanto is not installed; pip install optimum-quanto\n" in told
    assert "cache 'hqq2' is skipped: hqq is not installed; pip install hqq\n" in told
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert list(report["skipped"]) == ["quanto4", "hqq2"]


def test_a_reference_that_is_missing_ends_the_run(monkeypatch):
    nothing_installed(monkeypatch)
    with pytest.raises(ConfigError, match="reference 'hqq': hqq is not installed; pip install hqq"):
        choose(composed("reference=hqq"))


def test_an_older_transformers_has_no_fp8(monkeypatch):
    monkeypatch.delattr(cache_utils, "Fp8QuantizedLayer", raising=False)
    assert "has no fp8 cache; pip install --upgrade transformers" in (Fp8().missing() or "")


# ARGUS beside itself


def test_another_ladder_beside_the_run_s_own(run):
    own, other = Argus(), Argus(ArgusOptions(overrides=("tiers=int2", "tiers.page_size=8", "tiers.window=8", "anchors=none")))
    held = {"own": own.make(run), "other": other.make(run), "again": other.make(run)}
    assert held["own"].plan is run.plan
    assert held["other"].plan is held["again"].plan
    assert [stage.facts.name for stage in held["other"].plan.stages] == ["int2"]
    assert held["other"].plan.backend.name == run.config.backend == "cpu"
    for cache in held.values():
        assert isinstance(cache, ArgusCache)
        assert read(run.model, cache, ids(120)).isfinite().all()
    assert other.ledger(held["other"]).bits_per_value < 8 < own.ledger(held["own"]).bits_per_value
    assert load_cache_config(other.config.overrides).anchors == {}


# Quantized caches


class TwoParts(torch.Tensor):
    """A tensor that is made of two others, as quantized tensors are."""

    def __new__(cls, codes, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_what_a_quantized_tensor_is_made_of():
    plain = [torch.zeros(2), torch.zeros(3, dtype=torch.uint8), torch.zeros(4), torch.zeros(5)]
    nested = (TwoParts(TwoParts(plain[0], plain[1]), plain[2]), {"scale": [plain[3]], "bits": 4, "shape": torch.Size([2])})
    assert [id(found) for found in inner_tensors(nested)] == [id(x) for x in plain]
    assert list(inner_tensors("neither")) == list(inner_tensors(None)) == []


class Rounded(cache_utils.QuantizedLayer):
    """Whole numbers with one scale, as a backend keeps them: codes and a table beside them."""

    def _quantize(self, tensor, axis):
        if tensor.shape[-2] % 2:
            raise ValueError("an odd\nnumber of tokens")
        scale = tensor.abs().amax() / 127
        return (tensor / scale).round().to(torch.int8), {"scale": scale, "axis": axis}

    def _dequantize(self, pair):
        return pair[0].to(pair[1]["scale"].dtype) * pair[1]["scale"]


@pytest.fixture
def rounded(monkeypatch, run):
    """A kind whose backend is here."""
    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", Rounded)
    return Quanto(QuantoOptions(bits=4, group_size=8, residual=16, axis_key=-1))


def test_codes_scales_and_residual_are_weighed(rounded, run):
    cache, tokens = rounded.make(run), ids(60)
    layer = cache.layers[0]
    assert (layer.nbits, layer.q_group_size, layer.residual_length, layer.axis_key, layer.axis_value) == (4, 8, 16, -1, 0)
    read(run.model, cache, tokens[:, :40])
    scales = 2 * 2 * len(cache.layers)
    assert rounded.ledger(cache).parts == {"quantized": WIDTH * 40 + scales}
    read(run.model, cache, tokens[:, 40:45])
    ledger = rounded.ledger(cache)
    assert ledger.parts == {"quantized": WIDTH * 40 + scales, "residual": 2 * WIDTH * 5}
    assert ledger.values == WIDTH * 45
    assert ledger.bits_per_value == 8 * ledger.bytes / (WIDTH * 45)


def test_it_works_in_16_bits_and_answers_in_the_model_s_dtype(rounded, run):
    cache = rounded.make(run)
    keys = torch.randn(1, 2, 6, 8)
    first, _ = cache.update(keys, keys, 0)
    again, _ = cache.update(keys[:, :, :2], keys[:, :, :2], 0)
    assert first.dtype == again.dtype == torch.float32
    assert torch.equal(first, keys.half().float())
    assert cache.layers[0].keys.dtype == torch.float16
    assert not torch.equal(again[:, :, :6], first)
    assert again.shape[2] == cache.get_seq_length() == 8
    brain = keys.bfloat16()
    assert rounded.make(run).update(brain, brain, 0)[0].dtype == torch.bfloat16


def test_what_a_backend_refuses_ends_in_one_line(rounded, run):
    with pytest.raises(ConfigError, match=r"quanto does not take keys \[1, 2, 41, 8\]: an odd number of tokens") as caught:
        read(run.model, rounded.make(run), ids(41))
    assert "\n" not in str(caught.value)


def test_models_with_sliding_windows_are_refused():
    gemma = tiny("gemma2")
    with pytest.raises(ModelError, match="only supported for models with only full attention layers"):
        HalfQuantizedCache("quanto", gemma.config)


NO_QUANTO, NO_HQQ, NO_FP8 = (kind().missing() for kind in (Quanto, Hqq, Fp8))
REAL = [
    *(
        pytest.param(Quanto(QuantoOptions(bits=bits)), bits + 0.5, id=f"quanto{bits}", marks=pytest.mark.skipif(
            NO_QUANTO is not None, reason=NO_QUANTO or ""
        ))
        for bits in (2, 4)
    ),
    *(
        pytest.param(Hqq(HqqOptions(bits=bits)), bits + 0.5, id=f"hqq{bits}", marks=pytest.mark.skipif(
            NO_HQQ is not None, reason=NO_HQQ or ""
        ))
        for bits in (1, 2, 4, 8)
    ),
    pytest.param(Fp8(), 8 + 4 * 6 * 8 / (WIDTH * 64), id="fp8", marks=pytest.mark.skipif(
        NO_FP8 is not None, reason=NO_FP8 or ""
    )),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("kind", "bits"), REAL)
def test_the_packages_themselves(kind, bits, run):
    """Bits are what the codes and a scale and a zero for 64 numbers take; what is read back is near."""
    cache, exact, tokens = kind.make(run), Half().make(run), ids(90)
    for held in (cache, exact):
        read(run.model, held, tokens[:, :64])
    assert kind.ledger(cache).bits_per_value == pytest.approx(bits)
    reference = score(run, exact, tokens[:, 64:80])
    assert 0 < score(run, cache, tokens[:, 64:80]).kl(reference) < {1.5: 60, 2.5: 30}.get(bits, 3)
    read(run.model, cache, tokens[:, 80:81])
    assert cache.get_seq_length() == 64 + 15 + 1
