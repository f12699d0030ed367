"""Codes of a codebook that the fused kernel looks up in registers, against attention in float64 over what they decode to."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from argus.attention import Query  # noqa: E402
from argus.backends.base import Affine, Float8, Loaded, Plain, Segment  # noqa: E402
from argus.backends.cpu import pack, unpack  # noqa: E402
from argus.backends.triton import forms, launch, tuning  # noqa: E402
from argus.backends.triton.planar import planar  # noqa: E402
from argus.backends.triton.tables import lay_book  # noqa: E402
from tests.backends.decoding import DEVICE, Case, Kept, assembly, poison  # noqa: E402

__all__ = ["assembly", "poison"]


@triton.jit
def _load(codes, scale, zero, own, tok, ch, seen, inner, P: tl.constexpr, D: tl.constexpr, OPTION: tl.constexpr):  # noqa: N803
    base = codes.to(tl.pointer_type(tl.uint8)) + inner * (P * D * OPTION // 8)
    level = tl.load(own + planar(base, tok, ch, seen, OPTION, D), mask=seen, other=0.0)
    size = tl.load(scale.to(tl.pointer_type(tl.float16)) + inner * P + tok, mask=tok < P, other=0.0)
    return level * size.to(tl.float32)


def sylvester(dim: int) -> torch.Tensor:
    """The orthonormal Hadamard matrix."""
    common = torch.arange(dim)[:, None] & torch.arange(dim)
    odd = sum((common >> bit) % 2 for bit in range(dim.bit_length())) % 2
    return (1.0 - 2.0 * odd) / dim**0.5


class Book:
    """A tier of random codes, whatever it is given, with random levels and scales.

    turn: ``hadamard`` with random signs, where head_dim is a power of two (else, and for ``random``, any rotation), or None.
    """

    def __init__(self, bits: int, dim: int, turn: str | None = "hadamard", seed: int = 0, book: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.bits = bits
        self.levels = torch.randn(1 << bits, generator=self.generator).to(DEVICE)
        self.ones = torch.randint(0, 2, (dim,), generator=self.generator).to(DEVICE) * 2.0 - 1.0
        self.turn = torch.eye(dim, device=DEVICE)
        if turn == "hadamard" and dim & (dim - 1) == 0:
            self.turn = sylvester(dim).to(DEVICE) * self.ones
        elif turn is not None:
            self.turn = torch.linalg.qr(torch.randn(dim, dim, generator=self.generator)).Q.contiguous().to(DEVICE)
        rotation, signs = self.rotation if turn else None, self.signs if turn == "hadamard" else None
        self.kept = Loaded(lambda: _load, bits, self.own, rotation, signs, book)

    def own(self, like: torch.Tensor) -> torch.Tensor:
        return self.levels

    def rotation(self, dim: int, like: torch.Tensor) -> torch.Tensor:
        return self.turn

    def signs(self, dim: int, like: torch.Tensor) -> torch.Tensor:
        return self.ones

    def form(self, role: str) -> Loaded:
        return self.kept

    def encode(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        codes = torch.randint(0, 1 << self.bits, x.shape, generator=self.generator, dtype=torch.uint8)
        scale = torch.rand(x.shape[:-1], generator=self.generator) * 2
        scale[..., 3] = 0.0
        return {"codes": pack(codes, self.bits).to(DEVICE), "scale": scale.half().to(DEVICE)}

    def decode(self, payload: dict[str, torch.Tensor], role: str) -> torch.Tensor:
        levels = self.levels[unpack(payload["codes"], self.bits).int()]
        return levels * payload["scale"].float().unsqueeze(-1) @ self.turn


class Ladder(Case):
    """A case whose pages come from several stages: tiers of keys and of values, and pages of each."""

    def __init__(self, *stages: tuple[object, object, int], page: int = 64, marked: bool = False, **sizes: int) -> None:
        counts = tuple(count for *_, count in stages)
        super().__init__(Plain(), Plain(), page=page, counts=counts, exact=marked, **sizes)
        for place, (segment, (key, value, _)) in enumerate(zip(self.segments, stages, strict=True)):
            tiers = [Kept(self.backend, one) if isinstance(one, (Affine, Float8, Plain)) else one for one in (key, value)]
            kept = (tier.encode(payload["codes"]) for tier, payload in zip(tiers, (segment.keys, segment.values), strict=True))
            rest = (segment.positions, segment.last, page, segment.exact)
            self.segments[place] = Segment(*tiers, *kept, *rest)

    def jobs(self, query: Query | None = None) -> list[launch.Job]:
        """Who answers."""
        runs = self.backend.tables.of(self.segments).runs
        return launch.plan(query or self.query, [*runs, *self.dense])

    def shares(self) -> list[str]:
        return sorted(job.share for job in self.jobs() if job.share != "dense")


BITS = [(1, 1), (2, 2), (3, 3), (1, 3), (3, 2), (2, 1)]
WIDE = [(1, 3, 128), (3, 2, 128), (2, 1, 128), (3, 2, 256), (1, 3, 256)]


@pytest.fixture
def no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rotation is asked for."""

    def asked(self: Book, dim: int, like: torch.Tensor) -> torch.Tensor:
        raise AssertionError("lanes turn by signs")

    monkeypatch.setattr(Book, "rotation", asked)


@pytest.mark.usefixtures("no_matrix")
@pytest.mark.parametrize(("key", "value", "dim"), [(*bits, 64) for bits in BITS] + WIDE)
def test_widths_and_head_dims(key: int, value: int, dim: int) -> None:
    case = Ladder((Book(key, dim), Book(value, dim, seed=1), 2), dim=dim, batch=1, marked=dim == 64)
    assert case.shares() == ["book"]
    case.check(bound=1e-3)


@pytest.mark.parametrize(("page", "count"), [(16, 3), (48, 2), (64, 9), (128, 1)])
def test_pages_of_any_size_and_number(monkeypatch: pytest.MonkeyPatch, page: int, count: int) -> None:
    monkeypatch.setattr(tuning, "resident", lambda *_: 3)
    case = Ladder((Book(3, 64), Book(3, 64, seed=1), count), page=page, batch=1, marked=True)
    assert case.shares() == ["book"]
    case.check()


@pytest.mark.parametrize(("groups", "steps"), [(1, 1), (3, 2), (4, 1), (7, 1), (2, 8)])
def test_groups_and_steps(groups: int, steps: int) -> None:
    case = Ladder((Book(3, 64), Book(2, 64, seed=1), 2), batch=1, groups=groups, steps=steps, seed=groups)
    case.check()
    # Pages after the query are hidden.
    case.check(Query(case.query.rows, 40, steps))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_masks(kind: str) -> None:
    case = Ladder((Book(2, 64), Book(3, 64, seed=1), 2), steps=2, marked=True)
    mask = torch.rand(2, 1, 2, case.length, generator=case.generator).to(DEVICE) > 0.3
    if kind == "additive":
        mask = torch.where(mask, 0.5, torch.finfo(torch.float16).min).half()
    q = case.query
    case.check(Query(q.rows, q.start, 2, mask))


def test_softcap_and_sinks() -> None:
    case = Ladder((Book(3, 64), Book(3, 64, seed=1), 2), groups=3)
    q = case.query
    sinks = torch.randn(case.heads * case.groups, generator=case.generator).to(DEVICE)
    case.check(Query(q.rows * 4, q.start, q.length, None, 5.0), sinks)
    case.check(sinks=sinks)


@pytest.mark.parametrize("size", [2e-4, 1e4])
def test_small_and_large_values(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    values = Book(3, 64, seed=1)
    encode = values.encode
    monkeypatch.setattr(values, "encode", lambda x: (made := encode(x)) | {"scale": (made["scale"].float() * size).half()})
    case = Ladder((Book(3, 64), values, 2), batch=1)
    case.dense = []
    case.check()


AFFINE = Affine(4, "channel"), Affine(4, "token")


@pytest.mark.parametrize(
    ("stage", "dim"),
    [
        (AFFINE, 64),
        (AFFINE, 128),
        ((Float8("channel", 32), Float8("token")), 64),
        ((Plain(), Plain()), 128),
        ((Affine(4, "token"), Affine(4, "channel")), 64),
    ],
)
def test_beside_other_stages(stage: tuple[object, object], dim: int) -> None:
    tier = Book(3, dim)
    case = Ladder((*stage, 1), (tier, tier, 2), dim=dim, batch=1, marked=True)
    case.check()


@pytest.mark.parametrize(("key", "value"), [(3, 3), (2, 1)])
def test_a_head_dim_that_is_no_power_of_two(key: int, value: int) -> None:
    """The form tells signs, but its rotation is another."""
    case = Ladder((Book(key, 192), Book(value, 192, seed=1), 2), dim=192, batch=1)
    assert case.shares() == ["book"]
    case.check(bound=1e-3)


def test_several_rotations() -> None:
    """Queries are turned by the rotation of keys, answers back by that of values; lanes do either, or a matrix does."""
    signs = [Book(bits, 64, seed=bits) for bits in (3, 2)]
    random = [Book(bits, 64, "random", seed=bits) for bits in (2, 1)]
    straight = Book(2, 64, None, seed=7)
    wide = Book(4, 64, seed=8)
    case = Ladder(
        (straight, signs[0], 1), (signs[0], random[0], 2), (*AFFINE, 1), (random[1], signs[1], 1), (random[0], random[1], 1),
        (signs[1], straight, 1), (wide, wide, 1), batch=1,
    )  # fmt: skip
    assert case.shares() == ["any", "book", "book", "book", "book", "book", "codes"]
    turns = [job.constants[4:6] for job in case.jobs() if job.share == "book"]
    assert turns == [(False, True), (True, False), (False, True), (False, False), (True, False)]
    case.check()


def test_a_codebook_without_rotation() -> None:
    tier = Book(3, 64, None)
    case = Ladder((tier, tier, 2), marked=True)
    assert case.shares() == ["book"]
    case.check()


def test_lanes_turn_as_a_matrix_does(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = Book(3, 64)
    case = Ladder((*AFFINE, 1), (tier, tier, 2), batch=1)
    turned = case.backend.attend(case.query, case.segments, case.dense)
    monkeypatch.setattr(forms, "signs", lambda *_: None)
    torch.testing.assert_close(turned, case.backend.attend(case.query, case.segments, case.dense), rtol=1e-5, atol=1e-5)


def test_what_lanes_do_not_look_up() -> None:
    tier, told, wide = Book(3, 64), Book(3, 64, book=False), Book(4, 64)
    for key, value, page in ((told, told, 64), (tier, told, 64), (wide, tier, 64), (tier, tier, 24), (tier, Plain(), 64)):
        case = Ladder((key, value, 2), page=page, batch=1)
        assert case.shares() == ["any"]
        case.check()
    narrow = Book(3, 80)
    assert "book" not in Ladder((narrow, narrow, 2), dim=80, batch=1).shares()


def test_small_and_large_scales() -> None:
    tier = Book(3, 64)
    case = Ladder((tier, tier, 2), batch=1)
    for payload, factor in ((case.segments[0].keys, 0.05), (case.segments[0].values, 1e-4)):
        payload["scale"] *= factor
    case.dense.clear()
    case.check()
    case.segments[0].values["scale"] *= 0.25e4 * 1e4
    case.check()


def test_books_are_kept_once_and_counted() -> None:
    tier = Book(3, 64)
    case = Ladder((tier, tier, 2), (*AFFINE, 1), (tier, tier, 1))
    runs = [run for run in case.backend.tables.of(case.segments).runs if run.laid]
    assert len(runs) == 2
    assert all(a is b for a, b in zip(runs[0].laid, runs[1].laid, strict=True))
    assert all(any(one is tensor for one in case.backend.tables.tensors()) for tensor in runs[0].laid)


def test_a_book_is_laid_by_bytes() -> None:
    levels = torch.randn(8, generator=torch.Generator().manual_seed(0))
    words = lay_book(levels)[5].view(torch.uint8).view(2, 8)
    assert torch.equal((words[0].short() | words[1].short() << 8), levels.half().view(torch.int16))
    assert torch.equal(lay_book(levels[:2])[0].view(torch.uint8).view(2, 8)[:, :2], words[:, :2])
