"""Pools keep what they are given in bounded slabs; the window keeps its tokens; exact tokens and numbers are found again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from argus.exact import EMPTY, ExactNumbers, ExactTokens, add_tokens
from argus.ledger import measure, total_bytes
from argus.pages import Pool, Slab
from argus.window import WINDOW_STEP, Window
from tests.conftest import tokens

RUN = settings(max_examples=80, deadline=None)


def payload(pages: list[int], batch: int = 2) -> Slab:
    """Two named tensors of two dtypes that tell a page and a row."""
    codes = torch.tensor([[[page, row, 0] for row in range(batch)] for page in pages], dtype=torch.int64)
    return {"a": codes, "b": (codes[..., :2].float() + 0.5)}


def holds(pool: Pool, wanted: dict[int, Slab]) -> None:
    assert sorted(pool.pages) == sorted(wanted)
    assert len(pool) == len(wanted)
    found: dict[int, Slab] = {}
    for slab, pages in pool.blocks():
        assert 0 < len(pages) <= pool.slab_pages
        for row, page in enumerate(pages):
            found[page] = {name: tensor[row] for name, tensor in slab.items()}
    for page, slab in wanted.items():
        taken = pool.take([page])
        for name, tensor in slab.items():
            assert torch.equal(found[page][name], tensor)
            assert torch.equal(taken[name][0], tensor)


@RUN
@given(slab_pages=st.integers(1, 12), data=st.data())
def test_pool_is_a_dictionary(slab_pages, data):
    """Adds, removals and selections in any order, against a plain dictionary."""
    pool, wanted, batch, fresh = Pool(slab_pages), {}, 2, 0
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["add", "add", "remove", "select"]))
        if what == "add":
            pages = list(range(fresh, fresh + data.draw(st.integers(1, 9))))
            fresh += len(pages)
            given_ = payload(pages, batch)
            pool.add(given_, pages)
            wanted |= {page: {name: tensor[i].clone() for name, tensor in given_.items()} for i, page in enumerate(pages)}
            for tensor in given_.values():
                tensor.zero_()  # The pool owns what it keeps.
        elif what == "remove" and wanted:
            pages = data.draw(st.lists(st.sampled_from(sorted(wanted)), unique=True))
            pool.remove(pages)
            for page in pages:
                del wanted[page]
        elif what == "select":
            rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3)))
            pool.select(rows)
            batch = len(rows)
            wanted = {page: {name: tensor[rows] for name, tensor in slab.items()} for page, slab in wanted.items()}
        if data.draw(st.booleans()):
            pool.trim()
            kept = sum(tensor.numel() * tensor.element_size() for slab in wanted.values() for tensor in slab.values())
            assert total_bytes([tensor for slab in pool.slabs for tensor in slab.values()]) == kept
        holds(pool, wanted)


def test_a_full_slab_is_never_copied():
    pool = Pool(4)
    pool.add(payload(list(range(4))), list(range(4)))
    first = {name: tensor.data_ptr() for name, tensor in pool.slabs[0].items()}
    for page in range(4, 15):
        pool.add(payload([page]), [page])
    assert {name: tensor.data_ptr() for name, tensor in pool.slabs[0].items()} == first
    assert [slab["a"].shape[0] for slab in pool.slabs] == [4, 4, 4, 3]


def test_emptied_slabs_are_freed():
    pool = Pool(3)
    pool.add(payload(list(range(9))), list(range(9)))
    before = total_bytes([tensor for slab in pool.slabs for tensor in slab.values()])
    pool.remove([0, 1, 2, 4, 5, 6, 7])
    pool.trim()
    after = total_bytes([tensor for slab in pool.slabs for tensor in slab.values()])
    assert after * 9 == before * 2
    pool.remove([3, 8])
    pool.trim()
    assert pool.slabs == []


@RUN
@given(data=st.data())
def test_window_is_a_queue(data):
    """Appends, drops and crops in any order, against one plain tensor; what was given may be overwritten after settling."""
    window, wanted, start, seed = Window(torch.float32), tokens(0, 0), 0, 0
    for _ in range(data.draw(st.integers(1, 14))):
        what = data.draw(st.sampled_from(["append", "append", "drop", "crop", "settle"]))
        count = data.draw(st.integers(0, len(window)))
        if what == "append":
            seed += 1
            new = tokens(seed, data.draw(st.integers(1, 2 * WINDOW_STEP)))
            window.append(new[0].clone(), new[1].clone())
            wanted = tuple(torch.cat(pair, 2) for pair in zip(wanted, new, strict=True))
        elif what == "drop" and count:
            first = window.first(count)
            for x, kept in zip(first, wanted, strict=True):
                assert torch.equal(x, kept[:, :, :count])
            window.drop(count)
            wanted, start = tuple(x[:, :, count:] for x in wanted), start + count
        elif what == "crop" and count:
            window.crop(count)
            wanted = tuple(x[:, :, : x.shape[2] - count] for x in wanted)
        elif what == "settle":
            window.settle()
            assert window.fresh is None
        assert (len(window), window.start) == (wanted[0].shape[2], start)
        for i in (0, 1):
            parts = [part[i] for part in window.parts()]
            assert torch.equal(torch.cat(parts, 2) if parts else wanted[i], wanted[i])


def test_a_settled_window_owns_its_memory():
    """The prompt's tensors are not kept alive by the few tokens of them that stay."""
    window = Window(torch.float16)
    keys, values = tokens(1, 100)
    window.append(keys, values)
    window.drop(95)
    window.settle()
    kept = [tensor.clone() for part in window.parts() for tensor in part]
    assert total_bytes(window.tensors()) == 2 * 2 * WINDOW_STEP * 8 * 2
    keys.zero_()
    values.zero_()
    assert all(torch.equal(a, b) for part in [window.parts()[0]] for a, b in zip(part, kept, strict=True))


@pytest.mark.parametrize("held", [torch.float16, torch.float32])
def test_a_page_of_two_dtypes_loses_nothing(held):
    """Tokens that came back to the window are no numbers of the model's dtype."""
    window = Window(held)
    before, after = tokens(1, 5), tuple(x.bfloat16() for x in tokens(2, 20))
    window.append(*before)
    window.settle()
    window.append(*after)
    for x, kept, came in zip(window.first(8), before, after, strict=True):
        assert torch.equal(x.float(), torch.cat([kept, came[:, :, :3].float()], 2))


def chosen(seed: int, shape: tuple[int, ...], share: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@RUN
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]), data=st.data())
def test_exact_numbers_come_back(seed, share, data):
    """Numbers of pages added one block after another, cropped, forgotten and selected, are written where they were."""
    first = 0
    numbers, batch, heads, size, dim = ExactNumbers(torch.float32), 2, 3, 4, 5
    pages, marks = torch.zeros(0, batch, heads, size, dim), torch.zeros(0, batch, heads, size, dim, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for step in range(data.draw(st.integers(1, 8))):
        what = data.draw(st.sampled_from(["add", "add", "crop", "forget", "select"]))
        if what == "add":
            new = torch.randn(data.draw(st.integers(1, 3)), pages.shape[1], heads, size, dim, generator=generator)
            mark = chosen(seed + step, new.shape, share)
            numbers.add(new, mark, first + len(pages))
            pages, marks = torch.cat([pages, new]), torch.cat([marks, mark])
        elif what == "crop":
            keep = data.draw(st.integers(0, len(pages)))
            numbers.crop(first + keep)
            pages, marks = pages[:keep], marks[:keep]
        elif what == "forget":
            gone = data.draw(st.integers(0, len(pages) + 2))
            numbers.forget(first + gone)
            pages, marks, first = pages[gone:], marks[gone:], first + gone
        else:
            rows = torch.tensor(data.draw(st.lists(st.integers(0, pages.shape[1] - 1), min_size=1, max_size=3)))
            if len(pages) or numbers.rows is not None:
                numbers.select(rows)
                pages, marks = pages[:, rows], marks[:, rows]
        if not len(pages):
            continue
        asked = data.draw(st.lists(st.integers(0, len(pages) - 1), min_size=1, max_size=4))
        blank = torch.full_like(pages[asked], 7.0)
        found = numbers.over(blank, [first + page for page in asked])
        assert bool((blank == 7.0).all())
        assert torch.equal(found, torch.where(marks[asked], pages[asked], 7.0))
        kept = int(marks.sum())
        assert total_bytes(numbers.tensors()) == kept * (4 + 2) + marks[..., 0, 0].numel() * 4


@RUN
@given(seed=st.integers(0, 10**6), data=st.data())
def test_exact_tokens_come_back(seed, data):
    """Tokens marked in each row and head apart are written where they were, after crops and selections; some are forgotten."""
    exact, batch, heads, size, dim = ExactTokens(torch.float32), 2, 2, 4, 3
    held = torch.zeros(2, batch, heads, 0, dim)
    marks = torch.zeros(batch, heads, 0, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for step in range(data.draw(st.integers(1, 8))):
        what = data.draw(st.sampled_from(["add", "add", "crop", "forget", "select"]))
        if what == "add":
            n = data.draw(st.integers(1, 3))
            new = torch.randn(2, n, batch, heads, size, dim, generator=generator)
            mark = chosen(seed + step, (n, batch, heads, size), data.draw(st.sampled_from([0.0, 0.2, 1.0])))
            add_tokens([exact], new[0], new[1], held.shape[3], mark)
            held = torch.cat([held, new.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)], 3)
            marks = torch.cat([marks, mark.permute(1, 2, 0, 3).flatten(2)], 2)
        elif what == "crop":
            keep = data.draw(st.integers(0, marks.shape[2] // size)) * size
            exact.crop(keep)
            held, marks = held[:, :, :, :keep], marks[:, :, :keep]
        elif what == "forget":
            gone = data.draw(st.integers(0, marks.shape[2] // size)) * size
            exact.forget(gone)
            marks[:, :, :gone] = False
        elif what == "select":
            rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3)))
            exact.select(rows)
            held, marks, batch = held[:, rows], marks[rows], len(rows)
        keys, values = torch.full_like(held[0], 7.0), torch.full_like(held[1], 7.0)
        exact.write(keys, values, 0)
        for found, wanted in ((keys, held[0]), (values, held[1])):
            assert torch.equal(found, torch.where(marks.unsqueeze(-1), wanted, 7.0))
        if exact.positions is not None:
            assert int((exact.positions != EMPTY).sum()) == int(marks.sum())
            assert exact.holes or bool((exact.positions != EMPTY).all())
        else:
            assert not marks.any()


def test_ledger_counts_a_storage_once():
    """Views, slices and two names of one storage are one storage, with all its bytes; the first name has it."""
    storage = torch.zeros(100, dtype=torch.int16)
    other = torch.zeros(3, dtype=torch.float64)
    found = measure([("a", storage[:10]), ("b", storage[50:].view(5, 10)), ("b", other), ("a", torch.zeros(0))], 50)
    assert found.parts == {"a": 200, "b": 24}
    assert found.bytes == 224
    assert found.bits_per_value == 224 * 8 / 50
    assert found.compression == 16 / found.bits_per_value
    assert found == measure([("a", storage), ("b", other)], 50)
    assert measure([("a", storage), ("b", other)], 50, workspace=9).bytes == 224
    empty = measure([], 0)
    assert (empty.bytes, empty.bits_per_value, empty.compression) == (0, 0, 0)


def test_holes_apart_are_filled_from_the_same_slab():
    """Torch refuses an index of single places and a view of one tensor together."""
    pool = Pool(32)
    pool.add({"a": torch.arange(6.0).view(6, 1, 1)}, list(range(6)))
    pool.remove([0, 2])
    assert pool.pages == [4, 1, 5, 3]
    assert pool.take([4, 1, 5, 3])["a"].flatten().tolist() == [4.0, 1.0, 5.0, 3.0]
