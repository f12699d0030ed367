"""Puzzles: a context that is compressed, a question over what was kept of it, and the strings that the answer should hold."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveInt

from argus.errors import ConfigError
from argus.tasks.base import CacheKind, Row, Run, TaskConfig
from argus.tasks.steps import decode, forward, ids_of, mean_memory, memory, prose

SLACK = 3
"""Tokens that an answer may have beside the strings that are expected."""


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """`values` as they are; puzzles asked twice would count as two samples.

    Raises
    ------
    ValueError
        If one is there twice.
    """
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there twice; allowed: each once")
    return values


Once = (Field(min_length=1), AfterValidator(distinct))
"""What holds of several values of one option: there is one at least, and none twice."""

Lengths = Annotated[tuple[Annotated[int, Field(ge=64)], ...], *Once]


class PuzzleConfig(TaskConfig):
    """Options of a task of puzzles: context lengths in tokens, puzzles a length, and puzzles at once.

    Puzzles at once are rows of one batch: faster on a GPU. Their contexts have one length, so that nothing is padded.
    """

    lengths: Lengths = (512, 1024, 2048)
    samples: PositiveInt = 4
    batch: PositiveInt = 1


@dataclass(frozen=True)
class Puzzle:
    """A context of exactly so many tokens, a question, the strings to find, and the tokens that the answer may have."""

    context: list[int]
    question: list[int]
    answers: tuple[str, ...]
    tokens: int

    def score(self, text: str) -> float:
        """Share of the strings that stand in `text`."""
        return sum(answer in text for answer in self.answers) / len(self.answers)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, nothing added."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def room(length: int, parts: Iterable[Sequence[int]]) -> int:
    """Tokens that `parts` leave free of `length`.

    Raises
    ------
    ConfigError
        If they do not fit.
    """
    needed = sum(map(len, parts))
    if length < needed:
        raise ConfigError(f"task.lengths: {length} tokens have no room for what is asked for; allowed: {needed} or more")
    return length - needed


def hide(filler: Sequence[int], needles: Sequence[Sequence[int]], cuts: Sequence[int]) -> list[int]:
    """`filler` with each needle before the token at its cut; `cuts` do not fall."""
    out: list[int] = []
    for needle, begin, end in zip([*needles, []], [0, *cuts], [*cuts, len(filler)], strict=True):
        out += [*filler[begin:end], *needle]
    return out


def hide_evenly(
    head: list[int], unit: list[int], needles: Sequence[list[int]], depths: Sequence[float], length: int
) -> list[int]:
    """`length` tokens: `head`, then `unit` again and again with a needle at each depth (0-1, sorted), between two units."""
    free = room(length, [head, *needles])
    filler = (unit * (free // len(unit) + 1))[:free]
    return head + hide(filler, needles, [int(free * depth) // len(unit) * len(unit) for depth in depths])


@cache
def words() -> tuple[str, ...]:
    """Common words of five to nine letters, of the prose that every Python carries."""
    found = Counter(re.findall(r"(?<![\w.])[a-z]{5,9}(?![\w.(])", prose()))
    return tuple(sorted(word for word, count in found.items() if count >= 5))


def number(draw: random.Random) -> str:
    """Five digits."""
    return str(draw.randint(10000, 99999))


def replies(run: Run, kind: CacheKind, group: Sequence[Puzzle]) -> tuple[list[str], Row]:
    """Greedy answers to puzzles of one shape, as one batch, and the memory of a row's cache before the question is asked."""
    held = kind.make(run)
    forward(run, held, ids_of(run, *(puzzle.context for puzzle in group)))
    size = memory(kind.ledger(held), len(group))
    logits = forward(run, held, ids_of(run, *(puzzle.question for puzzle in group)))[:, -1]
    out = decode(run, held, logits, max(puzzle.tokens for puzzle in group))
    return [run.tokenizer.decode(row[: puzzle.tokens]) for row, puzzle in zip(out, group, strict=True)], size


def batches(puzzles: Iterable[Puzzle], size: int) -> Iterator[list[Puzzle]]:
    """Groups of at most `size` puzzles whose contexts and questions have one length each."""

    def shape(puzzle: Puzzle) -> tuple[int, int]:
        return len(puzzle.context), len(puzzle.question)

    for _, group in groupby(sorted(puzzles, key=shape), shape):
        alike = list(group)
        for begin in range(0, len(alike), size):
            yield alike[begin : begin + size]


def quiz(run: Run, label: Row, puzzles: Sequence[Puzzle], batch: int) -> Iterator[Row]:
    """One row a cache: the mean score of its greedy answers to the same puzzles, and its memory.

    Parameters
    ----------
    run : Run
    label : Row
        What every row says: ``task``, ``context``, and what tells these puzzles from others.
    puzzles : sequence of Puzzle
    batch : int
        Puzzles at once, at most.
    """
    scores: dict[str, list[float]] = {name: [] for name in run.caches}
    sizes: dict[str, list[Row]] = {name: [] for name in run.caches}
    groups = list(batches(puzzles, batch))
    words = "".join(f"{name} {value}, " for name, value in label.items() if name not in ("task", "context"))
    for group in groups:
        for name, kind in run.caches.items():
            done = f"{len(scores[name]) + len(group)} of {len(puzzles)}"
            run.tell(f"{label['task']}: {label['context']} tokens, {words}sample {done}, {name}")
            texts, size = replies(run, kind, group)
            sizes[name].append(size)
            scores[name] += [puzzle.score(text) for puzzle, text in zip(group, texts, strict=True)]
    for name, found in scores.items():
        size = mean_memory(sizes[name], [len(group) for group in groups])
        yield {**label, "cache": name, "accuracy": sum(found) / len(found), "samples": len(found), **size}


def quizzes(run: Run, asked: Sequence[tuple[Row, Sequence[Puzzle]]], batch: int) -> Iterator[Row]:
    """A quiz for each label and its puzzles: all are made before any is asked, so that none without room ends a long run."""
    for label, puzzles in asked:
        yield from quiz(run, label, puzzles, batch)


def quiz_kinds(run: Run, task: str, config: Any, make: Callable[[str, int, int], Puzzle]) -> Iterator[Row]:
    """A quiz for each of ``config.kinds`` and lengths, of puzzles that ``make(kind, length, seed)`` makes."""
    seeds = range(run.seed, run.seed + config.samples)
    yield from quizzes(
        run,
        [
            ({"task": task, "kind": kind, "context": length}, [make(kind, length, seed) for seed in seeds])
            for kind in config.kinds
            for length in config.lengths
        ],
        config.batch,
    )
