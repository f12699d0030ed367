"""Pages encoded straight from what another tier keeps: bit by bit what decoding and encoding make, and the oracle's codes."""

from __future__ import annotations

import operator
import os
from itertools import pairwise

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from argus.backends.base import PREFIX, Affine, Backend, Float8, Plain, Projected  # noqa: E402
from argus.backends.cpu import CpuBackend  # noqa: E402
from argus.backends.triton import archive, archive_codes, convert, layout  # noqa: E402
from argus.backends.triton.backend import TritonBackend  # noqa: E402
from argus.backends.triton.fragments import Weights  # noqa: E402
from argus.tiers.jl import projection  # noqa: E402
from tests.backends import ptx  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
FORMS = {
    "fp16": Plain(torch.float16),
    "bf16": Plain(torch.bfloat16),
    "fp32": Plain(torch.float32),
    "fp8": Float8("channel", 32),
    "fp8-page": Float8("channel"),
    "fp8-token": Float8("token"),
    **{f"int{bits}": Affine(bits, "channel") for bits in (2, 3, 4, 5, 7)},
    **{f"int{bits}-token": Affine(bits, "token") for bits in (2, 3, 4, 5, 7)},
    "int4-group": Affine(4, "channel", 16),
    "int4-token-group": Affine(4, "token", 16),
    "int8": Affine(8, "channel", symmetric=True),
    "int8-token": Affine(8, "token", symmetric=True),
    "wide": Affine(8, "channel"),
    "sign": Affine(1, "channel", centred=True),
    "sign-token": Affine(1, "token", centred=True),
}
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


class Kept:
    """A tier of one form."""

    def __init__(self, backend: Backend, form: object) -> None:
        self.backend, self.kept = backend, form

    def form(self, role: str) -> object:
        return self.kept

    target = form

    def encode(self, x: torch.Tensor, role: str) -> dict[str, torch.Tensor]:
        return self.backend.encode(x, self.kept)

    def decode(self, payload: dict[str, torch.Tensor], role: str) -> torch.Tensor:
        if isinstance(self.kept, Affine):
            return self.backend.dequantize(payload, self.kept)
        if isinstance(self.kept, Float8):
            return self.backend.from_fp8(payload, self.kept)
        return payload["codes"].float()


@pytest.fixture(autouse=True)
def assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter knows no inline assembly."""
    if not CUDA:
        monkeypatch.setattr(convert, "ASSEMBLED", True)
        monkeypatch.setattr("triton.language.inline_asm_elementwise", ptx.inline_asm)
        for name, operation in (("mod", operator.mod), ("lshift", operator.lshift), ("rshift", operator.rshift)):
            reflected = lambda self, other, operation=operation: operation(other, self.value)  # noqa: E731
            monkeypatch.setattr(f"triton.language.constexpr.__r{name}__", reflected, raising=False)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that kernels are to write is full of ones before."""
    empty = torch.empty

    def poisoned(*args: object, **options: object) -> torch.Tensor:
        made = empty(*args, **options)  # type: ignore[call-overload]
        return made if made.is_meta else made.copy_(torch.full((), 7, dtype=torch.float32).to(made.dtype))

    for module in (convert, archive, archive_codes):
        monkeypatch.setattr(module.torch, "empty", poisoned)


def pages(page: int, dim: int, count: int = 1) -> torch.Tensor:
    """Pages whose channels and tokens differ in size; a channel constant, one zero, one of few numbers, and a token zero."""
    generator = torch.Generator().manual_seed(page + dim)
    x = torch.randn(count, 1, 1, page, dim, generator=generator)
    x *= torch.rand(dim, generator=generator) * 8 + torch.rand(page, 1, generator=generator)
    x += torch.randn(dim, generator=generator) * 4
    x[..., 3] = 0.7
    x[..., 5] = 0.0
    x[..., 6] = torch.randint(-3, 4, (page,), generator=generator).float()
    x[..., 7, :] = 0.0
    x[..., 9, ::2] *= 1e-6
    return x.to(DEVICE)


def equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape, name
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8)), name


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


def same_as_oracle(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], form: Affine, page: int, dim: int) -> None:
    for name in want.keys() - {"codes"}:
        assert torch.equal(got[name].cpu(), want[name]), name
    codes = layout.unpack(got["codes"].cpu().view(torch.uint8), form.bits, form.axis, page, dim)
    from argus.backends.cpu import unpack

    assert torch.equal(codes, want["codes"].view(torch.uint8) if form.symmetric else unpack(want["codes"], form.bits))


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


def projected(inner: object, ratio: int = 4) -> Projected:
    return Projected(inner, ratio, False, lambda page, like: page**0.5 * projection(page, page // ratio, 0).to(like.device))


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
    # Products of 16-bit numbers, and of codes, sum in an order of their own.
    if first == "fp16" or (isinstance(FORMS[first], Affine) and inner == "int4-token"):
        near(got, {name: tensor.cpu() for name, tensor in plain.items()}, INNERS[inner])
    else:
        equal(got, plain)
    near(got, oracle.encode(decoded.cpu(), form), INNERS[inner])


CODES = {
    **{f"int{bits}": Affine(bits, "channel") for bits in (1, 2, 3, 4, 6, 7, 8)},
    **{f"int{bits}-token": Affine(bits, "token") for bits in (1, 2, 3, 4, 5, 7, 8)},
    "signed": Affine(8, "channel", symmetric=True),
    "signed-token": Affine(8, "token", symmetric=True),
    "sign": Affine(1, "channel", 64, centred=True),
    "sign-token": Affine(1, "token", centred=True),
}


@pytest.mark.parametrize("first", CODES)
@pytest.mark.parametrize(("dim", "ratio"), [(64, 4), (64, 8), (64, 16), (64, 13)])
def test_projected_codes(first: str, dim: int, ratio: int) -> None:
    """Straight from codes of pages of 64 tokens: several pages and heads, and sizes of tokens that differ widely."""
    backend, form, inner = TritonBackend(), CODES[first], Affine(4, "token")
    target = Projected(inner, ratio, False, lambda page, like: 8 * projection(page, page // ratio, ratio).to(like.device))
    x = pages(64, dim, 4).view(2, 1, 2, 64, dim)
    x = x * torch.exp2(-torch.arange(64, device=DEVICE) % 9.0).unsqueeze(-1)
    held = backend.encode(x, form)
    assert archive_codes.archive_codes(held, form, target, Weights()) is not None
    got = backend.recode(Kept(backend, form), Kept(backend, target), held, "keys")
    decoded = backend.dequantize(held, form).cpu()
    want = CpuBackend().encode(decoded, target)
    near(got, want, inner)
    for name in want:
        assert got[name].shape == want[name].shape, name
        assert got[name].dtype == want[name].dtype, name
    codes = [one[PREFIX + "codes"].cpu() for one in (got, want)]
    assert float((codes[0] == codes[1]).float().mean()) >= 0.998


@pytest.mark.parametrize("first", ["sign", "sign-token", "int3", "int3-token", "int4", "signed-token"])
@pytest.mark.parametrize("ratio", [4, 16])
def test_projected_codes_of_longer_tokens(first: str, ratio: int) -> None:
    test_projected_codes(first, 128, ratio)


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


def test_projections_are_laid_once() -> None:
    backend, target = TritonBackend(), projected(Affine(4, "token"))
    for form in (FORMS["int4"], FORMS["int2"], FORMS["int4"], FORMS["int4-token"], FORMS["int2-token"]):
        backend.recode(Kept(backend, form), Kept(backend, target), backend.encode(pages(64, 64), form), "keys")
    # Of axis channel a byte's room depends on bits.
    assert len(backend.tensors()) == 3


@pytest.mark.parametrize(
    ("page", "dim", "ratio"), [(64, 128, 4), (128, 64, 8), (64, 96, 4), (24, 80, 3), (64, 64, 8), (64, 64, 16), (32, 64, 32)]
)
@pytest.mark.parametrize("inner", ["int4-token", "int3", "int8", "plain"])
def test_projected_shapes(page: int, dim: int, ratio: int, inner: str) -> None:
    backend, form = TritonBackend(), projected(INNERS[inner], ratio)
    x = pages(page, dim, 2)
    got = backend.encode(x, form)
    whole = all(size & (size - 1) == 0 for size in (page, dim, page // ratio))
    assert (archive.archive({"codes": x}, Plain(), form, backend.weights) is not None) == whole
    near(got, CpuBackend().encode(x.cpu(), form), INNERS[inner])


def near(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], inner: object) -> None:
    """Means equal, coefficients as near as a product in float32 is; few codes or scales next to those of the oracle."""
    assert torch.equal(got["mean"].cpu(), want["mean"])
    assert got.keys() == want.keys()
    oracle = Kept(CpuBackend(), inner)
    kept = [{name.removeprefix(PREFIX): x.cpu() for name, x in one.items() if name != "mean"} for one in (got, want)]
    a, b = (oracle.decode(one, "keys") for one in kept)
    assert a.shape == b.shape
    if inner == Plain():
        assert float((a - b).norm() / b.norm()) <= 2e-6
    assert float(((a - b).abs() <= 2e-3 * b.abs().amax()).float().mean()) >= 0.998


def test_no_pages() -> None:
    backend = TritonBackend()
    held = backend.quantize(torch.empty(0, 1, 2, 64, 64, device=DEVICE), FORMS["int4"])
    for name in ("int2", "sign"):
        got = backend.recode(Kept(backend, FORMS["int4"]), Kept(backend, FORMS[name]), held, "keys")
        assert got["codes"].shape == (0, 1, 2, 64 * 64 * FORMS[name].bits // 8)
    form = projected(Affine(4, "token"))
    assert backend.recode(Kept(backend, FORMS["int4"]), Kept(backend, form), held, "keys")["mean"].shape == (0, 1, 2, 64)
