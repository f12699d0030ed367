"""What kernels are told of a segment's pages: where they lie, and what they look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from argus.backends.base import ROLES, Affine, Payload, Segment
from argus.backends.triton.forms import known
from argus.backends.triton.layout import BLOCK

FIELDS = 10
"""Of a page: addresses of codes, scale and zero of keys, the same of values, exact marks, means of keys and of values; and what
:func:`facts_of` tells of its forms."""
NAMES = ("codes", "scale", "zero")
COEFFICIENTS = "coefficients."
"""How the names of a projected page's coefficients begin."""


@dataclass(frozen=True, eq=False)
class Found:
    """What is looked up once of a segment.

    Attributes
    ----------
    readable : bool
        Whether kernels read it in place.
    shapes : list
        What its pages look like in memory.
    table : Tensor
        ``[pages, FIELDS]`` int64 on the host; empty where kernels do not read it.
    aligned : bool
        Whether all tensors of all pages begin at multiples of 16 bytes.
    """

    readable: bool
    shapes: list[Any]
    table: Tensor
    aligned: bool


def find(segment: Segment) -> Found:
    """Look a segment up."""
    if not readable(segment):
        return Found(False, shapes(segment), torch.zeros(0, FIELDS, dtype=torch.int64, device="cpu"), True)
    starts, steps = places(segment)
    first, step = torch.tensor([starts, steps], device="cpu")
    table = first + step * torch.arange(len(segment.positions), device="cpu").unsqueeze(-1)
    told = (*starts[:-1], *(steps if len(table) > 1 else ()))
    return Found(True, shapes(segment), table, not any(number % 16 for number in told))


Find = Callable[[Segment], Found]
"""Looks a segment up."""


def readable(segment: Segment) -> bool:
    """Whether kernels read this segment in place."""
    if not segment.positions.numel() or (segment.exact is not None and not segment.exact[0].is_contiguous()):
        return False
    return all(known(segment.tier(role).form(role), parts_of(segment.payload(role))) for role in ROLES)


def same_stage(first: Segment, second: Segment) -> bool:
    """Whether the launch that answers for `first` may answer for both, if pages of both look alike."""
    return (
        first.key_tier is second.key_tier
        and first.value_tier is second.value_tier
        and first.page_size == second.page_size
        and first.outliers == second.outliers
    )


def shapes(segment: Segment) -> list[Any]:
    """What the pages of a segment look like in memory."""
    tensors = (*segment.keys.values(), *segment.values.values(), segment.exact)
    return [None if x is None else (x.dtype, x.shape[1:], x.stride()) for x in tensors]


def parts_of(payload: Payload) -> Payload:
    """Codes, scales and zeros by their plain names."""
    return {name.removeprefix(COEFFICIENTS): tensor for name, tensor in payload.items()}


def places(segment: Segment) -> tuple[list[int], list[int]]:
    """The fields of a segment's first page, 0 for tensors that it has none of, and what is added to each from page to page."""
    kept = [payload.get(name) for payload in (parts_of(segment.keys), parts_of(segment.values)) for name in NAMES]
    tensors = [*kept, segment.exact, segment.keys.get("mean"), segment.values.get("mean")]
    facts = facts_of(*forms_of(segment), segment.page_size)
    starts = [*(0 if tensor is None else tensor.data_ptr() for tensor in tensors), facts]
    return starts, [*(0 if tensor is None else tensor.stride(0) * tensor.element_size() for tensor in tensors), 0]


def forms_of(segment: Segment) -> tuple[Any, Any]:
    """The forms of keys and of values."""
    return segment.key_tier.form("keys"), segment.value_tier.form("values")


def facts_of(key_form: object, value_form: object, page: int) -> int:
    """What the kernel for codes of any width is told of a page; 0 where it does not read it.

    Bits of keys, bits of values (8 bits each), whether either is signed (a bit each), blocks of 64 tokens that share a scale.
    """
    if not (isinstance(key_form, Affine) and isinstance(value_form, Affine)):
        return 0
    widths = {key_form.bits, value_form.bits} <= {1, 2, 4, 8}
    if not widths or page % BLOCK or (key_form.group or page) % BLOCK:
        return 0
    if (key_form.axis, value_form.axis, value_form.group) != ("channel", "token", None):
        return 0
    signs = key_form.symmetric | value_form.symmetric << 1
    return key_form.bits | value_form.bits << 8 | signs << 16 | (key_form.group or page) // BLOCK << 18
