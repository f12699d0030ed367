"""Eviction as a cache kind: positions, bytes and hooks with a press of the test's own, and kvpress itself where it is."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers
from argus_kvpress.cache import PRESSES, Pressed, PressOptions

from argus import plugins
from argus.caches import Half
from argus.config import RunConfig, compose, validate
from argus.errors import ConfigError
from argus.runner import choose

MISSING = Pressed(PressOptions(press="knorm")).missing()
needs_kvpress = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
IDS = torch.randint(2, 97, (1, 140), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and a busy machine makes threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(dtype=torch.float32):
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


@pytest.fixture
def run():
    return SimpleNamespace(model=tiny())


class Every:
    """A press that keeps one token in ``step``, from a given one on, and can fail."""

    def __init__(self, step, start=0, fails=False):
        self.step, self.start, self.fails = step, start, fails

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        assert not self.fails, "a press that fails"
        assert keys.dtype == hidden_states.dtype
        return keys[:, :, self.start :: self.step].contiguous(), values[:, :, self.start :: self.step].contiguous()

    @contextmanager
    def __call__(self, model):
        def hook(module, args, kwargs, output):
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            layer.keys, layer.values = self.compress(module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs)

        hooks = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
        yield
        for one in hooks:
            one.remove()


def kind(press):
    made = Pressed(PressOptions(press="knorm"))
    made.press = lambda: press
    return made


def read(model, cache, tokens, **options):
    with torch.inference_mode():
        return model(tokens, past_key_values=cache, **options).logits


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_bytes_of_what_is_left_over_all_that_was_read(run):
    half = kind(Every(2))
    cache = half.make(run)
    read(run.model, cache, IDS[:, :100])
    ledger = half.ledger(cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [50, 50]
    assert cache.layers[0].keys.dtype == torch.float16
    assert (ledger.bytes, ledger.values) == (2 * 2 * 2 * 8 * 50 * 2, 2 * 2 * 2 * 8 * 100)
    assert ledger.bits_per_value == 8
    read(run.model, cache, IDS[:, 100:110])
    assert half.ledger(cache).bits_per_value == 16 * 60 / 110


def test_tokens_after_the_prompt_keep_their_own_positions(run):
    """With nothing evicted, the same logits as the dense cache; with eviction, those of a dense cache told the positions."""
    whole, dense = kind(Every(1)).make(run), Half().make(run)
    for part in (IDS[:, :100], IDS[:, 100:110], IDS[:, 110:111]):
        assert torch.allclose(read(run.model, whole, part), read(run.model, dense, part), atol=1e-5)
    cache, other = kind(Every(2)).make(run), Half().make(run)
    read(run.model, cache, IDS[:, :100])
    read(run.model, other, IDS[:, :100])
    for layer in other.layers:
        layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
    wanted = read(run.model, other, IDS[:, 100:110], position_ids=torch.arange(100, 110)[None])
    assert torch.allclose(read(run.model, cache, IDS[:, 100:110]), wanted, atol=1e-5)
    assert not torch.allclose(wanted, read(run.model, whole, IDS[:, 100:110]), atol=1e-2)


def test_presses_do_not_touch_each_other_s_caches_nor_others(run):
    first, second = kind(Every(2)).make(run), kind(Every(4, 1)).make(run)
    plain = Half().make(run)
    before = hooks(run.model)
    for cache in (second, plain, first):
        read(run.model, cache, IDS[:, :100])
    assert [cache.layers[1].keys.shape[2] for cache in (first, second, plain)] == [50, 25, 100]
    assert hooks(run.model) == before


def test_a_press_that_fails_says_so_and_leaves_nothing_behind(run):
    broken = kind(Every(1, fails=True))
    cache = broken.make(run)
    before = hooks(run.model)
    with pytest.raises(ConfigError, match="Every: a press that fails"):
        read(run.model, cache, IDS)
    assert hooks(run.model) == before


def test_installing_it_is_enough():
    config = validate(RunConfig, compose(["cache=[knorm,snapkv,keydiff,expected_attention]", "cache.knorm.share=0.75"]))
    parts = choose(config)
    assert {**parts.caches, **parts.skipped}.keys() == {"fp16", *PRESSES}
    assert plugins.kinds(plugins.load(commands=True), "argus_caches")["kvpress"] is Pressed
    if MISSING:
        assert parts.skipped["knorm"] == MISSING
        assert "python -m benchmarks.kvpress_peers" in MISSING
    with pytest.raises(ConfigError, match=r"cache.knorm.share: .*less than 1"):
        choose(validate(RunConfig, compose(["cache=knorm", "cache.knorm.share=1"])))


@needs_kvpress
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # What kvpress imports warns.
@pytest.mark.parametrize("press", PRESSES)
def test_it_is_what_kvpress_does(press):
    """A model in 16 bits, so that nothing is rounded between: the same tokens are left, and the same logits follow."""
    import kvpress

    model = tiny(torch.bfloat16)
    mine = Pressed(PressOptions(press=press, share=0.5))
    cache, theirs = mine.make(SimpleNamespace(model=model)), transformers.DynamicCache()
    with getattr(kvpress, PRESSES[press])(compression_ratio=0.5)(model):
        read(model, theirs, IDS[:, :120])
    read(model, cache, IDS[:, :120])
    for one, other in zip(cache.layers, theirs.layers, strict=True):
        assert one.keys.shape[2] == 60
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    wanted = read(model, theirs, IDS[:, 120:130], position_ids=torch.arange(120, 130)[None])
    assert torch.equal(read(model, cache, IDS[:, 120:130]), wanted)
    assert mine.ledger(cache).bits_per_value == pytest.approx(16 * 70 / 130)
