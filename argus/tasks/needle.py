"""A needle in real prose: one sentence at a grid of depths and lengths, and a picture of where each cache finds it.

The test is known from Kamradt 2023 ("Needle in a Haystack"); the prose is the language reference that every Python carries.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from argus.hookspecs import hookimpl
from argus.pictures import draw_heat
from argus.tasks.base import Row, Run, Task
from argus.tasks.puzzles import SLACK, Once, Puzzle, PuzzleConfig, encode, hide, number, quizzes, room, words
from argus.tasks.steps import passage

NEEDLE = "\n\nThe secret code of {name} is {code}. Remember it.\n\n"
QUESTION = "\n\nWhat is the secret code of {name}? The secret code of {name} is"

Depth = Annotated[float, Field(ge=0, le=1)]


class NeedleConfig(PuzzleConfig):
    """Options of needle, beside lengths and batch: depths (0: the beginning, 1: the end), and needles a cell of the grid."""

    depths: Annotated[tuple[Depth, ...], *Once] = (0.1, 0.3, 0.5, 0.7, 0.9)
    samples: Annotated[int, Field(ge=1)] = 2


def puzzle(tokenizer: Any, length: int, depth: float, seed: int) -> Puzzle:
    """A context of `length` tokens of prose with the needle at the end of the sentence or line nearest to `depth`."""
    draw = random.Random(f"needle {seed} {length} {depth}")
    name, code = draw.choice(words()), number(draw)
    needle = encode(tokenizer, NEEDLE.format(name=name, code=code))
    filler = passage(tokenizer, room(length, [needle]), draw)
    ends = [place for place, token in enumerate(filler, 1) if tokenizer.decode([token]).rstrip(" ").endswith((".", "\n"))]
    cut = min(ends or range(len(filler) + 1), key=lambda place: abs(place - depth * len(filler)))
    return Puzzle(hide(filler, [needle], [cut]), encode(tokenizer, QUESTION.format(name=name)), (code,), len(code) + SLACK)


class Needle(Task):
    """Accuracy of the greedy answer, a row a cache, length and depth."""

    Config = NeedleConfig

    def run(self, run: Run) -> Iterator[Row]:
        config: NeedleConfig = self.config
        seeds = range(run.seed, run.seed + config.samples)
        asked = [
            (
                {"task": "needle", "context": length, "depth": depth},
                [puzzle(run.tokenizer, length, depth, seed) for seed in seeds],
            )
            for length in config.lengths
            for depth in config.depths
        ]
        rows: list[Row] = []
        for row in quizzes(run, asked, config.batch):
            rows.append(row)
            yield row
        draw_heat(rows, run.folder / "needle.png")


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"needle": Needle}
