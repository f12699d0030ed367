"""One kernel from integer codes to their Johnson-Lindenstrauss archive: a warp takes a page of a head, 64 tokens, in registers.

Coefficients are ``c = W (x - mean) / 64``, up to 16 rows, and pages are ``x = scale * code + zero``. Rows of ``W`` have ones
and as many minus ones, so means and zeros of channels fall out of them: of axis ``channel``, ``c = scale * (W codes) / 64``.
Scales of tokens take the signs of ``W``, which costs them no bit: of axis ``token``, ``c = ((W scale) codes + W zero) / 64``.
Both are products of FP16 numbers, exact, with float32 sums on tensor cores: a code of up to 8 bits is an FP16 number below
2^-14 as it is, wherever in its byte it lies. Codes of one bit and axis ``channel`` are counted instead (``archive_signs.py``).

A lane holds columns 2 t and 2 t + 1 of products (lane ``4 g + t``), so groups of coefficients, which run along channels, are
shared by the four lanes of a row. Its tokens are ``16 t + 8 (c / 2) + 4 s + 2 h + c % 2`` for byte ``c`` of word ``(s, h)``, as
``layout.py`` has it for axis ``token``. For axis ``channel`` lanes read words of other lanes and turn 4 x 4 bytes of them.
Of more than 8 rows a lane holds rows ``g`` and ``g + 8``; of up to 4, lanes 16 apart hold one row's halves.
"""

from __future__ import annotations

from typing import Any

import torch

from argus.backends.base import PREFIX, Affine, Payload, Projected
from argus.backends.triton import convert, tuning
from argus.backends.triton.archive_channels import _channel_kernel, place
from argus.backends.triton.archive_signs import _sign_kernel
from argus.backends.triton.archive_tokens import _token_kernel
from argus.backends.triton.codec import shape_of
from argus.backends.triton.fragments import PAGE, Weights


def archive_codes(payload: Payload, source: Affine, form: Projected, kept: Weights) -> Payload | None:
    """Pages of 64 tokens in fragment order, archived in 4-bit codes along channels; None: there is no kernel.

    Parameters
    ----------
    payload : dict of str to Tensor
        What `source` keeps of pages ``[n, B, H, P, D]``.
    source : Affine
    form : Projected
    kept : Weights

    Returns
    -------
    dict of str to Tensor or None
    """
    inner = form.inner
    page, dim = shape_of(payload, source)
    rows = page // form.ratio
    if not convert.ASSEMBLED or not isinstance(inner, Affine) or page != PAGE or dim not in (64, 128) or not 1 <= rows <= 16:
        return None
    if inner.bits != 4 or inner.axis != "token" or inner.group not in (None, dim) or inner.symmetric or inner.centred:
        return None
    whole = source.group in (None, page if source.axis == "channel" else dim)
    if not whole or (source.symmetric and source.bits < 8):
        return None
    held = {name: tensor.contiguous() for name, tensor in payload.items()}
    codes, scale = held["codes"], held["scale"]
    head, device = codes.shape[:3], codes.device
    made = {"mean": torch.empty(*head, dim, dtype=torch.float16, device=device)}
    made[PREFIX + "codes"] = torch.empty(*head, rows, dim // 2, dtype=torch.uint8, device=device)
    made[PREFIX + "scale"] = torch.empty(*head, rows, 1, dtype=torch.float16, device=device)
    made[PREFIX + "zero"] = torch.empty_like(made[PREFIX + "scale"])
    if head.numel():
        kernel, factors = _kernel_of(source)
        laid = kept.of(form, codes, factors)
        kernel[(head.numel(),)](
            codes.view(torch.uint8), scale, held.get("zero", scale), laid, *made.values(),
            dim, rows, source.bits, source.symmetric, inner.bits,
            num_warps=1, maxnreg=tuning.ARCHIVE_REGISTERS,
        )  # fmt: skip
    return made


def _kernel_of(source: Affine) -> tuple[Any, tuple[float, ...] | None]:
    """The kernel for codes, and how its projection is laid (:class:`argus.backends.triton.fragments.Weights`)."""
    if source.axis == "token":
        return _token_kernel, (1.0,) * 4
    if source.bits == 1:
        return _sign_kernel, None
    # Codes that are summed lie at several places of their bytes.
    places = [place(i, source.bits) for i in range(4)]
    return _channel_kernel, tuple(2.0 ** (places[3] - one) for one in places)
