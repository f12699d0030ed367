"""Partial attention is a monoid, and every part sees what its mask lets it see."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from argus.attention import DensePart, Partial, Query, SinkPart, answer, answer_bounded, merge
from tests.conftest import DIM, GROUPS, HEADS, dense_attention, queries, tokens

RUN = settings(max_examples=60, deadline=None)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def partial(seed: int, hidden: bool = True) -> Partial:
    """A random answer; some rows see nothing."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(2, 2, 3, DIM, generator=generator)
    lse = 20 * torch.randn(2, 2, 3, generator=generator)
    empty = (torch.rand(2, 2, 3, generator=generator) < 0.3) & hidden
    return Partial(out.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, -torch.inf))


def copy(part: Partial) -> Partial:
    return Partial(part.out.clone(), part.lse.clone())


def join(*parts: Partial) -> Partial:
    return merge([copy(part) for part in parts])


def same(found: Partial, wanted: Partial) -> None:
    torch.testing.assert_close(found.out, wanted.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.lse, wanted.lse, rtol=1e-5, atol=1e-5)


NOTHING = Partial(torch.zeros(2, 2, 3, DIM), torch.full((2, 2, 3), -torch.inf))


@RUN
@given(st.lists(st.integers(0, 10**6), min_size=3, max_size=3, unique=True))
def test_merge_is_associative(seeds):
    a, b, c = map(partial, seeds)
    same(join(join(a, b), c), join(a, join(b, c)))
    same(join(a, b, c), join(a, join(b, c)))


@RUN
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=5, unique=True), st.randoms(use_true_random=False))
def test_merge_is_commutative(seeds, random):
    parts = [partial(seed) for seed in seeds]
    shuffled = random.sample(parts, len(parts))
    same(join(*shuffled), join(*parts))


@RUN
@given(st.integers(0, 10**6))
def test_merge_has_an_identity(seed):
    part = partial(seed)
    same(join(part, NOTHING), part)
    same(join(NOTHING, part), part)
    same(join(NOTHING, NOTHING), NOTHING)


@RUN
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_merge_leaves_its_parts(seed, count):
    parts = [partial(seed + i) for i in range(count)]
    before = [copy(part) for part in parts]
    merge(parts)
    for part, kept in zip(parts, before, strict=True):
        assert torch.equal(part.out, kept.out)
        assert torch.equal(part.lse, kept.lse)


def dense_part(keys: Tensor, values: Tensor, begin: int, end: int) -> DensePart:
    positions = torch.arange(begin, end)
    return DensePart(keys[:, :, begin:end], values[:, :, begin:end], lambda query: query.visible(positions, end - 1))


def masks(kind: str, batch: int, steps: int, held: int) -> Tensor | None:
    """Masks ``[B or 1, 1 or Hq, S, L]`` in which every row sees its own token."""
    if kind == "none":
        return None
    heads = HEADS * GROUPS if "head" in kind else 1
    rows = 1 if "shared" in kind else batch
    generator = torch.Generator().manual_seed(11)
    seen = torch.rand(rows, heads, steps, held, generator=generator) < 0.5
    seen &= torch.ones(steps, held, dtype=torch.bool).tril(held - steps)
    seen |= torch.eye(held, dtype=torch.bool)[-steps:]
    if "additive" not in kind:
        return seen
    bias = torch.randn(rows, heads, steps, held, generator=generator)
    return bias.masked_fill(~seen, torch.finfo(torch.float32).min if "min" in kind else -torch.inf)


KINDS = ["none", "bool", "bool a head", "bool shared", "additive", "additive a head", "additive min"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
def test_parts_together_are_dense_attention(kind, softcap, sinks, steps):
    """However the tokens are cut into parts and the parts into batches."""
    held = 23
    keys, values = tokens(1, held, batch=2)
    q = queries(2, steps, batch=2)
    logits = queries(3, 1).flatten()[: HEADS * GROUPS] if sinks else None
    mask = masks(kind, 2, steps, held)
    query = Query.of(q, HEADS, 0.4, held - steps, mask, softcap)
    wanted = dense_attention(q, keys, values, 0.4, mask, softcap, logits)
    last = [] if logits is None else [SinkPart(logits)]
    for cuts in ([0, held], [0, 1, 17, held], [0, 8, 16, 20, held]):
        parts = [*last, *(dense_part(keys, values, begin, end) for begin, end in pairwise(cuts))]
        for budget in (200, 1 << 24):
            found = answer_bounded(query, parts, budget).out
            torch.testing.assert_close(found.reshape(q.shape).double(), wanted, **CLOSE)


@pytest.mark.parametrize("budget", [1, 60, 500])
def test_a_sink_may_be_alone_in_its_batch(budget):
    """A learned sink has no values, whatever batch of parts the budget puts it into."""
    keys, values = tokens(1, 12)
    q, logits = queries(2, 2), queries(3, 1).flatten()[: HEADS * GROUPS]
    query = Query.of(q, HEADS, 0.4, 10)
    parts = [dense_part(keys, values, 0, 7), dense_part(keys, values, 7, 12), SinkPart(logits)]
    found = answer_bounded(query, parts, budget).out
    wanted = dense_attention(q, keys, values, 0.4, sinks=logits)
    torch.testing.assert_close(found.reshape(q.shape).double(), wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["bool", "additive", "additive min"])
def test_hidden_rows_give_zero_and_no_nan(kind):
    """A row that sees nothing, in one part or in all."""
    keys, values = tokens(1, 12)
    q = queries(2, 3)
    mask = masks(kind, 1, 3, 12)
    hidden = False if kind == "bool" else (torch.finfo(torch.float32).min if "min" in kind else -torch.inf)
    mask[:, :, 0] = hidden
    mask[:, :, 1, :7] = hidden
    query = Query.of(q, HEADS, 0.4, 9, mask)
    first, second = dense_part(keys, values, 0, 7), dense_part(keys, values, 7, 12)
    found = answer(query, [first]).out.unflatten(2, (GROUPS, 3))
    assert torch.equal(found[:, :, :, :2], torch.zeros_like(found[:, :, :, :2]))
    lse = answer(query, [first]).lse.unflatten(2, (GROUPS, 3))
    assert (lse[:, :, :, :2] == -torch.inf).all()
    assert lse[:, :, :, 2].isfinite().all()
    whole = answer_bounded(query, [first, second], budget=1).out
    torch.testing.assert_close(whole.reshape(q.shape).double(), dense_attention(q, keys, values, 0.4, mask), **CLOSE)
    assert torch.equal(whole.unflatten(2, (GROUPS, 3))[:, :, :, 0], torch.zeros(1, HEADS, GROUPS, DIM))


def test_large_scores_do_not_overflow():
    keys, values = tokens(1, 9)
    q = 3000 * queries(2, 2)
    query = Query.of(q, HEADS, 1.0, 7)
    found = answer(query, [dense_part(keys, values, 0, 9)]).out
    torch.testing.assert_close(found.reshape(q.shape).double(), dense_attention(q, keys, values, 1.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_query_part_is_the_same_question(kind):
    """Any stretch of the query tokens gets the answer that it gets with all the others."""
    keys, values = tokens(1, 14, batch=2)
    q = queries(2, 6, batch=2)
    query = Query.of(q, HEADS, 0.4, 8, masks(kind, 2, 6, 14), softcap=3.0)
    part = dense_part(keys, values, 0, 14)
    whole = answer(query, [part]).out.unflatten(2, (GROUPS, 6))
    for begin, end in ((0, 6), (0, 1), (2, 5), (5, 6)):
        piece = query.part(begin, end)
        assert (piece.start, piece.length, piece.groups) == (8 + begin, end - begin, GROUPS)
        found = answer(piece, [part]).out.unflatten(2, (GROUPS, -1))
        torch.testing.assert_close(found, whole[:, :, :, begin:end], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_may_differ_by_row_and_head(kind):
    """Exact tokens: each row and head keeps its own, and sees of them what it saw of the whole."""
    held, steps = 16, 4
    keys, values = tokens(1, held, batch=2)
    q = queries(2, steps, batch=2)
    mask = masks(kind, 2, steps, held)
    positions = torch.stack(
        [torch.randperm(held, generator=torch.Generator().manual_seed(i))[:9] for i in range(2 * HEADS)]
    ).view(2, HEADS, 9)
    index = positions.unsqueeze(-1).expand(-1, -1, -1, DIM)
    part = DensePart(keys.gather(2, index), values.gather(2, index), lambda query: query.visible(positions, held - 1))
    found = answer(Query.of(q, HEADS, 0.4, held - steps, mask), [part]).out
    kept = torch.zeros(2, HEADS, 1, held, dtype=torch.bool).scatter_(-1, positions.unsqueeze(2), True)
    kept = kept.repeat_interleave(GROUPS, 1)
    seen = torch.ones(steps, held, dtype=torch.bool).tril(held - steps) if mask is None else mask
    seen = seen & kept if seen.dtype == torch.bool else seen.expand(2, -1, -1, -1).masked_fill(~kept, -torch.inf)
    wanted = dense_attention(q, keys, values, 0.4, seen)
    torch.testing.assert_close(found.reshape(q.shape).double(), wanted, **CLOSE)
