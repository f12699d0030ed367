"""Pools of equal pages, and pages themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Slab = dict[str, Tensor]
"""Named tensors, each ``[capacity, B, ...]``, of up to ``slab_pages`` pages."""


def positions(rows: Sequence[int], like: Tensor) -> slice | Tensor:
    """An index of `rows` on the device of `like`: a slice where they follow each other, which needs no copy to the device."""
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=like.device)


def as_bytes(x: Tensor) -> Tensor:
    """The same storage as uint8, whose rows can be indexed whatever the dtype is."""
    return x.view(torch.uint8)


class Pool:
    """Pages of one payload structure, dense in slabs of bounded size.

    A full slab is never copied again, an emptied one is freed, and a hole is filled with the pool's last page: the pages
    held are always the first ``len(pages)`` slots, so a slab is a block that needs no gathering.

    Attributes
    ----------
    slab_pages : int
        Pages a slab holds at most.
    slabs : list of dict of str to Tensor
        All but the last are full.
    pages : list of int
        The page in each slot.
    """

    def __init__(self, slab_pages: int) -> None:
        self.slab_pages = slab_pages
        self.slabs: list[Slab] = []
        self.pages: list[int] = []

    def __len__(self) -> int:
        return len(self.pages)

    def add(self, payload: Slab, pages: Sequence[int]) -> None:
        """Keep `payload` (tensors ``[len(pages), B, ...]``) for `pages`."""
        done = 0
        while done < len(pages):
            used = len(self.pages) % self.slab_pages
            take = min(len(pages) - done, self.slab_pages - used)
            index = len(self.pages) // self.slab_pages
            part = payload if take == len(pages) else {name: tensor[done : done + take] for name, tensor in payload.items()}
            if index == len(self.slabs):
                self.slabs.append({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in part.items()})
            else:
                self._append(self.slabs[index], part, used)
            self.pages += pages[done : done + take]
            done += take

    @staticmethod
    def _append(slab: Slab, part: Slab, used: int) -> None:
        for name, tensor in part.items():
            kept = slab[name]
            if kept.shape[0] < used + tensor.shape[0]:
                slab[name] = torch.cat([kept[:used], tensor])
            else:
                kept[used : used + tensor.shape[0]] = tensor

    def take(self, pages: Sequence[int]) -> Slab:
        """The payloads of `pages`, in their order: views where they lie so, until pages are added or removed."""
        place = {page: slot for slot, page in enumerate(self.pages)}
        parts = [self._rows(index, rows) for index, rows in self._by_slab([place[page] for page in pages])]
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def remove(self, pages: Sequence[int]) -> None:
        """Forget `pages`, the last pages filling their slots; call :meth:`trim` to give back their memory."""
        place = {page: slot for slot, page in enumerate(self.pages)}
        gone = {place[page] for page in pages}
        left = len(self.pages) - len(gone)
        holes = sorted(slot for slot in gone if slot < left)
        fillers = [slot for slot in range(left, len(self.pages)) if slot not in gone]
        done = 0
        for index, rows in self._by_slab(fillers):
            payload = self._rows(index, rows)
            for target, slots in self._by_slab(holes[done : done + len(rows)]):
                where = positions(slots, next(iter(payload.values())))
                for name, tensor in self.slabs[target].items():
                    # A view of the slab with the holes goes into a slice of it, but not to single places.
                    moved = payload[name][: len(slots)]
                    as_bytes(tensor)[where] = as_bytes(moved if isinstance(where, slice) else moved.clone())
                payload = {name: tensor[len(slots) :] for name, tensor in payload.items()}
            done += len(rows)
        for hole, filler in zip(holes, fillers, strict=True):
            self.pages[hole] = self.pages[filler]
        del self.pages[left:]

    def _by_slab(self, slots: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Slots as runs of one slab each, in their order: which slab, and the rows in it."""
        runs: list[tuple[int, list[int]]] = []
        for slot in slots:
            index, row = divmod(slot, self.slab_pages)
            if not runs or runs[-1][0] != index:
                runs.append((index, []))
            runs[-1][1].append(row)
        return runs

    def _rows(self, index: int, rows: Sequence[int]) -> Slab:
        """Rows of one slab: a view where they follow each other."""
        slab = self.slabs[index]
        where = positions(rows, next(iter(slab.values())))
        if isinstance(where, slice):
            return {name: tensor[where] for name, tensor in slab.items()}
        return {name: as_bytes(tensor)[where].view(tensor.dtype) for name, tensor in slab.items()}

    def trim(self) -> None:
        """Give back memory that no page uses."""
        full, rest = divmod(len(self.pages), self.slab_pages)
        del self.slabs[full + (rest > 0) :]
        if rest:
            slab = self.slabs[-1]
            for name, tensor in slab.items():
                if tensor.shape[0] > rest:
                    slab[name] = tensor[:rest].clone()

    def blocks(self) -> Iterator[tuple[Slab, list[int]]]:
        """Each slab's used part, the very tensors where all is used, and its pages."""
        for index, slab in enumerate(self.slabs):
            pages = self.pages[index * self.slab_pages : (index + 1) * self.slab_pages]
            if pages:
                used = len(pages)
                yield {name: x if x.shape[0] == used else x[:used] for name, x in slab.items()}, pages

    def select(self, rows: Tensor) -> None:
        """Replace the batch by `rows` of it."""
        self.map(lambda tensor: tensor.index_select(1, rows))

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor held."""
        for slab in self.slabs:
            for name, tensor in slab.items():
                slab[name] = change(tensor)


def to_pages(x: Tensor, size: int) -> Tensor:
    """``[B, H, n * P, D]`` as ``[n, B, H, P, D]``."""
    return x.unflatten(2, (-1, size)).permute(2, 0, 1, 3, 4)


def smooth(x: Tensor, kept: Tensor | None, chosen: Tensor | None) -> Tensor:
    """Pages with all that is kept exact replaced by the channel's mean over the rest, so that it widens no range."""
    if kept is None and chosen is None:
        return x.contiguous()
    apart = torch.zeros_like(x, dtype=torch.bool) if kept is None else kept.unsqueeze(-1).expand_as(x)
    if chosen is not None:
        apart = apart | chosen
    rest = x.masked_fill(apart, 0.0)
    count = (~apart).sum(-2, keepdim=True).clamp_min(1)
    return torch.where(apart, rest.sum(-2, keepdim=True) / count, rest)
