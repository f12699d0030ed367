"""How codes are told to a backend: forms, and the arithmetic that every backend shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Axis = Literal["channel", "token"]
"""Whose numbers share a scale: ``channel`` groups along tokens (one scale a channel), ``token`` along channels."""

Role = Literal["keys", "values"]
"""What pages hold. Keys vary by channel, values by token, so tiers treat them apart."""

ROLES: tuple[Role, Role] = ("keys", "values")

Payload = dict[str, Tensor]
"""What a tier keeps of ``n`` pages: named tensors, each ``[n, B, ...]``."""


PREFIX = "coefficients."
"""Names of what is kept of a projected page's coefficients begin so."""

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits of each plane that a code is cut into, low bits first: only powers of two pack exactly into bytes."""


@dataclass(frozen=True)
class Affine:
    """Packed integer codes with ``x = code * scale + zero`` for each group.

    Attributes
    ----------
    bits : int
        Bits a code, 1 to 8.
    axis : {"channel", "token"}
    group : int or None
        Numbers that share a scale and a zero; None: the whole axis of a page.
    symmetric : bool
        Codes are signed about zero and no zero is kept.
    centred : bool
        Of one bit only: :meth:`Backend.quantize` chooses ``zero`` and ``zero + scale`` at the group's mean less and plus
        the mean distance from it, and the code by the side of the mean. Codes are read the same either way.
    """

    bits: int
    axis: Axis
    group: int | None = None
    symmetric: bool = False
    centred: bool = False


@dataclass(frozen=True)
class Float8:
    """E4M3 codes (OCP 8-bit floating point, 2023) with ``x = code * scale`` for each group (None: the whole axis)."""

    axis: Axis
    group: int | None = None


@dataclass(frozen=True)
class Plain:
    """Floating-point numbers as they are, under the name ``codes``; who writes them tells their dtype."""

    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Projected:
    """``x = mean + factor * matrix^T c``: a mean ``[n, B, H, D]`` and coefficients ``coefficients.*`` in a form of their own.

    Attributes
    ----------
    inner : Affine, Float8, Plain, or another
        Of the coefficients ``c [n, B, H, P / ratio, D]``; encoded, they are ``c = W / P (x - mean)`` with ``W`` the matrix.
    ratio : int
        Tokens a coefficient row.
    unbiased : bool
        Whether what is read is right in the mean over matrices; see :meth:`factor`.
    matrix : callable
        ``matrix(page_size, like)``: ``[P / ratio, P]`` float32 on the device of ``like``, ones and minus ones, ``W W^T = P I``,
        and the sum of each row 0, unless there are P of them and one is constant.
    """

    inner: object
    ratio: int
    unbiased: bool
    matrix: Callable[[int, Tensor], Tensor]

    def factor(self, page_size: int) -> float:
        """The factor of ``matrix^T c``: 1, or of `unbiased` as many times as the rows fit into a basis of what means leave."""
        whole = max(1, page_size - 1)
        return whole / min(page_size // self.ratio, whole) if self.unbiased else 1.0


@dataclass(frozen=True)
class Loaded:
    """Codes that a tier's own Triton function reads: ``x = y R``, with ``y`` what it yields and ``R`` a rotation of channels.

    The payload's tensors are called ``codes``, ``scale`` and ``zero`` (any of them, of any dtype, each ``[n, B, H, ...]``).
    Queries are turned once a call, and the answer is turned back: no page is.

    Attributes
    ----------
    load : callable
        ``load()`` returns a function made by ``triton.jit``; only a backend that has Triton asks for it. Its arguments:
        ``codes, scale, zero`` (int64 addresses of a page's tensors, 0 where there is none), ``own`` (a pointer),
        ``tok [T, 1]`` and ``ch [1, D]`` (int32 tokens and channels), ``seen [T, D]`` (which of them are there), ``inner``
        (int64 index of batch row and head), and the constants ``P`` (tokens a page), ``D`` (channels) and ``OPTION``. It
        returns ``y [T, D]`` float32, 0 where nothing is there.
    option : int
        ``OPTION``, for which the function is compiled.
    own : callable or None
        ``own(like)``: a tensor on the device of ``like`` that all pages share, such as a codebook.
    rotation : callable or None
        ``rotation(dim, like)``: ``R [D, D]`` float32, orthonormal, on the device of ``like``; None: ``x = y``.
    signs : callable or None
        ``signs(dim, like)``: ``[D]`` float32, ones and minus ones, on the device of ``like``, where ``R = H diag(signs)`` for
        every ``D`` that is a power of two, with ``H[i, j] = (-1)^popcount(i & j) / sqrt(D)``, the Hadamard matrix in
        Sylvester's order. A backend may then turn by sums and differences and never ask for ``R``; None: ``R`` is another.
    book : bool
        ``y`` is ``own[code] * scale``, with codes of ``option`` bits that :func:`argus.backends.cpu.pack` packed along
        channels, and one FP16 ``scale`` a token. A backend may then read codes of up to 3 bits without ``load``, levels
        rounded to FP16.
    """

    load: Callable[[], Any]
    option: int = 0
    own: Callable[[Tensor], Tensor] | None = None
    rotation: Callable[[int, Tensor], Tensor] | None = None
    signs: Callable[[int, Tensor], Tensor] | None = None
    book: bool = False


def grouped(x: Tensor, axis: Axis, group: int | None) -> tuple[Tensor, int]:
    """View pages ``[..., P, D]`` as groups and tell the dimension that runs along one."""
    dim = -2 if axis == "channel" else -1
    return x.unflatten(dim, (-1, group or x.shape[dim])), dim


def round_up(x: Tensor) -> Tensor:
    """The smallest float16 not below `x` (float32, within FP16's range)."""
    half = x.to(torch.float16)
    step = torch.where(half.signbit(), -1, 1).to(torch.int16) * (half.float() < x)
    return (half.view(torch.int16) + step).view(torch.float16)
