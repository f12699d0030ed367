"""Numbers of pages that are kept exact, as backends read them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExactRows:
    """Exact numbers of one role of pages, row after row.

    A row is one page, batch row and head. Numbers of a row are kept together, rows in the order of (page, batch, head).

    Attributes
    ----------
    ends : Tensor
        ``[pages, B, H]`` int32, where each row's numbers end.
    places : Tensor
        int16 (int32 for pages of more than 32768 numbers), ``[N]``: index in a row's ``P * D`` numbers, in order.
    numbers : Tensor
        ``[N]`` of any floating dtype.
    first : int
        The first page that has rows.
    """

    ends: Tensor
    places: Tensor
    numbers: Tensor
    first: int = 0

    @classmethod
    def of(cls, pages: Tensor, chosen: Tensor, dtype: torch.dtype, first: int = 0) -> ExactRows:
        """The numbers of ``[n, B, H, P, D]`` pages that `chosen` marks, for the ``n`` pages from `first` on."""
        flat = chosen.flatten(-2)
        ends = flat.sum(-1).flatten().cumsum(0, dtype=torch.int32).view(flat.shape[:-1])
        index = torch.int16 if flat.shape[-1] <= 1 << 15 else torch.int32
        return cls(ends, flat.nonzero()[:, -1].to(index), pages.flatten(-2)[flat].to(dtype), first)

    @property
    def counts(self) -> Tensor:
        """``[pages, B, H]`` int32, numbers a row."""
        ends = self.ends.flatten()
        return torch.diff(ends, prepend=ends.new_zeros(1)).view(self.ends.shape)

    def index(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Indices into the numbers of `rows`, one row after another, and which of `rows` each belongs to."""
        counts = self.counts.flatten()
        wanted = counts[rows].long()
        owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), wanted)
        begin = self.ends.flatten()[rows] - wanted.cumsum(0)
        return begin[owner] + torch.arange(len(owner), device=rows.device), owner

    def write(self, decoded: Tensor, pages: Tensor) -> Tensor:
        """Write the numbers kept of `pages`, int64, into them, decoded, ``[n, B, H, P, D]`` and contiguous, in place."""
        inner = decoded.shape[1] * decoded.shape[2]
        rows = ((pages - self.first).unsqueeze(-1) * inner + torch.arange(inner, device=pages.device)).flatten()
        index, owner = self.index(rows)
        size = decoded.shape[-1] * decoded.shape[-2]
        decoded.view(-1)[owner * size + self.places[index].long()] = self.numbers[index].to(decoded.dtype)
        return decoded

    def over(self, decoded: Tensor, pages: Tensor) -> Tensor:
        """A copy of `pages`, decoded, with the numbers kept of them: a tier may decode to what it keeps."""
        return self.write(decoded.clone(memory_format=torch.contiguous_format), pages)

    def part(self, begin: int, end: int | None) -> ExactRows | None:
        """Copies of what is kept of pages `begin` to `end` of those that have rows; None: there are none."""
        ends = self.ends[begin:end]
        if not len(ends):
            return None
        before, last = (int(self.ends[begin - 1, -1, -1]) if begin else 0), int(ends[-1, -1, -1])
        places, numbers = (x[before:last].clone() for x in (self.places, self.numbers))
        return ExactRows(ends - before, places, numbers, self.first + begin)

    def joined(self, other: ExactRows) -> ExactRows:
        """The same with `other`, of the pages that follow, behind."""
        ends = torch.cat([self.ends, other.ends + len(self.numbers)])
        places, numbers = torch.cat([self.places, other.places]), torch.cat([self.numbers, other.numbers])
        return ExactRows(ends, places, numbers, self.first)

    def select(self, rows: Tensor) -> ExactRows:
        """The same with the batch replaced by `rows` of it."""
        numbering = torch.arange(self.ends.numel(), device=rows.device).view(self.ends.shape)
        index, _ = self.index(numbering.index_select(1, rows).flatten())
        counts = self.counts.index_select(1, rows)
        ends = counts.flatten().cumsum(0, dtype=torch.int32).view(counts.shape)
        return replace(self, ends=ends, places=self.places[index], numbers=self.numbers[index])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every tensor held."""
        return self.ends, self.places, self.numbers
