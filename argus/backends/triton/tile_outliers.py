"""Outliers for general tiles: what exact numbers add to scores and answers, beside what codes say at their places.

Scores of tokens get ``q[channel] * (exact - decoded)``, answers ``p[token] * (exact - decoded)``: products with one-hot
matrices, which put each where it belongs. Nothing of a page is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.reading import _basis, _page_numbers

AT_ONCE = tl.constexpr(32)
"""Outliers of a row that are taken at once."""


@triton.jit
def _row_of(ends, row):
    """Where the numbers of a row begin and end."""
    return tl.load(ends + row - 1, mask=row > 0, other=0), tl.load(ends + row)


@triton.jit
def _outliers_at(
    kept, n, end, begin_token, page, mean, own, matrix, factor, turn, inner,
    P: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, TB: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr,
    FRAGMENTS: tl.constexpr, ELEMENT: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """Outliers of a row from `n` on: tokens, channels, by how much they are beyond what is decoded, and which there are.

    Those that are not of the TB tokens from `begin_token` on are left out. The rest tells of the page, as for
    :func:`argus.backends.triton.reading._page_numbers`.
    """
    at = n + tl.arange(0, AT_ONCE)
    place = tl.load(kept[1] + at, mask=at < end, other=0).to(tl.int32)
    tok = place // D
    ch = place % D
    held = (at < end) & (tok >= begin_token) & (tok < begin_token + TB)
    number = tl.load(kept[2] + at, mask=held, other=0.0).to(tl.float32)
    decoded = _page_numbers(
        page, mean, own, matrix, factor, turn, tok, ch, held, inner, P, D, DB, ROWS, TURNED,
        KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD,
    )  # fmt: skip
    return tok, ch, tl.where(held, number - decoded, 0.0), held


@triton.jit
def _of_tokens(tok, begin_token, TB: tl.constexpr):
    """``[N, TB]``: which of TB tokens from a first on each is."""
    return ((tok - begin_token)[:, None] == tl.arange(0, TB)[None, :]).to(tl.float32)


@triton.jit
def _more_scores(s, q_ptr, row, R, delta, tok, ch, held, begin_token, D: tl.constexpr, TB: tl.constexpr, WIDE: tl.constexpr):
    """Scores ``[R, TB]`` and what keys' outliers add to them."""
    q = tl.load(q_ptr + row[:, None] * D + ch[None, :], mask=(row < R)[:, None] & held[None, :], other=0.0)
    return tl.dot(q * delta[None, :], _of_tokens(tok, begin_token, TB), s, input_precision="ieee" if WIDE else "tf32x3")


@triton.jit
def _more_answers(
    acc, p, delta, tok, ch, turn, begin_token, D: tl.constexpr, DB: tl.constexpr, TB: tl.constexpr, TURNED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sums ``[R, DB]`` of values by weights ``p [R, TB]``, and what values' outliers add to them."""
    HOW: tl.constexpr = "ieee" if WIDE else "tf32x3"
    w = tl.dot(p, tl.trans(_of_tokens(tok, begin_token, TB)), input_precision=HOW)
    return tl.dot(w * delta[None, :], _basis(turn, ch, D, DB, TURNED), acc, input_precision=HOW)
