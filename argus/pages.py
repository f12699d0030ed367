"""Storage of one layer: pools of equal pages, and the exact window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from argus.errors import ArgusError

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
            part = {name: tensor[done : done + take] for name, tensor in payload.items()}
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
        int32 ``[1]``, tokens held, it included.
    masks : dict of int or None to Tensor
        By a layer's reach, ``[B or 1, 1, 1, L]`` bool, which positions are seen; none where all that are held are.
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
