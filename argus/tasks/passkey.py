"""Passkey retrieval (Mohtashami and Jaggi 2023, arXiv:2305.16300): a number in filler, asked for after it was compressed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from argus.hookspecs import hookimpl
from argus.tasks.base import Row, Run, Task
from argus.tasks.puzzles import SLACK, Puzzle, PuzzleConfig, encode, hide_evenly, number, quizzes

HEAD = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is"


def puzzle(tokenizer: Any, length: int, seed: int) -> Puzzle:
    """A passkey puzzle whose context has `length` tokens; key and depth vary with `seed`."""
    draw = random.Random(f"{seed} {length}")
    key = number(draw)
    depth = draw.uniform(0.05, 0.95)
    head, unit, needle, question = (encode(tokenizer, text) for text in (HEAD, FILLER, NEEDLE.format(key=key), QUESTION))
    return Puzzle(hide_evenly(head, unit, [needle], [depth], length), question, (key,), len(key) + SLACK)


class PasskeyConfig(PuzzleConfig):
    """Options of passkey: context lengths in tokens, keys a length, and keys at once."""


class Passkey(Task):
    """Accuracy of the greedy answer, for every cache on the same puzzles."""

    Config = PasskeyConfig

    def run(self, run: Run) -> Iterator[Row]:
        seeds = range(run.seed, run.seed + self.config.samples)
        asked = [
            ({"task": "passkey", "context": length}, [puzzle(run.tokenizer, length, seed) for seed in seeds])
            for length in self.config.lengths
        ]
        yield from quizzes(run, asked, self.config.batch)


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"passkey": Passkey}
