"""What each codec promises in numbers: half a step, real e4m3fn, exact packing, orthogonal projections, kept means."""

from __future__ import annotations

import math
import random

import numpy
import pytest
import torch

from argus import plugins
from argus.backends.base import Affine
from argus.backends.cpu import CpuBackend, pack, unpack
from argus.errors import RangeError
from argus.testing.tiers import maker
from argus.tiers.base import LIMIT, ROLES, gate
from argus.tiers.jl import projection

TIERS = plugins.kinds(plugins.load(), "argus_tiers")


def tier(name, **options):
    return maker(TIERS[name], options, CpuBackend(), TIERS)(torch.float16)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(*shape):
    """Pages whose every group has a range and a centre of its own."""
    tokens, channels = torch.logspace(-1, 1, shape[-2]), torch.logspace(-2, 2, shape[-1])
    return normal(*shape) * tokens.unsqueeze(-1) * channels + 5 * normal(*shape[:-2], 1, shape[-1], seed=1)


def spread(groups, x, axis, group):
    dim = -2 if axis == "channel" else -1
    return groups.float().repeat_interleave(group or x.shape[dim], dim)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("group", [None, 4, 8])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_codes_lie_within_half_a_step_of_the_source(bits, group, axis):
    x = uneven(2, 1, 3, 16, 24)
    int_tier = tier("int", bits=bits, axis=axis, group_size=group)
    payload = int_tier.encode(x, "keys")
    scale = spread(payload["scale"], x, axis, group)
    assert len(payload["scale"].unique()) > payload["scale"].numel() / 2
    off = (int_tier.decode(payload, "keys") - x).abs() / scale
    assert off.max() <= 0.5 + 2e-3
    assert off.max() > 0.45
    codes = unpack(payload["codes"], bits)
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("group", [None, 4])
def test_int8_codes_are_symmetric_and_lie_within_half_a_step(group, axis):
    x = uneven(2, 1, 3, 16, 24)
    payload = tier("int8", axis=axis, group_size=group).encode(x, "keys")
    scale = spread(payload["scale"], x, axis, group)
    assert payload["codes"].dtype == torch.int8
    assert payload["codes"].abs().max() == 127
    assert "zero" not in payload
    assert ((tier("int8", axis=axis, group_size=group).decode(payload, "keys") - x).abs() / scale).max() <= 0.5 + 2e-3


@pytest.mark.parametrize(("role", "shape"), [("keys", [2, 1, 3, 1, 24]), ("values", [2, 1, 3, 16, 1])])
def test_keys_share_a_scale_a_channel_and_values_a_token(role, shape):
    for name in ("int8", "int4", "int3", "int2", "sign"):
        assert list(tier(name).encode(uneven(2, 1, 3, 16, 24), role)["scale"].shape) == shape, name


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("group", [None, 8])
def test_fp8_is_torch_s_own_cast_and_nothing_wraps(group, axis):
    x = uneven(2, 1, 3, 16, 24)
    fp8 = tier("fp8", axis=axis, group_size=group)
    payload = fp8.encode(x, "keys")
    scale = spread(payload["scale"], x, axis, group)
    assert payload["codes"].dtype == torch.float8_e4m3fn
    cast = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(payload["codes"].float(), cast)
    found = fp8.decode(payload, "keys")
    assert torch.allclose(found, cast * scale, rtol=1e-6, atol=0)
    assert (found * x >= 0).all()
    small = 2.0**-10 * scale
    assert ((found - x).abs() <= x.abs() * 2**-4 + small).all()
    assert payload["codes"].float().abs().max() >= 416


def test_every_fp8_code_is_read_as_torch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()].view(1, 1, 1, 1, -1)
    payload = {"codes": codes, "scale": torch.ones(1, 1, 1, 1, codes.shape[-1], dtype=torch.float16)}
    assert torch.equal(tier("fp8").decode(payload, "keys"), codes.float())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [8, 24, 64])
def test_packing_is_exact(bits, dim):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (3, 1, 5, 7, dim), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_keeps_every_code_at_every_place(bits):
    codes = torch.arange(1 << bits, dtype=torch.int64).view(-1, 1) + torch.arange(16)
    codes = (codes % (1 << bits)).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@pytest.mark.parametrize(("page", "rows"), [(64, 16), (64, 32), (16, 4), (8, 8), (128, 1), (2, 1), (1, 1)])
def test_projections_are_orthogonal_to_each_other_and_to_the_mean(page, rows):
    matrix = projection(page, rows, seed=3)
    assert matrix.shape == (rows, page)
    assert torch.equal(matrix.abs(), torch.ones(rows, page))
    assert torch.equal(matrix @ matrix.T, page * torch.eye(rows))
    assert not matrix[: page - 1].sum(1).any()
    assert page < 8 or not torch.equal(matrix, projection(page, rows, seed=4))


def test_a_projection_keeps_its_share_of_what_a_mean_leaves():
    x = uneven(1, 1, 1, 16, 4)[0, 0, 0]
    x = x - x.mean(0)
    kept = torch.stack([(projection(16, 4, seed) @ x).square().sum(0) / 16 for seed in range(400)])
    off = (kept.mean(0) - x.square().sum(0) * 4 / 15) / (kept.std(0) / math.sqrt(400))
    assert off.abs().max() < 4


def test_jl_keeps_the_mean_of_a_page_apart():
    x = normal(2, 1, 3, 64, 16) + 30 * normal(2, 1, 3, 1, 16, seed=1)
    jl = tier("jl")
    payload = jl.encode(x, "keys")
    assert torch.equal(payload["mean"], x.mean(-2).to(torch.float16))
    error = (jl.decode(payload, "keys") - x).norm()
    assert error / (x - x.mean(-2, keepdim=True)).norm() < 0.9
    assert error / x.norm() < 0.05


def test_jl_coefficients_are_the_projection_of_what_the_mean_leaves():
    x = normal(1, 1, 1, 16, 4)
    found = tier("jl").decode(tier("jl").encode(x, "keys"), "keys")
    matrix, mean = projection(16, 4, 0), x.mean(-2, keepdim=True)
    assert torch.allclose(found, mean + matrix.T @ (matrix @ (x - mean)) / 16, atol=5e-3)


def test_jl_without_its_centre_keeps_no_mean_and_loses_more_of_what_has_one():
    x = normal(2, 1, 2, 16, 8) + 5
    plain, centred = tier("jl", centre=False), tier("jl")
    payload = plain.encode(x, "keys")
    assert "mean" not in payload
    matrix = projection(16, 4, 0)
    assert torch.allclose(plain.decode(payload, "keys"), matrix.T @ (matrix @ x) / 16, atol=2e-2)
    errors = [(jl.decode(jl.encode(x, "keys"), "keys") - x).norm() for jl in (plain, centred)]
    assert errors[0] > 2 * errors[1]
    assert plain.bits("keys", 16, 8) == centred.bits("keys", 16, 8) - 1
    assert plain.form("keys") is None
    assert centred.form("keys") is not None


def test_unbiased_jl_is_right_in_the_mean_over_projections():
    seeds = 300
    x, query = normal(1, 1, 1, 16, 4), normal(1, 1, 1, 4, 1, seed=1)
    exact = (x @ query).flatten()
    scores = {}
    for unbiased in (True, False):
        made = [tier("jl", seed=seed, unbiased=unbiased) for seed in range(seeds)]
        scores[unbiased] = torch.stack([(jl.decode(jl.encode(x, "keys"), "keys") @ query).flatten() for jl in made])
    off = {unbiased: (found.mean(0) - exact) / (found.std(0) / math.sqrt(seeds)) for unbiased, found in scores.items()}
    assert off[True].abs().max() < 4
    assert off[False].abs().max() > 8


@pytest.mark.parametrize(("role", "dim"), [("keys", -2), ("values", -1)])
def test_sign_keeps_the_mean_and_the_mean_distance_from_it(role, dim):
    x = uneven(2, 1, 3, 16, 24)
    sign = tier("sign")
    payload = sign.encode(x, role)
    centre = x.mean(dim, keepdim=True)
    distance = (x - centre).abs().mean(dim, keepdim=True)
    found = sign.decode(payload, role)
    wanted = torch.where(x >= centre, centre + distance, centre - distance)
    assert ((found - wanted).abs() <= 2**-10 * (centre.abs() + 2 * distance)).all()
    assert payload["codes"].numel() * 8 == x.numel()


@pytest.mark.parametrize("change", [0.9, 1.1])
def test_sign_s_scale_is_the_best_there_is(change):
    x = uneven(2, 1, 3, 16, 24)
    sign, centre = tier("sign"), x.mean(-2, keepdim=True)
    found = sign.decode(sign.encode(x, "keys"), "keys")
    assert (found - x).norm() < (centre + change * (found - centre) - x).norm()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, LIMIT, -LIMIT, 1e-5])
@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2", "sign"])
def test_a_constant_is_kept_as_well_as_half_precision_can(name, value):
    x = torch.full((1, 1, 1, 8, 8), value)
    found = tier(name).decode(tier(name).encode(x, "values"), "values")
    allowed = abs(value) * (0.5 / 127 if name == "int8" else 2**-11) + 2**-24
    assert (found - x).abs().max() <= allowed


def test_the_gate_lets_numbers_with_gradients_pass():
    x = torch.ones(1, 1, 1, 2, 2, requires_grad=True)
    assert torch.equal(gate(x), x)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 2 * LIMIT, -2 * LIMIT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gate_stops_what_no_tier_can_keep(number, dtype):
    x = torch.zeros(1, 2, 3, dtype=dtype)
    x[0, 1, 2] = number
    with pytest.raises(RangeError, match="finite numbers up to 32752"):
        gate(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_gate_passes_the_rest_unchanged(dtype):
    x = torch.tensor([0.0, -1.5, 32512.0], dtype=dtype)
    assert gate(x).dtype == torch.float32
    assert torch.equal(gate(x), x.float())
    assert gate(torch.empty(0, dtype=dtype)).numel() == 0


@pytest.mark.parametrize("name", sorted(TIERS))
def test_the_global_random_state_is_not_touched(name):
    before = random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state()
    made = tier(name, **({"bits": 4} if name == "int" else {}))
    for role in ROLES:
        made.decode(made.encode(normal(1, 1, 1, 8, 8), role), role)
    assert random.getstate() == before[0]
    assert numpy.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_affine_codes_of_a_tier_s_own_are_read_as_given():
    codes = torch.arange(16, dtype=torch.uint8).view(1, 1, 1, 2, 8)
    scale, zero = torch.tensor([[0.5], [2.0]]), torch.tensor([[-1.0], [3.0]])
    form = Affine(4, "token")
    halves = (part.view(1, 1, 1, 2, 1).to(torch.float16) for part in (scale, zero))
    backend = CpuBackend()
    found = backend.dequantize(backend.affine(codes, *halves, form), form)
    assert torch.equal(found, codes.float() * scale + zero)
