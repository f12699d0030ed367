"""Numbers of pages of any form, decoded in registers wherever they are asked for."""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.planar import planar


@triton.jit
def _field_at(base, word, lane, byte, SHIFT: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, seen):
    """Fragment order: one plane's share of the codes."""
    F: tl.constexpr = 8 // BITS
    W: tl.constexpr = D // 2 // F
    V: tl.constexpr = 4 if W % 4 == 0 else (2 if W % 2 == 0 else 1)
    stored = word % W
    at = ((stored // V * 32 + lane) * V + stored % V) * 4 + byte
    return ((tl.load(base + at, mask=seen, other=0).to(tl.int32) >> ((word // W) * BITS)) & ((1 << BITS) - 1)) << SHIFT


@triton.jit
def _fragment(tok, ch, TOKENS: tl.constexpr, D: tl.constexpr):
    """Where in fragment order codes lie: lane, word and byte of their block."""
    u = tok % 64
    if TOKENS:
        lane = (ch % 8) * 4 + u // 16
        word = ((ch // 16 * 2 + (u % 8) // 4) * 2 + (u % 4) // 2) * 2 + (ch % 16) // 8
        byte = u % 2 + (u % 16) // 8 * 2
    else:
        c = ch % (D // 4)
        lane = (u // 8) * 4 + ch // (D // 4)
        word = ((u % 8) // 2 * (D // 16) + c // 4) * 2 + u % 2
        byte = c % 4
    return lane, word, byte


@triton.jit
def _codes(base, tok, ch, seen, BITS: tl.constexpr, TOKENS: tl.constexpr, FRAGMENTS: tl.constexpr, D: tl.constexpr):
    """Codes of tokens and channels, int32, broadcast together."""
    if FRAGMENTS:
        code = tl.zeros(seen.shape, tl.int32)
        lane, word, byte = _fragment(tok, ch, TOKENS, D)
        base += tok // 64 * (64 * D * BITS // 8)
        if BITS & 8:
            code |= _field_at(base, word, lane, byte, 0, 8, D, seen)
        if BITS & 4:
            code |= _field_at(base, word, lane, byte, 0, 4, D, seen)
        if BITS & 2:
            code |= _field_at(base + (BITS & 4) * D * 8, word, lane, byte, BITS & 4, 2, D, seen)
        if BITS & 1:
            code |= _field_at(base + (BITS & 6) * D * 8, word, lane, byte, BITS & 6, 1, D, seen)
    else:
        code = planar(base, tok, ch, seen, BITS, D)
    return code


@triton.jit
def _e4m3(byte):
    """The number of an E4M3 byte over 2^8: its exponent and mantissa moved to FP16's places."""
    half = ((byte & 127) << 7) | ((byte & 128) << 8)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _tile(
    codes, scales, zeros, own, tok, ch, seen, inner, P: tl.constexpr, D: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr,
    FRAGMENTS: tl.constexpr, ELEMENT: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """Numbers of tokens and channels of one page and head, float32. KIND 0: plain, 1: E4M3, 2: affine, 3: what LOAD reads."""
    if KIND == 3:
        x = LOAD(codes, scales, zeros, own, tok, ch, seen, inner, P, D, BITS)
    elif KIND == 0:
        base = codes.to(tl.pointer_type(ELEMENT)) + inner * P * D
        x = tl.load(base + tok * D + ch, mask=seen, other=0.0).to(tl.float32)
    else:
        # What all channels of a token share is loaded once, and what all tokens of a channel do.
        if TOKENS and G == D:
            at = inner * P + tok
            there = tok < P
        elif TOKENS:
            at = inner * (P * (D // G)) + tok * (D // G) + ch // G
            there = seen
        elif G == P:
            at = inner * D + ch
            there = ch < D
        else:
            at = inner * (P // G * D) + (tok // G) * D + ch
            there = seen
        scale = tl.load(scales.to(tl.pointer_type(tl.float16)) + at, mask=there, other=0.0).to(tl.float32)
        base = codes.to(tl.pointer_type(tl.uint8)) + inner * (P * D * BITS // 8)
        if KIND == 1:
            x = _e4m3(tl.load(base + tok * D + ch, mask=seen, other=0).to(tl.int32)) * (scale * 256.0)
        else:
            code = _codes(base, tok, ch, seen, BITS, TOKENS, FRAGMENTS, D)
            if SYMMETRIC:
                code = (code << 24) >> 24
            x = code.to(tl.float32) * scale
            if not SYMMETRIC:
                x += tl.load(zeros.to(tl.pointer_type(tl.float16)) + at, mask=there, other=0.0).to(tl.float32)
                x = tl.where(seen, x, 0.0)
    return x


@triton.constexpr_function
def _power(rows):
    """Rows of coefficients as tensor cores take them."""
    return max(16, 1 << (rows - 1).bit_length())


@triton.jit
def _addresses(row_of, ALIGNED: tl.constexpr):
    """Where codes, scales and zeros of a page begin, from where its table tells them on."""
    codes, scales, zeros = tl.load(row_of), tl.load(row_of + 1), tl.load(row_of + 2)
    if ALIGNED:
        codes, scales, zeros = tl.multiple_of(codes, 16), tl.multiple_of(scales, 16), tl.multiple_of(zeros, 16)
    return codes, scales, zeros


@triton.jit
def _projected_tile(
    page, mean, own, matrix, tok, ch, inner, P: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr,
    FRAGMENTS: tl.constexpr, ELEMENT: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """Of a projected page and head: coefficients ``[M, N]``, the matrix ``[T, M]`` back to `tok`, and means ``[N]``, float32.

    Of M rows, a power of two, those beyond ROWS are 0.
    """
    row = tl.arange(0, _power(ROWS))
    held = row < ROWS
    c = _tile(
        page[0], page[1], page[2], own, row[:, None], ch[None, :], held[:, None] & (ch < D)[None, :], inner, ROWS, D,
        KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD,
    )  # fmt: skip
    back = tl.load(matrix + row[None, :] * P + tok[:, None], mask=held[None, :] & (tok < P)[:, None], other=0.0)
    means = tl.load(mean.to(tl.pointer_type(tl.float16)) + inner * D + ch, mask=ch < D, other=0.0).to(tl.float32)
    return c, back, means


@triton.jit
def _page_tile(
    page, mean, own, matrix, factor, tok, ch, inner, P: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr,
    FRAGMENTS: tl.constexpr, ELEMENT: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """Tokens `tok` ``[T]`` and channels `ch` ``[N]`` of a page and head, float32, 0 beyond it.

    Of a projected page ROWS are kept: ``mean + factor * matrix^T c``; `mean` is the address of its means. Else ROWS is 0.
    """
    seen = (tok < P)[:, None] & (ch < D)[None, :]
    if ROWS:
        c, back, means = _projected_tile(
            page, mean, own, matrix, tok, ch, inner, P, D, ROWS,
            KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD,
        )  # fmt: skip
        x = tl.where(seen, tl.dot(back, c, input_precision="tf32x3") * factor + means[None, :], 0.0)
    else:
        x = _tile(
            page[0], page[1], page[2], own, tok[:, None], ch[None, :], seen, inner, P, D,
            KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD,
        )  # fmt: skip
    return x


@triton.jit
def _page_numbers(
    page, mean, own, matrix, factor, turn, tok, ch, held, inner, P: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    ROWS: tl.constexpr, TURNED: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, SYMMETRIC: tl.constexpr,
    FRAGMENTS: tl.constexpr, ELEMENT: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """Numbers at pairs of `tok` and `ch`, ``[N]`` each, float32, of those that are `held`; turned back where TURNED."""
    if ROWS:
        row = tl.arange(0, _power(ROWS))
        seen = (row < ROWS)[:, None] & held[None, :]
        c = _tile(
            page[0], page[1], page[2], own, row[:, None], ch[None, :], seen, inner, ROWS, D,
            KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD,
        )  # fmt: skip
        back = tl.load(matrix + row[:, None] * P + tok[None, :], mask=seen, other=0.0)
        means = tl.load(mean.to(tl.pointer_type(tl.float16)) + inner * D + ch, mask=held, other=0.0).to(tl.float32)
        x = tl.sum(back * c, 0) * factor + means
    elif KIND == 3:
        # Whole tokens, as its function is promised to be asked for.
        d = tl.arange(0, DB)
        y = _tile(
            page[0], page[1], page[2], own, tok[:, None], d[None, :], held[:, None] & (d < D)[None, :], inner, P, D,
            KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD,
        )  # fmt: skip
        x = tl.sum(y * _basis(turn, ch, D, DB, TURNED), 1)
    else:
        x = tl.sum(
            _tile(
                page[0], page[1], page[2], own, tok[:, None], ch[:, None], held[:, None], inner, P, D,
                KIND, BITS, TOKENS, G, SYMMETRIC, FRAGMENTS, ELEMENT, LOAD,
            ),
            1,
        )  # fmt: skip
    return x


@triton.jit
def _basis(turn, ch, D: tl.constexpr, DB: tl.constexpr, TURNED: tl.constexpr):
    """``[N, DB]``: what channels are among the numbers that a page keeps, of rotated ones where TURNED."""
    d = tl.arange(0, DB)
    if TURNED:
        x = tl.load(turn + d[None, :] * D + ch[:, None], mask=(d < D)[None, :], other=0.0)
    else:
        x = (ch[:, None] == d[None, :]).to(tl.float32)
    return x
