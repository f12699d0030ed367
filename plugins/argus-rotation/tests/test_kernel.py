"""The Triton backend reads rotated codes in place: compiled where there is a GPU, interpreted elsewhere."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from argus_rotation.tier import Rotation, RotationConfig  # noqa: E402

from argus.attention import Query  # noqa: E402
from argus.backends.base import Segment  # noqa: E402
from argus.backends.cpu import CpuBackend  # noqa: E402
from argus.backends.triton import launch  # noqa: E402
from argus.backends.triton.backend import TritonBackend  # noqa: E402
from argus.tiers.base import Tools  # noqa: E402
from tests.backends.decoding import assembly, spiked  # noqa: E402

__all__ = ["assembly"]

DEVICE = "cuda" if CUDA else "cpu"
BATCH, HEADS, GROUPS, PAGE = 2, 2, 2, 64


def rotation(bits: int) -> Rotation:
    return Rotation(RotationConfig(bits=bits), Tools(TritonBackend(), torch.float16, tier=lambda spec: rotation(bits)))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def segments(key_bits: int, value_bits: int, dim: int) -> list[Segment]:
    """Five pages in two blocks, some of their tokens answered elsewhere."""
    made = []
    tiers = rotation(key_bits), rotation(value_bits)
    for first, count in ((0, 3), (3, 2)):
        x = [normal(count, BATCH, HEADS, PAGE, dim, seed=seed + first) for seed in (1, 2)]
        positions = torch.arange(first, first + count, device=DEVICE) * PAGE
        marks = normal(count, BATCH, HEADS, PAGE, seed=first) > 1
        last = (first + count) * PAGE - 1
        payloads = tiers[0].encode(x[0], "keys"), tiers[1].encode(x[1], "values")
        made.append(Segment(*tiers, *payloads, positions, last, PAGE, marks, first=first * PAGE))
    return made


@pytest.mark.parametrize(("key_bits", "value_bits", "dim"), [(3, 3, 64), (2, 2, 128), (1, 3, 64), (4, 2, 128), (1, 4, 96)])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_attention_is_that_over_decoded_pages(
    monkeypatch: pytest.MonkeyPatch, key_bits: int, value_bits: int, dim: int, steps: int
) -> None:
    pages = segments(key_bits, value_bits, dim)
    q = normal(BATCH, HEADS * GROUPS, steps, dim, seed=5).half()
    query = Query.of(q, HEADS, dim**-0.5, 5 * PAGE)
    want = CpuBackend().attend(query, pages, [])
    if steps <= 8:
        monkeypatch.setattr(Rotation, "decode", None)  # No page is decoded.
    # Up to 3 bits are looked up in registers, by the kernel that answers for everything.
    looked_up = steps <= 8 and max(key_bits, value_bits) < 4
    if looked_up:
        monkeypatch.setattr(Rotation, "rotation", lambda *_: pytest.fail("lanes turn by signs"))
    backend = TritonBackend()
    found = backend.attend(query, pages, [])
    assert float((found - want).norm() / want.norm()) <= 2e-3
    [run] = backend.tables.of(pages).runs
    assert steps > 8 or (launch.job_of(query, run).share == "book") == looked_up


@pytest.mark.parametrize(("bits", "dim"), [(3, 64), (4, 96)])
@pytest.mark.parametrize("steps", [1, 20])
def test_outliers_are_those_of_pages_as_they_were(bits: int, dim: int, steps: int) -> None:
    """Exact numbers know no rotation: what they add to scores and answers is turned."""
    pages = spiked(segments(bits, bits, dim))
    query = Query.of(normal(BATCH, HEADS * GROUPS, steps, dim, seed=5).half(), HEADS, dim**-0.5, 5 * PAGE)
    found, want = TritonBackend().attend(query, pages, []), CpuBackend().attend(query, pages, [])
    plain = CpuBackend().attend(query, [replace(page, outliers={}) for page in pages], [])
    assert float((found - want).norm() / want.norm()) <= 2e-3
    assert float((plain - want).norm() / want.norm()) > 0.05


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "dim"), [(64, 128), (24, 256), (8, 64)])
def test_pages_are_coded_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch, bits: int, tokens: int, dim: int) -> None:
    x = normal(3, 1, 2, tokens, dim, seed=bits) * normal(dim, seed=1) + normal(3, 1, 2, tokens, 1, seed=2)
    x[0, ..., 1, :] = 0.0
    want = Rotation(RotationConfig(bits=bits), Tools(CpuBackend(), torch.float16, tier=None)).encode(x.cpu(), "keys")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(7))
    got = {name: tensor.cpu() for name, tensor in rotation(bits).encode(x, "keys").items()}
    assert all(got[name].shape == want[name].shape and got[name].dtype == want[name].dtype for name in want)
    assert int((got["scale"].view(torch.int16) - want["scale"].view(torch.int16)).abs().max()) <= 1
    # Sums in another order move a few numbers over a bound.
    assert float((got["codes"] == want["codes"]).float().mean()) >= 0.999


def test_the_function_that_the_documentation_shows_is_this_one() -> None:
    here = Path(__file__).parents[1]
    source = (here / "argus_rotation" / "kernel.py").read_text(encoding="utf-8")
    shown = (here.parents[1] / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert source[source.index("@triton.jit") :].strip() in shown
