"""What a backend offers: the operations that a tier may ask for, and attention over pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from argus.attention import Query
from argus.backends.forms import (
    PLANES as PLANES,
    PREFIX as PREFIX,
    ROLES as ROLES,
    Affine as Affine,
    Axis as Axis,
    Float8 as Float8,
    Loaded as Loaded,
    Payload as Payload,
    Plain as Plain,
    Projected as Projected,
    Role as Role,
    grouped as grouped,
    round_up as round_up,
)
from argus.backends.rows import ExactRows as ExactRows

if TYPE_CHECKING:
    from argus.tiers.base import Tier


@dataclass(frozen=True, eq=False)
class Segment:
    """Pages of one stage, up to a bounded block, as the backend sees them.

    Attributes
    ----------
    key_tier, value_tier : Tier
        They decode, and may describe their codes by :meth:`argus.tiers.base.Tier.form`.
    keys, values : dict of str to Tensor
        Payloads ``[n, B, ...]``.
    positions : Tensor
        ``[n]`` int64, position of each page's first token, in tokens.
    last : int
        The largest position held, in tokens.
    page_size : int
        Tokens a page, ``P``.
    exact : Tensor or None
        ``[n, B, H, P]`` bool, tokens that are answered elsewhere because they are kept exact; None where no segment of
        the cache has any.
    outliers : dict of str to ExactRows
        Exact numbers of the cache's pages, by role; a role that has none is left out.
    block_pages : int
        Pages that may be decoded at once, those of other segments with them.
    first : int
        A position that no token held comes before, in tokens.
    """

    key_tier: Tier
    value_tier: Tier
    keys: Payload
    values: Payload
    positions: Tensor
    last: int
    page_size: int
    exact: Tensor | None = None
    outliers: Mapping[Role, ExactRows] = field(default_factory=dict)
    block_pages: int = 1
    first: int = 0

    def part(self, begin: int, end: int) -> Segment:
        """The same for pages ``begin`` to ``end`` only."""
        return replace(
            self,
            keys={name: tensor[begin:end] for name, tensor in self.keys.items()},
            values={name: tensor[begin:end] for name, tensor in self.values.items()},
            positions=self.positions[begin:end],
            exact=None if self.exact is None else self.exact[begin:end],
        )

    def exactly(self, role: Role, decoded: Tensor) -> Tensor:
        """Decoded pages ``[n, B, H, P, D]`` with their outliers: a copy where there are any."""
        rows = self.outliers.get(role)
        return decoded if rows is None else rows.over(decoded, self.positions // self.page_size)

    def tier(self, role: Role) -> Tier:
        """The tier of `role`."""
        return self.key_tier if role == "keys" else self.value_tier

    def payload(self, role: Role) -> Payload:
        """The payload of `role`."""
        return self.keys if role == "keys" else self.values


def visible_pages(query: Query, segments: Sequence[Segment]) -> Tensor | None:
    """Which tokens of `segments` each row may see, broadcastable to ``[B, H, R, n * P]``, page after page; None: all."""
    marks = [segment.exact for segment in segments if segment.exact is not None]
    coded = ~torch.cat(marks).permute(1, 2, 0, 3).flatten(2).unsqueeze(2) if marks else None
    last = max(segment.last for segment in segments)
    if query.mask is None and last <= query.start:
        return coded
    positions = torch.cat([segment.positions for segment in segments])
    steps = torch.arange(segments[0].page_size, device=positions.device)
    return both(query.visible((positions.unsqueeze(-1) + steps).flatten(), last), coded)


@dataclass(frozen=True)
class Dense:
    """Tokens apart from pages, as the backend sees them: the window, or what anchors chose.

    Attributes
    ----------
    keys, values : Tensor
        ``[B, H, T, D]`` of any floating dtype, or int8 codes.
    positions : Tensor or None
        ``[B, H, T]`` int32, in tokens, negative where a place is empty; None: consecutive from `start`.
    start : int
        Position of the first token where `positions` is None.
    last : int
        The largest position held, in tokens.
    holes : bool
        Whether any place is empty.
    scales : tuple of Tensor or None
        ``[B, H, T]`` float16, by which codes of keys and of values are multiplied; None: there are no codes.
    count : Tensor or None
        int32 ``[2]`` on the device: how many of the first places hold tokens, consecutive ones, and the position of the first,
        where a step is recorded and finds others each time that it is replayed; `start` and `last` are of the first time.
        None: all places do.
    """

    keys: Tensor
    values: Tensor
    start: int
    last: int
    positions: Tensor | None = None
    holes: bool = False
    scales: tuple[Tensor, Tensor] | None = None
    count: Tensor | None = None

    def counted(self) -> Dense:
        """The same without the places that are empty, as the device tells."""
        if self.count is None:
            return self
        held, start = self.count.tolist()
        keys, values = self.keys[:, :, :held], self.values[:, :, :held]
        return replace(self, keys=keys, values=values, start=start, last=start + held - 1, count=None)

    def numbers(self, role: Role, low: int = 0, high: int | None = None) -> Tensor:
        """Keys or values ``[B, H, T, D]`` of tokens `low` to `high`; float32 where they are codes."""
        place = 0 if role == "keys" else 1
        held = (self.keys, self.values)[place][:, :, low:high]
        return held if self.scales is None else held.float() * self.scales[place][:, :, low:high].float().unsqueeze(-1)

    def visible(self, query: Query) -> Tensor | None:
        """Which of its tokens each row may see, broadcastable to ``[B, H, R, T]``; None: all."""
        if query.mask is None and self.last <= query.start and not self.holes:
            return None
        if self.positions is None:
            return query.visible(torch.arange(self.start, self.last + 1, device=self.keys.device), self.last)
        mask = query.visible(self.positions.long(), self.last)
        return both(mask, (self.positions >= 0).unsqueeze(-2)) if self.holes else mask


def both(mask: Tensor | None, held: Tensor | None) -> Tensor | None:
    """Hide what either hides: `mask` boolean or additive, `held` boolean; None hides nothing."""
    if mask is None or held is None:
        return held if mask is None else mask
    return mask & held if mask.dtype == torch.bool else torch.where(held, mask, torch.finfo(mask.dtype).min)


class Backend(ABC):
    """Operations on pages ``[n, B, H, P, D]``.

    How codes are ordered inside a payload is the backend's business: only it reads what it wrote.

    Attributes
    ----------
    workspace : int
        Bytes of the largest workspace that an answer has taken so far, beside the answer; 0 where they are not counted.
    at_once : int
        Bytes of keys in float32, up to which moving pages takes as long as moving one: so many layers take their turn
        together. 0: none do beyond `block_pages` pages.
    """

    name: str
    workspace: int = 0
    at_once: int = 0

    @abstractmethod
    def quantize(self, x: Tensor, form: Affine) -> Payload:
        """Quantize pages to packed codes.

        Parameters
        ----------
        x : Tensor
            ``[n, B, H, P, D]`` float32, finite.
        form : Affine
            Its group divides ``P`` (axis ``channel``) or ``D`` (axis ``token``).

        Returns
        -------
        dict of str to Tensor
            ``codes`` uint8 (or int8, symmetric), ``scale`` float16 and, unless symmetric, ``zero`` float16. Scales and
            zeros are ``[n, B, H, P/g, D]`` for ``channel`` and ``[n, B, H, P, D/g]`` for ``token``. Codes are computed
            from the rounded scale and zero; those of a centred form from the mean, summed in float64 and rounded to float32.
        """

    @abstractmethod
    def dequantize(self, payload: Payload, form: Affine) -> Tensor:
        """Pages ``[n, B, H, P, D]`` float32 from what :meth:`quantize` or :meth:`affine` returned."""

    @abstractmethod
    def affine(self, codes: Tensor, scale: Tensor, zero: Tensor, form: Affine) -> Payload:
        """Pack codes that a tier chose itself.

        Parameters
        ----------
        codes : Tensor
            ``[n, B, H, P, D]`` uint8 below ``2 ** form.bits``.
        scale, zero : Tensor
            float16, shaped as for :meth:`quantize`.
        """

    @abstractmethod
    def to_fp8(self, x: Tensor, form: Float8) -> Payload:
        """``codes`` float8_e4m3fn ``[n, B, H, P, D]`` and ``scale`` float16, shaped as for :meth:`quantize`."""

    @abstractmethod
    def from_fp8(self, payload: Payload, form: Float8) -> Tensor:
        """Pages ``[n, B, H, P, D]`` float32 from what :meth:`to_fp8` returned."""

    @abstractmethod
    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Apply ``matrix [M, P]`` to the token axis of pages: ``[n, B, H, M, D]`` float32."""

    def encode(self, x: Tensor, form: object) -> Payload:
        """Encode pages for a form: what the operations above make of them.

        Parameters
        ----------
        x : Tensor
            ``[n, B, H, P, D]`` float32, finite.
        form : Affine, Float8, Plain or Projected
            Plain numbers take the form's dtype, or keep theirs; what is projected has a form of these inside.

        Raises
        ------
        TypeError
            If `form` is another.
        """
        match form:
            case Affine():
                return self.quantize(x, form)
            case Float8():
                return self.to_fp8(x, form)
            case Plain():
                return {"codes": x if form.dtype is None else x.to(form.dtype)}
            case Projected():
                page = x.shape[-2]
                mean = (x.sum(-2, dtype=torch.float64) / page).float().to(torch.float16)
                rest = x - mean.float().unsqueeze(-2)
                kept = self.encode(self.project(rest, form.matrix(page, x) / page), form.inner)
                return {"mean": mean} | {PREFIX + name: tensor for name, tensor in kept.items()}
        raise TypeError(f"no pages can be encoded as {form}")

    def recode(self, source: Tier, target: Tier, payload: Payload, role: Role) -> Payload:
        """Pages that `source` keeps as `target` keeps them: ``target.encode(source.decode(payload, role), role)``.

        Bit by bit, save for products of floats whose sums are taken in another order, as for :class:`Projected` pages: there
        numbers agree as far as float32 sums do, so a code next to the middle between two may be the other.

        A backend may take a shorter way where :meth:`argus.tiers.base.Tier.form` and :meth:`argus.tiers.base.Tier.target`
        tell how; `payload` is never touched, but the answer may share tensors with it.
        """
        return target.encode(source.decode(payload, role), role)

    def tensors(self) -> list[Tensor]:
        """Every tensor that it holds for pages that are held, such as tables of where they lie."""
        return []

    def recordable(self, segments: Sequence[Segment], window: Dense) -> bool:
        """Whether :meth:`attend` only launches kernels for one query token, so that a CUDA graph can record it.

        Parameters
        ----------
        segments : sequence of Segment
        window : Dense
            The newest tokens, whose ``count`` will be given.
        """
        return False

    def reserve(self, segments: Sequence[Segment]) -> None:
        """Prepare to record :meth:`attend` over `segments`, so that the recording may :meth:`follow` them."""
        return

    def follow(self, old: Sequence[Segment], new: Sequence[Segment]) -> bool:
        """Let what was recorded over `old` read `new` from now on; False: it cannot, and must be recorded anew."""
        return False

    @abstractmethod
    def attend(self, query: Query, segments: Sequence[Segment], dense: Sequence[Dense], sinks: Tensor | None = None) -> Tensor:
        """Answer `query` over compressed pages and exact tokens together.

        The workspace is bounded by the largest segment; no page is left decoded.

        Parameters
        ----------
        query : Query
        segments : sequence of Segment
        dense : sequence of Dense
        sinks : Tensor or None
            ``[Hq]`` logits of learned attention sinks.

        Returns
        -------
        Tensor
            ``[B, H, R, D]`` float32.
        """
