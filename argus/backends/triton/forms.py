"""How the kernels for any form read a payload: the constants of :func:`argus.backends.triton.reading._page_tile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from argus.backends.base import Affine, Float8, Loaded, Payload, Plain, Projected
from argus.backends.triton import layout

ELEMENTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def known(form: object, payload: Payload) -> bool:
    """Whether ``_page_tile`` reads pages of a form: `payload` ``[n, B, ...]``, names without the prefix of coefficients."""
    if not all(tensor[:1].is_contiguous() for tensor in payload.values()):
        return False
    if isinstance(form, Projected):
        inner = isinstance(form.inner, (Affine, Float8, Plain)) and known(form.inner, payload)
        return inner and payload["mean"].dtype == torch.float16
    if isinstance(form, Plain):
        return payload["codes"].dtype in ELEMENTS
    return isinstance(form, (Affine, Float8, Loaded))


def described(form: Any, payload: Payload, page: int, dim: int) -> dict[str, Any]:
    """The constants with which ``_page_tile`` reads pages of a form that is :func:`known`.

    Parameters
    ----------
    form : Affine, Float8, Loaded, Plain or Projected
        What :meth:`argus.tiers.base.Tier.form` tells.
    payload : dict of str to Tensor
        ``[n, B, ...]``, for its dtypes.
    page, dim : int
        Tokens a page, and head_dim.
    """
    if isinstance(form, Projected):
        rows = page // form.ratio
        return described(form.inner, payload, rows, dim) | {"ROWS": rows}
    facts: dict[str, Any] = {"KIND": 0, "BITS": 16, "TOKENS": False, "G": 1, "SYMMETRIC": True, "FRAGMENTS": False}
    facts |= {"ELEMENT": tl.uint8, "WIDE": False, "LOAD": None, "ROWS": 0}
    if isinstance(form, Plain):
        return facts | {"ELEMENT": ELEMENTS[payload["codes"].dtype], "WIDE": payload["codes"].dtype == torch.float32}
    if isinstance(form, Loaded):
        return facts | {"KIND": 3, "BITS": form.option, "LOAD": form.load()}
    group = form.group or (page if form.axis == "channel" else dim)
    facts |= {"KIND": 1, "BITS": 8, "TOKENS": form.axis == "token", "G": group}
    if isinstance(form, Affine):
        fragments = layout.in_fragments(page, dim)
        facts |= {"KIND": 2, "BITS": form.bits, "SYMMETRIC": form.symmetric, "FRAGMENTS": fragments}
    return facts


def own(form: object, like: Tensor) -> Tensor | None:
    """What all pages of a form share, as its kernel reads it."""
    return form.own(like) if isinstance(form, Loaded) and form.own is not None else None


def archive(form: object, page: int, like: Tensor) -> tuple[Tensor | None, float]:
    """The matrix of projected pages and the factor of what it gives back; no matrix of others."""
    return (form.matrix(page, like), form.factor(page)) if isinstance(form, Projected) else (None, 1.0)


def booked(form: object) -> bool:
    """Whether a kernel looks codes of a form up in registers."""
    return isinstance(form, Loaded) and form.book and form.own is not None and 1 <= form.option <= 3


def rotates(form: object) -> bool:
    """Whether a kernel reads rotated numbers."""
    return isinstance(form, Loaded) and form.rotation is not None


def rotation(form: object, like: Tensor) -> Tensor | None:
    """The rotation of a form; None: it has none."""
    return form.rotation(like.shape[-1], like) if isinstance(form, Loaded) and form.rotation is not None else None


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
