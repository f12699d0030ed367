"""The comparison of a transformer, ARGUS and Mamba: its task, its models, its table."""

from __future__ import annotations

import json
import random

import pytest
import torch
from rich.console import Console

from benchmarks import lossless
from benchmarks.comparison import data, models, table, train
from benchmarks.comparison.contestants import Contestant, Recurrent, cost, recall


def batch_of(length, rows=3, seed=0, **options):
    pairs = options.pop("pairs", data.pairs_of(length))
    return data.draw(length, rows, torch.Generator().manual_seed(seed), pairs, options.pop("asked", pairs), **options)


def look_up(batch):
    """Answers found by searching each question's key in the context alone."""
    found = []
    for row in batch.tokens.tolist():
        context, questions = row[: batch.context], row[batch.context :: 2]
        found.append([context[context.index(key) + 1] for key in questions])
    return torch.tensor(found)


@pytest.mark.parametrize("length", data.LENGTHS)
def test_an_oracle_answers_every_question(length):
    for batch in (batch_of(length), batch_of(length, pairs=data.most_pairs(length)), data.exam(length, 3, 0)):
        assert batch.tokens.shape == (3, length)
        assert torch.equal(look_up(batch), batch.answers)


@pytest.mark.parametrize("length", [64, 256])
def test_keys_stand_once_in_the_context(length):
    batch = batch_of(length, rows=20, pairs=data.most_pairs(length))
    for row in batch.tokens[:, : batch.context].tolist():
        keys = [token for token in row if data.NOISE <= token < data.NOISE + data.KEYS]
        assert len(keys) == len(set(keys)) == data.most_pairs(length)


def test_tests_are_not_drawn_twice_alike():
    assert not torch.equal(data.exam(64, 2, 0).tokens, data.exam(64, 2, 1).tokens)
    assert torch.equal(data.exam(64, 2, 0).tokens, data.exam(64, 2, 0).tokens)


@pytest.mark.parametrize(
    ("length", "pairs", "asked", "known"),
    [(63, 4, 4, 9), (32, 2, 2, 9), (64, 16, 4, 99), (64, 4, 28, 9), (64, 4, 0, 9), (64, 4, 4, 3), (64, 4, 4, 999)],
)
def test_what_no_sequence_can_be_is_refused(length, pairs, asked, known):
    with pytest.raises(ValueError, match="allowed"):
        batch_of(length, pairs=pairs, asked=asked, known=known)


def test_lessons_ask_more_often_than_there_are_pairs():
    batch = batch_of(64, rows=20, pairs=4, asked=data.most_asked(64, 4), known=8)
    assert torch.equal(look_up(batch), batch.answers)
    questions = batch.tokens[:, batch.context :: 2]
    assert questions.min() >= data.NOISE
    assert questions.max() < data.NOISE + 8
    assert batch.answers.max() < data.NOISE + data.KEYS + 8
    assert questions.shape[1] > 20
    assert all(len(row.unique()) <= 4 for row in questions)


@pytest.mark.parametrize("stage", train.STAGES)
def test_lessons_of_every_stage_can_be_drawn(stage):
    options = train.options_of(["--model", "mamba", "--batch", "2048"])
    pick, generator = random.Random(0), torch.Generator().manual_seed(0)
    drawn = [train.lesson(stage, options, pick, generator) for _ in range(30)]
    assert {batch.tokens.shape[1] for batch in drawn} == set(train.lengths_of(stage, 2048))
    assert all(torch.equal(look_up(batch), batch.answers) for batch in drawn)


def test_stages_reach_the_lengths_of_the_comparison():
    assert [stage.length for stage in train.STAGES] == sorted(stage.length for stage in train.STAGES)
    assert [stage.until for stage in train.STAGES] == sorted(stage.until for stage in train.STAGES)
    assert set(data.LENGTHS) <= set(train.lengths_of(train.STAGES[-1], 2048))
    assert train.lengths_of(train.STAGES[-1], 64) == [64]


def test_a_layer_sees_its_own_token():
    """Embeddings no smaller than a tenth of what the first layer adds, else recall is learnt late."""
    torch.manual_seed(0)
    with torch.no_grad():
        states = models.transformer()(batch_of(64).tokens, output_hidden_states=True).hidden_states
    assert states[0].norm(dim=-1).mean() > 0.1 * (states[1] - states[0]).norm(dim=-1).mean()


def test_the_two_models_have_one_size():
    small, large = sorted(models.parameters(make()) for make in models.KINDS.values())
    assert large <= 1.1 * small


@pytest.fixture
def mamba():
    torch.manual_seed(0)
    return models.mamba().eval()


@pytest.mark.parametrize("length", [64, 200])
def test_what_mamba_was_trained_on_is_what_it_reads(mamba, length):
    """Training's chunked scan against tokens read one at a time."""
    batch = batch_of(length)
    with torch.no_grad():
        want = train.logits_of_answers(mamba.train(), batch)
    memory, got = Recurrent(mamba.eval()), []
    memory.read(batch.tokens[:, :1])
    for place in range(1, length - 1):
        got.append(memory.read(batch.tokens[:, place : place + 1]))
    torch.testing.assert_close(torch.stack(got[batch.context - 1 :: 2], 1), want, rtol=1e-4, atol=1e-4)


def test_mamba_reads_on_from_its_states(mamba):
    tokens = batch_of(64).tokens
    memory = Recurrent(mamba)
    memory.read(tokens[:, :40])
    last = memory.read(tokens[:, 40:])
    with torch.inference_mode():
        torch.testing.assert_close(last, mamba(tokens).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_mamba_states_are_measured(mamba):
    config, one = mamba.config, Contestant("mamba", "states", mamba=mamba)
    inner = config.num_heads * config.head_dim
    values = inner * config.state_size + (inner + 2 * config.n_groups * config.state_size) * config.conv_kernel
    for length in (64, 128):
        held, speed = cost(one, length, 0)
        assert held == 4 * values * config.num_hidden_layers
        assert speed > 0


def test_training_lowers_the_loss_and_writes_what_loads(tmp_path):
    words = ["--model", "transformer", "--longest", "64", "--batch", "512", "--tokens", "12000", "--out", str(tmp_path)]
    facts = train.train(train.options_of(words))
    model, kept = models.load("transformer", tmp_path)
    assert kept == facts
    assert facts["tokens"] == 12288 or facts["seconds"] > 200
    torch.manual_seed(0)
    batch = batch_of(64, rows=32)
    with torch.no_grad():
        trained, fresh = (train.loss_of(train.logits_of_answers(one, batch), batch) for one in (model, models.transformer()))
    assert trained < fresh - 0.5


def test_steps_rise_then_shrink():
    assert train.rate_at(0.0) == train.rate_at(1.0) == 0
    assert train.rate_at(0.3) == 1


def test_what_is_recalled_ends_a_stage(tmp_path, monkeypatch):
    words = ["--model", "transformer", "--longest", "64", "--batch", "64", "--tokens", "8000", "--out", str(tmp_path)]
    monkeypatch.setattr(train, "PASS", -1.0)
    facts = train.train(train.options_of(words))
    assert [one["steps"] for one in facts["stages"]] == [20, 40, 60]


@pytest.fixture
def compared(tmp_path):
    """Every contestant of the trio, untrained."""
    torch.manual_seed(0)
    for name, make in models.KINDS.items():
        models.save(make(), name, {"model": name}, tmp_path)
    words = ["--weights", str(tmp_path), "--lengths", "64", "192", "--sequences", "2", "--device", "cpu", "--ladders", "int4"]
    options = table.options_of(words)
    config = table.validate(table.RunConfig, table.compose(["model.device=cpu"]))
    return table.trio(config, options)[0], options


def test_every_row_is_measured_at_its_length(compared):
    found, options = compared
    rows = list(table.with_cost(table.recall_rows(found, options), found, options.seed))
    names = [("transformer", "fp16"), ("transformer", "argus int4"), ("mamba", "states")]
    assert [(row["model"], row["cache"], row["length"]) for row in rows] == [(*name, n) for n in (64, 192) for name in names]
    held = {(row["cache"], row["length"]): row["memory"] for row in rows}
    assert [held["fp16", n] for n in (64, 192)] == [2 * 2 * 2 * 64 * 2 * n for n in (64, 192)]
    assert held["argus int4", 192] < held["fp16", 192]
    assert held["states", 64] == held["states", 192]
    console = Console(width=table.WIDTH, record=True)
    table.show(rows, console)
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= table.WIDTH
    for text in (printed, table.markdown(rows)):
        assert all(word in text for word in ("64", "192", "argus int4", "states", *table.METRICS))


def test_recall_counts_right_answers(compared):
    found, _ = compared
    batch = data.exam(64, 4, 0)
    with torch.no_grad():
        likeliest = train.logits_of_answers(found[0].run.model, batch).argmax(-1)
    assert recall(found[0], batch) == pytest.approx(float((likeliest == batch.answers).float().mean()))
    # The same sequence, its last value put where the model expects it.
    batch.tokens[:, -1] = likeliest[:, -1]
    assert recall(found[0], batch) >= 1 / batch.answers.shape[1]


@pytest.mark.parametrize("name", sorted(models.KINDS))
def test_kept_weights_load(name):
    model, facts = models.load(name)
    assert facts["parameters"] == models.parameters(model)
    assert all(word in facts["command"] for word in ("benchmarks.comparison.train", name))


@pytest.fixture(scope="module")
def kept():
    """Every contestant of the trained trio, by the names of its row."""
    options = table.options_of(["--device", "cpu", "--ladders", "default", "int4"])
    config = table.validate(table.RunConfig, table.compose(["model.device=cpu"]))
    found, training = table.trio(config, options)
    return {(one.model, one.cache): one for one in found}, training


@pytest.mark.parametrize("length", [64, 512])
def test_the_kept_trio_recalls(kept, length):
    found, _ = kept
    batch = data.exam(length, 4, 0)
    with torch.inference_mode():
        assert {name: recall(one, batch) for name, one in found.items()} == dict.fromkeys(found, 1.0)


def test_int4_recalls_where_the_cache_is_all_codes(kept):
    """64 pairs in 1024 tokens, all but the window and one token in twenty in 4 bits."""
    found, _ = kept
    batch = data.exam(1024, 2, 0)
    with torch.inference_mode():
        assert recall(found["transformer", "argus int4"], batch) == recall(found["transformer", "fp16"], batch) == 1


def test_kept_figures_are_of_the_kept_weights(kept):
    """The Markdown is the JSON's table, and the JSON tells the training of the weights beside it."""
    _, training = kept
    folder = models.WEIGHTS.parents[1] / "results"
    facts = json.loads((folder / "comparison.json").read_text())
    assert facts["training"] == training
    assert (folder / "comparison.md").read_text() == table.markdown(facts["rows"])
    assert {row["length"] for row in facts["rows"]} == set(data.LENGTHS)


@pytest.mark.parametrize("packer", sorted(lossless.PACKERS))
@pytest.mark.parametrize("delta", [False, True])
def test_lossless_coding_is_lossless_and_finds_what_repeats(packer, delta):
    page = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    page[0, 0, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    noise = lossless.lossless(page.numpy(), packer, delta)
    still = lossless.lossless(page[:, :1].expand(-1, 64, -1).contiguous().numpy(), packer, delta)
    assert still < noise / 5


def test_a_changed_page_is_told(monkeypatch):
    pack, unpack = lossless.PACKERS["zlib"]
    monkeypatch.setitem(lossless.PACKERS, "zlib", (pack, lambda raw: unpack(raw)[::-1]))
    with pytest.raises(ValueError, match="changed"):
        lossless.lossless(torch.randn(1, 8, 8).half().numpy(), "zlib", False)
