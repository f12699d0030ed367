"""Aging policies: by capacity (fifo), by geometric growth (log), straight to the last stage (uniform)."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Annotated

from pydantic import Field, PositiveFloat

from argus.hookspecs import hookimpl
from argus.policies.base import Aging, PageFacts, PolicyConfig, StageFacts


def fill(pages: Sequence[PageFacts], capacities: Sequence[int | None]) -> list[int]:
    """Fill stages with pages from the newest on, each to its capacity; what is over goes to the last stage."""
    stage_of_age: list[int] = []
    for stage, capacity in enumerate(capacities[:-1]):
        stage_of_age += [stage] * (len(pages) if capacity is None else capacity)
    last = len(capacities) - 1
    targets = []
    for page in pages:
        target = stage_of_age[page.age] if page.age < len(stage_of_age) else last
        targets.append(target if page.stage is None else max(target, page.stage))
    return targets


class Fifo(Aging):
    """First in, first out: each stage holds its ``capacity`` and passes its oldest page on."""

    def targets(self, pages: Sequence[PageFacts], stages: Sequence[StageFacts]) -> list[int]:
        return fill(pages, [stage.capacity for stage in stages])


class LogConfig(PolicyConfig):
    """Options of log: pages in the first stage (rounded, at least one), and how many times more each next stage holds."""

    first: PositiveFloat = 1.0
    ratio: PositiveFloat = 2.0


class Log(Aging):
    """Stage sizes grow geometrically, so that a page's precision falls with the logarithm of its age."""

    Config = LogConfig

    def targets(self, pages: Sequence[PageFacts], stages: Sequence[StageFacts]) -> list[int]:
        sizes: list[int | None] = [max(1, round(self.config.first * self.config.ratio**i)) for i in range(len(stages))]
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
        chosen = [0 if floor((i + 1) * share) > floor(i * share) else last for i in range(len(pages))]
        return [max(target, page.stage or 0) for target, page in zip(chosen, pages, strict=True)]

    def scaled(self, stages: Sequence[StageFacts], factor: float) -> tuple[Aging, list[StageFacts]]:
        """`factor` pages in the first stage for each in the last: there is no size to scale."""
        return Uniform(UniformConfig(share=factor / (1 + factor))), list(stages)


@hookimpl
def argus_aging() -> dict[str, type[Aging]]:
    return {"fifo": Fifo, "log": Log, "uniform": Uniform}
