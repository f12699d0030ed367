"""Associative recall (Arora et al. 2023, arXiv:2312.04927) as token ids: pairs in noise, some asked for at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LENGTHS = (64, 256, 512, 1024, 2048)
NOISE, KEYS, VALUES = 128, 256, 128
"""Token ids: noise first, then keys, then values."""
VOCABULARY = NOISE + KEYS + VALUES
SPACING = 16
"""Tokens a pair in a test: a sequence of 2048 tokens has 128 pairs."""
ASKED = 16
"""Pairs asked for in a test sequence, at most."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one length.

    Attributes
    ----------
    tokens : Tensor
        ``[B, T]`` int64: a context of noise and pairs (a key, then its value), then questions (a key, then its value).
    context : int
        Tokens before the first question, even in number; from there on keys and values alternate.
    """

    tokens: Tensor
    context: int

    @property
    def answers(self) -> Tensor:
        """``[B, Q]``: the value of each question."""
        return self.tokens[:, self.context + 1 :: 2]


def pairs_of(length: int) -> int:
    """Pairs in a test sequence of `length` tokens."""
    return length // SPACING


def most_pairs(length: int) -> int:
    """Pairs that a sequence of `length` tokens can hold and ask for, each once."""
    return min(KEYS, length // 4 - 1)


def most_asked(length: int, pairs: int) -> int:
    """Questions that a sequence of `length` tokens has room for behind its pairs."""
    return length // 2 - pairs - 1


def draw(length: int, rows: int, generator: torch.Generator, pairs: int, asked: int, known: int = KEYS) -> Batch:
    """Random sequences.

    Parameters
    ----------
    length : int
        Tokens a sequence, questions included; even, at least 64.
    rows : int
        Sequences.
    generator : torch.Generator
        Draws everything, on the device where the tokens are made.
    pairs : int
        Pairs a sequence, each with a key of its own.
    asked : int
        Questions a sequence: each of another pair, or of any pair where they are more than the pairs.
    known : int
        Keys to draw from, the first ones; as many values, if there are.

    Raises
    ------
    ValueError
        If no sequence has this length, or not so many pairs or questions.
    """
    if length % 2 or length < 64:
        raise ValueError(f"length {length} is no length of this task; allowed: even numbers from 64")
    if not 1 <= pairs <= most_pairs(length):
        raise ValueError(f"{pairs} pairs in {length} tokens; allowed: 1 to {most_pairs(length)}")
    if not 1 <= asked <= most_asked(length, pairs):
        raise ValueError(f"{asked} questions of {pairs} pairs in {length} tokens; allowed: 1 to {most_asked(length, pairs)}")
    if not pairs <= known <= KEYS:
        raise ValueError(f"{known} keys for {pairs} pairs; allowed: {pairs} to {KEYS}")
    device, context = generator.device, length - 2 * asked

    def choose(count: int, among: int) -> Tensor:
        """`count` different numbers below `among`, in random order, in each row."""
        return torch.rand(rows, among, generator=generator, device=device).argsort(1)[:, :count]

    def number(*shape: int, below: int) -> Tensor:
        return torch.randint(below, shape, generator=generator, device=device)

    tokens = number(rows, length, below=NOISE)
    keys = choose(pairs, known) + NOISE
    values = number(rows, pairs, below=min(known, VALUES)) + NOISE + KEYS
    # One slot of two tokens stays free, so that pairs of a row may begin at even or at odd places.
    places = 2 * choose(pairs, context // 2 - 1) + number(rows, 1, below=2)
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    which = choose(asked, pairs) if asked <= pairs else number(rows, asked, below=pairs)
    tokens[:, context::2] = keys.gather(1, which)
    tokens[:, context + 1 :: 2] = values.gather(1, which)
    return Batch(tokens, context)


def exam(length: int, rows: int, seed: int, device: str = "cpu") -> Batch:
    """The sequences on which models are compared, the same on every device: at most 16 questions each."""
    pairs = pairs_of(length)
    made = draw(length, rows, torch.Generator().manual_seed(1_000_000 + seed), pairs, min(pairs, ASKED))
    return Batch(made.tokens.to(device), made.context)
