"""Passkey retrieval (Mohtashami and Jaggi 2023, arXiv:2305.16300): a number in filler, asked for after it was compressed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from argus.errors import ConfigError
from argus.hookspecs import hookimpl
from argus.tasks.base import Row, Run, Task, TaskConfig
from argus.tasks.steps import decode, feed, ids_of, memory

HEAD = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Puzzle:
    """A context of exactly so many tokens, a question, and the answer."""

    context: list[int]
    question: list[int]
    key: str


def puzzle(tokenizer: Any, length: int, seed: int) -> Puzzle:
    """A passkey puzzle whose context has `length` tokens; key and depth vary with `seed`."""
    draw = random.Random(f"{seed} {length}")
    key = str(draw.randint(10000, 99999))
    depth = draw.uniform(0.05, 0.95)
    head, unit, needle, question = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (HEAD, FILLER, NEEDLE.format(key=key), QUESTION)
    )
    room = length - len(head) - len(needle)
    if room < 0:
        raise ConfigError(f"task.lengths: {length} tokens have no room for the key; allowed: {length - room} or more")
    before = int(room * depth) // len(unit) * len(unit)
    filler = unit * (room // len(unit) + 1)
    return Puzzle(head + filler[:before] + needle + filler[: room - before], question, key)


def ask(run: Run, held: Any, task: Puzzle) -> bool:
    """Feed the question over what was kept of the context, and look for the key in the greedy answer."""
    logits = feed(run, held, ids_of(run, task.question))
    return task.key in run.tokenizer.decode(decode(run, held, logits, len(task.key) + 3))


class PasskeyConfig(TaskConfig):
    """Options of passkey: context lengths in tokens, and keys a length."""

    lengths: Annotated[tuple[Annotated[int, Field(ge=64)], ...], Field(min_length=1)] = (512, 1024, 2048)
    samples: PositiveInt = 4


class Passkey(Task):
    """Accuracy of the greedy answer, for every cache on the same puzzles."""

    Config = PasskeyConfig

    def run(self, run: Run) -> Iterator[Row]:
        for length in self.config.lengths:
            right = dict.fromkeys(run.caches, 0)
            sizes: dict[str, Row] = {}
            for sample in range(self.config.samples):
                task = puzzle(run.tokenizer, length, run.seed + sample)
                for name, kind in run.caches.items():
                    run.tell(f"passkey: {length} tokens, key {sample + 1} of {self.config.samples}, {name}")
                    held = kind.make(run)
                    feed(run, held, ids_of(run, task.context))
                    sizes[name] = memory(kind.ledger(held))
                    right[name] += ask(run, held, task)
            for name in run.caches:
                accuracy = right[name] / self.config.samples
                counted = {"accuracy": accuracy, "samples": self.config.samples}
                yield {"task": "passkey", "cache": name, "context": length, **counted, **sizes[name]}


@hookimpl
def argus_tasks() -> dict[str, type[Task]]:
    return {"passkey": Passkey}
