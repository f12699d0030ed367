"""What is kept apart for good: tokens that anchors chose, numbers that outliers chose. Neither moves when codes do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from argus.backends.base import Dense, ExactRows, round_up
from argus.errors import ArgusError

EMPTY = -1
"""Position of a place that holds no token: heads and rows may keep different numbers of tokens."""
ROOM = 8
"""Places a row and head that there is room for, at least, where a step is recorded."""
MOST = (1 << 31) - 1
"""Outliers that one layer keeps of keys, or of values."""


class ExactTokens:
    """Tokens kept apart from pages, for each batch row and head its own: exact, or in 8 bits.

    In 8 bits a token's keys, and its values, are ``scale * code`` with codes from -127 to 127 and ``scale`` the largest size
    over 127, rounded up to FP16.

    Parameters
    ----------
    dtype : torch.dtype
        In which exact tokens are kept.
    eight : bool
        Whether they are kept in 8 bits instead.

    Attributes
    ----------
    holes : bool
        Whether any place is empty.
    used : int
        The first places a row and head, beyond which all are empty.
    reserved : bool
        Whether what is held stays where it is as long as it has room, since a recorded step reads it.
    """

    def __init__(self, dtype: torch.dtype, eight: bool = False) -> None:
        self.dtype, self.eight = dtype, eight
        self.holes = False
        self.used = 0
        self.reserved = False
        self._held: tuple[Tensor, ...] = ()

    @property
    def keys(self) -> Tensor | None:
        """``[B, H, T, D]`` in the exact dtype, or int8 codes."""
        return self._held[0] if self._held else None

    @property
    def values(self) -> Tensor | None:
        """As keys."""
        return self._held[1] if self._held else None

    @property
    def positions(self) -> Tensor | None:
        """``[B, H, T]`` int32, in tokens; :data:`EMPTY` where a row and head keeps fewer than ``T``."""
        return self._held[2] if self._held else None

    @property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        """``[B, H, T]`` float16, of keys and of values; None where they are exact."""
        return (self._held[3], self._held[4]) if self._held and self.eight else None

    @property
    def width(self) -> int:
        """Places a row and head."""
        return self._held[0].shape[2] if self._held else 0

    def part(self, last: int) -> Dense | None:
        """What is held as a backend sees it; `last`: a position that no token held comes after."""
        if self.keys is None or self.values is None:
            return None
        return Dense(self.keys, self.values, 0, last, self.positions, self.holes, self.scales)

    def take(self, new: tuple[Tensor, ...], holes: bool) -> None:
        """Hold more places, as :meth:`tensors` tells them, where there is room or beyond; `holes`: some of them are empty."""
        if self.reserved and self.used + new[0].shape[2] > self.width and self.positions is not None:
            self._keep(self.positions)
        end = self.used + new[0].shape[2]
        if not self._held:
            self._held = tuple(x.clone(memory_format=torch.contiguous_format) for x in new)
        elif end > self.width:
            self._held = tuple(torch.cat((held[:, :, : self.used], x), 2) for held, x in zip(self._held, new, strict=True))
        else:
            for held, x in zip(self._held, new, strict=True):
                held[:, :, self.used : end] = x
        self.used = end
        self.holes = self.holes or holes or end < self.width

    def reserve(self) -> None:
        """Have room for an eighth more places, which are empty."""
        if not self._held:
            return
        self.reserved = True
        room = self.used + max(ROOM, self.used // 8) - self.width
        if room > 0:
            pads = [(0, 0, 0, room), (0, 0, 0, room), *[(0, room)] * 3]
            fills = (0, 0, EMPTY, 0, 0)
            self._held = tuple(
                torch.nn.functional.pad(x, pad, value=fill) for x, pad, fill in zip(self._held, pads, fills, strict=False)
            )
            self.holes = True

    def crop(self, length: int) -> None:
        """Forget tokens from position `length` on."""
        if self.positions is not None:
            self._keep(self.positions.masked_fill(self.positions >= length, EMPTY))

    def forget(self, position: int) -> None:
        """Forget tokens before `position`; where they are is empty as long as what is held stays there."""
        if self.positions is None:
            return
        if self.reserved:
            self.positions.masked_fill_(self.positions < position, EMPTY)
            self.holes = True
        else:
            self._keep(self.positions.masked_fill(self.positions < position, EMPTY))

    def _keep(self, positions: Tensor) -> None:
        """Keep the tokens that `positions`, those held, still tell."""
        used = (positions != EMPTY).flatten(0, 1).any(0)
        held = (*self._held[:2], positions, *self._held[3:])
        self._held = tuple(x[:, :, used] for x in held) if bool(used.any()) else ()
        self.used, self.reserved = self.width, False
        self.holes = self.positions is not None and bool((self.positions == EMPTY).any())

    def select(self, rows: Tensor) -> None:
        """Replace the batch by `rows` of it."""
        self.map(lambda x: x.index_select(0, rows))

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor held."""
        self._held = tuple(map(change, self._held))

    def write(self, keys: Tensor, values: Tensor, start: int) -> None:
        """Write the tokens kept into dense ``[B, H, T, D]`` keys and values of positions `start` on, in place."""
        if self.positions is None or self.keys is None or self.values is None:
            return
        end = start + keys.shape[2]
        batch, head, place = ((self.positions >= start) & (self.positions < end)).nonzero(as_tuple=True)
        token = self.positions[batch, head, place].long() - start
        for place_in, (target, held) in enumerate(((keys, self.keys), (values, self.values))):
            chosen = held[batch, head, place].to(target.dtype)
            if self.scales is not None:
                chosen *= self.scales[place_in][batch, head, place].to(target.dtype).unsqueeze(-1)
            target[batch, head, token] = chosen

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return list(self._held)


def add_tokens(held: Sequence[ExactTokens], keys: Tensor, values: Tensor, start: int, kept: Tensor) -> None:
    """Keep the tokens of pages that `kept` marks.

    Parameters
    ----------
    held : sequence of ExactTokens
        Of one kind; the batch rows of the others are those of each of these, one after another.
    keys, values : Tensor
        ``[n, B, H, P, D]``.
    start : int
        Position of the first token.
    kept : Tensor
        ``[n, B, H, P]`` bool.
    """
    flat = kept.permute(1, 2, 0, 3).flatten(2)
    counts = flat.sum(-1)
    each = counts.view(len(held), -1)
    most, least = torch.stack([each.amax(-1), each.amin(-1)]).tolist()
    width = max(most)
    if width == 0:
        return
    order = torch.argsort(flat.to(torch.uint8), dim=-1, descending=True, stable=True)[..., :width]
    empty = torch.arange(width, device=kept.device) >= counts.unsqueeze(-1)
    positions = (order + start).to(torch.int32).masked_fill(empty, EMPTY)
    chosen = [
        x.permute(1, 2, 0, 3, 4).flatten(2, 3).gather(2, order.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
        for x in (keys, values)
    ]
    if held[0].eight:
        (key_codes, key_scale), (value_codes, value_scale) = map(to_eight, chosen)
        new: tuple[Tensor, ...] = (key_codes, value_codes, positions, key_scale, value_scale)
    else:
        new = (*(x.to(held[0].dtype) for x in chosen), positions)
    for one, own, wide, narrow in zip(held, zip(*(x.chunk(len(held)) for x in new), strict=True), most, least, strict=True):
        if wide:
            one.take(tuple(x[:, :, :wide] for x in own), narrow < wide)


def to_eight(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 and scale float16 ``[..., T]`` of tokens ``[..., T, D]``."""
    scale = round_up(x.float().abs().amax(-1) / 127)
    step = scale.float().masked_fill(scale == 0, 1.0).unsqueeze(-1)
    return (x.float() / step).round_().clamp_(-127, 127).to(torch.int8), scale


class ExactNumbers:
    """Outliers of one role.

    Attributes
    ----------
    dtype : torch.dtype
        In which they are kept.
    rows : ExactRows or None
        None where no page has been given any.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rows: ExactRows | None = None

    def add(self, pages: Tensor, chosen: Tensor, first: int) -> None:
        """Keep the numbers of ``[n, B, H, P, D]`` pages that `chosen` marks, for the ``n`` pages from `first` on, the next.

        Raises
        ------
        ArgusError
            If more than 2^31 - 1 are kept in all.
        """
        new = ExactRows.of(pages, chosen, self.dtype, first)
        held = len(new.numbers) + (0 if self.rows is None else len(self.rows.numbers))
        if held > MOST:
            raise ArgusError(f"outliers: {held} numbers of one layer are to be kept exact; allowed: {MOST}")
        self.rows = new if self.rows is None else self.rows.joined(new)

    def crop(self, pages: int) -> None:
        """Forget pages from `pages` on."""
        if self.rows is not None:
            self.rows = self.rows.part(0, max(0, pages - self.rows.first))

    def forget(self, page: int) -> None:
        """Forget pages before `page`."""
        if self.rows is not None:
            self.rows = self.rows.part(max(0, page - self.rows.first), None)

    def select(self, rows: Tensor) -> None:
        """Replace the batch by `rows` of it."""
        if self.rows is not None:
            self.rows = self.rows.select(rows)

    def over(self, decoded: Tensor, pages: Sequence[int]) -> Tensor:
        """Decoded pages ``[n, B, H, P, D]`` with the numbers kept of them: a copy where there are any."""
        return decoded if self.rows is None else self.rows.over(decoded, torch.tensor(pages, device=decoded.device))

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [] if self.rows is None else list(self.rows.tensors())
