"""Rounding as the oracle rounds: quotients as divisions give them, scales up to FP16, codes to the even."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
FP8_MAX = tl.constexpr(448.0)
RANGE, SYMMETRIC, CENTRED, FLOATING = (tl.constexpr(i) for i in range(4))
"""How numbers are quantized: from the least to the greatest, about zero, to both sides of the mean, or to E4M3."""
DIVIDES = tl.constexpr(INTERPRETED)
"""Whether quotients are divisions: the interpreter rounds a fused multiplication and addition twice."""


@triton.jit
def _round_up(x):
    """The smallest float16 not below x."""
    if DIVIDES:
        half = x.to(tl.float16)
        bits = half.to(tl.int16, bitcast=True)
        step = tl.where(bits < 0, -1, 1).to(tl.int16)
        up = tl.where(half.to(tl.float32) < x, bits + step, bits).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        up = tl.inline_asm_elementwise("cvt.rp.f16.f32 $0, $1;", "=h,f", [x], tl.float16, True, 1)
    return up


@triton.jit
def _reciprocal(x):
    """``1 / x`` but for its last bit, of an FP16 number: others may be too small or too large for the instruction."""
    if DIVIDES:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def _round_even(x):
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _rounded_even(x):
    """The integer nearest to x, int32, for x below 2^22 in size: 1.5 * 2^23 leaves it in the low bits of the sum."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _over(x, step):
    """x over step, an FP16 number in float32, as a division rounds it.

    See :func:`argus.backends.triton.words._rounded` for why one correction is enough.
    """
    if DIVIDES:
        q = tl.div_rn(x, x * 0.0 + step)
    else:
        q = _corrected(x, step, _reciprocal(step))
    return q


@triton.jit
def _over_constant(x, PARTS: tl.constexpr):
    """:func:`_over` of a constant."""
    if DIVIDES:
        q = tl.div_rn(x, x * 0.0 + PARTS)
    else:
        q = _corrected(x, PARTS * 1.0, 1.0 / PARTS)
    return q


@triton.jit
def _corrected(x, step, inverse):
    q = x * inverse
    # Signs so that a zero keeps its own; Triton's minus is 0 - x, which does not.
    return tl.fma(tl.fma(step, q, x * -1.0) * -1.0, inverse, q)


@triton.jit
def _affine(low, high, TOP: tl.constexpr):
    """Scale and zero, float16, of groups that reach from low to high."""
    zero = -_round_up(-low)
    return _round_up(_over_constant(high - zero.to(tl.float32), TOP)), zero


@triton.jit
def _code(x, scale, zero, TOP: tl.constexpr):
    step = scale.to(tl.float32)
    step = tl.where(step == 0.0, 1.0, step)
    return tl.minimum(tl.maximum(_rounded_even(_over(x - zero.to(tl.float32), step)), 0), TOP)


@triton.jit
def _coded(x, scale, zero, KIND: tl.constexpr, TOP: tl.constexpr):
    """Codes, those about zero as bytes; scale and zero broadcast with x."""
    if KIND == SYMMETRIC:
        HALF: tl.constexpr = TOP >> 1
        step = scale.to(tl.float32)
        step = tl.where(step == 0.0, 1.0, step)
        code = tl.minimum(tl.maximum(_rounded_even(_over(x, step)), -HALF), HALF) & 255
    else:
        code = _code(x, scale, zero, TOP)
    return code
