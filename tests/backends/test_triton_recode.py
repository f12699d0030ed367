"""Pages encoded straight from what another tier keeps: bit by bit what decoding and encoding make, and the oracle's codes."""

from __future__ import annotations

from itertools import pairwise

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
    same_as_oracle,
)

from argus.backends.base import Affine, Float8
from argus.backends.cpu import CpuBackend
from argus.backends.triton import convert
from argus.backends.triton.backend import TritonBackend

DEFAULT = [
    *pairwise(("fp16", "fp8", "int8", "int4", "int2", "sign")),
    *pairwise(("fp16", "fp8", "int8-token", "int4-token", "int2-token", "sign-token")),
]
OTHERS = [
    ("fp16", "int4-token"), ("bf16", "sign"), ("bf16", "int3-token"), ("fp32", "sign-token"), ("fp32", "int4"),
    ("fp32", "int8-token"), ("fp8-token", "int8"), ("fp8-token", "int4-token"), ("fp8-page", "sign"), ("fp8", "sign-token"),
    ("int8", "wide"), ("wide", "int7"), ("int7", "int5"), ("int5", "int3"), ("int3", "sign"), ("int7-token", "int3-token"),
    ("int4-group", "int2"), ("int2", "int4"), ("int4", "int2-token"), ("int4-token-group", "int2-token"), ("sign", "int2"),
    ("int4", "int4-group"), ("int8", "fp8"),
]  # fmt: skip


def check(first: object, second: object, page: int, dim: int, kernel: bool | None = None, count: int = 1) -> None:
    backend = TritonBackend()
    source, target = Kept(backend, first), Kept(backend, second)
    held = source.encode(pages(page, dim, count), "keys")
    before = {name: tensor.clone() for name, tensor in held.items()}
    got = backend.recode(source, target, held, "keys")
    equal(held, before)
    decoded = source.decode(held, "keys")
    if kernel is not None:
        assert (backend._recoded(held, first, second) is not None) == kernel
    equal(got, target.encode(decoded.clone(), "keys"))
    if isinstance(second, Affine):
        same_as_oracle(got, CpuBackend().quantize(decoded.cpu(), second), second, page, dim)


@pytest.mark.parametrize(("first", "second"), DEFAULT, ids=[f"{a}-to-{b}" for a, b in DEFAULT])
@pytest.mark.parametrize("dim", [64, 128])
def test_default_ladder_takes_kernels(first: str, second: str, dim: int) -> None:
    check(FORMS[first], FORMS[second], 64, dim, kernel=True, count=3 if dim == 64 else 1)


@pytest.mark.parametrize(("first", "second"), OTHERS, ids=[f"{a}-to-{b}" for a, b in OTHERS])
def test_any_forms(first: str, second: str) -> None:
    check(FORMS[first], FORMS[second], 64, 64)


@pytest.mark.parametrize(("page", "dim"), [(128, 32), (64, 256), (64, 96), (24, 80), (48, 64)])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("fp8", "int8"),
        ("int4", "int2"),
        ("int4-token", "int2-token"),
        ("int2", "sign"),
        ("int2-token", "sign-token"),
        ("fp16", "sign-token"),
        ("fp16", "fp8"),
    ],
)
def test_any_shape(first: str, second: str, page: int, dim: int) -> None:
    forms = [Float8("channel", 8) if name == "fp8" and page % 32 else FORMS[name] for name in (first, second)]
    check(*forms, page, dim)


@pytest.mark.parametrize("name", ["sign", "sign-token", "int4", "int4-token", "int8-token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_numbers(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "PLAIN", dict.fromkeys(("channel", "token"), ("range", "e4m3")))
    x, form = pages(64, 64).to(dtype), FORMS[name]
    same_as_oracle(TritonBackend().quantize(x, form), CpuBackend().quantize(x.float().cpu(), form), form, 64, 64)


@pytest.mark.parametrize("form", [Float8("channel", 32), Float8("channel"), Float8("token"), Float8("channel", 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plain_numbers_to_e4m3(form: Float8, dtype: torch.dtype) -> None:
    x = pages(64, 64).to(dtype)
    x[..., 11, ::3] = -0.0
    equal(
        {name: tensor.cpu() for name, tensor in TritonBackend().to_fp8(x, form).items()},
        CpuBackend().to_fp8(x.float().cpu(), form),
    )


@pytest.mark.parametrize("seed", range(3))
def test_quotients_round_as_divisions(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers on and next to the middle between codes."""
    monkeypatch.setattr(convert, "PLAIN", {"channel": ("range",), "token": ("range",)})
    generator = torch.Generator().manual_seed(seed)
    step = torch.rand(64, generator=generator).to(torch.float16).float()
    middle = (torch.randint(0, 15, (1, 1, 1, 64, 64), generator=generator) + 0.5) * step
    bits = middle.view(torch.int32) + torch.randint(-2, 3, middle.shape, generator=generator, dtype=torch.int32)
    x = bits.view(torch.float32)
    x[..., 0, :], x[..., 1, :] = 0.0, 15 * step
    form = Affine(4, "channel")
    same_as_oracle(TritonBackend().quantize(x.to(DEVICE), form), CpuBackend().quantize(x, form), form, 64, 64)


@pytest.mark.parametrize(("bits", "axis", "group"), [(4, "channel", None), (4, "channel", 32), (4, "token", None),
                                                     (2, "channel", None), (2, "channel", 32), (2, "token", None)])  # fmt: skip
def test_codes_narrow_whatever_their_scales(bits: int, axis: str, group: int | None) -> None:
    """Scales below zero, none, the least there are, and such that neighbouring codes are one number; few codes, or one."""
    generator = torch.Generator().manual_seed(bits)
    source = Affine(bits, axis, group)
    target = Affine(2, axis, group) if bits == 4 else Affine(1, axis, group, centred=True)
    count = 6
    shape = (count, 1, 1, 64 // (group or 64), 64) if axis == "channel" else (count, 1, 1, 64, 1)
    codes = torch.randint(0, 1 << bits, (count, 1, 1, 64, 64), generator=generator, dtype=torch.uint8)
    codes[1] &= 5 % (1 << bits)
    codes[2] = codes[2, ..., :1, :1]
    scale = (torch.randn(shape, generator=generator) * 10 ** (torch.rand(shape, generator=generator) * 6 - 5)).half()
    zero = (torch.randn(shape, generator=generator) * 10 ** (torch.rand(shape, generator=generator) * 6 - 4)).half()
    scale[3], scale[4], zero[5] = 0.0, 2.0**-24, 60000.0
    backend = TritonBackend()
    held = backend.affine(codes.to(DEVICE), scale.to(DEVICE), zero.to(DEVICE), source)
    made = backend._recoded(held, source, target)
    assert made is not None
    decoded = backend.dequantize(held, source).cpu()
    same_as_oracle(made, CpuBackend().quantize(decoded, target), target, 64, 64)


def test_no_pages() -> None:
    backend = TritonBackend()
    held = backend.quantize(torch.empty(0, 1, 2, 64, 64, device=DEVICE), FORMS["int4"])
    for name in ("int2", "sign"):
        got = backend.recode(Kept(backend, FORMS["int4"]), Kept(backend, FORMS[name]), held, "keys")
        assert got["codes"].shape == (0, 1, 2, 64 * 64 * FORMS[name].bits // 8)
