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
    """A projection for products with 1-bit codes that lie as ``archive_signs.py`` turns them: A operands of ``mma.m16n8k256``.

    The first 128 bits of a row tell where it has ones, the others where it has minus ones; words of codes have bits of two
    channels in turn, and rows of an operand those of one.

    Parameters
    ----------
    matrix : Tensor
        ``W [R, 64]`` of ones and minus ones, R up to 16.

    Returns
    -------
    Tensor
        int32 ``[2, 32, 4]``: operand ``o``, lane ``4 g + t``, word ``h + 2 e`` with the bits that ``W = 1 - 2 e`` at token
        ``16 t + 8 (p / 16) + 2 (p % 8 / 2) + p / 8 % 2``, where ``p % 2 = m``. Row and ``m`` are ``g + 8 h`` and ``o``; up to
        8 rows ``g`` and ``h``, in operand 0 alone; up to 4 rows ``g % 4`` and ``g / 4``, with ``h = 0``.

    Raises
    ------
    ValueError
        As :func:`checked`.
    """
    rows = len(checked(matrix))
    laid = torch.zeros(2, 2, 8, PAGE, 2, dtype=torch.bool, device=matrix.device)  # o, h, g, token, m
    equal = torch.stack([matrix > 0, matrix < 0])  # e
    places = []
    for e in range(2):
        one = laid.clone()
        for row in range(rows):
            for m in range(2):
                if rows > 8:
                    o, h, g = m, row // 8, row % 8
                elif rows > SHORT:
                    o, h, g = 0, m, row
                else:
                    o, h, g = 0, 0, row + 4 * m
                one[o, h, g, :, m] = equal[e, row]
        places.append(one)
    x = torch.stack(places).view(2, 2, 2, 8, 4, 2, 4, 2, 2)  # e, o, h, g, t, token / 8, i, a, m
    x = x.permute(1, 3, 4, 0, 2, 5, 7, 6, 8).reshape(2, 32, 4, 32).long()
    words = (x << torch.arange(32, device=x.device)).sum(-1)
    return (words - (words >> 31 << 32)).to(torch.int32)


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
