"""What a tier is put through, for one shape and one role."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from argus.backends.base import Affine, Float8, Payload, Plain, Role
from argus.errors import ArgusError, RangeError
from argus.ledger import total_bytes
from argus.testing.base import Contract, describe, normal, other_seeds, same
from argus.tiers.base import LIMIT, Tier, gate

SHAPES = ((1, 1, 1), (1, 2, 3), (3, 1, 2))
"""Pages, batch and heads: one of each, and odd ones."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

ENOUGH = 8192
"""Numbers from which on the mean error over all pages must lie within the declared one."""
SPREAD = 1.4
"""How far a single page may lie above the declared error."""
STRAY = 2.0
"""How far numbers that are not normal may."""
FLOOR = 2.0**-21
"""Absolute error a number that is always allowed: scales and means live in FP16, whose smallest step is 2^-24."""


@dataclass(frozen=True)
class Subject:
    """A tier under a shape and a role, with the words to complain about it."""

    make: Callable[[], Tier]
    tier: Tier
    role: Role
    page: int
    dim: int
    contract: Contract

    def case(self, name: str) -> Contract:
        """The words for one case."""
        return self.contract.at(f"{self.role} of {self.page} tokens x head_dim {self.dim}, {name}")

    def pages(self, counts: tuple[int, int, int] | None = None) -> Tensor:
        """Normal numbers ``[n, B, H, P, D]``; by default of two pages and two batch rows."""
        return normal((*(counts or (2, 2, 3 if self.page * self.dim < 2048 else 1)), self.page, self.dim))

    def read(self, x: Tensor) -> Tensor:
        """What is left of `x` after the round trip."""
        return self.tier.decode(self.tier.encode(x.clone(), self.role), self.role)


def check_pages(it: Subject) -> None:
    """Every case of one shape and role, in the cache's usual dtype."""
    check_error(it)
    check_numbers(it)
    check_not_finite(it)
    check_repeatable(it)
    check_untouched(it)
    check_independent(it)
    check_form(it)
    check_target(it)
    check_shared(it)


def check_bits(it: Subject) -> None:
    """Declared bits are the payload's, and the payload is laid out by page and batch row."""
    for counts in SHAPES:
        words = it.case(f"pages, batch, heads {list(counts)}, cache in {it.tier.tools.dtype}")
        payload = it.tier.encode(it.pages(counts), it.role)
        words.require(isinstance(payload, Mapping), f"encode gives a {type(payload).__name__}, not tensors by name")
        words.require(bool(payload), "encode keeps nothing")
        for name, tensor in payload.items():
            words.require(isinstance(tensor, Tensor), f"payload '{name}' is a {type(tensor).__name__}, not a tensor")
            found = f"payload '{name}' is {list(tensor.shape)}, not [n, B, ...]"
            words.require(tuple(tensor.shape[:2]) == counts[:2], found)
        kept = 8 * sum(tensor.numel() * tensor.element_size() for tensor in payload.values())
        values = counts[0] * counts[1] * counts[2] * it.page * it.dim
        declared = it.tier.bits(it.role, it.page, it.dim)
        words.require(isinstance(declared, int | float), f"declares {declared!r} bits a value, not a number")
        found = f"keeps {kept / values:g} bits a value, declares {declared:g}"
        words.require(abs(kept / values - declared) <= 1e-9 * declared, found)


def relative(found: Tensor, x: Tensor) -> tuple[float, float]:
    """Error over the size of the numbers, of all pages together and of the worst, less what FP16 always allows."""
    size = x.shape[-1] * x.shape[-2]
    off = ((found - x).double().square().sum((-2, -1)) - size * FLOOR**2).clamp_min(0)
    norm = x.double().square().sum((-2, -1)).clamp_min(1e-300)
    return float((off.sum() / norm.sum()).sqrt()), float((off / norm).sqrt().amax())


def require_readable(words: Contract, found: Tensor, x: Tensor) -> None:
    """What was read is float32, finite, and as large as what was written."""
    words.require(found.shape == x.shape, f"decode gives {list(found.shape)}, not {list(x.shape)}")
    words.require(found.dtype == torch.float32, f"decode gives {found.dtype}, not torch.float32")
    words.require(bool(found.isfinite().all()), f"decode of {describe(x)} gives numbers that are not finite")


def check_error(it: Subject) -> None:
    """The round trip of normal numbers lies within the declared error."""
    for dtype in DTYPES:
        for counts in SHAPES:
            words = it.case(f"normal numbers, pages, batch, heads {list(counts)}, {dtype}")
            x = gate(it.pages(counts).to(dtype))
            found = it.read(x)
            require_readable(words, found, x)
            total, worst = relative(found, x)
            limit = it.tier.error
            words.require(worst <= SPREAD * limit, f"relative error of a page {worst:.4g}, allowed {SPREAD} x {limit:.4g}")
            if x.numel() >= ENOUGH:
                words.require(total <= limit, f"relative error {total:.4g}, declared {limit:.4g}")


def numbers(it: Subject) -> Iterator[tuple[str, Tensor, bool]]:
    """Cases that are not normal numbers: name, pages, and whether the declared error speaks of them."""
    x = it.pages()
    channel = normal((it.dim,), 1)
    yield "numbers about 1e-3", x * 1e-3, True
    yield "numbers up to the limit", x * (LIMIT / x.abs().amax()), True
    yield "channels with means of their own", x + 8 * channel, True
    yield "numbers about 1e-7", x * 1e-7, True
    yield "zeros", torch.zeros_like(x), True
    for constant in (1.0, -0.37, 1e-6, LIMIT, -LIMIT):
        yield f"all numbers {constant:g}", torch.full_like(x, constant), True
    yield "a constant a channel", channel.expand_as(x).contiguous(), True
    yield "channels from 1e-4 to 3e3", x * torch.logspace(-4, 3.5, it.dim), False
    yield "the limit with random signs", LIMIT * x.sign(), False
    spike = torch.zeros_like(x)
    spike[..., it.page // 2, it.dim // 2] = LIMIT
    yield "one number at the limit", spike, False


def check_numbers(it: Subject) -> None:
    """Extreme and constant numbers come back finite, near where they were."""
    for name, x, bounded in numbers(it):
        words = it.case(name)
        found = it.read(x)
        require_readable(words, found, x)
        if bounded:
            _, worst = relative(found, x)
            words.require(worst <= STRAY * it.tier.error, f"relative error {worst:.4g}, allowed {STRAY} x {it.tier.error:.4g}")
        else:
            furthest = float((found - x).abs().amax())
            reach = float(x.amax() - x.amin()) * 2 * max(1.0, 1.5 * it.tier.error)
            words.require(furthest <= reach, f"a number moved by {furthest:.4g}, allowed {reach:.4g}")


def check_not_finite(it: Subject) -> None:
    """NaN and infinity are stopped at the gate, and no tier turns them into ordinary numbers."""
    for number in (float("nan"), float("inf"), float("-inf")):
        words = it.case(f"a number is {number}")
        x = it.pages((1, 1, 1))
        x[..., it.page // 2, it.dim // 2] = number
        try:
            gate(x)
            words.require(False, "passes the gate")
        except RangeError:
            pass
        try:
            found = it.read(x)
        except ArgusError:
            continue
        words.require(not bool(found.isfinite().all()), "comes back as ordinary numbers: refuse it, or keep it not finite")


def check_repeatable(it: Subject) -> None:
    """A fresh tier under other global seeds keeps the same, from numbers laid out otherwise too."""
    x = it.pages()
    kept = it.tier.encode(x.clone(), it.role)
    with other_seeds(1234):
        again = it.make().encode(x.clone(), it.role)
    require_same_payload(it.case("encoded again under other global seeds"), again, kept)
    strided = x.permute(1, 2, 3, 0, 4).contiguous().permute(3, 0, 1, 2, 4)
    near(it, it.case("encoded from memory in another order"), it.read(strided), it.read(x), x)


def require_same_payload(words: Contract, found: Payload, wanted: Payload) -> None:
    """Two payloads agree to the bit."""
    words.require(found.keys() == wanted.keys(), f"payload has {sorted(found)}, not {sorted(wanted)}")
    for name, tensor in wanted.items():
        words.require_same(found[name], tensor, f"payload '{name}'")


def check_untouched(it: Subject) -> None:
    """Encode leaves its input, decode its payload, and decode can be repeated."""
    x = it.pages()
    before = x.clone()
    payload = it.tier.encode(x, it.role)
    it.case("encode").require_same(x, before, "its input")
    kept = {name: tensor.clone() for name, tensor in payload.items()}
    first = it.tier.decode(payload, it.role)
    require_same_payload(it.case("decode"), payload, kept)
    first.zero_()
    require_same_payload(it.case("writing into what was decoded"), it.tier.encode(before, it.role), kept)
    it.case("decode twice").require(
        same(it.tier.decode(kept, it.role), it.make().decode(kept, it.role)), "a fresh tier reads the same payload differently"
    )


def near(it: Subject, words: Contract, found: Tensor, wanted: Tensor, x: Tensor) -> None:
    """Two readings of `x` agree, but for the order in which sums were taken."""
    words.require(found.shape == wanted.shape, f"reads {list(found.shape)}, not {list(wanted.shape)}")
    off = float((found - wanted).norm() / x.norm())
    words.require(off <= 0.1 * it.tier.error + 1e-6, f"reads otherwise, by {off:.4g} of the numbers' size")


def check_independent(it: Subject) -> None:
    """A page, and a batch row, is kept the same beside any neighbours."""
    x = it.pages()
    x[1] *= 50
    x[:, 1] *= 50
    payload = it.tier.encode(x, it.role)
    wanted = it.tier.decode(payload, it.role)
    for page in range(len(x)):
        words = it.case(f"page {page} apart from its neighbours")
        alone = slice(page, page + 1)
        near(it, words, it.read(x[alone]), wanted[alone], x[alone])
        part = {name: tensor[alone] for name, tensor in payload.items()}
        near(it, words, it.tier.decode(part, it.role), wanted[alone], x[alone])
    rows = torch.tensor([1, 0, 1])
    picked = {name: tensor.index_select(1, rows) for name, tensor in payload.items()}
    near(it, it.case("batch rows reordered"), it.tier.decode(picked, it.role), wanted[:, rows], x[:, rows])
    near(it, it.case("a batch row alone"), it.read(x[:, :1].contiguous()), wanted[:, :1], x[:, :1])


def check_form(it: Subject) -> None:
    """A tier that describes its codes describes them as they are."""
    form: Any = it.tier.form(it.role)
    backend = it.tier.tools.backend
    readers: dict[type, Callable[[Payload], Tensor]] = {
        Affine: lambda payload: backend.dequantize(payload, form),
        Float8: lambda payload: backend.from_fp8(payload, form),
        Plain: lambda payload: payload["codes"].float(),
    }
    reader = readers.get(type(form))
    if reader is None:
        return
    x = it.pages()
    payload = it.tier.encode(x, it.role)
    near(it, it.case(f"read as {form}"), reader(payload), it.tier.decode(payload, it.role), x)


def check_target(it: Subject) -> None:
    """A tier that tells the form it encodes for leaves nothing of its own to do."""
    target = it.tier.target(it.role)
    if target is None:
        return
    x = it.pages()
    found, wanted = it.tier.tools.backend.encode(x, target), it.tier.encode(x, it.role)
    words = it.case(f"encoded for {target}")
    words.require(found.keys() == wanted.keys(), f"payload holds {sorted(found)}, not {sorted(wanted)}")
    for name, tensor in wanted.items():
        words.require(same(found[name], tensor), f"'{name}' is not what encode makes")


def check_shared(it: Subject) -> None:
    """What pages share does not grow with them."""
    it.read(it.pages((1, 1, 1)))
    before = total_bytes(list(it.tier.shared().values()))
    it.read(it.pages())
    after = total_bytes(list(it.tier.shared().values()))
    it.case("shared tensors").require(after == before, f"grow from {before} to {after} bytes as pages are encoded")
