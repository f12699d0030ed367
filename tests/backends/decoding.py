"""What tests of decode attention share: tiers of one form, a filled layer of them, and attention over it in float64."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from argus.attention import Query  # noqa: E402
from argus.backends.base import Affine, Dense, Float8, Plain, Projected, Segment  # noqa: E402
from argus.backends.triton import launch  # noqa: E402
from argus.backends.triton.backend import TritonBackend  # noqa: E402
from argus.exact import ExactNumbers  # noqa: E402
from argus.tiers.base import ROLES  # noqa: E402
from argus.tiers.jl import projection  # noqa: E402
from tests.backends import ptx  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
BOUND = 2e-3


class Kept:
    """A tier as the backend sees it: a form, and codes made by the backend itself."""

    def __init__(self, backend: TritonBackend, form: object, dtype: torch.dtype = torch.float16) -> None:
        self.backend, self.kept, self.dtype = backend, form, dtype

    def form(self, role: str) -> object:
        return self.kept

    def encode(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if isinstance(self.kept, Affine):
            return self.backend.quantize(x, self.kept)
        if isinstance(self.kept, Float8):
            return self.backend.to_fp8(x, self.kept)
        return {"codes": x.to(self.dtype)}

    def decode(self, payload: dict[str, torch.Tensor], role: str) -> torch.Tensor:
        if isinstance(self.kept, Affine):
            return self.backend.dequantize(payload, self.kept)
        if isinstance(self.kept, Float8):
            return self.backend.from_fp8(payload, self.kept)
        return payload["codes"].float()


class Case:
    """Random pages in segments, exact tokens, and queries of one attention call."""

    def __init__(
        self,
        key: object,
        value: object,
        page: int = 64,
        dim: int = 64,
        counts: tuple[int, ...] = (2, 1),
        batch: int = 2,
        heads: int = 2,
        groups: int = 2,
        steps: int = 1,
        exact: bool = False,
        window: int = 20,
        dtype: torch.dtype = torch.float16,
        seed: int = 0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.backend = TritonBackend()
        self.tiers = [Kept(self.backend, form, dtype) for form in (key, value)]
        self.heads, self.groups, self.steps, self.page = heads, groups, steps, page
        self.segments = []
        done = 0
        for count in counts:
            x = [self.random(count, batch, heads, page, dim) for _ in range(2)]
            for one in x:
                one *= 0.3 + torch.rand(dim, generator=self.generator).to(DEVICE) * 2
                one *= 0.3 + torch.rand(page, 1, generator=self.generator).to(DEVICE) * 2
            marks = self.random(count, batch, heads, page) > 1.0 if exact else None
            keys, values = (tier.encode(one) for tier, one in zip(self.tiers, x, strict=True))
            positions = (torch.arange(count) + done).to(DEVICE) * page
            last = (done + count) * page - 1
            self.segments.append(Segment(*self.tiers, keys, values, positions, last, page, marks))
            done += count
        start = done * page
        keys, values = (self.random(batch, heads, window + steps + 5, dim).to(dtype)[:, :, : window + steps] for _ in range(2))
        self.dense = [Dense(keys, values, start, start + window + steps - 1)]
        self.length = start + window + steps
        if exact:
            positions = torch.randint(0, start, (batch, heads, 9), generator=self.generator, dtype=torch.int32)
            positions[0, 1, 4:] = -1
            kept = (self.random(batch, heads, 9, dim).to(dtype) for _ in range(2))
            self.dense.append(Dense(*kept, 0, start - 1, positions.to(DEVICE), True))
        q = self.random(batch, heads * groups, steps, dim)
        self.query = Query.of(q, heads, dim**-0.5, self.length - steps)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE)

    def expected(self, query: Query, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Attention in float64 over everything decoded."""
        keys, values, positions = [], [], []
        batch, heads = query.rows.shape[:2]
        for segment in self.segments:
            for role, out in (("keys", keys), ("values", values)):
                decoded = segment.exactly(role, segment.tier(role).decode(segment.payload(role), role))
                out.append(decoded.double().permute(1, 2, 0, 3, 4).flatten(2, 3))
            at = (segment.positions[:, None] + torch.arange(self.page, device=DEVICE)).flatten().expand(batch, heads, -1)
            if segment.exact is not None:
                at = at.masked_fill(segment.exact.permute(1, 2, 0, 3).flatten(2), -1)
            positions.append(at)
        for part in self.dense:
            keys.append(part.numbers("keys").double())
            values.append(part.numbers("values").double())
            steps = torch.arange(part.start, part.start + part.keys.shape[2], device=DEVICE)
            positions.append(steps.expand(batch, heads, -1) if part.positions is None else part.positions.long())
        k, v, at = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(positions, 2)
        scores = query.rows.double() @ k.transpose(-1, -2)
        if query.softcap is not None:
            scores = torch.tanh(scores / query.softcap) * query.softcap
        seen = query.visible(at, 1 << 40)
        if seen.dtype != torch.bool:
            scores = scores + seen.double()
            seen = seen > torch.finfo(seen.dtype).min
        scores = scores.masked_fill(~(seen & (at >= 0).unsqueeze(-2)), float("-inf"))
        if sinks is not None:
            more = sinks.double().view(1, heads, -1, 1).expand(batch, heads, query.groups, query.length).flatten(2)
            scores = torch.cat([scores, more.unsqueeze(-1)], -1)
            v = torch.cat([v, torch.zeros_like(v[:, :, :1])], 2)
        return torch.softmax(scores, -1).nan_to_num() @ v

    def check(self, query: Query | None = None, sinks: torch.Tensor | None = None, bound: float = BOUND) -> None:
        query = query or self.query
        got = self.backend.attend(query, self.segments, self.dense, sinks).double()
        want = self.expected(query, sinks)
        assert torch.isfinite(got).all()
        assert float((got - want).norm() / want.norm()) <= bound


@pytest.fixture(autouse=True)
def assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter knows no inline assembly."""
    if not CUDA:
        ptx.stand_in(monkeypatch)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernels do not write is NaN."""

    def poisoned(self: type, query: Query, slots: int) -> launch.Workspace:
        batch, heads, rows, dim = query.rows.shape
        shape = (batch * heads, slots, rows)
        return launch.Workspace(
            torch.full((*shape, dim), float("nan"), device=DEVICE), torch.full(shape, float("nan"), device=DEVICE)
        )

    monkeypatch.setattr(launch.Workspace, "of", classmethod(poisoned))


def spiked(segments: list[Segment], share: float = 0.02, roles: tuple[str, ...] = ROLES, first: int = 0) -> list[Segment]:
    """The same pages with outliers, other numbers than what is decoded, but for those before page `first`, in front."""
    generator = torch.Generator().manual_seed(7)
    kept = {}
    for role in roles:
        numbers = ExactNumbers(torch.float16)
        for segment in segments:
            decoded = segment.tier(role).decode(segment.payload(role), role)
            more = torch.randn(decoded.shape, generator=generator).to(decoded) * 4
            chosen = torch.rand(decoded.shape, generator=generator).to(DEVICE) < share
            numbers.add(decoded + more, chosen, int(segment.positions[0]) // segment.page_size)
        numbers.forget(first)
        kept[role] = numbers.rows
    return [replace(segment, outliers=kept) for segment in segments if int(segment.positions[0]) >= first * segment.page_size]


FORMS = {
    "plain": Plain(),
    "fp8": Float8("channel", 32),
    "fp8-token": Float8("token"),
    "int8": Affine(8, "channel", symmetric=True),
    "int8-token": Affine(8, "token", symmetric=True),
    "int4": Affine(4, "channel"),
    "int4-token": Affine(4, "token"),
    "int4-group": Affine(4, "channel", 32),
    "int4-token-group": Affine(4, "token", 16),
    "int3": Affine(3, "channel"),
    "int3-token": Affine(3, "token"),
    "int2": Affine(2, "channel"),
    "int2-token": Affine(2, "token"),
    "sign": Affine(1, "channel"),
    "sign-token": Affine(1, "token"),
    "int7": Affine(7, "channel"),
    "int7-token": Affine(7, "token"),
}


class KeptProjection(Kept):
    """``mean + W^T c`` with coefficients of another form."""

    def __init__(self, backend: TritonBackend, inner: object, unbiased: bool, ratio: int = 4) -> None:
        super().__init__(backend, inner)
        self.inner = Kept(backend, inner)
        self.kept = Projected(inner, ratio, unbiased, self.matrix)
        self.projection: torch.Tensor | None = None

    def matrix(self, page: int, like: torch.Tensor) -> torch.Tensor:
        if self.projection is None:
            self.projection = projection(page, page // self.kept.ratio, 0).to(like.device)
        return self.projection

    def encode(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        mean = x.mean(-2).half()
        kept = self.inner.encode(self.matrix(x.shape[-2], x) @ (x - mean.float().unsqueeze(-2)) / x.shape[-2])
        return {"mean": mean} | {"coefficients." + name: tensor for name, tensor in kept.items()}

    def decode(self, payload: dict[str, torch.Tensor], role: str) -> torch.Tensor:
        kept = {name.removeprefix("coefficients."): tensor for name, tensor in payload.items() if name != "mean"}
        rest = self.projection.T @ self.inner.decode(kept, role)
        return rest * self.kept.factor(rest.shape[-2]) + payload["mean"].float().unsqueeze(-2)
