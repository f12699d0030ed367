"""The newest tokens of one layer, exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from argus.errors import ArgusError

WINDOW_STEP = 16
"""Tokens by which the window's buffer grows: the most that it holds beyond what it needs."""


@dataclass(frozen=True)
class Place:
    """What a step that is recorded and replayed finds on the device: its token's place in the window, and what it sees.

    Attributes
    ----------
    index : Tensor
        int64 ``[1]``, its place.
    count : Tensor
        int32 ``[2]``, tokens held, it included, and the position of the first.
    masks : dict of int or None to Tensor
        By a layer's reach, ``[B or 1, 1, 1, L]`` bool with room for more tokens, which positions are seen; none where all that
        are held are.
    """

    index: Tensor
    count: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)


class Window:
    """The newest tokens, exact, in order.

    A buffer takes what is written while it has room; what does not fit is held as it came until :meth:`settle`.

    Attributes
    ----------
    start : int
        Position of the first token held.
    buffer, fresh : tuple of Tensor or None
        Keys and values ``[B, H, T, D]``: those of `used` tokens and room for more; and those that came after them.
    reserved : bool
        Whether the buffer stays where it is as long as what is held fits it, since a recorded step writes to it.
    place : Place or None
        Where to write the token that :meth:`advance` has counted, while a step is recorded.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.start = 0
        self.used = 0
        self.buffer: tuple[Tensor, Tensor] | None = None
        self.fresh: tuple[Tensor, Tensor] | None = None
        self.reserved = False
        self.place: Place | None = None

    def __len__(self) -> int:
        return self.used + (self.fresh[0].shape[2] if self.fresh else 0)

    @property
    def room(self) -> int:
        """Tokens that the buffer has room for."""
        return 0 if self.buffer is None or self.fresh is not None else self.buffer[0].shape[2] - self.used

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write tokens ``[B, H, S, D]``."""
        steps = keys.shape[2]
        if self.place is not None and self.buffer is not None:
            for kept, new in zip(self.buffer, (keys, values), strict=True):
                kept.index_copy_(2, self.place.index, new.to(kept.dtype))
        elif self.fresh is not None:
            self.fresh = (torch.cat([self.fresh[0], keys], 2), torch.cat([self.fresh[1], values], 2))
        elif self.buffer is None or self.used + steps > self.buffer[0].shape[2]:
            self.fresh = (keys, values)
        else:
            for kept, new in zip(self.buffer, (keys, values), strict=True):
                kept[:, :, self.used : self.used + steps] = new
            self.used += steps

    def reserve(self, tokens: int) -> None:
        """Have a buffer with room for so many tokens in all, which stays where it is as long as they fit it."""
        self.settle()
        self.reserved = True
        if self.buffer is not None and self.buffer[0].shape[2] < tokens:
            wide = [torch.nn.functional.pad(kept, (0, 0, 0, tokens - kept.shape[2])) for kept in self.buffer]
            self.buffer = (wide[0], wide[1])

    def advance(self, tokens: int) -> None:
        """Count tokens that a recorded step writes to the buffer's next places; a negative number takes them back.

        Raises
        ------
        ArgusError
            If it has no such places.
        """
        if tokens > self.room:
            raise ArgusError(f"the window has room for {self.room} tokens, not for {tokens}")
        self.used += tokens

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values held, oldest first, as one or two consecutive parts."""
        held = []
        if self.buffer is not None and self.used:
            held.append((self.buffer[0][:, :, : self.used], self.buffer[1][:, :, : self.used]))
        if self.fresh is not None:
            held.append(self.fresh)
        return held

    def first(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, tokens, D]`` of the oldest tokens."""
        parts = self.parts()
        if parts[0][0].shape[2] >= tokens:
            return parts[0][0][:, :, :tokens], parts[0][1][:, :, :tokens]
        rest = tokens - parts[0][0].shape[2]
        # Of two dtypes torch.cat takes the one that holds both.
        keys, values = (torch.cat([parts[0][i], parts[1][i][:, :, :rest]], 2) for i in (0, 1))
        return keys, values

    def drop(self, tokens: int) -> None:
        """Forget the oldest tokens."""
        self._keep(tokens, len(self))

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens."""
        self._keep(0, len(self) - tokens)

    def reset(self, start: int) -> None:
        """Hold nothing; the next token has position `start`."""
        self.start, self.used = start, 0
        self.buffer = self.fresh = None
        self.reserved = False

    def _keep(self, begin: int, end: int) -> None:
        """Hold tokens `begin` to `end` only, as a view where they fit no buffer."""
        kept = []
        offset = 0
        for keys, values in self.parts():
            low, high = max(begin - offset, 0), min(end - offset, keys.shape[2])
            if low < high:
                kept.append((keys[:, :, low:high], values[:, :, low:high]))
            offset += keys.shape[2]
        self.start += begin
        if not kept:
            self.reset(self.start)
            return
        if begin == 0 and len(kept) == 1 and self.used and self.fresh is None:
            self.used = end
            return
        if self.buffer is None or (len(kept) == 1 and not self.reserved):
            self.buffer, self.used, self.fresh = None, 0, kept[0]
            return
        # What is left in the buffer moves to its front; what came after it stays as it came.
        if begin >= self.used:
            self.used, self.fresh = 0, kept[0]
            return
        self.used, self.fresh = kept[0][0].shape[2], kept[1] if len(kept) == 2 else None
        for whole, left in zip(self.buffer, kept[0], strict=True):
            whole[:, :, : self.used] = left.clone()

    def settle(self) -> None:
        """Move what was held as it came into a buffer with room for the next tokens, in the window's dtype."""
        if self.fresh is None:
            return
        tokens = len(self)
        if self.reserved and self.buffer is not None and tokens <= self.buffer[0].shape[2]:
            for kept, new in zip(self.buffer, self.fresh, strict=True):
                kept[:, :, self.used : tokens] = new
            self.fresh, self.used = None, tokens
            return
        batch, heads = self.fresh[0].shape[:2]
        size = -(-tokens // WINDOW_STEP) * WINDOW_STEP
        parts = self.parts()
        buffers = []
        for i in (0, 1):
            buffer = torch.empty(batch, heads, size, parts[0][i].shape[-1], dtype=self.dtype, device=self.fresh[i].device)
            filled = 0
            for part in parts:
                steps = part[i].shape[2]
                buffer[:, :, filled : filled + steps] = part[i]
                filled += steps
            buffers.append(buffer)
        self.buffer, self.fresh, self.used, self.reserved = (buffers[0], buffers[1]), None, tokens, False

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor held."""
        if self.buffer is not None:
            self.buffer = (change(self.buffer[0]), change(self.buffer[1]))
        if self.fresh is not None:
            self.fresh = (change(self.fresh[0]), change(self.fresh[1]))

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [*(self.buffer or ()), *(self.fresh or ())]
