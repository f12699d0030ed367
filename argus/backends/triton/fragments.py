"""Projections as lanes load them: the A operands of ``mma.m16n8k16`` (PTX ISA 9.7, matrix fragments), ready made."""

from __future__ import annotations

import torch
from torch import Tensor


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
