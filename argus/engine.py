"""The engine: one layer's cache. Write, attend, crop, select; it knows stages by their place, never by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from argus.attention import Query
from argus.backends.base import Dense, Segment
from argus.blocks import Blocks, payload_of
from argus.errors import ArgusError
from argus.exact import ExactNumbers, ExactTokens
from argus.pages import Pool
from argus.plan import Plan
from argus.tiers.base import ROLES, Role
from argus.window import Window

P = ParamSpec("P")
R = TypeVar("R")


def at_home(method: Callable[Concatenate[LayerCache, P], R]) -> Callable[Concatenate[LayerCache, P], R]:
    """A method that is called in :func:`home`."""

    @wraps(method)
    def call(layer: LayerCache, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with home(layer):
            return method(layer, *args, **kwargs)

    return call


def unscaled(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off where it is on: a cache's dtypes are its own."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


@contextmanager
def home(layer: LayerCache) -> Iterator[None]:
    """Autocast off, and the device that holds the layer the current one, as kernels ask of it."""
    with torch.cuda.device(layer.home), unscaled(layer.device):
        yield


class Held(NamedTuple):
    """What a recorded step of one layer reads: segments, the window's buffer, and the keys that anchors chose."""

    segments: list[Segment]
    window: tuple[Tensor, Tensor] | None
    anchored: Tensor | None


class LayerCache:
    """The cache of one attention layer.

    Parameters
    ----------
    plan : Plan
    reach : int or None
        Tokens that a query sees, itself the last, where attention is local: pages that no query will see any more are
        forgotten, but for one page so that as many tokens can be cropped; None: all.

    Attributes
    ----------
    plan : Plan
    reach : int or None
    patient : bool
        Whether pages that no query will see are held until :meth:`forget`, so that any number of tokens can be cropped before.
    unsure : int
        Newest tokens that the next crop may take back, which let no page leave the window.
    window : Window
        The newest tokens.
    pools : list of Pool
        One a stage.
    where : list of int
        The stage of each page, oldest page first; page ``i`` holds positions ``i * page_size`` on. What it says of pages
        that are forgotten means nothing.
    forgotten : int
        How many of the oldest pages are held no more.
    salience : list of float
        Of each page, as aging policies are told of it.
    exact : ExactTokens
    outliers : dict of str to ExactNumbers
    blocks : Blocks
        Pages as backends see them.
    shape : tuple of int or None
        Batch, key-value heads and head_dim of the keys written last.
    value_dim : int
        The head_dim of values.
    home : int
        Which GPU holds it; -1: none.
    torn : bool
        Whether pages were being kept, or were on their way from stage to stage, when something was raised: what is held is not
        what it should be.
    """

    def __init__(self, plan: Plan, reach: int | None = None) -> None:
        self.plan = plan
        self.reach = reach
        self.patient = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        plan = self.plan
        self.window = Window(plan.dtype)
        self.pools = [Pool(plan.block_pages) for _ in plan.stages]
        self.where: list[int] = []
        self.forgotten = 0
        self.salience: list[float] = []
        self.exact = ExactTokens(plan.dtype, plan.eight)
        self.outliers: dict[Role, ExactNumbers] = {role: ExactNumbers(plan.dtype) for role in ROLES}
        self.shape: tuple[int, int, int] | None = None
        self.value_dim = 0
        self.home = -1
        self.torn = False
        self.unsure = 0
        self.blocks = Blocks(plan)

    @property
    def device(self) -> torch.device:
        """Where the layer is held; of an empty one none is needed."""
        return next((tensor.device for _, tensor in self.tensors()), torch.device("cpu"))

    @property
    def values(self) -> int:
        """Numbers that the tokens held have in keys and values together."""
        batch, heads, dim = self.shape or (0, 0, 0)
        return batch * heads * (dim + self.value_dim) * (self.length - self.forgotten * self.plan.page_size)

    @property
    def length(self) -> int:
        """Tokens written, those that are forgotten too."""
        return len(self.where) * self.plan.page_size + len(self.window)

    @property
    def due(self) -> int:
        """Pages that leave the window at the next turn (:func:`argus.turns.age`)."""
        pages = max(0, len(self.window) - self.unsure - self.plan.window) // self.plan.page_size
        return pages if pages >= self.plan.leaving else 0

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Take the next tokens, ``[B, H, S, D]``, exact.

        Raises
        ------
        ArgusError
            If batch, heads or a head_dim are not those of the tokens held.
        """
        shape, value_dim = (keys.shape[0], keys.shape[1], keys.shape[3]), values.shape[3]
        if self.length and (shape, value_dim) != (self.shape, self.value_dim):
            dims, held = (*shape, value_dim), (*(self.shape or ()), self.value_dim)
            raise ArgusError(f"tokens of batch, heads and head_dims {dims} cannot follow those held, of {held}")
        self._leave_inference()
        self.shape, self.value_dim, self.home = shape, value_dim, keys.get_device()
        self.window.append(keys, values)
        self._doubt(keys.shape[2])

    def advance(self, tokens: int) -> None:
        """Count tokens that a recorded step writes, as :meth:`argus.window.Window.advance`."""
        self.window.advance(tokens)
        self._doubt(tokens)

    def _doubt(self, tokens: int) -> None:
        """Keep the newest tokens in the window where the next crop may take them back."""
        self.unsure = min(tokens, self.plan.page_size) if self.patient else 0

    @property
    def writable(self) -> bool:
        """Whether what is held may be written in place: not outside of inference mode where it was made in it."""
        if torch.is_inference_mode_enabled():
            return True
        written = (
            *self.window.tensors(),
            *self.exact.tensors(),
            *(next(iter(slab.values())) for pool in self.pools for slab in pool.slabs),
        )
        return not any(tensor.is_inference() for tensor in written)

    def _leave_inference(self) -> None:
        """Copy what is written in place, where it may not be."""
        if self.writable:
            return
        self.window.map(torch.Tensor.clone)
        self.exact.map(torch.Tensor.clone)
        for pool in self.pools:
            pool.map(torch.Tensor.clone)
        self.blocks.renew(self.pools, self.outliers)

    @at_home
    def attend(self, query: Query, sinks: Tensor | None = None) -> Tensor:
        """Answer queries over all that is held.

        Parameters
        ----------
        query : Query
        sinks : Tensor or None
            ``[Hq]`` logits of learned attention sinks.

        Returns
        -------
        Tensor
            ``[B, H, R, D]`` float32.
        """
        return self.plan.backend.attend(query, self.segments(), self.dense(), sinks)

    def dense(self) -> list[Dense]:
        """The exact tokens: what anchors chose, and the window."""
        parts = []
        start = self.window.start
        if self.window.place is not None and self.window.buffer is not None:
            whole = Dense(*self.window.buffer, start, start + len(self.window) - 1, count=self.window.place.count)
            return [whole, *self._anchored()]
        for keys, values in self.window.parts():
            end = start + keys.shape[2]
            parts.append(Dense(keys, values, start, end - 1))
            start = end
        return [*parts, *self._anchored()]

    def _anchored(self) -> list[Dense]:
        """The tokens that anchors chose."""
        anchors = self.exact.part(len(self.where) * self.plan.page_size - 1)
        return [] if anchors is None else [anchors]

    @property
    def room(self) -> int:
        """Tokens that the window's buffer takes until pages move, the one after which they do included."""
        return min(self.window.room, self.plan.most - len(self.window))

    @property
    def recordable(self) -> bool:
        """Whether a step of one token can be recorded."""
        if not self.where or not self.window.used or self.window.fresh is not None:
            return False
        return self.plan.backend.recordable(self.segments(), self.dense()[0])

    def reserve(self) -> None:
        """Have room for all tokens until pages move, and where they go then, as far as may be."""
        self._leave_inference()
        self.window.reserve(self.plan.most)
        self.exact.reserve()
        self.plan.backend.reserve(self.segments())

    def held(self) -> Held:
        """What a step that is recorded now reads."""
        return Held(self.segments(), self.window.buffer, self.exact.keys)

    def follow(self, before: Held) -> bool:
        """Whether a step that was recorded when `before` was held reads what is held now, pages that have moved since too."""
        now = self.held()
        if now.window is not before.window or now.anchored is not before.anchored:
            return False
        return now.segments is before.segments or self.plan.backend.follow(before.segments, now.segments)

    def segments(self) -> list[Segment]:
        """The pages of every stage, in bounded blocks."""
        return self.blocks.of(self.pools, self.outliers)

    @at_home
    def forget(self) -> None:
        """Forget the pages that no later query sees."""
        self.unsure = 0
        self._leave_inference()
        self.leave_out()
        self.tidy()

    def leave_out(self) -> None:
        """Forget the pages that no later query sees, in the window too; call :meth:`tidy` when pages have moved."""
        size, held = self.plan.page_size, len(self.where)
        gone = 0 if self.reach is None else min(held + self.due, (self.length - self.reach + 1) // size - 1)
        if gone <= self.forgotten:
            return
        self.blocks.held = None
        for stage, pool in enumerate(self.pools):
            pool.remove([page for page in range(self.forgotten, min(gone, held)) if self.where[page] == stage])
        if gone > held:
            self.window.drop((gone - held) * size)
            self.where += [len(self.pools) - 1] * (gone - held)
            self.salience += [0.0] * (gone - held)
        self.exact.forget(gone * size)
        for numbers in self.outliers.values():
            numbers.forget(gone)
        self.forgotten = gone

    def tidy(self) -> None:
        """Give back what no page uses."""
        for pool in self.pools:
            pool.trim()
        self.blocks.renew(self.pools, self.outliers)

    @at_home
    def read(self, pages: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, n * P, D]`` float32 of consecutive pages, as attention sees them."""
        outs: dict[str, list[Tensor]] = {role: [] for role in ROLES}
        for page in pages:
            stage = self.where[page]
            slab = self.pools[stage].take([page])
            for role in ROLES:
                decoded = self.plan.stages[stage].tier(role).decode(payload_of(slab, role), role)
                outs[role].append(self.outliers[role].over(decoded, [page])[0])
        keys, values = (torch.cat(outs[role], 2) for role in ROLES)
        self.exact.write(keys, values, pages[0] * self.plan.page_size)
        return keys, values

    def check_crop(self, length: int) -> None:
        """Raise unless tokens from position `length` on can be forgotten.

        Raises
        ------
        ArgusError
        """
        if not 0 <= length <= self.length:
            raise ArgusError(f"crop to {length} tokens: allowed is 0 to {self.length}, the tokens held")
        least = self.forgotten * self.plan.page_size + (self.reach or 1) - 1
        if self.forgotten and 0 < length < least:
            raise ArgusError(f"crop to {length} tokens: allowed is 0 or {least} on, what comes before is forgotten")

    @at_home
    def crop(self, length: int) -> None:
        """Forget every token from position `length` on; a page that is cut comes back to the window as it reads.

        Raises
        ------
        ArgusError
            As :meth:`check_crop`.
        """
        self.check_crop(length)
        self._leave_inference()
        if length == 0:
            self.reset()
            return
        size = self.plan.page_size
        whole, rest = divmod(length, size)
        if length >= len(self.where) * size:
            self.window.crop(self.length - length)
            return
        back = self.read([whole]) if rest else None
        gone = list(range(whole, len(self.where)))
        for stage, pool in enumerate(self.pools):
            pool.remove([page for page in gone if self.where[page] == stage])
        del self.where[whole:], self.salience[whole:]
        self.exact.crop(whole * size)
        for numbers in self.outliers.values():
            numbers.crop(whole)
        self.window.reset(whole * size)
        if back is not None:
            self.window.append(back[0][:, :, :rest], back[1][:, :, :rest])
            self.window.settle()
        self.tidy()

    @at_home
    def select(self, rows: Tensor) -> None:
        """Replace the batch by `rows` of it (int64 ``[B']``): reorder, repeat, or keep some."""
        for pool in self.pools:
            pool.select(rows)
        self.window.map(lambda tensor: tensor.index_select(0, rows))
        self.exact.select(rows)
        for numbers in self.outliers.values():
            numbers.select(rows)
        if self.shape is not None:
            self.shape = (len(rows), *self.shape[1:])
        self.blocks.renew(self.pools, self.outliers)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor held, each with what it is for: ``stage.<place>``, ``exact``, ``outliers``, ``window`` or ``index``."""
        for place, pool in enumerate(self.pools):
            for slab in pool.slabs:
                for tensor in slab.values():
                    yield f"stage.{place}", tensor
        for tensor in self.exact.tensors():
            yield "exact", tensor
        for numbers in self.outliers.values():
            for tensor in numbers.tensors():
                yield "outliers", tensor
        for tensor in self.window.tensors():
            yield "window", tensor
        for tensor in self.blocks.tensors():
            yield "index", tensor
