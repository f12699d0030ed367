"""The contract suite over everything built in, and over plugins broken on purpose: the suite itself can fail."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest
import torch
from pydantic import BaseModel

from argus import plugins
from argus.backends.cpu import CpuBackend
from argus.errors import ConfigError
from argus.policies.aging import Fifo
from argus.policies.anchors import Sinks
from argus.policies.outliers import Sigma
from argus.testing import ContractError, check_aging, check_anchors, check_backend, check_outliers, check_tier
from argus.testing.base import normal
from argus.testing.tiers import maker
from argus.tiers.base import Tier, gate
from argus.tiers.fp8 import Fp8
from argus.tiers.int4 import Int4
from argus.tiers.int8 import Int8
from argus.tiers.sign import Sign

MANAGER = plugins.load()
TIERS = plugins.kinds(MANAGER, "argus_tiers")
GROUPED = ("int8", "int4", "int3", "int2", "sign", "fp8")
OPTIONS = [
    *((name, {"axis": axis, "group_size": 4}) for name in GROUPED for axis in ("channel", "token")),
    *(("int", {"bits": bits}) for bits in range(2, 9)),
    *(("jl", {"coefficients": name}) for name in ("fp8", "int8", "int4", "int2", "sign")),
    ("jl", {"coefficients": {"tier": "int4", "axis": "token"}}),
    ("jl", {"coefficients": {"tier": "int", "bits": 3}, "ratio": 2, "seed": 5}),
    ("jl", {"unbiased": True}),
    ("jl", {"centre": False}),
    ("jl", {"centre": False, "coefficients": {"tier": "int4", "axis": "token"}}),
    ("jl", {"unbiased": True, "coefficients": "int4", "ratio": 2}),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and a busy machine makes threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", sorted(set(TIERS) - {"int"}))
def test_tiers_keep_their_contract(name):
    check_tier(TIERS[name])


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_tiers_keep_their_contract_with_other_options(name, options):
    check_tier(TIERS[name], config=options, page_size=16, head_dim=40)


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in sorted(set(TIERS) - {"int"})), ("int", {"bits": 5})])
@pytest.mark.parametrize(("page_size", "head_dim"), [(128, 8), (8, 256)])
def test_tiers_keep_their_contract_in_long_and_wide_pages(name, options, page_size, head_dim):
    check_tier(TIERS[name], config=options, page_size=page_size, head_dim=head_dim)


@pytest.mark.parametrize("name", sorted(set(TIERS) - {"int"}))
def test_the_declared_error_is_not_slack(name):
    make = maker(TIERS[name], {}, CpuBackend(), TIERS)
    tier, x = make(torch.float16), normal((4, 2, 3, 64, 64))
    worst = max(float((tier.decode(tier.encode(x, role), role) - x).norm() / x.norm()) for role in ("keys", "values"))
    assert worst <= tier.error <= 1.5 * worst


def anchor_options() -> list[tuple[str, dict]]:
    novelty = [{"by": by, "scope": scope, "share": 0.1} for by in ("keys", "values", "both") for scope in ("page", "block")]
    rest = {"sinks": [{}, {"tokens": 0}], "lines": [{}, {"tokens": 3}, {"ids": (3, 4)}], "novelty": novelty}
    return [(name, options) for name in plugins.kinds(MANAGER, "argus_anchors") for options in rest.get(name, [{}])]


@pytest.mark.parametrize(("name", "options"), anchor_options(), ids=str)
def test_anchor_policies_keep_their_contract(name, options):
    check_anchors(plugins.kinds(MANAGER, "argus_anchors")[name], config=options)


@pytest.mark.parametrize("name", sorted(plugins.kinds(MANAGER, "argus_aging")))
def test_aging_policies_keep_their_contract(name):
    check_aging(plugins.kinds(MANAGER, "argus_aging")[name])


@pytest.mark.parametrize("name", sorted(plugins.kinds(MANAGER, "argus_outliers")))
def test_outlier_policies_keep_their_contract(name):
    check_outliers(plugins.kinds(MANAGER, "argus_outliers")[name])


def test_the_cpu_backend_keeps_its_contract():
    check_backend(CpuBackend())


class WrongBits(Int4):
    def bits(self, role, page_size, head_dim):
        return 4.0


class LossierThanDeclared(Int4):
    error = 0.02


class SeedsGlobally(Int4):
    def encode(self, x, role):
        torch.manual_seed(42)
        return super().encode(x, role)


class DrawsFromRandom(Int4):
    def decode(self, payload, role):
        random.random()
        return super().decode(payload, role)


class HidesNan(Int4):
    def encode(self, x, role):
        return super().encode(x.nan_to_num(0.0, 0.0, 0.0), role)


class WritesToPayload(Sign):
    def decode(self, payload, role):
        found = super().decode(payload, role)
        payload["scale"].zero_()
        return found


class WritesToInput(Int8):
    def encode(self, x, role):
        kept = super().encode(x, role)
        x.zero_()
        return kept


def rounded(x, peak):
    """Numbers on a grid of a thousand steps between the peaks."""
    return (x / peak * 500).round() / 500 * peak


class LeaksBetweenPages(Int4):
    def encode(self, x, role):
        return super().encode(rounded(x, x.abs().amax((0, 2, 3, 4), keepdim=True).clamp_min(1e-9)), role)


class LeaksBetweenRows(Int4):
    def encode(self, x, role):
        return super().encode(rounded(x, x.abs().amax((1, 2, 3, 4), keepdim=True).clamp_min(1e-9)), role)


class NoisyAtRandom(Int8):
    def encode(self, x, role):
        state = torch.get_rng_state()
        noisy = x * (1 + 1e-3 * torch.randn_like(x))
        torch.set_rng_state(state)
        return super().encode(noisy, role)


class WrapsAround(Fp8):
    def encode(self, x, role):
        kept = super().encode(x, role)
        return kept | {"scale": kept["scale"].clamp_max(8.0)}


class OverflowsHalf(Sign):
    def encode(self, x, role):
        kept = super().encode(x, role)
        return kept | {"scale": kept["scale"] * 4, "zero": kept["zero"] * 4}

    def decode(self, payload, role):
        return super().decode(payload, role) / 4


class PagesLast(Int8):
    def encode(self, x, role):
        kept = super().encode(x, role)
        return kept | {"scale": kept["scale"].movedim(0, -1)}

    def decode(self, payload, role):
        return super().decode(payload | {"scale": payload["scale"].movedim(-1, 0)}, role)


class WrongDtype(Int8):
    def decode(self, payload, role):
        return super().decode(payload, role).double()


class GrowsShared(Int8):
    def encode(self, x, role):
        self.kept = [*getattr(self, "kept", []), x.clone()]
        return super().encode(x, role)

    def shared(self):
        return {str(i): x for i, x in enumerate(self.kept)}


class RefusesAll(Int8):
    def check(self, role, page_size, head_dim):
        raise ConfigError("never")


class ChecksWithAnotherError(Int8):
    def check(self, role, page_size, head_dim):
        raise ValueError("no")


BROKEN = {
    WrongBits: "declares 4",
    LossierThanDeclared: "relative error",
    SeedsGlobally: "random state of torch",
    DrawsFromRandom: "random state of random",
    HidesNan: "ordinary numbers",
    WritesToPayload: "payload",
    WritesToInput: "input",
    LeaksBetweenPages: "neighbours",
    LeaksBetweenRows: "batch row",
    NoisyAtRandom: "other global seeds",
    WrapsAround: "relative error",
    OverflowsHalf: "not finite",
    PagesLast: r"not \[n, B",
    WrongDtype: "float64",
    GrowsShared: "grow",
    RefusesAll: "refuses every shape",
    ChecksWithAnotherError: "allowed is ConfigError",
}


@pytest.mark.parametrize(("kind", "complaint"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_broken_tiers_are_caught(kind, complaint):
    with pytest.raises(ContractError, match=complaint) as caught:
        check_tier(kind)
    assert kind.__name__ in str(caught.value)


def test_a_tier_that_describes_its_codes_wrongly_is_caught():
    class Described(Int4):
        def form(self, role):
            return replace(super().form(role), bits=4, axis="channel", group=16)

        def decode(self, payload, role):
            return super().decode(payload, role).flip(-1)

        def encode(self, x, role):
            return super().encode(x.flip(-1), role)

    with pytest.raises(ContractError, match="read as Affine"):
        check_tier(Described, page_size=16, head_dim=16)


class Nothing(Tier):
    """Keeps no bit: every number reads as zero."""

    error = 1.0

    def encode(self, x, role):
        return {"none": gate(x).unsqueeze(-1)[..., :0]}

    def decode(self, payload, role):
        return payload["none"].sum(-1)

    def bits(self, role, page_size, head_dim):
        return 0.0


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"encode": lambda self, x, role: gate(x)}, "encode gives a Tensor, not tensors by name"),
        ({"encode": lambda self, x, role: {"none": []}}, "payload 'none' is a list, not a tensor"),
        ({"bits": lambda self, role, page_size, head_dim: None}, "declares None bits a value, not a number"),
    ],
    ids=["encode", "payload", "bits"],
)
def test_a_tier_that_answers_otherwise_is_told(broken, said):
    with pytest.raises(ContractError, match=f"{said}$"):
        check_tier(type("Broken", (Nothing,), broken), page_size=16, head_dim=8)


def test_a_tier_may_keep_nothing():
    check_tier(Nothing, page_size=16, head_dim=8)


@pytest.mark.parametrize("size", ["page_size", "head_dim"])
def test_a_size_of_zero_is_refused(size):
    with pytest.raises(ConfigError, match=f"{size} 0 is no size; allowed: 1 or more"):
        check_tier(Int4, **{size: 0})


def test_a_refused_shape_is_named():
    with pytest.raises(ContractError, match=r"page_size \[64\] x head_dim \[5\]"):
        check_tier(Int4, page_size=64, head_dim=5)


class Beyond(Fifo):
    def targets(self, pages, stages):
        return [len(stages)] * len(pages)


class Short(Fifo):
    def targets(self, pages, stages):
        return super().targets(pages, stages)[1:]


class Wavers(Fifo):
    calls = count()

    def targets(self, pages, stages):
        last = next(self.calls) % 2
        return [len(stages) - 1 if last else page.stage or 0 for page in pages]


class Asleep(Fifo):
    def targets(self, pages, stages):
        return None


class AnswersNumbers(Fifo):
    def targets(self, pages, stages):
        return torch.zeros(len(pages), dtype=torch.long)


class AskedBack(Fifo):
    """Wrong only where queries ask for a page."""

    needs_queries = True

    def targets(self, pages, stages):
        return [0 if page.salience > 0 and len(pages) > 10 else len(stages) - 1 for page in pages]


class Unscaled(Fifo):
    def scaled(self, stages, factor):
        return None


@pytest.mark.parametrize("kind", [Beyond, Short, Wavers, Asleep, AnswersNumbers, AskedBack, Unscaled])
def test_broken_aging_is_caught(kind):
    with pytest.raises(ContractError, match=kind.__name__):
        check_aging(kind)


def test_aging_that_moves_a_page_back_is_caught():
    class Turns(Fifo):
        def targets(self, pages, stages):
            fresh = pages[0].stage is None
            return [len(stages) - 1 if fresh else 0] * len(pages)

    with pytest.raises(ContractError, match="now in stage"):
        check_aging(Turns)


class Marks(Sinks):
    def choose(self, pages):
        pages.taken.fill_(True)
        return pages.taken


class Scores(Sinks):
    def choose(self, pages):
        return super().choose(pages).float()


class NeedsIds(Sinks):
    def choose(self, pages):
        return pages.taken & (pages.tokens is not None) & torch.rand(()).bool()


class Mute(Sinks):
    def choose(self, pages):
        return None


class MarksQueries(Sinks):
    needs_queries = True

    def choose(self, pages):
        if pages.queries is not None:
            pages.queries.zero_()
        return super().choose(pages)


class ScoresQueries(Sinks):
    needs_queries = True

    def choose(self, pages):
        return super().choose(pages) if pages.queries is None else pages.queries.mean(2)


class RowsTogether(Sinks):
    def choose(self, pages):
        size = pages.keys.norm(dim=-1)
        return size >= size.amax((0, 1), keepdim=True)


@pytest.mark.parametrize("kind", [Marks, Scores, NeedsIds, Mute, MarksQueries, ScoresQueries, RowsTogether])
def test_broken_anchors_are_caught(kind):
    with pytest.raises(ContractError, match=kind.__name__):
        check_anchors(kind)


class AllPages(Sigma):
    def choose(self, x, role):
        return (x - x.mean()).abs() > 2 * x.std(unbiased=False)


class Sometimes(Sigma):
    def choose(self, x, role):
        chosen = super().choose(x, role)
        return chosen if chosen.any() else None


class Numbers(Sigma):
    def choose(self, x, role):
        return 3


class AllRows(Sigma):
    def choose(self, x, role):
        mean, sigma = x.mean((1, 2, 3, 4), keepdim=True), x.std((1, 2, 3, 4), unbiased=False, keepdim=True)
        return (x - mean).abs() > 2 * sigma


@pytest.mark.parametrize("kind", [AllPages, AllRows, Sometimes, Numbers])
def test_broken_outliers_are_caught(kind):
    with pytest.raises(ContractError, match=kind.__name__):
        check_outliers(kind)


class Neighbour(CpuBackend):
    def dequantize(self, payload, form):
        return super().dequantize(payload | {"scale": payload["scale"].roll(1, -1)}, form)


class Eight(CpuBackend):
    def to_fp8(self, x, form):
        kept = super().to_fp8(x, form)
        return kept | {"codes": kept["codes"].float().round().to(torch.float8_e4m3fn)}


class Sees(CpuBackend):
    def attend(self, query, segments, dense, sinks=None):
        return super().attend(query, segments, dense, None)


class Overlooks(CpuBackend):
    def attend(self, query, segments, dense, sinks=None):
        return super().attend(query, [replace(segment, outliers={}) for segment in segments], dense, sinks)


@pytest.mark.parametrize("kind", [Neighbour, Eight, Sees, Overlooks])
def test_broken_backends_are_caught(kind):
    with pytest.raises(ContractError, match="backend cpu"):
        check_backend(kind())


def test_options_are_validated():
    class Odd(Int4):
        class Config(Int4.Config):
            depth: int = 0

    assert issubclass(Odd.Config, BaseModel)
    with pytest.raises(ConfigError, match="width"):
        check_tier(Odd, config={"width": 3})
