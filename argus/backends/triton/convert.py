"""Launching the kernel of ``recode.py``: which forms it reads and writes, and when it is the faster one."""

from __future__ import annotations

from typing import NamedTuple

import torch

from argus.backends.base import Affine, Float8, Payload, Plain
from argus.backends.triton import layout
from argus.backends.triton.codec import INTERPRETED, shape_of
from argus.backends.triton.recode import (
    BFLOAT16,
    CENTRED,
    CODES,
    E4M3,
    FLOAT16,
    FLOAT32,
    RANGE,
    SYMMETRIC,
    _recode_kernel,
)

ASSEMBLED = not INTERPRETED
"""Whether inline assembly runs: the interpreter knows none."""
PLAIN = {"channel": ("sign",), "token": ("sign", "range")}
"""Which codes of plain numbers this kernel makes, an axis; the others go to the one that takes a page as a block."""
NUMBERS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


class Reading(NamedTuple):
    """Constants of the kernel that tell what its source is."""

    kind: int
    bits: int = 8
    symmetric: bool = True
    tokens: bool = False
    group: int = 64


def readable(payload: Payload, source: object, target: Affine, page: int, dim: int) -> Reading | None:
    """How the kernel reads a source for a target; None: it does not."""
    if isinstance(source, Plain):
        chosen = "sign" if target.centred else "range"
        kind = NUMBERS.get(payload["codes"].dtype)
        return Reading(kind.value) if kind is not None and chosen in PLAIN[target.axis] else None
    if isinstance(source, Float8):
        group = source.group or (page if source.axis == "channel" else dim)
        # A lane's tokens, eight in a row or sixteen, share a group.
        fits = group % 16 == 0 and 64 % group == 0 if source.axis == "channel" else group == dim
        return Reading(E4M3.value, 8, True, source.axis == "token", group) if fits else None
    if isinstance(source, Affine) and source.axis == target.axis:
        group = source.group or (page if source.axis == "channel" else dim)
        fits = group % 8 == 0 and 64 % group == 0 if source.axis == "channel" else group == dim
        return Reading(CODES.value, source.bits, source.symmetric, source.axis == "token", group) if fits else None
    return None


def writable(target: Affine, page: int, dim: int) -> bool:
    """Whether the kernel writes pages of this shape: a group is a block's 64 tokens, or all channels of a token."""
    group = target.group or (page if target.axis == "channel" else dim)
    whole = group == (64 if target.axis == "channel" else dim)
    return layout.in_fragments(page, dim) and dim & (dim - 1) == 0 and dim <= 256 and whole


def convert(payload: Payload, source: object, target: Affine) -> Payload | None:
    """Integer codes of what a tier keeps, or of plain numbers; None where there is no kernel or a faster one.

    Parameters
    ----------
    payload : dict of str to Tensor
        What `source` keeps of pages ``[n, B, H, P, D]``.
    source : object
        The form in which it does; :class:`argus.backends.base.Plain` of any floating dtype.
    target : Affine

    Returns
    -------
    dict of str to Tensor or None
        What :meth:`argus.backends.base.Backend.quantize` makes of the decoded pages, bit by bit.
    """
    if not ASSEMBLED or not isinstance(source, (Plain, Float8, Affine)):
        return None
    page, dim = shape_of(payload, source) if isinstance(source, Affine) else payload["codes"].shape[-2:]
    reading = readable(payload, source, target, page, dim) if writable(target, page, dim) else None
    if reading is None:
        return None
    held = {name: tensor.contiguous() for name, tensor in payload.items()}
    codes = held["codes"]
    head = codes.shape[:3]
    kind = torch.int8 if target.symmetric else torch.uint8
    scales = (*head, page // 64, dim) if target.axis == "channel" else (*head, page, 1)
    made = {"codes": torch.empty(*head, page * dim * target.bits // 8, dtype=kind, device=codes.device)}
    made["scale"] = torch.empty(scales, dtype=torch.float16, device=codes.device)
    if not target.symmetric:
        made["zero"] = torch.empty_like(made["scale"])
    units = head.numel() * page // 64
    if units:
        scale = held.get("scale", codes)
        how = CENTRED if target.centred else SYMMETRIC if target.symmetric else RANGE
        _recode_kernel[(units,)](
            codes.view(torch.uint8), scale, held.get("zero", scale), made["codes"], made["scale"], made.get("zero", made["scale"]),
            dim, *reading, how.value, target.bits, target.axis == "token", num_warps=1,
        )  # fmt: skip
    return made
