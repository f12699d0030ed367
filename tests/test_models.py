"""What is wrong with a model, its device or the backend for it ends in one line."""

from __future__ import annotations

import pytest
import torch
import transformers

from argus.backends.cpu import CpuBackend
from argus.build import choose_backend
from argus.config import ModelConfig
from argus.errors import ConfigError, ModelError
from argus.models import choose_device, load
from tests.models import tiny


@pytest.mark.parametrize("name", ["mps", "meta", "xpu"])
def test_a_device_that_caches_know_nothing_of_is_refused(name):
    with pytest.raises(ModelError, match=rf"model.device '{name}' is no device for a cache; allowed: auto, cpu, cuda$"):
        choose_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ModelError, match=r"model.device 'cuda:2' is not here; allowed: auto, cpu, cuda:0 to cuda:1$"):
        choose_device("cuda:2")


def test_weights_that_are_cut_off_end_in_one_line(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda source: None)
    with pytest.raises(ModelError, match=r"does not load: .*; allowed: model=embedded, a hub name or a folder") as caught:
        load(ModelConfig(name="hf", id=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_kernels_for_a_gpu_are_refused_where_there_is_none(monkeypatch):
    known = {"triton": CpuBackend, "cpu": CpuBackend}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"backend 'triton' needs a CUDA device, and none is here; allowed: auto, cpu$"):
        choose_backend("triton", torch.device("cpu"), known)
    assert isinstance(choose_backend("auto", torch.device("cpu"), known), CpuBackend)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert isinstance(choose_backend("triton", torch.device("cpu"), known), CpuBackend)
