"""Retrieval beyond one key, in the manner of RULER (Hsieh et al. 2024, arXiv:2404.06654), on text made here."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from argus.hookspecs import hookimpl
from argus.tasks.base import Row, Run, Task
from argus.tasks.passkey import FILLER, HEAD
from argus.tasks.puzzles import SLACK, Once, Puzzle, PuzzleConfig, encode, hide_evenly, number, quiz_kinds, words

Kind = Literal["multikey", "multivalue", "tracking"]
Few = Annotated[int, Field(ge=1, le=8)]


class RetrievalConfig(PuzzleConfig):
    """Options of retrieval, beside lengths, samples and batch.

    ``kinds``: which puzzles. ``keys``: codes in a multikey context, one of them asked for. ``values``: codes of the one name
    in a multivalue context, all of them asked for. ``chains`` and ``hops``: variables that get a number, and how often each
    is handed on to a new variable, in a tracking context; asked for are the variables that hold one of the numbers. The
    defaults are small enough for a model of 135M parameters; RULER's usual ones are ``keys=4 values=4 chains=1 hops=4``.
    """

    kinds: Annotated[tuple[Kind, ...], *Once] = ("multikey", "multivalue", "tracking")
    keys: Few = 2
    values: Few = 3
    chains: Few = 1
    hops: Few = 2


@dataclass(frozen=True)
class Story:
    """Sentences to hide in this order, the question, the strings to find, and a long answer that holds them all."""

    head: str
    needles: list[str]
    question: str
    answers: list[str]
    longest: str


def multikey(config: RetrievalConfig, draw: random.Random) -> Story:
    """Several names, each with a code; one is asked for, the others distract."""
    names = draw.sample(words(), config.keys)
    codes = [number(draw) for _ in names]
    needles = [f"The code of {name} is {code}. Remember it. " for name, code in zip(names, codes, strict=True)]
    place = draw.randrange(config.keys)
    question = f"What is the code of {names[place]}? The code of {names[place]} is"
    return Story(HEAD, needles, question, [codes[place]], f" {codes[place]}")


def multivalue(config: RetrievalConfig, draw: random.Random) -> Story:
    """One name with several codes, all of them asked for."""
    name = draw.choice(words())
    codes = [number(draw) for _ in range(config.values)]
    needles = [f"\n\nOne secret code of {name} is {code}.\n\n" for code in codes]
    question = f"\n\nWhat are all the secret codes of {name}? The secret codes of {name} are"
    return Story(HEAD, needles, question, codes, "".join(f" {code}," for code in codes))


def tracking(config: RetrievalConfig, draw: random.Random) -> Story:
    """Chains of variables, each assigned the one before; asked for are all that hold the number of one chain.

    The first variable of the chain is given. The answer may be long enough to name every variable.
    """
    size = config.hops + 1
    names = [name.upper() for name in draw.sample([word for word in words() if len(word) == 5], config.chains * size)]
    chains = [names[begin : begin + size] for begin in range(0, len(names), size)]
    codes = [number(draw) for _ in chains]
    order = [place for place in range(config.chains) for _ in range(size)]
    draw.shuffle(order)
    said = [0] * config.chains
    needles = []
    for place in order:
        chain, step = chains[place], said[place]
        needles.append(f"VAR {chain[step]} = {f'VAR {chain[step - 1]}' if step else codes[place]}. ")
        said[place] += 1
    asked = draw.randrange(config.chains)
    question = f"Which variables have the value {codes[asked]}? They are VAR {chains[asked][0]}, VAR"
    longest = "".join(f" VAR {name}," for name in names)
    return Story("Track the chain of variables. ", needles, question, chains[asked][1:], longest)


KINDS: dict[str, Callable[[RetrievalConfig, random.Random], Story]] = {
    "multikey": multikey,
    "multivalue": multivalue,
    "tracking": tracking,
}


def puzzle(tokenizer: Any, config: RetrievalConfig, kind: str, length: int, seed: int) -> Puzzle:
    """A puzzle of one kind whose context has `length` tokens; its text and where it is hidden vary with `seed`."""
    draw = random.Random(f"{kind} {seed} {length}")
    story = KINDS[kind](config, draw)
    needles = [encode(tokenizer, needle) for needle in story.needles]
    depths = sorted(draw.uniform(0.02, 0.98) for _ in needles)
    context = hide_evenly(encode(tokenizer, story.head), encode(tokenizer, FILLER), needles, depths, length)
    tokens = len(encode(tokenizer, story.longest)) + SLACK
    return Puzzle(context, encode(tokenizer, story.question), tuple(story.answers), tokens)


class Retrieval(Task):
    """Share of the expected strings in the greedy answer, for every cache on the same puzzles."""

    Config = RetrievalConfig

    def run(self, run: Run) -> Iterator[Row]:
        yield from quiz_kinds(run, "retrieval", self.config, partial(puzzle, run.tokenizer, self.config))


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"retrieval": Retrieval}
