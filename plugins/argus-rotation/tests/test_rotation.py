"""The tier ``rotation``: its contract, its mathematics, and that installing it is enough."""

from __future__ import annotations

from math import erf, sqrt

import pytest
import torch
from argus_rotation.__main__ import main, measured
from argus_rotation.codebook import codebook, distortion
from argus_rotation.tier import Rotation, RotationConfig, blocks, hadamard

from argus import plugins
from argus.backends.cpu import CpuBackend
from argus.build import build
from argus.config import CacheConfig, compose, validate
from argus.errors import ConfigError
from argus.testing import check_tier
from argus.tiers.base import Tools


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and a busy machine makes threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(**options):
    return Rotation(RotationConfig(**options), Tools(CpuBackend(), torch.float16, tier=lambda spec: rotation()))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_it_keeps_its_contract(bits):
    check_tier(Rotation, config={"bits": bits})


@pytest.mark.parametrize(("page_size", "head_dim"), [(64, 96), (16, 128), (4, 256)])
def test_it_keeps_its_contract_in_other_shapes(page_size, head_dim):
    check_tier(Rotation, config={"bits": 3, "seed": 7}, page_size=page_size, head_dim=head_dim)


@pytest.mark.parametrize(("bits", "cosine"), [(4, 0.995), (3, 0.983), (2, 0.940), (1, 0.80)])
def test_it_reaches_the_reference_figures_on_normal_numbers(bits, cosine):
    found, error = measured(bits)
    assert found >= cosine - 0.001
    assert error <= rotation(bits=bits).error <= 1.15 * error


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_the_means_of_their_cells(bits):
    levels = codebook(bits)
    assert list(levels) == sorted(levels)
    assert len(levels) == 2**bits
    assert levels == pytest.approx([-level for level in reversed(levels)], abs=1e-8)
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2)
    grid = torch.tensor(levels, dtype=torch.float64)
    cell = torch.bucketize(x, (grid[1:] + grid[:-1]) / 2)
    for i, level in enumerate(levels):
        assert float((x * weight)[cell == i].sum() / weight[cell == i].sum()) == pytest.approx(level, abs=1e-4)
    square = ((x - grid[cell]).square() * weight).sum() / weight.sum()
    assert distortion(bits) == pytest.approx(float(square), abs=1e-5)


def test_one_bit_is_the_mean_of_half_a_normal():
    assert codebook(1)[1] == pytest.approx(sqrt(2 / 3.141592653589793))
    assert erf(0) == 0


@pytest.mark.parametrize(("length", "parts"), [(64, [64]), (80, [64, 16]), (96, [64, 32]), (8, [8]), (7, [4, 2, 1])])
def test_blocks_are_the_powers_of_two_that_add_up(length, parts):
    assert blocks(length) == parts


@pytest.mark.parametrize("length", [8, 64, 80, 96, 7])
def test_the_transform_is_orthonormal_and_its_own_inverse(length):
    matrix = hadamard(torch.eye(length))
    assert torch.allclose(matrix @ matrix.T, torch.eye(length), atol=1e-6)
    x = normal(2, 3, length)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-5)


def test_the_transform_is_hadamard_s():
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / sqrt(2)
    assert torch.allclose(hadamard(torch.eye(8)), torch.kron(torch.kron(two, two), two), atol=1e-6)


def test_a_token_with_one_large_number_is_kept_where_plain_codes_fail():
    x = normal(1, 1, 1, 16, 64)
    x[..., 5] = 40.0
    tier = rotation(bits=4)
    found = tier.decode(tier.encode(x, "values"), "values")
    assert (found - x).norm() / x.norm() < 0.15


@pytest.mark.parametrize("dim", [2, 64, 128])
def test_the_rotation_is_signs_and_a_hadamard_matrix_in_sylvesters_order(dim):
    tier, like = rotation(seed=3), torch.empty(0)
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    torch.testing.assert_close(tier.rotation(dim, like), matrix / dim**0.5 * tier.signs(dim, like))
    assert tier.form("keys").signs(dim, like) is tier.signs(dim, like)


def test_the_seed_chooses_the_signs():
    x = normal(1, 1, 1, 4, 64)
    first, again, other = (rotation(seed=seed).encode(x, "keys")["codes"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bits_outside_one_to_four_are_refused():
    known = plugins.kinds(plugins.load(), "argus_tiers")
    for bits in (0, 5):
        with pytest.raises(ConfigError, match="bits"):
            validate(known["rotation"].Config, {"bits": bits})
    with pytest.raises(ConfigError, match="multiples of 8"):
        rotation(bits=3).check("keys", 64, 12)


def test_installing_it_is_enough():
    assert plugins.kinds(plugins.load(), "argus_tiers")["rotation"] is Rotation
    stage = "tiers.stages.cold={tier: rotation, bits: 2}"
    data = compose(["tiers=int4", f"+{stage}", "tiers.order=[int4,cold]"])
    config = validate(CacheConfig, {name: data[name] for name in CacheConfig.model_fields if name in data})
    plan = build(config, head_dim=64)
    assert [type(stage.keys) for stage in plan.stages][-1] is Rotation
    assert plan.stages[-1].keys.bits("keys", 64, 64) == 2.25


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_its_config_files_compose(bits):
    tiers = compose([f"tiers=rotation{bits}"])["tiers"]
    assert tiers["order"] == ["rotation"]
    assert tiers["stages"]["rotation"] == {"tier": "rotation", "bits": bits, "seed": 0}


def test_the_table_prints(capsys):
    main()
    assert capsys.readouterr().out.count("\n") == 6


def test_defaults_of_torch_change_nothing() -> None:
    x = normal(3, 2, 2, 32, 64)

    def read(tier: Rotation) -> torch.Tensor:
        return tier.decode(tier.encode(x, "keys"), "keys")

    wanted = read(rotation())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = read(rotation())
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, wanted)
