"""Launching the kernel of ``recode.py``: which forms it reads and writes, and when it is the faster one."""

from __future__ import annotations

from typing import NamedTuple

import torch

from argus.backends.base import Affine, Float8, Payload, Plain
from argus.backends.triton import layout, narrow, recode, tuning
from argus.backends.triton.codec import kind_of, shape_of
from argus.backends.triton.rounding import INTERPRETED

ASSEMBLED = not INTERPRETED
"""Whether inline assembly runs: the interpreter knows none."""
PLAIN = {"channel": ("e4m3",), "token": ("range",)}
"""Which codes of plain numbers this kernel makes, an axis; the others go to those that take a page as a block."""
FLOAT32, FLOAT16, BFLOAT16 = (x.value for x in (recode.FLOAT32, recode.FLOAT16, recode.BFLOAT16))
E4M3, CODES = recode.E4M3.value, recode.CODES.value
NUMBERS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


class Reading(NamedTuple):
    """Constants of the kernel that tell what its source is."""

    kind: int
    bits: int = 8
    symmetric: bool = True
    tokens: bool = False
    group: int = 64


def readable(payload: Payload, source: object, target: Affine | Float8, page: int, dim: int) -> Reading | None:
    """How the kernel reads a source for a target; None: it does not."""
    if isinstance(source, Plain):
        chosen = "e4m3" if isinstance(target, Float8) else "range"
        kind = NUMBERS.get(payload["codes"].dtype)
        # A warp that reads float32 along tokens waits for memory; 16 bits it reads in wider pieces.
        slow = kind == FLOAT32 and chosen == "e4m3"
        return Reading(kind) if kind is not None and chosen in PLAIN[target.axis] and not slow else None
    if isinstance(source, Float8):
        group = source.group or (page if source.axis == "channel" else dim)
        # A lane's tokens, eight in a row or sixteen, share a group.
        fits = group % 16 == 0 and 64 % group == 0 if source.axis == "channel" else group == dim
        return Reading(E4M3, 8, True, source.axis == "token", group) if fits else None
    if isinstance(source, Affine) and source.axis == target.axis:
        group = source.group or (page if source.axis == "channel" else dim)
        fits = group % 8 == 0 and 64 % group == 0 if source.axis == "channel" else group == dim
        return Reading(CODES, source.bits, source.symmetric, source.axis == "token", group) if fits else None
    return None


def writable(target: Affine | Float8, page: int, dim: int) -> int | None:
    """The length of groups, where the kernel writes pages of this shape: 32 or 64 tokens of a block, or all channels."""
    group = target.group or (page if target.axis == "channel" else dim)
    fits = group in (32, 64) if target.axis == "channel" else group == dim and isinstance(target, Affine)
    return group if fits and layout.in_fragments(page, dim) and dim & (dim - 1) == 0 and dim <= 256 else None


def narrows(reading: Reading, target: Affine | Float8, group: int) -> bool:
    """Whether codes become others without being decoded: 4 bits of the same groups to 2, or 2 bits to 1."""
    if reading.kind != CODES or not isinstance(target, Affine) or target.symmetric or reading.symmetric:
        return False
    # How often a code occurs in a group fits a byte, and a quartet fills words of the target.
    fits = 64 <= group <= 128 if reading.tokens else reading.group == group
    return fits and (reading.bits, target.bits) == ((2, 1) if target.centred else (4, 2))


def convert(payload: Payload, source: object, target: Affine | Float8) -> Payload | None:
    """Codes of what a tier keeps, or of plain numbers; None where there is no kernel or a faster one.

    Parameters
    ----------
    payload : dict of str to Tensor
        What `source` keeps of pages ``[n, B, H, P, D]``.
    source : object
        The form in which it does; :class:`argus.backends.base.Plain` of any floating dtype.
    target : Affine or Float8

    Returns
    -------
    dict of str to Tensor or None
        What :meth:`argus.backends.base.Backend.encode` makes of the decoded pages, bit by bit.
    """
    if not ASSEMBLED or not isinstance(source, (Plain, Float8, Affine)):
        return None
    page, dim = shape_of(payload, source) if isinstance(source, Affine) else payload["codes"].shape[-2:]
    group = writable(target, page, dim)
    reading = None if group is None else readable(payload, source, target, page, dim)
    if group is None or reading is None:
        return None
    narrowing = narrows(reading, target, group)
    if isinstance(target, Affine) and target.centred and not narrowing:
        return None
    held = {name: tensor.contiguous() for name, tensor in payload.items()}
    codes = held["codes"]
    head = codes.shape[:3]
    bits, shape, dtype = 8, (page, dim), torch.float8_e4m3fn
    if isinstance(target, Affine):
        bits, shape = target.bits, (page * dim * target.bits // 8,)
        dtype = torch.int8 if target.symmetric else torch.uint8
    scales = (*head, page // group, dim) if target.axis == "channel" else (*head, page, 1)
    made = {"codes": torch.empty(*head, *shape, dtype=dtype, device=codes.device)}
    made["scale"] = torch.empty(scales, dtype=torch.float16, device=codes.device)
    if isinstance(target, Affine) and not target.symmetric:
        made["zero"] = torch.empty_like(made["scale"])
    units = head.numel() * page // 64
    if units:
        scale = held.get("scale", codes)
        sources = codes.view(torch.uint8), scale, held.get("zero", scale)
        targets = made["codes"].view(torch.uint8), made["scale"], made.get("zero", made["scale"])
        options = {"num_warps": 1, "maxnreg": tuning.NARROW_REGISTERS if narrowing else tuning.CODEC_REGISTERS}
        tokens = target.axis == "token"
        if narrowing:
            narrow._narrow_kernel[(units,)](*sources, *targets, dim, kind_of(target), tokens, group, **options)
        else:
            recode._recode_kernel[(units,)](*sources, *targets, dim, *reading, kind_of(target), bits, tokens, group, **options)
    return made
