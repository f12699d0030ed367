"""KIVI's formula written out, against what the ladders ``kivi2`` and ``kivi4`` keep and read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from argus.blocks import payload_of
from argus.build import build, stage_bits
from argus.config import RunConfig, compose, load_cache_config, validate
from argus.engine import LayerCache
from argus.runner import choose
from argus.turns import age

LADDERS = {"kivi2": 2, "kivi4": 4}
GROUP, RESIDUAL = 32, 128


def kivi(x, bits, along):
    """Codes, scale and zero of KIVI for ``[..., T, D]``, groups of 32 along an axis (-2: tokens, -1: channels)."""
    groups = x.double().movedim(along, -1).unflatten(-1, (-1, GROUP))
    zero = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - zero) / (2**bits - 1)
    exact = (groups - zero) / scale
    return tuple(part.flatten(-2).movedim(-1, along) for part in (exact, *(y.expand_as(groups) for y in (scale, zero))))


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and a busy machine makes threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def filled(name, keys, values):
    """One layer that has read all tokens, as the cache ``name`` makes it."""
    run = validate(RunConfig, compose([f"cache={name}"]))
    plan = build(load_cache_config(run.cache[name].options["overrides"]), keys.shape[-1])
    layer = LayerCache(replace(plan, dtype=torch.float32))
    layer.write(keys, values)
    age([layer])
    return layer


def coded(layer, role):
    """Codes ``[B, H, T, D]`` of the pages, and the tier's form."""
    (slab, _), *more = layer.pools[0].blocks()
    assert not more
    form = layer.plan.stages[0].tier(role).form(role)
    payload = payload_of(slab, role)
    unit = {name: torch.full_like(x, float(name == "scale")) for name, x in payload.items() if name != "codes"}
    codes = layer.plan.backend.dequantize(payload | unit, form)
    return codes.permute(1, 2, 0, 3, 4).flatten(2, 3)


def on_grid(shape, bits, seed):
    """Whole codes on a grid that FP16 holds: a group with both ends in it has 0.25 as its scale."""
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)) * 0.25 - 1.5


@pytest.mark.parametrize(("name", "bits"), LADDERS.items())
def test_codes_are_those_of_the_formula(name, bits):
    """On a grid they are equal; elsewhere each is the nearest, up to the rounding of scale and zero to FP16."""
    shape = (2, 3, 448, 64)
    normal = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for kind, pair in {"grid": [on_grid(shape, bits, seed) for seed in (2, 3)], "normal": normal}.items():
        layer = filled(name, *pair)
        tokens = len(layer.where) * GROUP
        assert tokens == 448 - RESIDUAL
        for role, x, along in zip(("keys", "values"), pair, (-2, -1), strict=True):
            exact, scale, _ = kivi(x[:, :, :tokens], bits, along)
            found = coded(layer, role)
            if kind == "grid":
                settled = scale == 0.25
                assert settled.float().mean() > 0.5
                assert torch.equal(found[settled].double(), exact[settled])
            else:
                assert (found - exact).abs().max() <= 0.5 + 2**bits * 2**-9
                assert (found == exact.round()).float().mean() > 0.98


@pytest.mark.parametrize(("name", "bits"), LADDERS.items())
def test_what_attention_reads_is_the_formula_and_the_newest_tokens(name, bits):
    keys, values = (torch.randn(1, 2, 480, 64, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5))
    layer = filled(name, keys, values)
    tokens = len(layer.where) * GROUP
    assert RESIDUAL <= len(layer.window) < RESIDUAL + GROUP
    assert torch.equal(torch.cat([part[0] for part in layer.window.parts()], 2), keys[:, :, tokens:])
    assert layer.exact.keys is None
    for found, x, along in zip(layer.read(range(len(layer.where))), (keys, values), (-2, -1), strict=True):
        exact, scale, zero = kivi(x[:, :, :tokens], bits, along)
        wanted = exact.round() * scale + zero
        read, formula = found - x[:, :, :tokens], wanted - x[:, :, :tokens]
        assert (read.abs() <= scale / 2 + 0.002).all()
        assert float(read.norm()) == pytest.approx(float(formula.norm()), rel=2e-3)


@pytest.mark.parametrize(("name", "bits"), LADDERS.items())
def test_a_scale_and_a_zero_for_32_numbers(name, bits):
    plan = build(load_cache_config([f"tiers={name}", "anchors=none"]), 64)
    assert stage_bits(plan.stages[0], plan.page_size, 64) == bits + 32 / GROUP
    assert (plan.window, plan.anchors) == (RESIDUAL, ())


def test_installing_it_is_enough():
    config = validate(RunConfig, compose(["cache=[argus,kivi2,kivi4]"]))
    assert list(choose(config).caches) == ["fp16", "argus", "kivi2", "kivi4"]
