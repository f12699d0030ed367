"""How a GPU reads rotated codes in place: the function of :class:`argus.backends.base.Loaded`."""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.planar import planar


@triton.jit
def load(codes, scale, zero, own, tok, ch, seen, inner, P: tl.constexpr, D: tl.constexpr, OPTION: tl.constexpr):  # noqa: N803
    """``scale * levels[code]``, the token as it was rotated; ``own``: the levels, ``OPTION``: bits a code."""
    base = codes.to(tl.pointer_type(tl.uint8)) + inner * (P * D * OPTION // 8)
    level = tl.load(own + planar(base, tok, ch, seen, OPTION, D), mask=seen, other=0.0)
    size = tl.load(scale.to(tl.pointer_type(tl.float16)) + inner * P + tok, mask=tok < P, other=0.0)
    return level * size.to(tl.float32)
