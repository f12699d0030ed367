"""What a cache has seen: its tokens, and padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from argus.moves import Context


@dataclass
class Transcript:
    """The tokens that a cache has seen, where a policy asks for them, and each row's padding.

    Attributes
    ----------
    wanted : bool
        Whether a policy asks for tokens.
    tokens : Tensor or None
        ``[B, L]`` int32, :data:`UNKNOWN` where embeddings came without them.
    padding : Tensor or None
        ``[B]`` int64, tokens of padding on the left.
    most : int
        The largest padding of a row.
    """

    wanted: bool
    tokens: Tensor | None = None
    padding: Tensor | None = None
    most: int = 0

    def note(self, seen: int, tokens: Tensor | None, mask: Tensor | None) -> None:
        """Note the `tokens` ``[B, S]`` and the mask of a forward pass over a cache of `seen` tokens."""
        if seen == 0:
            self.forget()
        if seen <= self.most and isinstance(mask, Tensor) and mask.dim() == 2:
            self.padding = (mask.cumsum(-1) == 0).sum(-1)
            self.most = int(self.padding.amax())
        if self.wanted and tokens is not None and (seen == 0 or self.tokens is not None):
            tokens = tokens.to(torch.int32)
            self.tokens = tokens if self.tokens is None else torch.cat([self.tokens[:, :seen], tokens], 1)

    def forget(self) -> None:
        """Forget everything."""
        self.tokens, self.padding, self.most = None, None, 0

    def context(self, device: torch.device, queries: Tensor | None = None) -> Context:
        """What pages on `device` are told when they are born."""
        tokens, padding = (None if x is None else x.to(device) for x in (self.tokens, self.padding))
        return Context(tokens, padding, queries)

    def select(self, rows: Tensor) -> None:
        """Replace the batch by `rows` of it."""
        self.tokens, self.padding = (
            None if x is None else x.index_select(0, rows.to(x.device)) for x in (self.tokens, self.padding)
        )

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Every tensor held."""
        return [("tokens", tensor) for tensor in (self.tokens, self.padding) if tensor is not None]
