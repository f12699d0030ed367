"""Aging policies: by capacity (fifo), by geometric growth (log), straight to the last stage (uniform)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import PositiveFloat, PositiveInt

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
    """Options of log: pages in the first stage, and how many times more each next stage holds."""

    first: PositiveInt = 1
    ratio: PositiveFloat = 2.0


class Log(Aging):
    """Stage sizes grow geometrically, so that a page's precision falls with the logarithm of its age."""

    Config = LogConfig

    def targets(self, pages: Sequence[PageFacts], stages: Sequence[StageFacts]) -> list[int]:
        sizes: list[int | None] = [max(1, round(self.config.first * self.config.ratio**i)) for i in range(len(stages))]
        return fill(pages, sizes)


class Uniform(Aging):
    """Every page straight to the last stage."""

    def targets(self, pages: Sequence[PageFacts], stages: Sequence[StageFacts]) -> list[int]:
        return [len(stages) - 1] * len(pages)


@hookimpl
def argus_aging() -> dict[str, type[Aging]]:
    return {"fifo": Fifo, "log": Log, "uniform": Uniform}
