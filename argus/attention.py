"""Attention as a monoid: partial answers with their log-sum-exp, and their merge.

The merge of partial softmax attention is the online-softmax identity of Milakov and Gimelshein (2018, arXiv:1805.02867),
used as in FlashDecoding: parts may be answered in any order and by any method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DENSE_BUDGET = 1 << 24
"""Scores held at once by :func:`answer`, in numbers: the bound on its workspace."""


class Partial(NamedTuple):
    """The answer of one part of the cache.

    Attributes
    ----------
    out : Tensor
        ``[B, H, R, D]`` float32, the softmax average over this part alone; zero where the part holds no visible token.
    lse : Tensor
        ``[B, H, R]`` float32, log of the sum of exponentials of this part's scores; ``-inf`` where nothing is visible.
    """

    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Query:
    """The queries of one attention call, grouped by key-value head.

    Attributes
    ----------
    rows : Tensor
        ``[B, H, R, D]`` float32, scaled by the softmax scale; ``R = G * S`` with ``G`` query heads a key-value head
        (slow) and ``S`` query tokens (fast).
    start : int
        Position of the first query token, in tokens.
    length : int
        ``S``, the number of query tokens.
    mask : Tensor or None
        ``[B or 1, 1 or G * H, S, L]``, boolean (True: visible) or additive. None means causal by position.
    softcap : float or None
        Scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
    """

    rows: Tensor
    start: int
    length: int
    mask: Tensor | None = None
    softcap: float | None = None

    @classmethod
    def of(
        cls, q: Tensor, kv_heads: int, scale: float, start: int, mask: Tensor | None = None, softcap: float | None = None
    ) -> Query:
        """Group queries ``[B, Hq, S, D]`` by key-value head, scaled by `scale`."""
        batch, _, length, dim = q.shape
        rows = (q.float() * scale).reshape(batch, kv_heads, -1, dim)
        return cls(rows, start, length, mask, softcap)

    @property
    def groups(self) -> int:
        """Query heads a key-value head."""
        return self.rows.shape[2] // self.length

    def part(self, begin: int, end: int) -> Query:
        """The same call for query tokens ``begin`` to ``end`` only."""
        batch, heads, _, dim = self.rows.shape
        rows = self.rows.view(batch, heads, self.groups, self.length, dim)[:, :, :, begin:end]
        mask = None if self.mask is None else self.mask[:, :, begin:end]
        return Query(rows.reshape(batch, heads, -1, dim), self.start + begin, end - begin, mask, self.softcap)

    def visible(self, positions: Tensor, last: int) -> Tensor | None:
        """Which keys each row may see.

        Parameters
        ----------
        positions : Tensor
            int64 positions of the keys in tokens, ``[T]``, or ``[B, H, T]`` where heads differ.
        last : int
            The largest of them, in tokens.

        Returns
        -------
        Tensor or None
            Broadcastable to ``[B, H, R, T]``, boolean or additive; None when everything is visible.
        """
        if self.mask is not None:
            return self._gather(self.mask, positions)
        if last <= self.start:
            return None
        steps = torch.arange(self.start, self.start + self.length, device=positions.device).repeat(self.groups)
        return positions.unsqueeze(-2) <= steps.unsqueeze(-1)

    def _gather(self, mask: Tensor, positions: Tensor) -> Tensor:
        batch, heads, groups = self.rows.shape[0], self.rows.shape[1], self.groups
        # [B or 1, 1 or H, 1 or G, S, L]: the query heads of a group share its keys
        mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (heads, groups))
        if positions.dim() == 1:
            picked = mask.index_select(-1, positions)
        else:
            shape = (batch, heads, mask.shape[2], self.length, positions.shape[-1])
            index = positions.clamp_min(0)[:, :, None, None, :].expand(shape)
            picked = mask.expand(batch, heads, -1, -1, -1).gather(-1, index)
        return picked.expand(-1, -1, groups, -1, -1).flatten(2, 3)


def weigh(scores: Tensor, query: Query, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Turn raw scores into softmax weights and their log-sum-exp.

    Parameters
    ----------
    scores : Tensor
        ``[..., R, T]`` float32 products of scaled queries and keys.
    query : Query
        For its softcap.
    visible : Tensor or None
        Broadcastable to `scores`, boolean or additive.

    Returns
    -------
    tuple of Tensor
        Weights ``[..., R, T]`` that sum to one (zero where nothing is visible) and log-sum-exp ``[..., R]``.
    """
    if query.softcap is not None:
        scores = torch.tanh(scores / query.softcap) * query.softcap
    if visible is None:
        lse = torch.logsumexp(scores, -1)
        return torch.exp(scores - lse.unsqueeze(-1)), lse
    if visible.dtype == torch.bool:
        scores = scores.masked_fill(~visible, float("-inf"))
    else:
        scores = scores + visible
        hidden = visible <= torch.finfo(visible.dtype).min
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    safe = lse.masked_fill(lse == float("-inf"), 0.0)
    return torch.exp(scores - safe.unsqueeze(-1)), lse


def answer(query: Query, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Partial:
    """Answer for dense keys and values.

    Parameters
    ----------
    query : Query
    keys, values : Tensor
        ``[B, H, T, D]`` of any floating dtype.
    visible : Tensor or None
        As :meth:`Query.visible` returns it.

    Returns
    -------
    Partial
    """
    scores = query.rows @ keys.float().transpose(-1, -2)
    weights, lse = weigh(scores, query, visible)
    return Partial(weights @ values.float(), lse)


def answer_pages(query: Query, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Partial:
    """Answer for a block of pages without making them contiguous in tokens.

    Parameters
    ----------
    query : Query
    keys, values : Tensor
        ``[n, B, H, P, D]`` float32.
    visible : Tensor or None
        Broadcastable to ``[n, B, H, R, P]``.

    Returns
    -------
    Partial
    """
    scores = query.rows @ keys.transpose(-1, -2)
    n, batch, heads, rows, page = scores.shape
    scores = scores.permute(1, 2, 3, 0, 4).reshape(batch, heads, rows, n * page)
    if visible is not None:
        visible = visible.expand(n, batch, heads, rows, page).permute(1, 2, 3, 0, 4).reshape(batch, heads, rows, n * page)
    weights, lse = weigh(scores, query, visible)
    weights = weights.view(batch, heads, rows, n, page).permute(3, 0, 1, 2, 4)
    return Partial((weights @ values).sum(0), lse)


def merge(parts: Sequence[Partial]) -> Partial:
    """Merge partial answers in any order.

    Parameters
    ----------
    parts : sequence of Partial
        At least one, all of one shape.

    Returns
    -------
    Partial
        The answer of the union of the parts.
    """
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([part.lse for part in parts])
    lse = torch.logsumexp(lses, 0)
    safe = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = torch.exp(lses - safe).unsqueeze(-1)
    out = weights[0] * parts[0].out
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        out.addcmul_(weight, part.out)
    return Partial(out, lse)


def sink_logits(query: Query, logits: Tensor) -> Partial:
    """The part that a learned attention sink is: a logit a query head and no value (gpt-oss).

    Parameters
    ----------
    query : Query
    logits : Tensor
        ``[Hq]``.
    """
    batch, heads, rows, dim = query.rows.shape
    lse = logits.float().view(1, heads, -1, 1).expand(batch, heads, query.groups, query.length).reshape(batch, heads, rows)
    return Partial(query.rows.new_zeros(batch, heads, rows, dim), lse)
