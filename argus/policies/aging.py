"""Aging policies: by capacity (fifo), by what queries ask for, by geometric growth, straight to the last stage."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Annotated

from pydantic import Field, FiniteFloat

from argus.hookspecs import hookimpl
from argus.policies.base import Aging, PageFacts, PolicyConfig, StageFacts


def fill(pages: Sequence[PageFacts], capacities: Sequence[int | None]) -> list[int]:
    """Fill stages with pages from the newest on, each to its capacity; what is over goes to the last stage."""
    ends = list(accumulate(len(pages) if capacity is None else capacity for capacity in capacities[:-1]))
    return [max(bisect_right(ends, page.age), page.stage or 0) for page in pages]


class Fifo(Aging):
    """First in, first out: each stage holds its ``capacity`` and passes its oldest page on."""

    def targets(self, pages: Sequence[PageFacts], stages: Sequence[StageFacts]) -> list[int]:
        return fill(pages, [stage.capacity for stage in stages])


class Salience(Aging):
    """The pages that queries asked for most first, each stage to its ``capacity``, whatever their age.

    What counts is what the newest queries asked for when the page left the window (as SnapKV chooses tokens,
    arXiv:2404.14469), for a long prompt the prompt's last tokens. A page never comes back from a later stage.
    """

    needs_queries = True

    def targets(self, pages: Sequence[PageFacts], stages: Sequence[StageFacts]) -> list[int]:
        order = sorted(range(len(pages)), key=lambda place: (-pages[place].salience, pages[place].age))
        ranked = fill([replace(pages[place], age=rank) for rank, place in enumerate(order)], [s.capacity for s in stages])
        return [target for _, target in sorted(zip(order, ranked, strict=True))]


class LogConfig(PolicyConfig):
    """Options of log: pages in the first stage (rounded, at least one), and how many times more each next stage holds."""

    first: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    ratio: Annotated[FiniteFloat, Field(gt=0)] = 2.0


class Log(Aging):
    """Stage sizes grow geometrically, so that a page's precision falls with the logarithm of its age."""

    Config = LogConfig

    def targets(self, pages: Sequence[PageFacts], stages: Sequence[StageFacts]) -> list[int]:
        sizes: list[int | None] = []
        size = self.config.first
        for _ in stages:
            sizes.append(max(1, round(min(size, len(pages)))))
            size *= self.config.ratio
        return fill(pages, sizes)

    def scaled(self, stages: Sequence[StageFacts], factor: float) -> tuple[Aging, list[StageFacts]]:
        return Log(self.config.model_copy(update={"first": self.config.first * factor})), list(stages)


class UniformConfig(PolicyConfig):
    """Options of uniform: the share of the pages that goes to the first stage, evenly over all ages."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.0


class Uniform(Aging):
    """Whatever its age, a page goes straight to the last stage, or a share of them to the first: age decides nothing.

    With a share it is what an aging policy of the same bytes is to be compared with.
    """

    Config = UniformConfig

    def targets(self, pages: Sequence[PageFacts], stages: Sequence[StageFacts]) -> list[int]:
        share, last = self.config.share, len(stages) - 1
        targets: list[int] = []
        first = 0
        for number, page in enumerate(pages, 1):
            new = 0 if first + 1 <= number * share else last
            targets.append(new if page.stage is None else page.stage)
            first += targets[-1] == 0
        return targets

    def scaled(self, stages: Sequence[StageFacts], factor: float) -> tuple[Aging, list[StageFacts]]:
        """`factor` pages in the first stage for each in the last: there is no size to scale."""
        return Uniform(UniformConfig(share=factor / (1 + factor))), list(stages)


@hookimpl
def argus_aging() -> dict[str, type[Aging]]:
    return {"fifo": Fifo, "salience": Salience, "log": Log, "uniform": Uniform}
