"""What tests of encoding and recoding share: forms, a tier of one form, pages, and how results are compared."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from argus.backends.base import Affine, Backend, Float8, Plain  # noqa: E402
from argus.backends.cpu import unpack  # noqa: E402
from argus.backends.triton import archive, archive_codes, convert, layout  # noqa: E402
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
        ptx.stand_in(monkeypatch)


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


def same_as_oracle(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], form: Affine, page: int, dim: int) -> None:
    for name in want.keys() - {"codes"}:
        assert torch.equal(got[name].cpu(), want[name]), name
    codes = layout.unpack(got["codes"].cpu().view(torch.uint8), form.bits, form.axis, page, dim)
    assert torch.equal(codes, want["codes"].view(torch.uint8) if form.symmetric else unpack(want["codes"], form.bits))
