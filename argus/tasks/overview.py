"""The main job: every cache on passkeys and prose, then one row a stage of the first with a ladder, and two pictures of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pydantic import Field

from argus.caches import dense_ledger
from argus.hookspecs import hookimpl
from argus.pictures import draw_bytes, draw_strip
from argus.tasks.base import Row, Run, Task, TaskConfig
from argus.tasks.fidelity import Fidelity, FidelityConfig, ladders, stage_rows
from argus.tasks.passkey import Passkey, PasskeyConfig
from argus.tasks.perplexity import Perplexity, PerplexityConfig


class OverviewConfig(TaskConfig):
    """Options of overview: those of its parts."""

    passkey: PasskeyConfig = Field(default_factory=PasskeyConfig)
    perplexity: PerplexityConfig = Field(default_factory=PerplexityConfig)
    fidelity: FidelityConfig = Field(default_factory=FidelityConfig)


class Overview(Task):
    """Passkey, perplexity and fidelity in one run."""

    Config = OverviewConfig

    def run(self, run: Run) -> Iterator[Row]:
        yield from Perplexity(self.config.perplexity).run(run)
        for name, plan in islice(ladders(run), 1):
            held, source = Fidelity(self.config.fidelity).caches(run, name, plan)
            yield from stage_rows(name, held, source)
            draw_strip(held, run.folder / "pages.png")
            draw_bytes(held, dense_ledger(source).bytes, run.folder / "bytes.png")
            del held, source
        yield from Passkey(self.config.passkey).run(run)


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"overview": Overview}
