"""Which positions a call's queries may see, known on the host: what lies beyond is neither decoded nor read."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from argus.attention import Query


@dataclass(frozen=True)
class Sight:
    """Bounds over all rows of a call, in tokens, both ends included.

    Attributes
    ----------
    first, last : int
        No row sees a position outside them.
    plain_first, plain_last : int
        Every row sees every position between them, and the mask adds nothing there.
    """

    first: int
    last: int
    plain_first: int
    plain_last: int

    def sees(self, first: int, last: int) -> bool:
        """Whether any row may see any position from `first` to `last`."""
        return first <= self.last and last >= self.first

    def plain(self, first: int, last: int) -> bool:
        """Whether no mask is needed for positions from `first` to `last`."""
        return self.plain_first <= first and last <= self.plain_last


def survey(mask: Tensor) -> Sight:
    """The sight that a mask ``[B or 1, 1 or Hq, S, L]``, boolean or additive, leaves; waits for the device once."""
    over = (0, 1, 2)
    if mask.dtype == torch.bool:
        lines = torch.stack([mask.any(0).any(0).any(0), mask.all(0).all(0).all(0)]).cpu()
    else:
        low, high = mask.amin(over), mask.amax(over)
        lines = torch.stack([high > torch.finfo(mask.dtype).min, (low == 0) & (high == 0)]).cpu()
    seen = lines[0].nonzero().flatten().tolist()
    if not seen:
        return Sight(0, -1, 0, -1)
    # The longest run of columns that every row sees lies between two neighbours that some row does not.
    ends = torch.tensor([-1, mask.shape[-1]], device="cpu")
    edges = torch.cat([ends[:1], (~lines[1]).nonzero().flatten(), ends[1:]])
    longest = int(edges.diff().argmax())
    return Sight(seen[0], seen[-1], int(edges[longest]) + 1, int(edges[longest + 1]) - 1)


KINDS = 2
"""Masks of a call: those of layers that see all tokens, and those of layers that see the newest."""


class Sights:
    """The sight of a call; a mask that layers of a model share is surveyed once."""

    def __init__(self) -> None:
        self._kept: list[tuple[weakref.ref[Tensor], int, Sight]] = []

    def of(self, query: Query) -> Sight:
        """The sight of `query`'s rows."""
        if query.mask is None:
            return Sight(0, query.start + query.length - 1, 0, query.start)
        if query.mask.is_cuda and torch.cuda.is_current_stream_capturing():
            return Sight(0, sys.maxsize, 0, -1)
        # Who writes to a mask may ask with it again; writes in inference mode are not counted.
        written = 0 if query.mask.is_inference() else query.mask._version
        for mask, version, sight in self._kept:
            if mask() is query.mask and version == written:
                return sight
        self._kept = [*self._kept[1 - KINDS :], (weakref.ref(query.mask), written, survey(query.mask))]
        return self._kept[-1][2]
