"""Integer codes to codes of half as many bits, without decoding them: a group's numbers are few, so each is rounded once.

Where groups of both stages are the same, a group of 4-bit codes holds at most 16 numbers and one of 2-bit codes four. What
its new scale and zero are follows from the least and greatest code, or from how often each occurs, and which code becomes
which from a few comparisons a group. Codes themselves are only counted, compared and masked, four or more in a word. The
order of codes is told in ``recode.py``, whose results these are bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.codes import _load_plane
from argus.backends.triton.lanes import _half
from argus.backends.triton.rounding import CENTRED, _affine
from argus.backends.triton.words import _across, _larger16, _owned, _put16, _put_words, _smaller16, _spread, _transposed4


@triton.jit
def _pairs_ahead(words, first, second, S: tl.constexpr, N: tl.constexpr, NS: tl.constexpr, L1: tl.constexpr, L3: tl.constexpr):
    """The greatest 4-bit code of a quartet's group (bits 12 to 15) and what 15 leaves over the least (28 to 31).

    Of two 16-bit numbers the one with the larger upper four bits is the larger, whatever follows: a shift brings each of
    four fields there.
    """
    for j in tl.static_range(N // 2):
        w = words[j // 2 * 2 * NS + 2 * S + j % 2]
        odd, even = _larger16(w, w << 4), _larger16(w << 8, w << 12)
        low_odd, low_even = _smaller16(w, w << 4), _smaller16(w << 8, w << 12)
        if j == 0:
            most_odd, most_even, least_odd, least_even = odd, even, low_odd, low_even
        else:
            most_odd, most_even = _larger16(most_odd, odd), _larger16(most_even, even)
            least_odd, least_even = _smaller16(least_odd, low_odd), _smaller16(least_even, low_even)
    left_odd, left_even = ~least_odd, ~least_even
    four = (
        (most_even & 0xFFFF) | (left_even << 16), (most_odd & 0xFFFF) | (left_odd << 16),
        _high(most_even) | (left_even & -65536), _high(most_odd) | (left_odd & -65536),
    )  # fmt: skip
    return _across(four, first, second, L1, 8, L3, 3)


@triton.jit
def _high(word):
    return (word >> 16) & 0xFFFF


@triton.jit
def _reached(code, sign, last, scale, zero, start, bound, UP: tl.constexpr):
    """Whether the number of a code lies so far over the new zero; UP: or on the bound."""
    over = tl.fma(tl.fma(code, sign, last), scale, zero) - start
    if UP:
        yes = over >= bound
    else:
        yes = over > bound
    return yes


@triton.jit
def _above(scale, zero, step, start, J: tl.constexpr):
    """How many of 16 codes, the greatest numbers, become code J or more; a binary search, since numbers rise with codes.

    ``round(d / step) >= J`` is ``d >= (J - 1/2) step``, or ``>`` where half way is rounded down. The bound is exact in
    float32, and no quotient of a float by an FP16 number rounds onto ``J - 1/2`` unless it lies there.
    """
    sign = tl.where(scale < 0.0, -1.0, 1.0)
    last = tl.where(scale < 0.0, 15.0, 0.0)
    bound = step * (J - 0.5)
    below = scale * 0.0
    for i in tl.static_range(4):
        yes = _reached(below + ((8 >> i) - 1), sign, last, scale, zero, start, bound, J % 2 == 0)
        below = tl.where(yes, below, below + (8 >> i))
    yes = _reached(below, sign, last, scale, zero, start, bound, J % 2 == 0)
    return 16.0 - tl.where(yes, below, below + 1.0)


@triton.jit
def _quarter(codes, a1, a2, a3):
    """2-bit codes, at bits 4 and 5 of each byte, of the four 4-bit codes in a word; ``a`` as :func:`_above` tells."""
    x1, x2, x3 = codes + a1, codes + a2, codes + a3
    return ((x1 ^ x2 ^ x3) & 0x10101010) | ((x2 << 1) & 0x20202020)


@triton.jit
def _to_two(words, lane, first, second, held, scales, zeros, scale_ptr, zero_ptr, S: tl.constexpr, TOKENS: tl.constexpr,
            G: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Words of 2-bit codes of a quartet, from 4-bit codes."""
    NS: tl.constexpr = 4 if TOKENS else D // 16
    N: tl.constexpr = D // 8 if TOKENS else 8
    L1: tl.constexpr = 16 if TOKENS else 4
    L3: tl.constexpr = 4 if TOKENS else (16 if G == 64 else 0)
    ends = _pairs_ahead(words, first, second, S, N, NS, L1, L3)
    high = ((ends >> 12) & 15).to(tl.float32)
    low = 15.0 - ((ends >> 28) & 15).to(tl.float32)
    s, z = _half(scales), _half(zeros)
    a, b = tl.fma(low, s, z), tl.fma(high, s, z)
    scale, zero = _affine(tl.minimum(a, b), tl.maximum(a, b), 3)
    _put16(scale_ptr, scale.to(tl.int16, bitcast=True).to(tl.int32), held)
    _put16(zero_ptr, zero.to(tl.int16, bitcast=True).to(tl.int32), held)
    step, start = scale.to(tl.float32), zero.to(tl.float32)
    step = tl.where(step == 0.0, 1.0, step)
    many = _above(s, z, step, start, 1) + 256.0 * _above(s, z, step, start, 2) + 65536.0 * _above(s, z, step, start, 3)
    mine = many.to(tl.int32) | tl.where(s < 0.0, 15 << 24, 0)
    p = _spread(mine, lane, L1, 8, L3)
    a1, a2, a3, turned = _transposed4(p[0], p[1], p[2], p[3])
    made = ()
    for j in tl.static_range(N // 4):
        u = words[j // 2 * 2 * NS + 2 * S + j % 2]
        v = words[D // 8 + j // 2 * 2 * NS + 2 * S + j % 2]
        word = _quarter((u & 0x0F0F0F0F) ^ turned, a1, a2, a3) >> 4
        word |= _quarter((v & 0x0F0F0F0F) ^ turned, a1, a2, a3) >> 2
        word |= _quarter(((u >> 4) & 0x0F0F0F0F) ^ turned, a1, a2, a3)
        word |= _quarter(((v >> 4) & 0x0F0F0F0F) ^ turned, a1, a2, a3) << 2
        made = made + (word,)
    return made


@triton.jit
def _nibbles(bits):
    """How many of each byte's four bits 0, 2, 4, 6 are set, of two such bytes added."""
    four = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return (four + (four >> 4)) & 0x0F0F0F0F


@triton.jit
def _counted(words, first, second, S: tl.constexpr, N: tl.constexpr, NS: tl.constexpr, L1: tl.constexpr, L3: tl.constexpr):
    """How many of a group's 2-bit codes have their low bit, their high bit, or both set: three bytes of a word."""
    low, high, both = 0, 0, 0
    for j in tl.static_range(N // 8):
        u, v = words[j * 2 * NS + 2 * S], words[j * 2 * NS + 2 * S + 1]
        ul, vl, uh, vh = u & 0x55555555, v & 0x55555555, (u >> 1) & 0x55555555, (v >> 1) & 0x55555555
        low += _nibbles(ul + vl)
        high += _nibbles(uh + vh)
        both += _nibbles((ul & uh) + (vl & vh))
    return _across(_transposed4(low, high, both, low * 0), first, second, L1, 8, L3, 0)


@triton.jit
def _weighed(n0, n1, n2, n3, x0, x1, x2, x3, SHARE: tl.constexpr):
    """The mean of numbers of which each occurs so often: sums in float64, rounded to float32."""
    a = n0 * x0.to(tl.float64) + n1 * x1.to(tl.float64)
    b = n2 * x2.to(tl.float64) + n3 * x3.to(tl.float64)
    return ((a + b) * SHARE).to(tl.float32)


@triton.jit
def _to_one(words, lane, first, second, held, scales, zeros, scale_ptr, zero_ptr, S: tl.constexpr, TOKENS: tl.constexpr,
            G: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """For each word of 2-bit codes of a quartet, one with their signs about the mean at bits 0, 2, 4 and 6 of its bytes."""
    NS: tl.constexpr = 4 if TOKENS else D // 16
    N: tl.constexpr = D // 8 if TOKENS else 8
    L1: tl.constexpr = 16 if TOKENS else 4
    L3: tl.constexpr = 4 if TOKENS else (16 if G == 64 else 0)
    SHARE: tl.constexpr = 1.0 / G
    counts = _counted(words, first, second, S, N, NS, L1, L3)
    low, high, both = counts & 255, (counts >> 8) & 255, (counts >> 16) & 255
    n0, n1 = (G - low - high + both).to(tl.float64), (low - both).to(tl.float64)
    n2, n3 = (high - both).to(tl.float64), both.to(tl.float64)
    s, z = _half(scales), _half(zeros)
    x1, x2, x3 = s + z, tl.fma(s, 2.0, z), tl.fma(s, 3.0, z)
    centre = _weighed(n0, n1, n2, n3, z, x1, x2, x3, SHARE)
    r0, r1, r2, r3 = z - centre, x1 - centre, x2 - centre, x3 - centre
    far = _weighed(n0, n1, n2, n3, tl.abs(r0), tl.abs(r1), tl.abs(r2), tl.abs(r3), SHARE)
    scale, zero = (2.0 * far).to(tl.float16), (centre - far).to(tl.float16)
    _put16(scale_ptr, scale.to(tl.int16, bitcast=True).to(tl.int32), held)
    _put16(zero_ptr, zero.to(tl.int16, bitcast=True).to(tl.int32), held)
    sides = tl.where(r0 >= 0.0, 0xFF, 0) | tl.where(r1 >= 0.0, 0xFF00, 0)
    sides |= tl.where(r2 >= 0.0, 0xFF0000, 0) | tl.where(r3 >= 0.0, -16777216, 0)
    p = _spread(sides, lane, L1, 8, L3)
    m0, m1, m2, m3 = _transposed4(p[0], p[1], p[2], p[3])
    made = ()
    for j in tl.static_range(N // 4):
        w = words[j // 2 * 2 * NS + 2 * S + j % 2]
        h = w >> 1
        made = made + (((h & ((w & m3) | (~w & m2))) | (~h & ((w & m1) | (~w & m0)))) & 0x55555555,)
    return made


@triton.jit
def _narrow_kernel(
    from_ptr, from_scale, from_zero, codes_ptr, scale_ptr, zero_ptr,
    D: tl.constexpr, KIND: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Recode 64 tokens of one head: 2-bit codes to their sides of the mean (KIND CENTRED), or 4-bit codes to 2 bits."""
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 32)
    BITS: tl.constexpr = 2 if KIND == CENTRED else 4
    NS: tl.constexpr = 4 if TOKENS else D // 16
    PER: tl.constexpr = 4 if TOKENS else 8
    first, second, held, at = _owned(lane, unit, D, TOKENS, G)
    words = _load_plane(from_ptr.to(tl.int64) + unit * (8 * D * BITS), lane, BITS, D)
    scales, zeros = from_scale.to(tl.int64) + at, from_zero.to(tl.int64) + at
    to, base = scale_ptr.to(tl.int64) + at, zero_ptr.to(tl.int64) + at
    made = ()
    for S in tl.static_range(NS):
        if KIND == CENTRED:
            made = made + _to_one(
                words, lane, first, second, held, scales + S * PER, zeros + S * PER, to + S * PER, base + S * PER,
                S, TOKENS, G, D,
            )  # fmt: skip
        else:
            made = made + _to_two(
                words, lane, first, second, held, scales + S * PER, zeros + S * PER, to + S * PER, base + S * PER,
                S, TOKENS, G, D,
            )  # fmt: skip
    # A quartet made E words, word j of which is stored word (j / 2, S, j % 2).
    E: tl.constexpr = (D // 8 if TOKENS else 8) // 4
    W: tl.constexpr = D // 8
    stored = ()
    if KIND == CENTRED:
        for w in tl.static_range(W // 2):
            one = made[w // 2 % NS * E + w // (2 * NS) * 2 + w % 2]
            two = made[(w + W // 2) // 2 % NS * E + (w + W // 2) // (2 * NS) * 2 + w % 2]
            stored = stored + (one | (two << 1),)
        _put_words(codes_ptr.to(tl.int64) + unit * (8 * D), lane, stored, W // 2)
    else:
        for w in tl.static_range(W):
            stored = stored + (made[w // 2 % NS * E + w // (2 * NS) * 2 + w % 2],)
        _put_words(codes_ptr.to(tl.int64) + unit * (16 * D), lane, stored, W)
