"""lm-eval's model interface with a fresh cache for every request; lm-eval itself where it is installed."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from argus.errors import ConfigError
from argus.tasks import harness
from argus.tasks.harness import Harness, HarnessConfig, accuracy, known_tasks, language_model


@pytest.fixture
def interface(monkeypatch):
    """A stand-in for lm-eval's class for Hugging Face models: what ours calls of it, and nothing else."""

    class HFLM:
        max_length = 200

        def __init__(self, pretrained, tokenizer, batch_size):
            assert batch_size == 1
            self.model = pretrained

        def _model_generate(self, context, max_length, stop, **options):
            return self.model.generate(context, max_length=max_length, do_sample=False, pad_token_id=0, **options)

    module = ModuleType("lm_eval.models.huggingface")
    module.HFLM = HFLM
    for name in ("lm_eval", "lm_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", module)


def ids(length: int) -> list[int]:
    return torch.randint(2, 600, (length,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("asked", [1, 7])
def test_a_continuation_is_scored_over_the_cache(run, interface, asked):
    context, continuation = ids(120), ids(130)[-asked:]
    with torch.no_grad():
        scores = run.model(torch.tensor([context + continuation])).logits[0, 119:-1].log_softmax(-1)
    wanted = float(scores.gather(1, torch.tensor(continuation)[:, None]).sum())
    exact = language_model(run, run.caches["fp16"])
    ((found, greedy),) = exact._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True, override_bs=1)
    assert found == pytest.approx(wanted, abs=0.02 * asked)
    assert greedy is bool((scores.argmax(-1) == torch.tensor(continuation)).all())
    best = [int(scores[0].argmax())]
    assert exact._loglikelihood_tokens([(None, context, best)])[0][1] is True
    assert (exact.context, exact.size["bits_per_value"]) == (120 + asked - 1, 16)
    coarse = language_model(run, run.caches["argus"])
    ((other, _),) = coarse._loglikelihood_tokens([(None, context, continuation)])
    assert abs(other - wanted) > 10 * abs(found - wanted)
    assert coarse.size["bits_per_value"] < 16


def test_what_is_too_long_loses_its_beginning(run, interface):
    """Context and all but the last token of the continuation fill the model's positions, no more."""
    model = language_model(run, run.caches["fp16"])
    context, continuation = ids(300), ids(5)
    long = model._loglikelihood_tokens([(None, context, continuation)])
    assert model.context == 200  # Of these, the last token of the context and four of the continuation are read at once.
    assert long == model._loglikelihood_tokens([(None, context[-196:], continuation)])


def test_an_answer_is_decoded_with_the_cache(run, interface):
    prompt = torch.tensor([ids(100)])
    plain = run.model.generate(prompt, max_length=108, do_sample=False, pad_token_id=0)
    out = {}
    for name, kind in run.caches.items():
        model = language_model(run, kind)
        out[name] = model._model_generate(prompt, 108, [])
        assert model.context == 107
        assert model.size["cache_bytes"] > 0
    assert torch.equal(out["fp16"], plain)
    assert not torch.equal(out["argus"], plain)


def test_a_cache_that_evicts_does_not_generate(run, interface):
    """Generation goes on at the tokens left, and would read others twice."""

    class Evicting(DynamicCache):
        def get_seq_length(self, *args, **kwargs):
            return super().get_seq_length(*args, **kwargs) // 2

    kind = SimpleNamespace(make=lambda run: Evicting())
    with pytest.raises(ConfigError, match=r"generates with caches that hold every token read; this one evicts some"):
        language_model(run, kind)._model_generate(torch.tensor([ids(100)]), 108, [])


def test_whole_texts_are_refused(run, interface):
    with pytest.raises(ConfigError, match=r"asks nothing of a cache; use task=perplexity"):
        language_model(run, run.caches["fp16"]).loglikelihood_rolling([])


def test_a_missing_package_is_named(run, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    with pytest.raises(ConfigError, match=r"lm-eval.* not installed; pip install lm-eval") as caught:
        list(Harness(HarnessConfig()).run(run))
    assert "\n" not in str(caught.value)


def test_the_accuracy_of_a_task_is_that_which_it_reports():
    assert accuracy({"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.7}) == 0.5
    assert accuracy({"exact_match_stderr,strict": 0.1, "exact_match,strict": 0.0, "acc,none": 1.0}) == 0.0
    assert accuracy({"word_perplexity,none": 8.0}) is None


@pytest.fixture
def folder(tmp_path):
    """Two small tasks of lm-eval, whose data is a local file."""
    data = tmp_path / "codes.jsonl"
    text = "The grass is green. The code is {n}. The code is"
    lines = [{"text": text.format(n=n), "code": n, "all": ["7", n]} for n in ("11", "23", "58")]
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    base = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    base |= {"doc_to_text": "{{text}}"}
    said = {"output_type": "generate_until", "doc_to_target": "{{code}}", "metric_list": [{"metric": "exact_match"}]}
    said |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 4}}
    chosen = {"output_type": "multiple_choice", "doc_to_choice": "{{all}}", "doc_to_target": 1}
    chosen |= {"metric_list": [{"metric": "acc"}]}
    for name, part in (("said", said), ("chosen", chosen)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **base, **part}))
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_itself(run, folder, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install lm-eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = HarnessConfig(tasks=("said", "chosen"), include=str(folder), limit=2)
    rows = list(Harness(config).run(run))
    names = [(row["cache"], row["kind"], row["samples"]) for row in rows]
    assert names == [(cache, kind, 2) for cache in ("fp16", "argus") for kind in ("said", "chosen")]
    assert all(row["task"] == "harness" and 0 <= row["accuracy"] <= 1 for row in rows)
    assert all(row["context"] > 20 and row["cache_bytes"] > 0 and row["metrics"] for row in rows)
    with pytest.raises(ConfigError, match=r"lm-eval has no task 'nothing'; allowed: what 'lm-eval ls tasks' lists"):
        known_tasks(HarnessConfig(tasks=("nothing",)))
    (folder / "codes.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"lm-eval cannot load task 'said': "):
        list(Harness(config).run(SimpleNamespace(**vars(run))))
