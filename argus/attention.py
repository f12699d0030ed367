"""Attention as a monoid: partial answers with their log-sum-exp, and their merge.

The merge of partial softmax attention is the online-softmax identity of Milakov and Gimelshein (2018, arXiv:1805.02867),
used as in FlashDecoding: parts may be answered in any order and by any method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DENSE_BUDGET = 1 << 24
"""Scores held at once by :func:`answer_bounded`, in numbers: the bound on its workspace."""


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
    scale : float
        The softmax scale that `rows` were multiplied by: divided by it, they are the model's own numbers again.
    """

    rows: Tensor
    start: int
    length: int
    mask: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(
        cls, q: Tensor, kv_heads: int, scale: float, start: int, mask: Tensor | None = None, softcap: float | None = None
    ) -> Query:
        """Group queries ``[B, Hq, S, D]`` by key-value head, scaled by `scale`."""
        batch, _, length, dim = q.shape
        rows = (q.float() * scale).reshape(batch, kv_heads, -1, dim)
        return cls(rows, start, length, mask, softcap, scale)

    @property
    def groups(self) -> int:
        """Query heads a key-value head."""
        return self.rows.shape[2] // self.length

    def part(self, begin: int, end: int) -> Query:
        """The same call for query tokens ``begin`` to ``end`` only."""
        batch, heads, _, dim = self.rows.shape
        rows = self.rows.view(batch, heads, self.groups, self.length, dim)[:, :, :, begin:end]
        mask = None if self.mask is None else self.mask[:, :, begin:end]
        return Query(rows.reshape(batch, heads, -1, dim), self.start + begin, end - begin, mask, self.softcap, self.scale)

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


class Part(ABC):
    """A part of the cache that can be asked: pages of a stage, exact tokens, a learned sink."""

    tokens: int
    """Tokens it holds, the width of its scores."""

    @abstractmethod
    def scores(self, query: Query) -> Tensor:
        """Scores ``[B, H, R, tokens]`` float32, ``-inf`` for tokens that a row may not see."""

    @abstractmethod
    def mix(self, weights: Tensor) -> Tensor | None:
        """``[B, H, R, D]``: values averaged by weights ``[B, H, R, tokens]``; None: it has no values."""


def limit(scores: Tensor, query: Query, visible: Tensor | None) -> Tensor:
    """Scores with the query's softcap, and ``-inf`` where `visible` (boolean or additive, broadcastable) hides a token."""
    if query.softcap is not None:
        scores = torch.tanh(scores / query.softcap) * query.softcap
    if visible is None:
        return scores
    if visible.dtype == torch.bool:
        return scores.masked_fill(~visible, -torch.inf)
    return (scores + visible).masked_fill(visible <= torch.finfo(visible.dtype).min, -torch.inf)


def answer(query: Query, parts: Sequence[Part]) -> Partial:
    """The answer of several parts at once: their scores share one softmax, their values are mixed one after another."""
    widths = [part.tokens for part in parts]
    scores = torch.cat([part.scores(query) for part in parts], -1)
    highest = scores.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    mixed = [part.mix(weight) for part, weight in zip(parts, weights.split(widths, -1), strict=True)]
    held = [out for out in mixed if out is not None]
    out = held[0] if held else torch.zeros_like(query.rows)
    for other in held[1:]:
        out += other
    lse = (total.log() + highest).squeeze(-1)
    return Partial(out / total.masked_fill(total == 0, 1.0), lse)


def answer_bounded(query: Query, parts: Sequence[Part], budget: int = DENSE_BUDGET) -> Partial:
    """The answer of any number of parts, holding at most `budget` scores at once, or those of one part."""
    rows = query.rows[..., 0].numel()
    batches: list[list[Part]] = [[]]
    used = 0
    for part in parts:
        if batches[-1] and (used + part.tokens) * rows > budget:
            batches.append([])
            used = 0
        batches[-1].append(part)
        used += part.tokens
    whole = answer(query, batches[0])
    for batch in batches[1:]:
        whole = merge([whole, answer(query, batch)])
    return whole


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


class DensePart(Part):
    """Keys and values as they are.

    Parameters
    ----------
    keys, values : Tensor
        ``[B, H, T, D]`` of any floating dtype.
    visible : callable
        ``visible(query)``: as :meth:`Query.visible` returns it.
    """

    def __init__(self, keys: Tensor, values: Tensor, visible: Callable[[Query], Tensor | None]) -> None:
        self.keys, self.values, self.visible = keys, values, visible
        self.tokens = keys.shape[2]

    def scores(self, query: Query) -> Tensor:
        return limit(query.rows @ self.keys.float().transpose(-1, -2), query, self.visible(query))

    def mix(self, weights: Tensor) -> Tensor:
        return weights @ self.values.float()


class SinkPart(Part):
    """A learned attention sink: a logit a query head and no value (gpt-oss)."""

    tokens = 1

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def scores(self, query: Query) -> Tensor:
        batch, heads, rows, _ = query.rows.shape
        spread = self.logits.float().view(1, heads, -1, 1).expand(batch, heads, query.groups, query.length)
        return spread.reshape(batch, heads, rows, 1)

    def mix(self, weights: Tensor) -> None:
        return None
