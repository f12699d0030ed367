"""Pages archived, plain or straight from codes: means as the oracle's, coefficients as near as sums in another order are."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from tests.backends.recoding import (  # isort: skip  Triton is told to interpret before it is imported.
    DEVICE,
    FORMS,
    Kept,
    assembly as assembly,
    equal,
    pages,
    poison as poison,
)

from argus.backends.base import PREFIX, Affine, Float8, Plain, Projected
from argus.backends.cpu import CpuBackend
from argus.backends.triton import archive, archive_codes
from argus.backends.triton.backend import TritonBackend
from argus.backends.triton.fragments import Weights, fragments, ones, signs
from argus.tiers.jl import projection


def projected(inner: object, ratio: int = 4) -> Projected:
    return Projected(inner, ratio, False, lambda page, like: projection(page, page // ratio, 0).to(like.device))


INNERS = {
    "int4-token": Affine(4, "token"),
    "int3": Affine(3, "channel"),
    "int2-group": Affine(2, "token", 16),
    "int1": Affine(1, "channel", 8),
    "int8": Affine(8, "token", symmetric=True),
    "plain": Plain(),
    "fp16": Plain(torch.float16),
    "fp8": Float8("token"),
}


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("first", ["fp32", "fp16", "sign", "sign-token", "int2", "int8-token", "fp8"])
def test_projected(inner: str, first: str) -> None:
    backend, oracle, form = TritonBackend(), CpuBackend(), projected(INNERS[inner])
    source, target = Kept(backend, FORMS[first]), Kept(backend, form)
    held = source.encode(pages(64, 64), "keys")
    got = backend.recode(source, target, held, "keys")
    decoded = source.decode(held, "keys")
    plain = target.encode(decoded, "keys")
    summed = inner == "int4-token" and isinstance(FORMS[first], Affine) and FORMS[first].axis == "token"
    largest = summed * float(decoded.abs().max())
    # Products of 16-bit numbers, and of codes, sum in an order of their own.
    if first == "fp16" or (isinstance(FORMS[first], Affine) and inner == "int4-token"):
        near(got, {name: tensor.cpu() for name, tensor in plain.items()}, INNERS[inner], largest)
    else:
        equal(got, plain)
    near(got, oracle.encode(decoded.cpu(), form), INNERS[inner], largest)


CODES = {
    **{f"int{bits}": Affine(bits, "channel") for bits in (1, 2, 3, 4, 6, 7, 8)},
    **{f"int{bits}-token": Affine(bits, "token") for bits in (1, 2, 3, 4, 5, 7, 8)},
    "signed": Affine(8, "channel", symmetric=True),
    "signed-token": Affine(8, "token", symmetric=True),
    "sign": Affine(1, "channel", 64, centred=True),
    "sign-token": Affine(1, "token", centred=True),
}


@pytest.mark.parametrize(
    ("first", "dim", "ratio"),
    [
        *((first, 64, ratio) for ratio in (4, 8, 16) for first in CODES),
        *((first, 64, 32) for first in ("int1", "int3", "int4-token", "int7-token", "signed", "sign-token")),
    ],
)
def test_projected_codes(first: str, dim: int, ratio: int) -> None:
    """Straight from codes of pages of 64 tokens: several heads, and sizes of tokens that differ widely."""
    backend, form, inner = TritonBackend(), CODES[first], Affine(4, "token")
    target = Projected(inner, ratio, False, lambda page, like: projection(page, page // ratio, ratio).to(like.device))
    heads = 4 if ratio == 32 else 2  # Enough coefficients for a share of them.
    x = pages(64, dim, heads).view(1, 1, heads, 64, dim)
    x = x * torch.exp2(-torch.arange(64, device=DEVICE) % 9.0).unsqueeze(-1)
    held = backend.encode(x, form)
    assert archive_codes.archive_codes(held, form, target, Weights()) is not None
    got = backend.recode(Kept(backend, form), Kept(backend, target), held, "keys")
    decoded = backend.dequantize(held, form).cpu()
    want = CpuBackend().encode(decoded, target)
    near(got, want, inner, (form.axis == "token") * float(decoded.abs().max()))
    for name in want:
        assert got[name].shape == want[name].shape, name
        assert got[name].dtype == want[name].dtype, name
    codes = [one[PREFIX + "codes"].cpu() for one in (got, want)]
    assert float((codes[0] == codes[1]).float().mean()) >= 0.998


@pytest.mark.parametrize("first", ["sign", "sign-token", "int3", "int3-token", "int4", "signed-token"])
@pytest.mark.parametrize("ratio", [4, 16])
def test_projected_codes_of_longer_tokens(first: str, ratio: int) -> None:
    test_projected_codes(first, 128, ratio)


@pytest.mark.parametrize("first", ["int1", "int1-token", "int4", "int4-token", "signed"])
@pytest.mark.parametrize("ratio", [4, 8, 16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_coefficients_of_one_sign(first: str, ratio: int, sign: float) -> None:
    """The first row's ranges do not reach 0: every channel rises and falls with it."""
    backend, form, target = TritonBackend(), CODES[first], projected(Affine(4, "token"), ratio)
    matrix = target.matrix(64, torch.empty(0))
    x = sign * matrix[0].unsqueeze(-1) * torch.linspace(1.0, 3.0, 64) + 0.1 * matrix[-1].unsqueeze(-1)
    held = backend.encode(x.view(1, 1, 1, 64, 64).to(DEVICE), form)
    got = backend.recode(Kept(backend, form), Kept(backend, target), held, "keys")
    want = CpuBackend().encode(backend.dequantize(held, form).cpu(), target)
    lows = want[PREFIX + "zero"].float().flatten()
    highs = lows + 15 * want[PREFIX + "scale"].float().flatten()
    assert bool((lows[0] > 0.2) if sign > 0 else (highs[0] < -0.2))
    near(got, want, Affine(4, "token"), (form.axis == "token") * float(x.abs().max()))


@pytest.mark.parametrize(
    ("form", "page", "dim", "ratio", "inner"),
    [
        (Affine(4, "channel", 32), 64, 64, 4, Affine(4, "token")), (Affine(4, "token", 16), 64, 64, 4, Affine(4, "token")),
        (Affine(4, "channel"), 128, 64, 8, Affine(4, "token")), (Affine(4, "token"), 64, 96, 4, Affine(4, "token")),
        (Affine(4, "token"), 64, 64, 2, Affine(4, "token")), (Affine(4, "channel"), 64, 64, 4, Affine(4, "token", 16)),
        (Affine(2, "channel"), 64, 64, 4, Affine(1, "token", centred=True)), (Affine(2, "token"), 64, 64, 4, Plain()),
    ],
)  # fmt: skip
def test_other_projected_codes_go_elsewhere(form: Affine, page: int, dim: int, ratio: int, inner: object) -> None:
    backend, target = TritonBackend(), projected(inner, ratio)
    held = backend.encode(pages(page, dim), form)
    assert archive_codes.archive_codes(held, form, target, Weights()) is None
    got = backend.recode(Kept(backend, form), Kept(backend, target), held, "keys")
    assert torch.equal(got["mean"].cpu(), CpuBackend().encode(backend.dequantize(held, form).cpu(), target)["mean"])


@pytest.mark.parametrize("first", ["int4", "int4-token", "int8", "int8-token"])
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_projected_codes_stay_not_finite(first: str, number: float) -> None:
    backend, form, target = TritonBackend(), FORMS[first], projected(Affine(4, "token"), 16)
    held = backend.encode(pages(64, 64), form)
    held["scale"].view(-1)[9] = number
    got = backend.recode(Kept(backend, form), Kept(backend, target), held, "keys")
    assert not bool(got["mean"].isfinite().all())


@pytest.mark.parametrize("spoil", [0.0, 0.5, -1.0])
def test_projections_of_other_numbers_are_refused(spoil: float) -> None:
    matrix = projection(64, 16, 0)
    matrix[3, int(matrix[3].argmax())] = spoil
    for lay in (ones, partial(signs, factors=(1.0,) * 4), partial(fragments, factor=1.0, back=True)):
        with pytest.raises(ValueError, match=r"ones and as many minus ones"):
            lay(matrix)


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9, 16])
def test_projections_of_bits(rows: int) -> None:
    """Every bit of W is in one place of each channel's operand, where it is one and where it is minus one."""
    matrix = projection(64, rows, 0)
    laid = ones(matrix).view(6, 8, 4, 4)
    found = torch.zeros(2, 2, rows, 64, dtype=torch.int64)
    for (o, g, t, word), number in zip(
        itertools.product(range(2), range(8), range(4), range(4)), laid[:2].flatten().tolist(), strict=True
    ):
        h, e = word % 2, word // 2
        for p in range(32):
            if number >> p & 1:
                row, m = (g + 8 * h, o) if rows > 8 else (g, h) if rows > 4 else (g % 4, g // 4)
                assert p % 2 == m
                found[m, e, row, 16 * t + p // 16 * 8 + p % 8 // 2 * 2 + p // 8 % 2] += 1
    assert torch.equal(found[0], torch.stack([matrix > 0, matrix < 0]).long())
    assert torch.equal(found[1], found[0])
    for g in range(8):
        alone = laid[2 + g // 2, :, :, g % 2 * 2 : g % 2 * 2 + 2]
        assert alone[g].unique(dim=0).tolist() == [[0x55555555, -0x55555556]]
        assert int(alone.count_nonzero()) == 8


def test_projections_are_laid_once() -> None:
    backend, target = TritonBackend(), projected(Affine(4, "token"))
    for name in ("int4", "int2", "int4", "int4-token", "int2-token", "sign", "sign"):
        backend.recode(Kept(backend, FORMS[name]), Kept(backend, target), backend.encode(pages(64, 64), FORMS[name]), "keys")
    # Of axis channel a byte's room depends on bits, and of one bit there is no byte.
    assert len(backend.tensors()) == 4


@pytest.mark.parametrize(
    ("page", "dim", "ratio"), [(64, 128, 4), (128, 64, 8), (64, 96, 4), (16, 80, 4), (64, 64, 8), (64, 64, 16), (32, 64, 32)]
)
@pytest.mark.parametrize("inner", ["int4-token", "int3", "int8", "plain"])
def test_projected_shapes(page: int, dim: int, ratio: int, inner: str) -> None:
    backend, form = TritonBackend(), projected(INNERS[inner], ratio)
    x = pages(page, dim, 2)
    got = backend.encode(x, form)
    whole = all(size & (size - 1) == 0 for size in (page, dim, page // ratio))
    assert (archive.archive({"codes": x}, Plain(), form, backend.weights) is not None) == whole
    near(got, CpuBackend().encode(x.cpu(), form), INNERS[inner])


def near(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], inner: object, largest: float = 0.0) -> None:
    """Means equal, coefficients as near as a product in float32 is; few codes or scales next to those of the oracle.

    Means of numbers up to `largest` that are summed in float32 are as near as such sums.
    """
    means = [one["mean"].cpu().double() for one in (got, want)]
    off = (means[0] - means[1]).abs()
    assert bool((off <= (largest > 0) * (2**-10 * means[1].abs() + 2**-20 * largest)).all())
    assert got.keys() == want.keys()
    oracle = Kept(CpuBackend(), inner)
    kept = [{name.removeprefix(PREFIX): x.cpu() for name, x in one.items() if name != "mean"} for one in (got, want)]
    a, b = (oracle.decode(one, "keys") for one in kept)
    assert a.shape == b.shape
    if inner == Plain():
        assert float((a - b).norm() / b.norm()) <= 2e-6
    assert float(((a - b).abs() <= 2e-3 * b.abs().amax()).float().mean()) >= 0.998


def test_no_pages() -> None:
    backend, form = TritonBackend(), projected(Affine(4, "token"))
    held = backend.quantize(torch.empty(0, 1, 2, 64, 64, device=DEVICE), FORMS["int4"])
    assert backend.recode(Kept(backend, FORMS["int4"]), Kept(backend, form), held, "keys")["mean"].shape == (0, 1, 2, 64)
