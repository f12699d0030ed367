"""Recall: copying a sequence that stands in the context, and associative recall of one of many pairs.

The two synthetic tasks on which attention is measured against fixed states (associative recall: Ba et al. 2016,
arXiv:1610.06258; copying: Jelassi et al. 2024, arXiv:2402.01032), on random words that no text foretells.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from argus.hookspecs import hookimpl
from argus.tasks.base import Row, Run, Task
from argus.tasks.passkey import FILLER
from argus.tasks.puzzles import SLACK, Once, Puzzle, PuzzleConfig, encode, hide_evenly, quiz_kinds, words

Kind = Literal["copy", "pairs"]
Some = Annotated[int, Field(ge=1, le=64)]


class RecallConfig(PuzzleConfig):
    """Options of recall, beside lengths, samples and batch.

    ``kinds``: which puzzles. ``given`` and ``copied``: random words of the sequence to copy that the question repeats, and
    that the answer should continue with. ``pairs``: pairs of words, of one of which the second is asked for.
    """

    kinds: Annotated[tuple[Kind, ...], *Once] = ("copy", "pairs")
    given: Some = 4
    copied: Some = 8
    pairs: Some = 8


@dataclass(frozen=True)
class Block:
    """A text to hide, the question, and the strings to find."""

    text: str
    question: str
    answers: list[str]


def copy(config: RecallConfig, draw: random.Random) -> Block:
    """A sequence of random words; its first ones are given again."""
    sequence = draw.sample(words(), config.given + config.copied)
    said = "Remember these words: "
    return Block(f"{said}{' '.join(sequence)}. ", said + " ".join(sequence[: config.given]), sequence[config.given :])


def pairs(config: RecallConfig, draw: random.Random) -> Block:
    """Pairs of random words, line by line; the first word of one is given again."""
    names = draw.sample(words(), 2 * config.pairs)
    keys, values = names[: config.pairs], names[config.pairs :]
    lines = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
    place = draw.randrange(config.pairs)
    return Block(f"\n{lines}\n", f"\n{keys[place]}:", [values[place]])


KINDS: dict[str, Callable[[RecallConfig, random.Random], Block]] = {"copy": copy, "pairs": pairs}


def puzzle(tokenizer: Any, config: RecallConfig, kind: str, length: int, seed: int) -> Puzzle:
    """A puzzle of one kind whose context has `length` tokens: filler and, at a depth that varies with `seed`, the block."""
    draw = random.Random(f"{kind} {seed} {length}")
    block = KINDS[kind](config, draw)
    depth = draw.uniform(0.05, 0.95)
    context = hide_evenly([], encode(tokenizer, FILLER), [encode(tokenizer, block.text)], [depth], length)
    tokens = len(encode(tokenizer, " " + " ".join(block.answers))) + SLACK
    return Puzzle(context, encode(tokenizer, block.question), tuple(block.answers), tokens)


class Recall(Task):
    """Share of the expected strings in the greedy answer, for every cache on the same puzzles."""

    Config = RecallConfig

    def run(self, run: Run) -> Iterator[Row]:
        yield from quiz_kinds(run, "recall", self.config, partial(puzzle, run.tokenizer, self.config))


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"recall": Recall}
