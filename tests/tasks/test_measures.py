"""Perplexity in both protocols, and repetition."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from argus.engine import LayerCache
from argus.errors import ConfigError
from argus.tasks import generate, perplexity
from argus.tasks.fidelity import stage_rows
from argus.tasks.generate import Generate, GenerateConfig
from argus.tasks.perplexity import Perplexity, PerplexityConfig, window, written
from argus.tasks.repetition import Repetition, RepetitionConfig, loop
from argus.tasks.steps import Clock, feed, mean_memory, passage, sampler
from argus.turns import age
from tests.conftest import tokens


def logits_of(run, kind, ids, context: int) -> torch.Tensor:
    """Log-probabilities of the tokens after `context`, each token fed by itself."""
    held = kind.make(run)
    feed(run, held, ids[:, :context])
    rows = [feed(run, held, ids[:, place : place + 1]) for place in range(context, ids.shape[1] - 1)]
    return torch.stack(rows).log_softmax(-1)


def test_tokens_written_one_by_one_are_compressed_on_the_way(run):
    """The figures are those of a loop by hand; for FP16 also those of one dense pass, and pages fill while decoding."""
    ids = window(run, 180, 0)
    context = 64
    held = {name: kind.make(run) for name, kind in run.caches.items()}
    for cache in held.values():
        feed(run, cache, ids[:, :context])
    before = len(held["argus"].layers[0].engine.where)
    clocks = {name: Clock(run.device) for name in held}
    found = written(run, held, ids[:, context:], clocks)
    after = len(held["argus"].layers[0].engine.where)
    assert (before, after) == (3, 10)
    assert held["argus"].get_seq_length() == held["fp16"].get_seq_length() == 179
    assert all(len(clock.seconds) == 115 for clock in clocks.values())
    targets = ids[0, context + 1 :, None]
    dense = run.model(ids).logits[0, context:-1].log_softmax(-1)
    exact, coarse = (logits_of(run, kind, ids, context) for kind in run.caches.values())
    torch.testing.assert_close(exact, dense, rtol=0, atol=0.05)
    assert (found["fp16"].nll, found["fp16"].kl) == (0, pytest.approx(0, abs=1e-6))
    change = exact.gather(1, targets) - coarse.gather(1, targets)
    assert found["argus"].nll == pytest.approx(float(change.mean()), abs=1e-4)
    assert found["argus"].kl == pytest.approx(float((exact.exp() * (exact - coarse)).sum(-1).mean()), rel=1e-3)
    assert found["argus"].kl > 1e-3


def test_one_run_has_both_protocols(run):
    rows = list(Perplexity(PerplexityConfig(context=100, scored=9, windows=2, decoded=40)).run(run))
    assert [row["cache"] for row in rows] == ["fp16", "argus"]
    for row in rows:
        assert (row["samples"], row["decoded"], row["decoded_samples"]) == (2 * 8, 40, 2 * 40)
    first, second = rows
    assert (first["dnll"], first["decoded_dnll"]) == (0, 0)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert second["kl"] > 1e-4
    assert second["decoded_kl"] > 1e-4
    assert second["kl"] != second["decoded_kl"]


def test_the_first_pass_of_a_process_is_not_timed(run, monkeypatch):
    """A pass of the reference comes before every piece that is timed."""
    seen = []
    monkeypatch.setattr(perplexity, "feed", lambda *args, **options: seen.append("fed") or feed(*args, **options))

    class Spy(Clock):
        def timed(self):
            seen.append("timed")
            return super().timed()

    monkeypatch.setattr(perplexity, "Clock", Spy)
    list(Perplexity(PerplexityConfig(context=100, scored=9, windows=1, decoded=1)).run(run))
    assert seen[:3] == ["fed", "timed", "fed"]


def test_the_median_of_two_lies_between_them():
    assert Clock(torch.device("cpu"), [1.0, 9.0]).median == 5.0
    assert Clock(torch.device("cpu"), [2.0, 9.0, 1.0]).median == 2.0
    assert Clock(torch.device("cpu")).median == 0.0


def test_tokens_decoded_do_not_change_what_is_scored_before(run):
    """The window of text, and so the first protocol, depends on context and scored tokens alone."""
    few, many = (list(Perplexity(PerplexityConfig(context=64, scored=9, windows=1, decoded=n)).run(run))[1] for n in (1, 30))
    assert (few["dnll"], few["kl"]) == pytest.approx((many["dnll"], many["kl"]), abs=1e-4)
    assert few["decoded_kl"] != many["decoded_kl"]


def test_memory_is_the_mean_of_all_texts(run, monkeypatch):
    """Bytes may depend on the text: of several the mean is told, not the last."""
    sizes = [{"cache_bytes": 100, "bits_per_value": 8.0}, {"cache_bytes": 50, "bits_per_value": 4.0}]
    assert mean_memory(sizes) == {"cache_bytes": 75, "bits_per_value": 6.0, "compression": 16 / 6}
    assert mean_memory(sizes, [3, 1])["bits_per_value"] == 7.0
    told = iter([sizes[0], sizes[0], sizes[1], sizes[1]])
    monkeypatch.setattr(perplexity, "memory", lambda ledger: next(told))
    rows = list(Perplexity(PerplexityConfig(context=40, scored=4, windows=2, decoded=1)).run(run))
    assert [row["bits_per_value"] for row in rows] == [6.0, 6.0]


def test_the_prose_goes_on_at_its_beginning(tokenizer, monkeypatch):
    text = " ".join(f"word{place}" for place in range(600)) + " "
    monkeypatch.setattr("argus.tasks.steps.prose", lambda: text)
    whole = tokenizer(text + text, add_special_tokens=False).input_ids
    for seed in range(20):
        short = passage(tokenizer, 100, random.Random(seed))
        long = passage(tokenizer, 100, random.Random(seed), 400)
        assert (len(short), len(long), long[:100]) == (100, 500, short)
        assert any(whole[place : place + 500] == long for place in range(len(whole)))
    with pytest.raises(ConfigError, match=r"1000 tokens are more than the prose surely has; allowed: fewer than \d+"):
        passage(tokenizer, 600, random.Random(0), 400)


def test_perplexity_draws_no_token_twice(run, monkeypatch):
    """Scored tokens end where decoded ones begin, at the last token scored, which was not fed yet."""
    seen = []

    def spy(run, held, ids, clocks):
        seen.append((held["fp16"].get_seq_length(), ids))
        return written(run, held, ids, clocks)

    monkeypatch.setattr(perplexity, "written", spy)
    list(Perplexity(PerplexityConfig(context=64, scored=9, windows=1, decoded=5)).run(run))
    ((length, ids),) = seen
    assert length == 64 + 8
    assert torch.equal(ids, window(run, 73, 0, 5)[:, 72:])


@pytest.mark.parametrize(
    ("tokens", "least", "found"),
    [
        ([], 1, None),
        ([1, 2, 3, 4, 5, 6], 1, None),
        ([1, 1, 1], 3, (1, 3)),
        ([1, 1, 1], 4, None),
        ([9, 8, 1, 2, 1, 2, 1, 2], 6, (2, 6)),
        ([9, 2, 1, 2, 1, 2, 1, 2], 6, (2, 7)),
        ([1, 2, 1, 2, 1, 2, 9], 2, None),
        ([1, 2, 3, 1, 2, 3], 1, None),
        ([5, 1, 1, 2, 1, 1, 2, 1, 1, 2], 9, (3, 9)),
    ],
)
def test_loops(tokens, least, found):
    assert loop(tokens, least) == found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(3, 9), min_size=1, max_size=6, unique=True), st.data())
def test_a_text_that_ends_in_a_loop_is_known(prefix, period, data):
    """Three whole turns at least, and any part of a turn, after any text without its tokens."""
    turns = data.draw(st.integers(3, 5))
    rest = data.draw(st.integers(0, len(period) - 1))
    tail = (period * (turns + 1))[: turns * len(period) + rest]
    assert loop(prefix + tail, 1) == (len(period), len(tail))
    assert loop([*prefix, *tail, 99], 2) is None


def test_repetition(run):
    config = RepetitionConfig(prompts=("Tell a story.", "Say it again and again."), tokens=60, orders=(1, 2), loop=6)
    rows = list(Repetition(config).run(run))
    assert [row["cache"] for row in rows] == ["fp16", "argus"]
    longest = max(len(run.tokenizer(prompt).input_ids) for prompt in config.prompts)
    for row in rows:
        assert row["samples"] == len(row["texts"]) == len(row["loop_periods"]) == len(row["loop_tokens"]) == 2
        assert row["context"] == longest + 59
        assert 0 < row["distinct_1"] <= row["distinct_2"] <= 1
        assert row["loops"] == sum(period is not None for period in row["loop_periods"]) / 2
        assert row["cache_bytes"] > 0
    assert rows[1]["cache_bytes"] < rows[0]["cache_bytes"]


def test_drawn_texts_depend_on_the_seed_and_on_nothing_else(run):
    """The same cache under two names writes the same; another seed does not."""
    run.caches = {"fp16": run.caches["fp16"], "again": run.caches["fp16"]}
    config = RepetitionConfig(prompts=("Tell a story.", "Say it again and again."), tokens=30, temperature=2.0)
    first, again = (row["texts"] for row in Repetition(config).run(run))
    run.seed += 100
    other = next(iter(Repetition(config).run(run)))["texts"]
    greedy = next(iter(Repetition(config.model_copy(update={"temperature": 0.0})).run(run)))["texts"]
    assert first == again
    assert len({tuple(texts) for texts in (first, other, greedy)}) == 3


def test_letters_of_several_tokens_are_shown_whole(run, monkeypatch):
    text = "ağaç, 木 and ☃."
    ids, shown = run.tokenizer(text).input_ids, []
    assert len(ids) > len(text)
    rows = iter([*torch.nn.functional.one_hot(torch.tensor(ids), len(run.tokenizer)).float(), torch.zeros(len(run.tokenizer))])
    monkeypatch.setattr(generate, "feed", lambda *_: next(rows))
    monkeypatch.setattr(generate, "stop_ids", lambda _: [])
    one = SimpleNamespace(**vars(run) | {"caches": {"fp16": run.caches["fp16"]}, "show": shown.append})
    [row] = Generate(GenerateConfig(prompt="a", tokens=len(ids))).run(one)
    assert "".join(shown) == text + "\n"
    assert row["text"] == text


def test_bits_of_a_stage_are_of_keys_and_values_of_two_sizes(run):
    layer = LayerCache(replace(run.plan, anchors=()))
    layer.write(tokens(1, 80)[0], tokens(2, 80, dim=16)[1])
    age([layer])
    keys, values = layer.read(range(len(layer.where)))
    held = SimpleNamespace(
        plan=layer.plan, layers=[SimpleNamespace(engine=layer)], tensors=layer.tensors, get_seq_length=lambda: layer.length
    )
    [row] = stage_rows("argus", held, SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=values)]))
    assert row["bits_per_value"] == 8 * row["bytes"] / (keys.numel() + values.numel())


def test_a_sampler_draws_as_often_as_the_model_says():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]]).expand(4000, -1)
    for temperature in (0.5, 1.0):
        drawn = sampler(temperature, 0)(logits)
        assert drawn.max() == 1
        assert float(drawn.float().mean()) == pytest.approx(float(torch.tensor(1 / temperature).sigmoid()), abs=0.03)
    assert torch.equal(sampler(0, 0)(logits), logits.argmax(-1))


def test_a_loop_is_found_in_what_a_model_writes(run):
    """A model whose answer is always the same token; where that token would end the text, another is chosen."""

    @dataclass
    class Out:
        logits: torch.Tensor

    made = run.model

    class Same(torch.nn.Module):
        generation_config = made.generation_config

        def forward(self, ids, past_key_values, use_cache, logits_to_keep):
            out = made(ids, past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep)
            logits = torch.zeros_like(out.logits)
            logits[..., 70], logits[..., 71] = 2.0, 1.0
            return Out(logits)

    run.model = Same()
    run.caches = {"fp16": run.caches["fp16"]}
    config = RepetitionConfig(prompts=("Tell a story.",), tokens=40, orders=(1,), loop=32)
    (row,) = Repetition(config).run(run)
    assert (row["loops"], row["loop_periods"], row["loop_tokens"]) == (1, [1], [40])
    assert row["distinct_1"] == 1 / 40
    assert row["texts"] == [run.tokenizer.decode([70] * 40)]
    run.model.generation_config.eos_token_id = [70, 3]
    (row,) = Repetition(config).run(run)
    assert row["texts"] == [run.tokenizer.decode([71] * 40)]
