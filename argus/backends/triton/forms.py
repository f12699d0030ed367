"""How the kernels for any form read a payload: the constants of :func:`argus.backends.triton.decode._tile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from argus.backends.base import Affine, Float8, Loaded, Payload, Plain
from argus.backends.triton import layout

ELEMENTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def described(form: object, payload: Payload, page: int, dim: int) -> dict[str, Any] | None:
    """The constants with which ``_tile`` reads pages of a form; None: it does not read them.

    Parameters
    ----------
    form : object or None
        What :meth:`argus.tiers.base.Tier.form` tells.
    payload : dict of str to Tensor
        ``[n, B, ...]``, for its dtypes.
    page, dim : int
        Tokens a page, and head_dim.
    """
    if not all(tensor[:1].is_contiguous() for tensor in payload.values()):
        return None
    known: dict[str, Any] = {"KIND": 0, "BITS": 16, "TOKENS": False, "G": 1, "SYMMETRIC": True, "FRAGMENTS": False}
    known |= {"ELEMENT": tl.uint8, "WIDE": False, "LOAD": None}
    if isinstance(form, Plain) and payload["codes"].dtype in ELEMENTS:
        return known | {"ELEMENT": ELEMENTS[payload["codes"].dtype], "WIDE": payload["codes"].dtype == torch.float32}
    if isinstance(form, Loaded):
        return known | {"KIND": 3, "BITS": form.option, "LOAD": form.load()}
    if isinstance(form, (Affine, Float8)):
        group = form.group or (page if form.axis == "channel" else dim)
        known |= {"KIND": 1, "BITS": 8, "TOKENS": form.axis == "token", "G": group}
        if isinstance(form, Affine):
            fragments = layout.in_fragments(page, dim)
            known |= {"KIND": 2, "BITS": form.bits, "SYMMETRIC": form.symmetric, "FRAGMENTS": fragments}
        return known
    return None


def own(form: object, like: Tensor) -> Tensor | None:
    """What all pages of a form share, as its kernel reads it."""
    return form.own(like) if isinstance(form, Loaded) and form.own is not None else None


def booked(form: object) -> bool:
    """Whether a kernel looks codes of a form up in registers."""
    return isinstance(form, Loaded) and form.book and form.own is not None and 1 <= form.option <= 3


def rotates(form: object) -> bool:
    """Whether a kernel reads rotated numbers."""
    return isinstance(form, Loaded) and form.rotation is not None


def signs(form: object, dim: int) -> Callable[[int, Tensor], Tensor] | None:
    """The signs that make a form's rotation of the Hadamard transform; None: it has none, or is another."""
    return form.signs if isinstance(form, Loaded) and form.rotation is not None and dim & (dim - 1) == 0 else None


def turned(form: object, rows: Tensor) -> Tensor:
    """Queries ``[..., D]`` as they meet what a kernel reads of keys."""
    if isinstance(form, Loaded) and form.rotation is not None:
        return rows @ form.rotation(rows.shape[-1], rows).T
    return rows


def turn_back(form: object, out: Tensor) -> None:
    """Make averages ``[..., D]`` of what a kernel read of values averages of values, in place."""
    if isinstance(form, Loaded) and form.rotation is not None:
        out.copy_(out @ form.rotation(out.shape[-1], out))
