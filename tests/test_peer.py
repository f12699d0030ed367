"""What a published cache of this kind got wrong, each as a test: the numbers are those of the list of observations."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from transformers import DynamicCache

import argus
from argus import ArgusCache, patch_model_with_argus, plugins, unpatch
from argus.build import build
from argus.caches import Argus, Half
from argus.config import load_cache_config
from argus.engine import LayerCache
from argus.errors import ConfigError, ModelError
from argus.hookspecs import hookimpl
from argus.tasks.fidelity import Fidelity, FidelityConfig
from argus.tasks.passkey import HEAD, NEEDLE, Passkey, PasskeyConfig, puzzle
from argus.tasks.perplexity import Perplexity, PerplexityConfig
from argus.tiers.grouped import GroupedTier
from tests.conftest import SEVEN, config, contents, grow, make_layer, make_plan, reachable, tokens, unique_bytes
from tests.models import tiny

SMALL = ["tiers=seed", "tiers.page_size=16", "tiers.window=16"]
SMALL += [f"tiers.stages.{stage}.capacity=32" for stage in list(SEVEN)[:-1]]
"""All seven stages on pages of 16 tokens, so that a few hundred tokens reach every one."""


def ids(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model():
    return tiny("llama")


class Words:
    """A tokenizer of whole words, so that a text has as many tokens as words."""

    chat_template = None

    def __init__(self):
        self.known: dict[str, int] = {}

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[2 + self.known.setdefault(word, len(self.known)) % 95 for word in text.split()])

    def decode(self, tokens):
        return " ".join(map(str, tokens))


@pytest.fixture
def run(model, tmp_path):
    """A run of the command line's kind, on a tiny model."""
    plan = build(load_cache_config(SMALL), 8)
    caches = {"fp16": Half(), "argus": Argus()}
    yield SimpleNamespace(
        model=model,
        tokenizer=Words(),
        device=torch.device("cpu"),
        plan=plan,
        caches=caches,
        folder=tmp_path,
        seed=3,
        tell=lambda sentence: None,
        show=lambda text: None,
    )
    unpatch(model)


# 1


@pytest.mark.parametrize("chunk", [1, 5, 40, 600])
def test_1_every_demoted_page_is_its_own_source(chunk):
    """Each page a stage holds is, to the bit, what the tier makes of what that very page was before it moved."""
    sources: dict[str, list[torch.Tensor]] = {}

    def recording(kind, name):
        def encode(self, x, role):
            sources.setdefault(f"{name} {role}", []).extend(x.clone())
            return kind.encode(self, x, role)

        return type(kind.__name__, (kind,), {"encode": encode})

    kinds = plugins.kinds(plugins.load(), "argus_tiers")
    mine = {f"my_{name}": recording(kinds[name], f"my_{name}") for name in list(SEVEN)}

    class Plugin:
        @hookimpl
        def argus_tiers(self):
            return mine

    capacities = {f"my_{name}": 16 for name in list(SEVEN)[:-1]}
    options = {f"my_{name}": SEVEN[name] for name in SEVEN}
    layer = LayerCache(make_plan(config(list(mine), capacities, options=options), [Plugin()]))
    # Each page has a mean of its own, so that no page can pass for another.
    means = 4 * torch.randn(2, 1, 2, 75, 1, 8, generator=torch.Generator().manual_seed(9)).half().float()
    keys, values = (x + mean.expand(-1, -1, -1, 8, -1).flatten(2, 3) for x, mean in zip(tokens(1, 600), means, strict=True))
    grow(layer, keys, values, chunk=chunk)
    assert len(layer.where) == 74
    assert [len(pool) for pool in layer.pools] == [2] * 6 + [62]
    for page, place in enumerate(layer.where):
        for role, read, first in zip(("keys", "values"), layer.read([page]), (keys, values), strict=True):
            stage = layer.plan.stages[place]
            tier, written = stage.tier(role), first.unflatten(2, (-1, 8))[0].transpose(0, 1)
            assert int(torch.cosine_similarity(read.flatten()[None], written.flatten(1)).argmax()) == page
            encoded = torch.stack([x.flatten() for x in sources[f"{stage.facts.name} {role}"]])
            source = encoded[int(torch.cosine_similarity(encoded, written[page].flatten()[None]).argmax())].view(read.shape)
            again = tier.decode(tier.encode(source[None], role), role)[0]
            torch.testing.assert_close(read, again, rtol=1e-5, atol=1e-5)


# 2


def test_2_fp8_is_fp8():
    """Real E4M3 codes: numbers of every size come back within 1/16, nothing wraps."""
    layer = make_layer(("fp8",))
    keys, values = tokens(1, 96)
    keys *= 200
    grow(layer, keys, values)
    slab = layer.pools[0].slabs[0]
    assert slab["keys.codes"].dtype == slab["values.codes"].dtype == torch.float8_e4m3fn
    for read, wanted in zip(contents(layer), (keys, values), strict=True):
        big = wanted.abs() > wanted.abs().amax() / 64
        assert ((read - wanted).abs()[big] <= wanted.abs()[big] / 15).all()
        assert (read.sign() == wanted.sign())[big].all()


# 3


def test_3_keys_by_channel_values_by_token_and_means_kept():
    plan = make_plan(config(tuple(SEVEN)))
    grouped = [stage for stage in plan.stages if isinstance(stage.keys, GroupedTier)]
    assert len(grouped) == 4
    for stage in grouped:
        assert (stage.keys.form("keys").axis, stage.values.form("values").axis) == ("channel", "token")
    # Keys whose channels have means of their own, as real keys do, survive one bit and a projection.
    for name in ("sign", "jl"):
        layer = make_layer((name,), options={name: SEVEN[name]})
        keys, values = tokens(1, 96)
        keys = keys + 20 * torch.randn(8, generator=torch.Generator().manual_seed(2))
        grow(layer, keys, values)
        assert torch.cosine_similarity(contents(layer)[0], keys, dim=-1).amin() > 0.95


# 4


def test_4_bytes_fall_or_the_config_says_so():
    options = {"jl": {"ratio": 4, "coefficients": "fp16"}}
    growing = config(("sign", "jl"), {"sign": 64}, options=options, page_size=64, dtype="float16")
    strict = growing.model_copy(update={"tiers": growing.tiers.model_copy(update={"allow_growth": False})})
    with pytest.raises(ConfigError, match=r"stage 'jl' keeps 4.25 bits a value, not fewer than 'sign'.*allow_growth=true"):
        make_plan(strict, head_dim=64)
    assert len(make_plan(growing, head_dim=64).stages) == 2


# 5


@pytest.mark.parametrize("name", [name for name in SEVEN if name != "fp16"])
def test_5_a_prompt_is_encoded_from_its_exact_values(name):
    """The oldest pages of a long prompt are as good as if their stage were the only one."""
    keys, values = tokens(1, 400)
    order = list(SEVEN)[: list(SEVEN).index(name) + 1]
    ladder = make_layer(order, dict.fromkeys(order[:-1], 16))
    alone = make_layer((name,))
    grow(ladder, keys, values)
    grow(alone, keys, values)
    held = len(ladder.pools[-1])
    assert held == len(ladder.where) - 2 * (len(order) - 1)
    for found, wanted in zip(ladder.read(range(held)), alone.read(range(held)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# 6


def test_6_a_patched_model_uses_the_cache(model):
    """The cache that plain generate returns is ARGUS's, holds bytes in a stage, and no other is accepted."""
    patch_model_with_argus(model, SMALL)
    try:
        out = model.generate(ids(120), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        held = out.past_key_values
        assert type(held) is ArgusCache
        assert held.get_seq_length() == 123
        parts = held.ledger().parts
        assert parts["stage.0"] > 0
        assert parts["stage.1"] > 0
        with pytest.raises(ModelError, match="was given a DynamicCache"):
            model(ids(8), past_key_values=DynamicCache())
    finally:
        unpatch(model)


def test_6_a_patched_model_whose_attention_was_changed_uses_the_cache(model):
    """Whatever happened between, plain generate compresses; and nothing is left on the model that is unpatched."""
    patch_model_with_argus(model, SMALL)
    model.set_attn_implementation("sdpa")
    out = model.generate(ids(120), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert type(out.past_key_values) is ArgusCache
    assert out.past_key_values.ledger().parts["stage.1"] > 0
    unpatch(model)
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks


# 7


@pytest.mark.parametrize("anchors", ["default", "none"])
@pytest.mark.parametrize("outliers", ["none", "sigma"])
def test_7_bytes_are_those_of_every_storage_that_is_held(model, anchors, outliers):
    """Every tensor that the cache leads to, tiers and all, each storage once: nothing is left out."""
    cache = ArgusCache(model, [*SMALL, f"anchors={anchors}", f"outliers={outliers}"])
    with torch.no_grad():
        model(ids(300, 2), past_key_values=cache)
        for step in range(40):
            model(ids(1, 2) + step % 5, past_key_values=cache)
    unpatch(model)
    held = {x for layer in cache.layers for x in reachable(vars(layer))}
    held |= {x for stage in cache.plan.stages for tier in (stage.keys, stage.values) for x in reachable(tier)}
    held |= set(reachable(cache.transcript))
    assert cache.ledger().bytes == unique_bytes(list(held))
    assert cache.ledger().values == 2 * 3 * 2 * 2 * 8 * 340


def test_7_compression_is_of_measured_bytes(run):
    """Both caches are measured in the same way, and one has fewer bytes for the same tokens."""
    rows = list(Perplexity(PerplexityConfig(context=400, scored=8, windows=1, decoded=2)).run(run))
    dense, compressed = rows
    assert dense["cache_bytes"] == 2 * 3 * 2 * 8 * 2 * 400
    assert compressed["cache_bytes"] < dense["cache_bytes"]
    for row in rows:
        assert row["bits_per_value"] == row["cache_bytes"] * 8 / (2 * 3 * 2 * 8 * 400)
        assert row["compression"] == pytest.approx(16 / row["bits_per_value"])


# 8


@pytest.mark.parametrize("length", [64, 65, 100, 512, 1000])
def test_8_passkeys_have_the_stated_length(length):
    """The length to the token; key, depth and text vary with the seed and with nothing else."""
    words = Words()
    found = [puzzle(words, length, seed) for seed in range(12)]
    assert all(len(one.context) == length for one in found)
    assert len({one.answers[0] for one in found}) == 12
    assert found[3] == puzzle(words, length, 3)
    needle = len(words(NEEDLE.format(key=1)).input_ids)
    depths = set()
    for one in found:
        here = words(NEEDLE.format(key=one.answers[0])).input_ids
        places = [i for i in range(length) if one.context[i : i + needle] == here]
        assert len(places) == 1
        depths.add(places[0])
    assert len(depths) >= {64: 1, 65: 1, 100: 2, 512: 6, 1000: 6}[length]


def test_8_a_length_with_no_room_is_refused():
    """A tokenizer of letters needs more than 64 tokens for the sentence with the key: never a longer context in silence."""

    def letters(text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    shortest = len(HEAD) + len(NEEDLE.format(key=12345))
    assert len(puzzle(letters, shortest, 0).context) == shortest
    with pytest.raises(ConfigError, match=rf"64.*allowed.*{shortest}"):
        puzzle(letters, 64, 0)


def test_8_passkeys_are_asked_of_a_compressed_context(run):
    seen = []
    make = run.caches["argus"].make

    def spy(run):
        seen.append(make(run))
        return seen[-1]

    weighed = []
    ledger = run.caches["argus"].ledger

    def weigh(cache):
        weighed.append((cache.get_seq_length(), unique_bytes([x for _, x in cache.tensors()])))
        return ledger(cache)

    run.caches["argus"].make, run.caches["argus"].ledger = spy, weigh
    rows = list(Passkey(PasskeyConfig(lengths=(256, 400), samples=2)).run(run))
    assert [(row["cache"], row["context"]) for row in rows] == [("fp16", 256), ("argus", 256), ("fp16", 400), ("argus", 400)]
    assert len(seen) == 4
    for row, cache in zip([rows[1], rows[3]], [seen[1], seen[3]], strict=True):
        assert (row["context"], row["cache_bytes"]) in weighed
        assert cache.get_seq_length() > row["context"]
        # The whole context but a window was compressed before the question was asked.
        assert all(len(layer.engine.where) * 16 >= row["context"] - 32 for layer in cache.layers)
        parts = cache.ledger().parts
        assert all(parts[f"stage.{place}"] > 0 for place in range(7 if row["context"] == 400 else 6))
        assert row["samples"] == 2
        assert 0 <= row["accuracy"] <= 1


# 9


def test_9_memory_is_measured_and_nothing_is_reserved(run):
    """Rows hold the bytes of the storages in the run; before the first token there are none."""
    fresh = ArgusCache(run.model, plan=run.plan)
    assert fresh.ledger().bytes == unique_bytes([x for _, x in fresh.tensors()]) <= 7 * 16 * 16 * 4
    assert not [x for layer in fresh.layers for x in reachable(vars(layer))]
    task = Fidelity(FidelityConfig(context=300))
    held, _ = task.caches(run, "argus", run.plan)
    rows = list(task.run(run))
    assert [row["stage"] for row in rows] == list(SEVEN)
    for place, row in enumerate(rows):
        slabs = [x for layer in held.layers for slab in layer.engine.pools[place].slabs for x in slab.values()]
        assert row["bytes"] == unique_bytes(slabs)
        assert row["pages"] == len(held.layers[0].engine.pools[place])
    assert sum(row["tokens"] for row in rows) == len(held.layers[0].engine.where) * 16


# 10


def test_10_every_page_has_its_own_scales():
    """Numbers whose sizes differ from token to token, channel to channel and page to page come back each at its size."""
    sizes = torch.logspace(-2, 2, 96).view(1, 1, 96, 1)
    for name in ("int8", "int4", "fp8"):
        layer = make_layer((name,), options={name: {"axis": "token"}})
        keys, values = tokens(1, 96, dim=8)
        grow(layer, keys * sizes, values * sizes.flip(2))
        for read, wanted in zip(contents(layer), (keys * sizes, values * sizes.flip(2)), strict=True):
            off = (read - wanted).norm(dim=-1) / wanted.norm(dim=-1)
            assert off.amax() < 0.15, name


# 11


def test_11_left_padding_chunks_and_crop(model):
    """One row of a padded batch, fed in chunks, cropped and fed again, answers as it does alone in a dense cache."""
    exact = ["tiers=exact", "tiers.page_size=4", "tiers.window=4", "tiers.dtype=float32"]
    exact += ["anchors=sinks", "anchors.sinks.tokens=3"]
    tokens_, pad = ids(50, 2), 9
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, :pad] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    cache, plain = ArgusCache(model, exact), DynamicCache()
    logits = {}
    with torch.no_grad():
        for name, held in (("argus", cache), ("dense", plain)):
            out = []
            for begin, end in ((0, 17), (17, 40)):
                part = {"attention_mask": mask[:, :end], "position_ids": places[:, begin:end]}
                out.append(model(tokens_[:, begin:end], past_key_values=held, **part).logits)
            held.crop(-11)
            assert held.get_seq_length() == 29
            part = {"attention_mask": mask[:, :44], "position_ids": places[:, 29:44]}
            out.append(model(tokens_[:, 29:44], past_key_values=held, **part).logits)
            logits[name] = torch.cat(out, 1)
    unpatch(model)
    real = torch.cat([torch.arange(40), torch.arange(29, 44)]) >= pad
    for row, kept in ((0, real), (1, torch.ones_like(real))):
        torch.testing.assert_close(logits["argus"][row][kept], logits["dense"][row][kept], rtol=1e-4, atol=1e-4)
    held = cache.layers[0].engine.exact.positions
    assert [sorted({int(p) for p in held[row, 0] if p >= 0}) for row in (0, 1)] == [[9, 10, 11], [0, 1, 2]]


# 12


def test_12_the_users_random_state_is_left_alone(model, run):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()

    torch.manual_seed(7)
    before = states()
    patch_model_with_argus(model, [*SMALL, "outliers=topk"])
    model.generate(ids(150), max_new_tokens=3, do_sample=False)
    unpatch(model)
    list(Passkey(PasskeyConfig(lengths=(128,), samples=1)).run(run))
    list(Perplexity(PerplexityConfig(context=64, scored=8, windows=1, decoded=1)).run(run))
    list(Fidelity(FidelityConfig(context=64)).run(run))
    assert states() == before


def test_12_equal_seeds_give_equal_codes(model):
    caches = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        cache = ArgusCache(model, SMALL)
        with torch.no_grad():
            model(ids(200), past_key_values=cache)
        caches.append(cache)
    unpatch(model)
    for one, other in zip(*(cache.tensors() for cache in caches), strict=True):
        assert one[0] == other[0]
        # A window's buffer has room for tokens to come, which nobody has written yet.
        assert one[0] == "window" or torch.equal(one[1].view(torch.uint8), other[1].view(torch.uint8))


def test_the_package_is_whole():
    """Every module imports, on this Python, without a compiler (13)."""
    root = Path(argus.__file__).parent
    for path in sorted(root.rglob("*.py")):
        name = ".".join(("argus", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        if "triton" not in name:
            __import__(name)
