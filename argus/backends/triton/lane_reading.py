"""Numbers of a page by token and channel, one a lane, decoded wherever they lie; all addresses are lanes' own."""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.lanes import _floats, _half, _load16
from argus.backends.triton.reading import _e4m3, _fragment
from argus.backends.triton.words import _byte

FP16, BF16, E4M3, CODES, ANY, PROJECTED = (tl.constexpr(number) for number in range(6))
"""What a page keeps: 16-bit numbers; E4M3 codes; codes in fragment order, of a width known when it compiles or when it runs;
coefficients of projected pages."""


@triton.jit
def _each(address):
    """An address for every lane."""
    return address + tl.zeros((32,), tl.int64)


@triton.jit
def _brain(at):
    """A BF16 number as float32."""
    return (_load16(at) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _field(base, lane, word, byte, WIDTH: tl.constexpr, SHIFT: tl.constexpr, D: tl.constexpr):
    """One plane's share of a code in fragment order, moved to bit SHIFT."""
    W: tl.constexpr = D * WIDTH // 16
    V: tl.constexpr = 4 if W % 4 == 0 else (2 if W % 2 == 0 else 1)
    stored = word % W
    code = _byte(base + ((stored // V * 32 + lane) * V + stored % V) * 4 + byte)
    return ((code >> (word // W * WIDTH)) & ((1 << WIDTH) - 1)) << SHIFT


@triton.jit
def _code(base, token, channel, BITS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr):
    """A code in fragment order."""
    lane, word, byte = _fragment(token, channel, TOKENS, D)
    base += token // 64 * (8 * D * BITS)
    code = tl.zeros((32,), tl.int32)
    if BITS & 8:
        code |= _field(base, lane, word, byte, 8, 0, D)
    if BITS & 4:
        code |= _field(base, lane, word, byte, 4, 0, D)
    if BITS & 2:
        code |= _field(base + (BITS & 4) * D * 8, lane, word, byte, 2, BITS & 4, D)
    if BITS & 1:
        code |= _field(base + (BITS & 6) * D * 8, lane, word, byte, 1, BITS & 6, D)
    return code


@triton.jit
def _any_code(base, token, channel, bits, D: tl.constexpr, TOKENS: tl.constexpr):
    """The same of 1, 2, 4 or 8 bits, known when it runs; D is a multiple of 64."""
    lane, word, byte = _fragment(token, channel, TOKENS, D)
    width = D * bits // 16
    stored = word % width
    code = _byte(base + token // 64 * (8 * D * bits) + (stored // 4 * 32 + lane) * 16 + stored % 4 * 4 + byte)
    return (code >> (word // width * bits)) & ((1 << bits) - 1)


@triton.jit
def _back(page, matrix, token, channel, inner, P: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """``W^T c`` of planar 4-bit coefficients with a scale and a zero a row."""
    at = page[0] + inner * (ROWS * D // 2) + channel % (D // 2)
    shift = channel // (D // 2) * 4
    weights = matrix.to(tl.int64) + token * 4
    x = tl.zeros((32,), tl.float32)
    # Four at a time: all at once would take long to compile.
    for begin in range(0, ROWS, 4):
        for i in tl.static_range(4):
            row = (inner * ROWS + begin + i) * 2
            code = ((_byte(at + (begin + i) * (D // 2)) >> shift) & 15).to(tl.float32)
            c = code * _half(_each(page[1] + row)) + _half(_each(page[2] + row))
            x += c * _floats(weights + (begin + i) * (P * 4), 1)[0]
    return x


@triton.jit
def _number(
    page, more, token, channel, inner, P: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
    TOKENS: tl.constexpr, G: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """A number of a page and head, float32.

    page: addresses of codes, scales and zeros. more: of ANY bits, whether codes are signed, and tokens that share a scale where
    TOKENS do not have their own; of PROJECTED pages, with BITS rows, the address of means, a factor and the matrix.
    """
    if KIND == FP16:
        x = _half(page[0] + ((inner * P + token) * D + channel) * 2)
    elif KIND == BF16:
        x = _brain(page[0] + ((inner * P + token) * D + channel) * 2)
    elif KIND == PROJECTED:
        x = _back(page, more[2], token, channel, inner, P, D, BITS) * more[1] + _half(more[0] + (inner * D + channel) * 2)
    elif KIND == ANY:
        code = _any_code(page[0] + inner * (P * D // 8 * more[0]), token, channel, more[0], D, TOKENS)
        at = inner * P + token
        if not TOKENS:
            at = at // more[2] * D + channel
        scale = _half(page[1] + at * 2)
        zero = _half(tl.where(more[1] == 1, page[1], page[2]) + at * 2)
        x = tl.where(more[1] == 1, ((code << 24) >> 24).to(tl.float32) * scale, code.to(tl.float32) * scale + zero)
    else:
        at = (inner * P + token) * (D // G) + channel // G
        if not TOKENS:
            at = (inner * (P // G) + token // G) * D + channel
        scale = _half(page[1] + at * 2)
        if KIND == E4M3:
            x = _e4m3(_byte(page[0] + (inner * P + token) * D + channel)) * (scale * 256.0)
        else:
            code = _code(page[0] + inner * (P * D * BITS // 8), token, channel, BITS, D, TOKENS)
            if SIGNED:
                x = ((code << 24) >> 24).to(tl.float32) * scale
            else:
                x = code.to(tl.float32) * scale + _half(page[2] + at * 2)
    return x
