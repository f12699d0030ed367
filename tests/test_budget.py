"""A byte budget is met by what is measured, for every policy that can scale its stages, or said to be out of reach."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from argus import ArgusCache, unpatch
from argus.budget import Shape, meet
from argus.build import build
from argus.config import Budget, CacheConfig, compose, validate
from argus.errors import ConfigError
from argus.hookspecs import hookimpl
from argus.policies.aging import Fifo, Log, Uniform
from argus.policies.base import Aging, PageFacts, StageFacts, scale
from tests.models import SMALL, tiny

CONTEXT = 480
LADDER = [
    *("tiers.page_size=16", "tiers.window=16", "tiers.order=[int4,int2,jl]", "tiers.allow_growth=true"),
    *("tiers.stages.int4.capacity=96", "tiers.stages.int2.capacity=96", f"budget.context={CONTEXT}"),
]
SHAPE = Shape(reaches=(None,) * 3, heads=2, head_dim=64, dtype=torch.float32, device=torch.device("cpu"))


def plan_of(*words: str, extra=()):
    data = compose([*LADDER, *words])
    config = validate(CacheConfig, {name: data[name] for name in CacheConfig.model_fields})
    return meet(build(config, SHAPE.head_dim, extra=extra), config.budget, SHAPE)


class Reverse(Aging):
    """The oldest pages in the first stages, by capacity: a policy that knows nothing of budgets."""

    def targets(self, pages, stages):
        places = [place for place, stage in enumerate(stages[:-1]) for _ in range(stage.capacity)]
        wanted = [places[i] if i < len(places) else len(stages) - 1 for i in range(len(pages))]
        return [max(target, page.stage or 0) for target, page in zip(wanted, pages, strict=True)]


class Plugin:
    @hookimpl
    def argus_aging(self):
        return {"reverse": Reverse}


@pytest.mark.parametrize("policy", ["fifo", "log", "uniform", "salience", "reverse"])
def test_every_policy_meets_the_budget_to_a_page(policy):
    """By as much as one page weighs between the first and the last stage, or for log a page of each stage."""
    words = ["aging=fifo", "aging.policy=reverse"] if policy == "reverse" else [f"aging={policy}"]
    most = (4.5 - 1.25 + 0.5) * 16 / CONTEXT * (2 if policy == "log" else 1)
    firsts = []
    for bits in (4.0, 4.5, 5.0):
        match = plan_of(*words, f"budget.bits={bits}", extra=[Plugin()]).match
        assert match.reached <= bits < match.next
        assert match.next - match.reached < 2 * most
        assert sum(match.pages.values()) == (CONTEXT - 16) // 16
        firsts.append(match.pages["int4"])
    assert firsts == sorted(set(firsts))


def test_policies_of_one_budget_take_the_same_bytes():
    found = {policy: plan_of(f"aging={policy}", "budget.bits=4.4").match.reached for policy in ("fifo", "log", "uniform")}
    free = {policy: plan_of(f"aging={policy}", "budget.bits=null").match for policy in found}
    assert set(free.values()) == {None}
    assert max(found.values()) - min(found.values()) < 0.15
    assert all(4.25 < bits <= 4.4 for bits in found.values())


@pytest.mark.parametrize("policy", ["fifo", "log", "uniform", "salience"])
@pytest.mark.parametrize("anchors", ["none", "default", "salience"])
def test_a_run_takes_what_the_budget_says(policy, anchors):
    """The cache of a model at that context, measured, takes exactly the bits that were reached."""
    model = tiny("llama")
    groups = [f"tiers.stages.{stage}.group_size=8" for stage in ("int4", "int2")]
    bits = {"none": 5.5, "default": 7.0, "salience": 7.0}[anchors]
    cache = ArgusCache(model, [*LADDER, *groups, f"aging={policy}", f"anchors={anchors}", f"budget.bits={bits}"])
    with torch.no_grad():
        model(torch.randint(2, SMALL["vocab_size"], (1, CONTEXT)), past_key_values=cache)
    assert cache.ledger().bits_per_value == pytest.approx(cache.plan.match.reached, abs=1e-12)
    held = {s.facts.name: len(pool) for s, pool in zip(cache.plan.stages, cache.layers[0].engine.pools, strict=True)}
    assert cache.plan.match.pages == held
    unpatch(model)


@pytest.mark.parametrize(("name", "words"), [("llama", ["tiers.slack=64"]), ("mistral", []), ("gemma3", ["tiers.slack=16"])])
def test_a_budget_counts_slack_and_what_layers_forget(name, words):
    """However the tokens come, a step at a time too; layers of a sliding window hold fewer."""
    model = tiny(name)
    groups = [f"tiers.stages.{stage}.group_size=8" for stage in ("int4", "int2")]
    options = [*LADDER, *groups, "anchors=none", *words]
    with pytest.raises(ConfigError) as error:
        ArgusCache(model, [*options, "budget.bits=1"])
    low, high = (float(word) for word in str(error.value).rpartition("allowed: ")[2].split(" to "))
    asked = (low + high) / 2
    ids = torch.randint(2, SMALL["vocab_size"], (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    for first in (CONTEXT, CONTEXT - 90):
        cache = ArgusCache(model, [*options, f"budget.bits={asked}"])
        with torch.no_grad():
            for part in (ids[:, :first], *ids[:, first:].split(1, 1)):
                if part.shape[1]:
                    model(part, past_key_values=cache)
        index = cache.ledger().parts.get("index", 0)
        assert (cache.ledger().bytes - index) * 8 / cache.ledger().values <= asked + 0.01
    unpatch(model)


def test_what_was_solved_repeats_it():
    """Capacities or options that the match names, without a budget, give the same pages."""
    fifo = plan_of("budget.bits=4.5").match
    sizes = [f"tiers.stages.{name}.capacity={tokens}" for name, tokens in fifo.capacities.items() if tokens]
    again = plan_of("budget.bits=null", *sizes)
    assert [stage.facts.capacity for stage in again.stages] == [fifo.pages["int4"], fifo.pages["int2"], None]
    log = plan_of("aging=log", "budget.bits=4.5").match
    policy = Log(Log.Config(**log.aging))
    targets = policy.targets([PageFacts(28 - i, None) for i in range(29)], [StageFacts(name, None) for name in log.pages])
    assert [targets.count(place) for place in range(3)] == list(log.pages.values())


def test_a_budget_that_is_out_of_reach_names_the_range():
    for bits in (1.0, 9.0):
        with pytest.raises(ConfigError, match=r"out of this ladder's reach at 480 tokens; allowed: [\d.]+ to [\d.]+$") as error:
            plan_of(f"budget.bits={bits}")
        low, high = str(error.value).rpartition("allowed: ")[2].split(" to ")
        for allowed in (low, high):
            assert plan_of(f"budget.bits={allowed}").match.reached <= float(allowed)


@pytest.mark.parametrize("policy", ["fifo", "log", "uniform"])
def test_a_ladder_that_grows_meets_its_budget(policy):
    """It takes most where all is in its last stage."""
    grows = [f"aging={policy}", "tiers.order=[int2,int4]"]
    for bits in (5.0, 6.0):
        match = plan_of(*grows, f"budget.bits={bits}").match
        assert match.reached <= bits < match.next
        assert match.next - match.reached < 2 * (4.5 - 2.5 + 0.5) * 16 / CONTEXT
    with pytest.raises(ConfigError, match=r"allowed: [\d.]+ to [\d.]+$") as error:
        plan_of(*grows, "budget.bits=1")
    low, high = (float(word) for word in str(error.value).rpartition("allowed: ")[2].split(" to "))
    assert low < 5.0 < 6.0 < high


@pytest.mark.parametrize("words", [["tiers.order=[int4]"], ["tiers.stages.int4.capacity=null"], ["budget.context=20"]])
def test_a_ladder_with_nothing_to_scale_is_refused(words):
    with pytest.raises(ConfigError, match=r"whatever its stages hold; allowed: several stages"):
        plan_of("budget.bits=4", *words)


def test_a_budget_is_more_than_nothing():
    with pytest.raises(ConfigError, match=r"budget.bits: Input should be greater than 0"):
        plan_of("budget.bits=0")
    assert Budget().bits is None


def test_scaling_moves_where_stages_end():
    stages = [StageFacts("a", 3), StageFacts("b", 5), StageFacts("c", None)]
    assert scale(stages, 1) == stages
    assert [stage.capacity for stage in scale(stages, 0)] == [0, 0, None]
    sizes = [[stage.capacity for stage in scale(stages, step / 100)[:2]] for step in range(400)]
    for (a, b), (c, d) in pairwise(sizes):
        assert 0 <= c - a <= 1
        assert 0 <= c + d - a - b <= 1
    assert Fifo(Fifo.Config()).scaled(stages, 2)[1] == [StageFacts("a", 6), StageFacts("b", 10), StageFacts("c", None)]


def test_uniform_spreads_its_share_over_all_ages():
    stages = [StageFacts(name, None) for name in "abc"]
    policy = Uniform(Uniform.Config(share=0.25))
    held: list[int] = []
    for born in (7, 1, 32):
        before = [*held, *[None] * born]
        held = policy.targets([PageFacts(len(before) - 1 - i, stage) for i, stage in enumerate(before)], stages)
    assert held == ([2, 2, 2, 0] * 10)
    even, _ = policy.scaled(stages, 1.0)
    assert Counter(even.targets([PageFacts(9 - i, None) for i in range(10)], stages)) == {0: 5, 2: 5}
