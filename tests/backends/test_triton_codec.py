"""Every operation of the Triton backend against the CPU backend: compiled where there is a GPU, interpreted elsewhere."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from argus.backends.base import Affine, Float8  # noqa: E402
from argus.backends.cpu import CpuBackend  # noqa: E402
from argus.backends.triton import layout  # noqa: E402
from argus.backends.triton.backend import TritonBackend  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
SHAPES = [(64, 64), (64, 128), (128, 32), (64, 96), (64, 80), (24, 80), (48, 40)]


def pages(page: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Fresh pages, every channel and token of another size, one channel constant and one zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, 2, page, dim, generator=generator)
    x *= torch.rand(dim, generator=generator) * 8 + torch.rand(page, 1, generator=generator)
    x += torch.randn(dim, generator=generator) * 4
    x[..., 3] = 0.7
    x[..., 5] = 0.0
    return x.to(dtype)


def units(x: torch.Tensor) -> torch.Tensor:
    """FP16 numbers as integers in their order."""
    bits = x.cpu().view(torch.int16).int()
    return torch.where(bits < 0, -32768 - bits, bits)


def same_scales(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name in ("scale", "zero"):
        if name in want:
            assert got[name].shape == want[name].shape
            assert int((units(got[name]) - units(want[name])).abs().max()) <= 1


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize(("page", "dim"), SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), [*((bits, False) for bits in (1, 2, 3, 4, 7, 8)), (8, True)])
def test_quantize(page: int, dim: int, axis: str, bits: int, symmetric: bool) -> None:
    cpu, triton = CpuBackend(), TritonBackend()
    for group in (None, 16 if (dim if axis == "token" else page) % 16 == 0 else 8):
        form = Affine(bits, axis, group, symmetric)
        x = pages(page, dim, bits)
        want = cpu.quantize(x, form)
        got = triton.quantize(x.to(DEVICE), form)
        same_scales(got, want)
        codes = layout.unpack(got["codes"].cpu().view(torch.uint8), bits, axis, page, dim)
        other = layout.unpack(layout.pack(natural(want, form, page, dim), bits, axis), bits, axis, page, dim)
        assert torch.equal(codes, other)
        back = triton.dequantize(got, form).cpu()
        torch.testing.assert_close(back, cpu.dequantize(want, form), rtol=1e-6, atol=1e-6)


def natural(payload: dict[str, torch.Tensor], form: Affine, page: int, dim: int) -> torch.Tensor:
    if form.symmetric:
        return payload["codes"].view(torch.uint8)
    from argus.backends.cpu import unpack

    return unpack(payload["codes"], form.bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quantize_takes_16_bit_pages(dtype: torch.dtype) -> None:
    form = Affine(4, "channel")
    x = pages(64, 64, dtype=dtype)
    want = CpuBackend().quantize(x.float(), form)
    got = TritonBackend().quantize(x.to(DEVICE), form)
    same_scales(got, want)
    codes = layout.unpack(got["codes"].cpu(), 4, "channel", 64, 64)
    assert torch.equal(codes, natural(want, form, 64, 64))


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize(("page", "dim"), SHAPES)
def test_affine_keeps_codes_as_given(page: int, dim: int, axis: str) -> None:
    triton = TritonBackend()
    for bits in (1, 2, 3, 4, 5, 8):
        codes = torch.randint(0, 1 << bits, (3, 2, 1, page, dim), dtype=torch.uint8)
        packed = triton.affine(codes.to(DEVICE), torch.zeros(1), torch.zeros(1), Affine(bits, axis))["codes"]
        assert packed.numel() * 8 == codes.numel() * bits
        assert torch.equal(packed.cpu(), layout.pack(codes, bits, axis))
        assert torch.equal(layout.unpack(packed.cpu(), bits, axis, page, dim), codes)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize(("page", "dim"), SHAPES)
def test_fp8(page: int, dim: int, axis: str) -> None:
    cpu, triton = CpuBackend(), TritonBackend()
    for group in (None, 8):
        form = Float8(axis, group)
        x = pages(page, dim, 7)
        want, got = cpu.to_fp8(x, form), triton.to_fp8(x.to(DEVICE), form)
        same_scales(got, want)
        assert torch.equal(got["codes"].cpu().view(torch.uint8), want["codes"].view(torch.uint8))
        torch.testing.assert_close(triton.from_fp8(got, form).cpu(), cpu.from_fp8(want, form), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("tokens", "rows", "dim"), [(64, 16, 64), (24, 5, 80), (128, 33, 40)])
def test_project(tokens: int, rows: int, dim: int) -> None:
    x, matrix = pages(tokens, dim), torch.randn(rows, tokens)
    want = matrix.double() @ x.double()
    got = TritonBackend().project(x.to(DEVICE), matrix.to(DEVICE)).cpu().double()
    assert float((got - want).norm() / want.norm()) < 1e-6


def test_no_pages() -> None:
    empty = torch.empty(0, 1, 2, 64, 64, device=DEVICE)
    payload = TritonBackend().quantize(empty, Affine(4, "channel"))
    assert TritonBackend().dequantize(payload, Affine(4, "channel")).shape == empty.shape


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("bits", [3, 4, 7, 8])
def test_the_oracle_is_the_same_on_a_gpu(bits: int) -> None:
    """Numbers of few bits, whose ranges are often an exact multiple of the largest code."""
    form = Affine(bits, "channel", symmetric=bits == 8)
    x = pages(64, 128).half().float()
    want, got = CpuBackend().quantize(x, form), CpuBackend().quantize(x.to(DEVICE), form)
    assert all(torch.equal(got[name].cpu(), want[name]) for name in want)
