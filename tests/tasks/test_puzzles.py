"""Puzzles can be solved from their contexts, have the stated length, and a batch answers as one after another."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from argus.errors import ConfigError
from argus.tasks import needle, passkey, recall, retrieval
from argus.tasks.puzzles import Puzzle, batches, encode, hide, hide_evenly, quiz, replies, words
from argus.tasks.retrieval import Retrieval, RetrievalConfig

LENGTHS = (700, 1024, 1501)


def make(tokenizer, kind: str, length: int, seed: int) -> Puzzle:
    if kind == "passkey":
        return passkey.puzzle(tokenizer, length, seed)
    if kind == "needle":
        return needle.puzzle(tokenizer, length, 0.4, seed)
    if kind in recall.KINDS:
        return recall.puzzle(tokenizer, recall.RecallConfig(), kind, length, seed)
    return retrieval.puzzle(tokenizer, RetrievalConfig(keys=4, chains=2), kind, length, seed)


def last(pattern: str, text: str) -> str:
    return re.findall(pattern, text)[-1]


def track(context: str, question: str) -> list[str]:
    """Every variable that holds the value asked for, by doing the assignments in turn."""
    value = last(r"the value (\d+)", question)
    held: dict[str, str] = {}
    for name, given in re.findall(r"VAR (\w+) = (\d+|VAR \w+)\.", context):
        held[name] = held[given.removeprefix("VAR ")] if given.startswith("VAR") else given
    return [name for name, one in held.items() if one == value and name not in question]


def copied(context: str, question: str) -> list[str]:
    sequence = last(r"Remember these words: ([^.]*)\.", context).split()
    given = question.removeprefix("Remember these words: ").split()
    assert sequence[: len(given)] == given
    return sequence[len(given) :]


def told(pattern: str, context: str, question: str) -> list[str]:
    """What stands in the context of the name that is asked for."""
    return re.findall(pattern.replace("NAME", last(r"codes? of (\w+) (?:is|are)", question)), context)


SOLVE = {
    "passkey": lambda c, q: re.findall(r"The pass key is (\d+)\.", c),
    "needle": lambda c, q: told(r"The secret code of NAME is (\d+)\.", c, q),
    "multikey": lambda c, q: told(r"The code of NAME is (\d+)\.", c, q),
    "multivalue": lambda c, q: told(r"One secret code of NAME is (\d+)\.", c, q),
    "tracking": track,
    "copy": copied,
    "pairs": lambda c, q: re.findall(q + r" (\w+)\n", c),
}
"""Who can read, solves each from context and question alone."""

COUNTS = {"multivalue": 3, "tracking": 2, "copy": 8}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", SOLVE)
def test_a_puzzle_can_be_solved_from_its_context(tokenizer, kind, length):
    found = [make(tokenizer, kind, length, seed) for seed in range(4)]
    for one in found:
        assert len(one.context) == length
        solved = SOLVE[kind](tokenizer.decode(one.context), tokenizer.decode(one.question))
        assert sorted(solved) == sorted(one.answers)
        assert len(one.answers) == COUNTS.get(kind, 1)
        assert one.tokens >= len(encode(tokenizer, " " + " ".join(one.answers)))
    assert found[2] == make(tokenizer, kind, length, 2)
    assert len({one.answers for one in found}) == 4
    assert len({tuple(one.context) for one in found}) == 4


def test_other_keys_distract(tokenizer):
    """As many codes as asked for, of as many names."""
    config = RetrievalConfig(keys=5)
    text = tokenizer.decode(retrieval.puzzle(tokenizer, config, "multikey", 1000, 0).context)
    found = re.findall(r"The code of (\w+) is (\d+)\.", text)
    assert len({name for name, _ in found}) == len({code for _, code in found}) == len(found) == 5


def test_chains_are_told_in_turn(tokenizer):
    """No variable is handed on before it has a value, and both chains are there."""
    config = RetrievalConfig(chains=2, hops=3)
    for seed in range(5):
        text = tokenizer.decode(retrieval.puzzle(tokenizer, config, "tracking", 1000, seed).context)
        lines = re.findall(r"VAR (\w+) = (\d+|VAR \w+)\.", text)
        assert len(lines) == 2 * 4
        assert sum(given.isdigit() for _, given in lines) == 2
        told: set[str] = set()
        for name, given in lines:
            assert given.isdigit() or given.removeprefix("VAR ") in told
            told.add(name)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.8, 1.0])
def test_a_needle_stands_at_its_depth_after_a_sentence(tokenizer, depth):
    for seed in range(3):
        text = tokenizer.decode(needle.puzzle(tokenizer, 1000, depth, seed).context)
        before, after = re.split(r"\n\nThe secret code of \w+ is \d+\. Remember it\.\n\n", text)
        assert len(before) / len(before + after) == pytest.approx(depth, abs=0.12)
        assert before.rstrip(" ").endswith((".", "\n")) or depth == 0


def test_needles_are_hidden_where_said():
    assert hide([1, 2, 3, 4], [[9], [8, 8]], [1, 4]) == [1, 9, 2, 3, 4, 8, 8]
    assert hide([1, 2], [[9], [8]], [0, 0]) == [9, 8, 1, 2]
    assert hide_evenly([0], [1, 2], [[9], [8]], [0.5, 0.9], 9) == [0, 1, 2, 9, 1, 2, 8, 1, 2]


@pytest.mark.parametrize("kind", SOLVE)
def test_a_length_with_no_room_is_refused(tokenizer, kind):
    with pytest.raises(ConfigError, match=r"task.lengths: 15 tokens have no room for .*; allowed: \d+ or more") as caught:
        make(tokenizer, kind, 15, 0)
    enough = int(last(r"\d+", str(caught.value)))
    assert len(make(tokenizer, kind, enough + 20, 0).context) == enough + 20


@pytest.mark.parametrize(
    "task",
    [
        passkey.Passkey(passkey.PasskeyConfig(lengths=(700, 64))),
        needle.Needle(needle.NeedleConfig(lengths=(700, 64), depths=(0.5,))),
        recall.Recall(recall.RecallConfig(lengths=(700, 64), copied=40)),
        Retrieval(RetrievalConfig(lengths=(700, 64), keys=8)),
    ],
    ids=lambda task: type(task).__name__,
)
def test_a_length_with_no_room_is_refused_before_any_is_asked(run, task, monkeypatch):
    monkeypatch.setattr("argus.tasks.puzzles.replies", lambda *_: pytest.fail("a puzzle was asked"))
    monkeypatch.setattr(needle, "NEEDLE", needle.NEEDLE * 9)
    with pytest.raises(ConfigError, match=r"task.lengths: 64 tokens have no room"):
        list(task.run(run))


def test_there_are_words_enough():
    """For the largest options that are allowed."""
    assert len(words()) >= 2 * 64
    assert len([word for word in words() if len(word) == 5]) >= 8 * 9


def test_a_batch_has_one_shape():
    made = [Puzzle([1] * size, [2] * asked, ("x",), 1) for size, asked in ((4, 2), (4, 3), (4, 2), (5, 2), (4, 2))]
    groups = list(batches(made, 2))
    assert [len(group) for group in groups] == [2, 1, 1, 1]
    assert all(len({(len(one.context), len(one.question)) for one in group}) == 1 for group in groups)
    assert sorted(map(id, made)) == sorted(id(one) for group in groups for one in group)


def test_a_batch_answers_as_one_after_another(run):
    """On the FP16 cache, text by text."""
    made = [replace(passkey.puzzle(run.tokenizer, 200, seed), tokens=12) for seed in range(5)]
    kind = run.caches["fp16"]
    alone = [replies(run, kind, [one]) for one in made]
    together, size = replies(run, kind, made)
    assert together == [text for (text,), _ in alone]
    assert len(set(together)) > 1
    assert size == alone[0][1]
    # As rows: the texts are what is expected, so that every batch must score what a batch of one does.
    expected = [replace(one, answers=(text, "never")) for one, text in zip(made, together, strict=True)]
    label = {"task": "passkey", "context": 200}
    rows = [list(quiz(run, label, expected, size)) for size in (1, 2, 5)]
    assert rows[0][0]["accuracy"] == 0.5
    assert [row["cache"] for row in rows[0]] == ["fp16", "argus"]
    assert rows[0][0] == rows[1][0] == rows[2][0]


def test_memory_is_a_rows_own(run):
    """With an ARGUS cache too, whatever the batch."""
    made = [passkey.puzzle(run.tokenizer, 200, seed) for seed in range(3)]
    one, three = (replies(run, run.caches["argus"], made[:count])[1] for count in (1, 3))
    assert three["cache_bytes"] == pytest.approx(one["cache_bytes"], rel=0.05)
    assert three["bits_per_value"] == pytest.approx(one["bits_per_value"], rel=0.05)
    assert one["cache_bytes"] < replies(run, run.caches["fp16"], made[:1])[1]["cache_bytes"]


def test_scores_are_shares():
    one = Puzzle([1], [2], ("12345", "67890"), 9)
    assert [one.score(text) for text in ("", " 67890", " 12345, 67890", "1234 5")] == [0, 0.5, 1, 0]


def test_rows_of_every_kind(run):
    found = list(Retrieval(RetrievalConfig(lengths=(400,), samples=2, batch=2)).run(run))
    names = [(row["kind"], row["cache"], row["context"], row["samples"]) for row in found]
    kinds = ("multikey", "multivalue", "tracking")
    assert names == [(kind, cache, 400, 2) for kind in kinds for cache in ("fp16", "argus")]
    assert all(0 <= row["accuracy"] <= 1 and row["cache_bytes"] > 0 and row["task"] == "retrieval" for row in found)


def test_a_grid_of_needles_and_its_picture(run):
    config = needle.NeedleConfig(lengths=(150, 200), depths=(0.2, 0.8), samples=1)
    rows = list(needle.Needle(config).run(run))
    assert [(row["context"], row["depth"], row["cache"]) for row in rows] == [
        (length, depth, cache) for length in (150, 200) for depth in (0.2, 0.8) for cache in ("fp16", "argus")
    ]
    data = (run.folder / "needle.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 5000
