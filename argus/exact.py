"""What is kept apart for good: tokens that anchors chose, numbers that outliers chose. Neither moves when codes do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from argus.backends.base import Dense, Patch, round_up

EMPTY = -1
"""Position of a place that holds no token: heads and rows may keep different numbers of tokens."""


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
    """

    def __init__(self, dtype: torch.dtype, eight: bool = False) -> None:
        self.dtype, self.eight = dtype, eight
        self.holes = False
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

    def add(self, keys: Tensor, values: Tensor, start: int, kept: Tensor) -> None:
        """Keep the tokens of pages that `kept` marks.

        Parameters
        ----------
        keys, values : Tensor
            ``[n, B, H, P, D]``.
        start : int
            Position of the first token.
        kept : Tensor
            ``[n, B, H, P]`` bool.
        """
        flat = kept.permute(1, 2, 0, 3).flatten(2)
        counts = flat.sum(-1)
        width = int(counts.amax())
        if width == 0:
            return
        order = torch.argsort(flat.to(torch.uint8), dim=-1, descending=True, stable=True)[..., :width]
        empty = torch.arange(width, device=kept.device) >= counts.unsqueeze(-1)
        positions = (order + start).to(torch.int32).masked_fill(empty, EMPTY)
        chosen = [
            x.permute(1, 2, 0, 3, 4).flatten(2, 3).gather(2, order.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
            for x in (keys, values)
        ]
        if self.eight:
            (key_codes, key_scale), (value_codes, value_scale) = map(to_eight, chosen)
            new: tuple[Tensor, ...] = (key_codes, value_codes, positions, key_scale, value_scale)
        else:
            new = (*(x.to(self.dtype) for x in chosen), positions)
        self._held = tuple(torch.cat(pair, 2) for pair in zip(self._held, new, strict=True)) if self._held else new
        self.holes = self.holes or bool(empty.any())

    def crop(self, length: int) -> None:
        """Forget tokens from position `length` on."""
        if self.positions is not None:
            self._keep(self.positions.masked_fill(self.positions >= length, EMPTY))

    def forget(self, position: int) -> None:
        """Forget tokens before `position`."""
        if self.positions is not None:
            self._keep(self.positions.masked_fill(self.positions < position, EMPTY))

    def _keep(self, positions: Tensor) -> None:
        """Keep the tokens that `positions`, those held, still tell."""
        used = (positions != EMPTY).flatten(0, 1).any(0)
        held = (*self._held[:2], positions, *self._held[3:])
        self._held = tuple(x[:, :, used] for x in held) if bool(used.any()) else ()
        self.holes = self.positions is not None and bool((self.positions == EMPTY).any())

    def select(self, rows: Tensor) -> None:
        """Replace the batch by `rows` of it."""
        self._held = tuple(x.index_select(0, rows) for x in self._held)

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


def to_eight(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 and scale float16 ``[..., T]`` of tokens ``[..., T, D]``."""
    scale = round_up(x.float().abs().amax(-1) / 127)
    step = scale.float().masked_fill(scale == 0, 1.0).unsqueeze(-1)
    return (x.float() / step).round_().clamp_(-127, 127).to(torch.int8), scale


class ExactNumbers:
    """Outliers of one role: exact numbers of pages, row after row.

    A row is one page, batch row and head. Numbers of a row are kept together, rows in the order of (page, batch, head).

    Attributes
    ----------
    first : int
        The first page that has rows.
    counts : Tensor
        ``[pages, B, H]`` int32, numbers a row.
    places : Tensor
        int16 (int32 for pages of more than 32768 numbers), ``[N]``: index in a row's ``P * D`` numbers.
    numbers : Tensor
        ``[N]`` in the cache's exact dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.first = 0
        self.counts: Tensor | None = None
        self.places: Tensor | None = None
        self.numbers: Tensor | None = None

    def add(self, pages: Tensor, chosen: Tensor, first: int) -> None:
        """Keep the numbers of ``[n, B, H, P, D]`` pages that `chosen` marks, for the ``n`` pages from `first` on, the next."""
        flat = chosen.flatten(-2)
        index = torch.int16 if flat.shape[-1] <= 1 << 15 else torch.int32
        counts = flat.sum(-1, dtype=torch.int32)
        places = flat.nonzero()[:, -1].to(index)
        numbers = pages.flatten(-2)[flat].to(self.dtype)
        if self.counts is None or self.places is None or self.numbers is None:
            self.counts, self.places, self.numbers, self.first = counts, places, numbers, first
        else:
            self.counts = torch.cat([self.counts, counts])
            self.places = torch.cat([self.places, places])
            self.numbers = torch.cat([self.numbers, numbers])

    def crop(self, pages: int) -> None:
        """Forget pages from `pages` on."""
        self._keep(0, max(0, pages - self.first))

    def forget(self, page: int) -> None:
        """Forget pages before `page`."""
        self._keep(max(0, page - self.first), None)
        self.first = max(self.first, page)

    def _keep(self, begin: int, end: int | None) -> None:
        """Keep some of the pages that have rows, one after another."""
        if self.counts is None or self.places is None or self.numbers is None:
            return
        before, kept = int(self.counts[:begin].sum()), int(self.counts[begin:end].sum())
        self.counts = self.counts[begin:end].clone()
        self.places, self.numbers = (x[before : before + kept].clone() for x in (self.places, self.numbers))
        if not len(self.counts):
            self.counts = self.places = self.numbers = None

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Indices into the numbers of `rows`, one row after another, and which of `rows` each belongs to."""
        counts = self.counts.flatten().long() if self.counts is not None else rows
        starts = counts.cumsum(0) - counts
        wanted = counts[rows]
        owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), wanted)
        first = wanted.cumsum(0) - wanted
        return starts[rows][owner] + torch.arange(len(owner), device=rows.device) - first[owner], owner

    def select(self, rows: Tensor) -> None:
        """Replace the batch by `rows` of it."""
        if self.counts is None or self.places is None or self.numbers is None:
            return
        numbering = torch.arange(self.counts.numel(), device=rows.device).view(self.counts.shape)
        index, _ = self._rows(numbering.index_select(1, rows).flatten())
        self.places, self.numbers = self.places[index], self.numbers[index]
        self.counts = self.counts.index_select(1, rows)

    def write(self, decoded: Tensor, pages: Sequence[int]) -> Tensor:
        """Write the numbers kept of `pages` into them, decoded, ``[n, B, H, P, D]``, in place."""
        if self.counts is None or self.places is None or self.numbers is None:
            return decoded
        _, batch, heads = self.counts.shape
        wanted = torch.tensor(pages, device=decoded.device) - self.first
        rows = (wanted.unsqueeze(-1) * batch * heads + torch.arange(batch * heads, device=decoded.device)).flatten()
        index, owner = self._rows(rows)
        size = decoded.shape[-1] * decoded.shape[-2]
        decoded.view(-1)[owner * size + self.places[index].long()] = self.numbers[index].to(decoded.dtype)
        return decoded

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [x for x in (self.counts, self.places, self.numbers) if x is not None]


class OutlierPatch(Patch):
    """The outliers of one block of pages."""

    def __init__(self, numbers: dict[str, ExactNumbers], pages: Sequence[int]) -> None:
        self.numbers = numbers
        self.pages = pages

    def __call__(self, role: str, pages: Tensor) -> Tensor:
        return self.numbers[role].write(pages.contiguous(), self.pages)

    def part(self, begin: int, end: int) -> OutlierPatch:
        return OutlierPatch(self.numbers, self.pages[begin:end])
