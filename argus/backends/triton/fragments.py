"""Projections as lanes load them: the A operands of ``mma`` (PTX ISA 9.7, matrix fragments), ready made."""

from __future__ import annotations

import torch
from torch import Tensor

from argus.backends.forms import Projected

PAGE = 64
SHORT, TALL = 4, 8
"""Rows up to which an operand of :func:`weights` holds all bytes of each number, and up to which it holds two."""
SMALL, FEW = 4, 3
"""Bits of codes up to which :func:`weights`, as they are or times scales of tokens, are small enough for sums in int32."""


def fragments(matrix: Tensor, factor: float, back: bool) -> Tensor:
    """``factor * W`` in a high and a low FP16 part.

    Parameters
    ----------
    matrix : Tensor
        ``W [M, 64]`` float32, ``M`` up to 16; rows up to 16 are filled with zeros.
    factor : float
    back : bool
        Whether rows of the operand are tokens and its columns coefficients (``W^T``), or the other way round.

    Returns
    -------
    Tensor
        int32 ``[4, 2, 32, 4]``: 16 tokens, part (high, low), lane ``4 g + t``, word. Word ``r`` holds two numbers ``e``: token
        ``16 i + g + 8 (r % 2)`` with coefficients ``2 t + 8 (r / 2) + e``; or coefficient ``g + 8 (r % 2)`` with tokens
        ``16 i + 2 t + 8 (r / 2) + e``.
    """
    scaled = torch.zeros(16, 64, device=matrix.device)
    scaled[: len(matrix)] = factor * matrix
    high = scaled.to(torch.float16)
    low = (scaled - high.float()).to(torch.float16)
    parts = torch.stack([high, low])
    if back:
        x = parts.reshape(2, 2, 4, 2, 4, 2, 8)  # part, r / 2, t, e, i, r % 2, g
        x = x.permute(4, 0, 6, 2, 1, 5, 3)
    else:
        x = parts.reshape(2, 2, 8, 4, 2, 4, 2)  # part, r % 2, g, i, r / 2, t, e
        x = x.permute(3, 0, 2, 5, 4, 1, 6)
    return x.reshape(4, 2, 32, 4, 2).contiguous().view(torch.int32).squeeze(-1)


def weights(matrix: Tensor, tokens: bool, bits: int) -> Tensor:
    """A projection in signed bytes, for products with codes by ``mma.m16n8k32``.

    Parameters
    ----------
    matrix : Tensor
        ``w [R, 64]``, R up to 16.
    tokens : bool
        Whether scales of tokens are still to come in.
    bits : int
        Bits a code.

    Returns
    -------
    Tensor
        int32. Axis ``channel``: operands ``[operand, s, lane, word]`` of signed bytes of ``w`` in fixed point, rows ``g`` and
        ``g + 8`` in turn: high, middle and low bytes; or, of up to 8 rows, high and middle ones, then low ones and ones; or, of
        up to 4, four rows each of high, low, and middle bytes and ones. Axis ``token``: float32 ``[row half, s, h, lane,
        byte]``, of up to 4 rows each twice. Then float32 sums of 16 rows in their unit, what this stands for
        (for axis ``channel`` 64 times), and one over that.
    """
    rows, device, top = len(matrix), matrix.device, (1 << bits) - 1
    wide = rows > TALL
    w = torch.zeros(16, PAGE, dtype=torch.float64, device=device)
    w[:rows] = matrix
    room = (2.0**22 - 0x8100 if tokens else 0x7F7F7E) / w.abs().max()
    if not tokens and bits <= SMALL:
        room = torch.minimum(room, (2.0**31 - PAGE * (top + 1)) / (top * w.abs().sum(1).max()))
    mantissa, _ = torch.frexp(room)
    factor = room / mantissa / 2  # the power of two not above it
    laid = (w * factor).view(2, 8, 4, 2, 2, 2, 2)  # row half, g, t, c / 2, s, h, c % 2
    if tokens:
        if rows <= SHORT:
            laid[0, 4:] = laid[0, :4]
        shown = laid[: 2 if wide else 1].permute(0, 4, 5, 1, 2, 3, 6).float()
    else:
        v = laid.round().to(torch.int32)
        high, middle, low = (v + 0x8080) >> 16, (((v + 0x8080) >> 8) & 255) - 128, ((v + 0x8080) & 255) - 128
        if wide:
            operands = torch.stack([high, middle, low])
        elif rows <= SHORT:
            upper, lower = torch.cat([high[0, :4], low[0, :4]]), torch.cat([middle[0, :4], torch.ones_like(low[0, :4])])
            operands = torch.stack([upper, lower]).unsqueeze(0)
        else:
            upper = torch.stack([high[0], middle[0]])
            operands = torch.stack([upper, torch.stack([low[0], torch.ones_like(low[0])])])
        shown = operands.permute(0, 5, 2, 3, 6, 1, 4, 7).to(torch.int8)  # operand, s, g, t, h, row half, c / 2, c % 2
    unit = (1 if tokens else PAGE) / factor.view(1)
    facts = torch.cat([w.sum(1) / unit, unit, 1 / unit]).float()
    return torch.cat([shown.flatten().contiguous().view(torch.int32), facts.view(torch.int32)])


class Weights:
    """Projections as :func:`weights` lays them, made once."""

    def __init__(self) -> None:
        self._laid: dict[tuple[Projected, bool, int, torch.device], Tensor] = {}

    def of(self, form: Projected, like: Tensor, tokens: bool, bits: int) -> Tensor:
        """The projection of `form` for pages of 64 tokens, on the device of `like`."""
        key = (form, tokens, bits if bits <= SMALL and not tokens else 0, like.device)
        if key not in self._laid:
            self._laid[key] = weights(form.matrix(PAGE, like) / PAGE, tokens, bits)
        return self._laid[key]

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return list(self._laid.values())
