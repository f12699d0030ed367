"""Projections as lanes load them: the A operands of ``mma.m16n8k16`` (PTX ISA 9.7, matrix fragments), ready made."""

from __future__ import annotations

import torch
from torch import Tensor

from argus.backends.forms import Projected

PAGE = 64
SHORT = 4
"""Rows up to which an operand of :func:`signs` holds each twice."""


def checked(matrix: Tensor) -> Tensor:
    """A projection that is what :class:`argus.backends.forms.Projected` asks for: looked at once, when it is laid.

    Raises
    ------
    ValueError
        If `matrix` has other numbers than ones and minus ones, or a row whose sum is not 0.
    """
    if not bool((matrix.abs() == 1).all()) or bool(matrix.sum(1).any()):
        raise ValueError("a projection must have ones and as many minus ones in each row; see argus.backends.forms.Projected")
    return matrix


def fragments(matrix: Tensor, factor: float, back: bool) -> Tensor:
    """``factor * W`` in FP16.

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
        int32 ``[4, 32, 4]``: 16 tokens, lane ``4 g + t``, word. Word ``r`` holds two numbers ``e``: token
        ``16 i + g + 8 (r % 2)`` with coefficients ``2 t + 8 (r / 2) + e``; or coefficient ``g + 8 (r % 2)`` with tokens
        ``16 i + 2 t + 8 (r / 2) + e``.

    Raises
    ------
    ValueError
        As :func:`checked`.
    """
    laid = torch.zeros(16, PAGE, dtype=torch.float16, device=matrix.device)
    laid[: len(matrix)] = factor * checked(matrix)
    if back:
        x = laid.reshape(2, 4, 2, 4, 2, 8)  # r / 2, t, e, i, r % 2, g
        x = x.permute(3, 5, 1, 0, 4, 2)
    else:
        x = laid.reshape(2, 8, 4, 2, 4, 2)  # r % 2, g, i, r / 2, t, e
        x = x.permute(2, 1, 4, 3, 0, 5)
    return x.reshape(4, 32, 4, 2).contiguous().view(torch.int32).squeeze(-1)


def signs(matrix: Tensor, factors: tuple[float, ...]) -> Tensor:
    """A projection for products with codes whose tokens lie as in ``layout.py``.

    Parameters
    ----------
    matrix : Tensor
        ``W [R, 64]`` of ones and minus ones, R up to 16. Up to 4 rows are there twice; the others of 16 are zeros.
    factors : tuple of float
        Of tokens ``2 i`` and ``2 i + 1`` of every eight, ``i < 4``: powers of two.

    Returns
    -------
    Tensor
        int32 ``[4, 32, 4]``: ``i``, lane ``4 g + t``, word ``2 r + h``: FP16 numbers of row ``g + 8 h`` with tokens
        ``16 t + 2 i + r`` and the one 8 further.

    Raises
    ------
    ValueError
        As :func:`checked`.
    """
    laid = torch.zeros(16, PAGE, dtype=torch.float16, device=matrix.device)
    laid[: len(matrix)] = checked(matrix)
    if len(matrix) <= SHORT:
        laid[4:8] = laid[:4]
    x = laid.view(2, 8, 4, 2, 4, 2).permute(4, 1, 2, 5, 0, 3)  # h, g, t, e, i, r -> i, g, t, r, h, e
    x = x * torch.tensor(factors, dtype=torch.float16, device=matrix.device).view(4, 1, 1, 1, 1, 1)
    return x.contiguous().view(torch.int32).reshape(4, 32, 4)


def ones(matrix: Tensor) -> Tensor:
    """A projection for products with 1-bit codes that lie as ``archive_signs.py`` turns them: A operands of binary ``mma``.

    Words of codes have bits of two channels in turn. The first 128 bits of a row tell where it has ones, the others where it
    has minus ones, in every other bit: for one of the channels, ``m``.

    Parameters
    ----------
    matrix : Tensor
        ``W [R, 64]`` of ones and minus ones, R up to 16.

    Returns
    -------
    Tensor
        int32 ``[6, 32, 4]``. Of operand ``o < 2``, lane ``4 g + t`` and word ``h + 2 e``, bit ``p`` is whether ``p % 2 = m``
        and ``W = 1 - 2 e`` at token ``16 t + 8 (p / 16) + 2 (p % 8 / 2) + p / 8 % 2``. Of more than 8 rows it is row
        ``g + 8 h`` and ``m = o``; of up to 8 row ``g`` and ``m = h``; of up to 4 row ``g % 4`` and ``m = g / 4``, where
        ``h = 0``; and then ``o = 0``. Of operand ``o >= 2`` word ``m + 2 i`` has bits ``p % 2 = m`` in row
        ``g = 2 (o - 2) + i``.

    Raises
    ------
    ValueError
        As :func:`checked`.
    """
    rows, device = len(checked(matrix)), matrix.device
    laid = torch.zeros(16, PAGE, device=device)
    laid[:rows] = matrix
    x = torch.stack([laid > 0, laid < 0]).view(2, 16, 4, 2, 4, 2)  # e, row, t, token / 8 % 2, i, a
    bits = x.transpose(-1, -2).reshape(2, 16, 4, 16).long() << 2 * torch.arange(16, device=device)
    words = torch.stack([bits.sum(-1), bits.sum(-1) << 1], -1)  # e, row, t, m
    made = torch.zeros(6, 8, 4, 2, 2, dtype=torch.int64, device=device)  # o, g, t, e, h
    if rows > 8:
        made[:2] = words.view(2, 2, 8, 4, 2).permute(4, 2, 3, 0, 1)
    elif rows > SHORT:
        made[0] = words[:, :8].permute(1, 2, 0, 3)
    else:
        made[0, ..., 0] = words[:, :4].permute(3, 1, 2, 0).reshape(8, 4, 2)
    alone = torch.eye(8, dtype=torch.int64, device=device).view(4, 2, 8).transpose(1, 2)  # o, g, i
    made[2:] = (alone[..., None] * torch.tensor([0x55555555, 0xAAAAAAAA], device=device)).unsqueeze(2)
    return made.reshape(6, 32, 4).to(torch.int32)


class Weights:
    """Projections as :func:`signs` or :func:`ones` lay them, made once."""

    def __init__(self) -> None:
        self._laid: dict[tuple[Projected, tuple[float, ...] | None, torch.device], Tensor] = {}

    def of(self, form: Projected, like: Tensor, factors: tuple[float, ...] | None) -> Tensor:
        """The projection of `form` for pages of 64 tokens, on the device of `like`; factors None: for 1-bit codes."""
        key = (form, factors, like.device)
        if key not in self._laid:
            matrix = form.matrix(PAGE, like)
            self._laid[key] = ones(matrix) if factors is None else signs(matrix, factors)
        return self._laid[key]

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return list(self._laid.values())
