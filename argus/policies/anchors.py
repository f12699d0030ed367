"""Anchor policies: attention sinks, ends of lines, tokens unlike the others, and tokens that queries ask for."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from argus.errors import ConfigError
from argus.hookspecs import hookimpl
from argus.policies.base import Anchors, NewPages, PolicyConfig, TextFacts

COSINES = 1 << 24
"""Numbers held at once where tokens are compared with each other, or those of one head."""


class SinksConfig(PolicyConfig):
    """Options of sinks: how many of the first tokens stay exact."""

    tokens: NonNegativeInt = 4


class Sinks(Anchors):
    """The first tokens of each row, padding left out (StreamingLLM, arXiv:2309.17453)."""

    Config = SinksConfig

    def choose(self, pages: NewPages) -> Tensor:
        rank = pages.positions - pages.padding[:, None]
        return ((rank >= 0) & (rank < self.config.tokens)).unsqueeze(2)


class LinesConfig(PolicyConfig):
    """Options of lines: how many tokens before and with each line's end, and the token ids that end one."""

    tokens: PositiveInt = 2
    ids: tuple[int, ...] | None = None


class Lines(Anchors):
    """The last tokens of each line, where rhymes stand."""

    Config = LinesConfig
    needs_tokens = True

    def __init__(self, config: PolicyConfig, text: TextFacts) -> None:
        super().__init__(config, text)
        self.ids = self.config.ids if self.config.ids is not None else text.line_ends
        if not self.ids:
            raise ConfigError("anchors.lines: no token ids end a line; give anchors.lines.ids=[...] or a tokenizer")

    def choose(self, pages: NewPages) -> Tensor:
        n, batch, _, page, _ = pages.keys.shape
        if pages.tokens is None:
            return pages.taken.new_zeros(n, batch, 1, page)
        near = pages.tokens[:, : n * page + self.config.tokens - 1]
        ends = torch.isin(near, torch.tensor(self.ids, device=near.device))
        kept = ends.clone()
        for step in range(1, self.config.tokens):
            kept[:, :-step] |= ends[:, step:]
        return kept[:, : n * page].reshape(batch, n, 1, page).transpose(0, 1)


class NoveltyConfig(PolicyConfig):
    """Options of novelty.

    ``share`` of the tokens is kept for each head; ``by`` values, keys, or both (half of the share each); ``scope``: the
    share is filled within each page, or over all pages that leave the window together, at most ``tiers.block_pages``.
    ``span``: a token's score is the mean over that many tokens around it, so that what stands together is kept together.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    by: Literal["keys", "values", "both"] = "values"
    scope: Literal["page", "block"] = "block"
    span: PositiveInt = 1


class Novelty(Anchors):
    """The tokens least like any other: retrieval at few bits lives on which tokens stay exact, not on the codec.

    A token's score is its largest cosine with another token of the scope, of keys or of values, less their mean; the
    lowest scores are kept. On a GPU cosines are rounded to 16 bits.
    """

    Config = NoveltyConfig

    def choose(self, pages: NewPages) -> Tensor:
        taken = self._scoped(pages.taken.unsqueeze(-1)).squeeze(-1)
        kept = torch.zeros_like(taken)
        sources = {"keys": [pages.keys], "values": [pages.values], "both": [pages.values, pages.keys]}[self.config.by]
        count = max(1, round(self.config.share * taken.shape[-1] / len(sources)))
        for source in sources:
            # Tensor cores compare numbers of 16 bits ten times as fast as float32.
            found = nearest(self._scoped(source), torch.float16 if source.is_cuda else torch.float32)
            likeness = around(found, self.config.span).masked_fill(taken | kept, float("inf"))
            kept.scatter_(-1, likeness.topk(count, largest=False).indices, True)
        n, batch, heads, page = pages.taken.shape
        if self.config.scope == "page":
            return kept
        return kept.view(batch, heads, n, page).permute(2, 0, 1, 3)

    def _scoped(self, x: Tensor) -> Tensor:
        """Pages as ``[..., T, D]`` with all tokens of one scope in ``T``."""
        return x if self.config.scope == "page" else x.permute(1, 2, 0, 3, 4).flatten(2, 3)


class SalienceConfig(PolicyConfig):
    """Options of salience.

    ``share`` of the tokens of all pages that leave the window together, at most ``tiers.block_pages``, is kept for each head.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.02


class Salience(Anchors):
    """The tokens that the newest queries attend to most, for each head (SnapKV, arXiv:2404.14469).

    A token's score is its attention among the tokens that leave the window with it, averaged over the queries.
    """

    Config = SalienceConfig
    needs_queries = True

    def choose(self, pages: NewPages) -> Tensor:
        n, batch, heads, page, _ = pages.keys.shape
        if pages.queries is None:
            return torch.zeros_like(pages.taken)
        keys = pages.keys.permute(1, 2, 0, 3, 4).flatten(2, 3)
        weight = torch.softmax(pages.queries @ keys.transpose(-1, -2), -1).mean(-2)
        weight = weight.masked_fill(pages.taken.permute(1, 2, 0, 3).flatten(2), -1.0)
        count = max(1, round(self.config.share * weight.shape[-1]))
        kept = torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, weight.topk(count).indices, True)
        return kept.view(batch, heads, n, page).permute(2, 0, 1, 3)


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Each token's largest cosine with another, less the mean of all: ``[..., T, D]`` to ``[..., T]`` float32.

    Cosines are computed in `dtype`.
    """
    unit = torch.nn.functional.normalize(x - x.mean(-2, keepdim=True), dim=-1).flatten(0, -3).to(dtype)
    found = []
    for part in unit.split(max(1, COSINES // x.shape[-2] ** 2)):
        cosine = part @ part.transpose(-1, -2)
        cosine.diagonal(dim1=-2, dim2=-1).fill_(-1.0)
        found.append(cosine.amax(-1))
    return torch.cat(found).view(x.shape[:-1]).float()


def around(x: Tensor, span: int) -> Tensor:
    """The mean of `x` ``[..., T]`` over `span` tokens around each, fewer at the ends."""
    if span == 1:
        return x
    flat = torch.nn.functional.pad(x.flatten(0, -2).unsqueeze(1), (span // 2, (span - 1) // 2), value=float("nan"))
    return flat.unfold(-1, span, 1).nanmean(-1).view(x.shape)


@hookimpl
def argus_anchors() -> dict[str, type[Anchors]]:
    return {"sinks": Sinks, "lines": Lines, "novelty": Novelty, "salience": Salience}
