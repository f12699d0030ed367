"""Words of four codes and the numbers they stand for, four to a lane, in inline PTX (PTX ISA 9.7): no value costs more than
a dozen instructions, and the compiler has few operations to look at. ``layout.py`` tells which codes share a word.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.lanes import _xor


@triton.jit
def _values(word, s, z):
    """``code * s + z`` of four unsigned codes: a byte under 2^23's exponent is 2^23 + code."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d; .reg .f32 e, f, g, h;
        prmt.b32 a, $4, 0x4B000000, 0x7440; prmt.b32 b, $4, 0x4B000000, 0x7441;
        prmt.b32 c, $4, 0x4B000000, 0x7442; prmt.b32 d, $4, 0x4B000000, 0x7443;
        mov.b32 e, a; mov.b32 f, b; mov.b32 g, c; mov.b32 h, d;
        sub.rn.f32 e, e, 0f4B000000; sub.rn.f32 f, f, 0f4B000000; sub.rn.f32 g, g, 0f4B000000; sub.rn.f32 h, h, 0f4B000000;
        fma.rn.f32 $0, e, $5, $9; fma.rn.f32 $1, f, $6, $10; fma.rn.f32 $2, g, $7, $11; fma.rn.f32 $3, h, $8, $12; }""",
        "=&f,=&f,=&f,=&f,r,f,f,f,f,f,f,f,f", [word, s[0], s[1], s[2], s[3], z[0], z[1], z[2], z[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _signed_values(word, s):
    """``code * s`` of four signed codes: 128 is added to each, and taken from 2^23 + 128 + code."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 w, a, b, c, d; .reg .f32 e, f, g, h;
        xor.b32 w, $4, 0x80808080;
        prmt.b32 a, w, 0x4B000000, 0x7440; prmt.b32 b, w, 0x4B000000, 0x7441;
        prmt.b32 c, w, 0x4B000000, 0x7442; prmt.b32 d, w, 0x4B000000, 0x7443;
        mov.b32 e, a; mov.b32 f, b; mov.b32 g, c; mov.b32 h, d;
        sub.rn.f32 e, e, 0f4B000080; sub.rn.f32 f, f, 0f4B000080; sub.rn.f32 g, g, 0f4B000080; sub.rn.f32 h, h, 0f4B000080;
        mul.rn.f32 $0, e, $5; mul.rn.f32 $1, f, $6; mul.rn.f32 $2, g, $7; mul.rn.f32 $3, h, $8; }""",
        "=&f,=&f,=&f,=&f,r,f,f,f,f", [word, s[0], s[1], s[2], s[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _rounded(x0, x1, x2, x3, step, inverse, zero):
    """A word of ``round((x - zero) / step)``, four integers of 8 bits, as a division rounded to float32 would give them.

    With a step of FP16's eleven bits, ``y`` within 2^-22 of ``1 / step`` and ``q = (x - zero) * y``, one correction is enough:
    ``q + (x - zero - q * step) * y`` is the rounded quotient. What stands in brackets is exact, the sum before its rounding is
    within 2^-20 of a float's last place, and no quotient of 24 by 11 bits comes nearer than 2^-12 of it to the middle of two
    floats. 1.5 * 2^23 rounds it to the even integer and leaves that in the low byte.
    """
    return tl.inline_asm_elementwise(
        """{ .reg .f32 a, b, c, d, e, f, g, h, k, l, m, n; .reg .b32 p, q, r, s;
        sub.rn.f32 a, $1, $13; sub.rn.f32 b, $2, $14; sub.rn.f32 c, $3, $15; sub.rn.f32 d, $4, $16;
        mul.rn.f32 e, a, $9; mul.rn.f32 f, b, $10; mul.rn.f32 g, c, $11; mul.rn.f32 h, d, $12;
        neg.f32 k, $5; neg.f32 l, $6; neg.f32 m, $7; neg.f32 n, $8;
        fma.rn.f32 a, k, e, a; fma.rn.f32 b, l, f, b; fma.rn.f32 c, m, g, c; fma.rn.f32 d, n, h, d;
        fma.rn.f32 e, a, $9, e; fma.rn.f32 f, b, $10, f; fma.rn.f32 g, c, $11, g; fma.rn.f32 h, d, $12, h;
        add.rn.f32 e, e, 0f4B400000; add.rn.f32 f, f, 0f4B400000; add.rn.f32 g, g, 0f4B400000; add.rn.f32 h, h, 0f4B400000;
        mov.b32 p, e; mov.b32 q, f; mov.b32 r, g; mov.b32 s, h;
        prmt.b32 p, p, q, 0x0040; prmt.b32 r, r, s, 0x0040; prmt.b32 $0, p, r, 0x5410; }""",
        "=r,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f",
        [x0, x1, x2, x3, step[0], step[1], step[2], step[3], inverse[0], inverse[1], inverse[2], inverse[3],
         zero[0], zero[1], zero[2], zero[3]],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _rounded_signed(x0, x1, x2, x3, step, inverse):
    """:func:`_rounded` about zero."""
    return tl.inline_asm_elementwise(
        """{ .reg .f32 a, b, c, d, e, f, g, h, k, l, m, n; .reg .b32 p, q, r, s;
        mul.rn.f32 e, $1, $9; mul.rn.f32 f, $2, $10; mul.rn.f32 g, $3, $11; mul.rn.f32 h, $4, $12;
        neg.f32 k, $5; neg.f32 l, $6; neg.f32 m, $7; neg.f32 n, $8;
        fma.rn.f32 a, k, e, $1; fma.rn.f32 b, l, f, $2; fma.rn.f32 c, m, g, $3; fma.rn.f32 d, n, h, $4;
        fma.rn.f32 e, a, $9, e; fma.rn.f32 f, b, $10, f; fma.rn.f32 g, c, $11, g; fma.rn.f32 h, d, $12, h;
        add.rn.f32 e, e, 0f4B400000; add.rn.f32 f, f, 0f4B400000; add.rn.f32 g, g, 0f4B400000; add.rn.f32 h, h, 0f4B400000;
        mov.b32 p, e; mov.b32 q, f; mov.b32 r, g; mov.b32 s, h;
        prmt.b32 p, p, q, 0x0040; prmt.b32 r, r, s, 0x0040; prmt.b32 $0, p, r, 0x5410; }""",
        "=r,f,f,f,f,f,f,f,f,f,f,f,f",
        [x0, x1, x2, x3, step[0], step[1], step[2], step[3], inverse[0], inverse[1], inverse[2], inverse[3]],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _rounded_e4m3(x0, x1, x2, x3, step, inverse):
    """A word of four E4M3 codes of ``x / step``; a zero keeps its sign."""
    return tl.inline_asm_elementwise(
        """{ .reg .f32 a, b, c, d, e, f, g, h; .reg .b16 p, q;
        mul.rn.f32 e, $1, $9; mul.rn.f32 f, $2, $10; mul.rn.f32 g, $3, $11; mul.rn.f32 h, $4, $12;
        neg.f32 a, $1; neg.f32 b, $2; neg.f32 c, $3; neg.f32 d, $4;
        fma.rn.f32 a, $5, e, a; fma.rn.f32 b, $6, f, b; fma.rn.f32 c, $7, g, c; fma.rn.f32 d, $8, h, d;
        neg.f32 a, a; neg.f32 b, b; neg.f32 c, c; neg.f32 d, d;
        fma.rn.f32 e, a, $9, e; fma.rn.f32 f, b, $10, f; fma.rn.f32 g, c, $11, g; fma.rn.f32 h, d, $12, h;
        cvt.rn.satfinite.e4m3x2.f32 p, f, e; cvt.rn.satfinite.e4m3x2.f32 q, h, g; mov.b32 $0, {p, q}; }""",
        "=r,f,f,f,f,f,f,f,f,f,f,f,f",
        [x0, x1, x2, x3, step[0], step[1], step[2], step[3], inverse[0], inverse[1], inverse[2], inverse[3]],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _joined(a, b, c, d):
    """A word of the low bytes of four."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 p, r; prmt.b32 p, $1, $2, 0x0040; prmt.b32 r, $3, $4, 0x0040; prmt.b32 $0, p, r, 0x5410; }",
        "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _larger16(a, b):
    """The larger of each two unsigned 16-bit numbers."""
    return tl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _smaller16(a, b):
    return tl.inline_asm_elementwise("min.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _either(a, b, OP: tl.constexpr):
    """OP 0: the sum, 1: the larger, 2: the smaller, 3: the larger of two halves each."""
    if OP == 0:
        x = a + b
    elif OP == 1:
        x = tl.maximum(a, b)
    elif OP == 2:
        x = tl.minimum(a, b)
    else:
        x = _larger16(a, b)
    return x


@triton.jit
def _traded(x, LANES: tl.constexpr):
    """:func:`_xor` of words or numbers."""
    return _xor(x.to(tl.float32, bitcast=True), LANES).to(x.dtype, bitcast=True)


@triton.jit
def _across(x, first, second, L1: tl.constexpr, L2: tl.constexpr, L3: tl.constexpr, OP: tl.constexpr):
    """Join four numbers over the eight lanes that differ in the bits L1, L2 and L3, in that order; L3 0: over four lanes.

    A lane keeps one of them, ``first + 2 * second``: what tells it are its bits L1 and L2.
    """
    a = _either(tl.where(first, x[1], x[0]), _traded(tl.where(first, x[0], x[1]), L1), OP)
    b = _either(tl.where(first, x[3], x[2]), _traded(tl.where(first, x[2], x[3]), L1), OP)
    c = _either(tl.where(second, b, a), _traded(tl.where(second, a, b), L2), OP)
    if L3 > 0:
        c = _either(c, _traded(c, L3), OP)
    return c


@triton.jit
def _inside(x, N: tl.constexpr, OP: tl.constexpr):
    """Join N quartets, a flat tuple."""
    for level in tl.static_range(6):
        if (N >> level) > 1:
            y = ()
            for j in tl.static_range(N >> (level + 1)):
                for c in tl.static_range(4):
                    y = y + (_either(x[8 * j + c], x[8 * j + 4 + c], OP),)
            x = y
    return x


@triton.jit
def _transposed4(a, b, c, d):
    """Four words whose bytes are the first, second, third and fourth bytes of these."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 p, q, r, s; prmt.b32 p, $4, $5, 0x5140; prmt.b32 q, $6, $7, 0x5140; prmt.b32 r, $4, $5, 0x7362;
        prmt.b32 s, $6, $7, 0x7362; prmt.b32 $0, p, q, 0x5410; prmt.b32 $1, p, q, 0x7632; prmt.b32 $2, r, s, 0x5410;
        prmt.b32 $3, r, s, 0x7632; }""",
        "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _lane_word(x, lane):
    return tl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=r,r,r", [x, lane], tl.int32, True, 1)


@triton.jit
def _spread(word, lane, L1: tl.constexpr, L2: tl.constexpr, L3: tl.constexpr):
    """The words of the four lanes that :func:`_across` left a quartet's groups in."""
    t = lane % 4
    if L3 == 0:
        t += lane & 16
    return (_lane_word(word, t), _lane_word(word, t + L1), _lane_word(word, t + L2), _lane_word(word, t + L1 + L2))


@triton.jit
def _owned(lane, unit, D: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr):
    """What tells a lane the group that :func:`_across` leaves it, whether it stores its scale, and where quartet 0 has its own.

    Of two lanes with the same group one stores. The place is in bytes, of FP16 scales, for a block of 64 tokens of one head.
    """
    first = (lane & (16 if TOKENS else 4)) != 0
    second = (lane & 8) != 0
    held = (lane & (4 if TOKENS else (16 if G == 64 else 0))) == 0
    mine = first.to(tl.int32) + 2 * second.to(tl.int32)
    if TOKENS:
        at = (unit * 64 + lane % 4 * 16 + mine // 2 * 8 + mine % 2) * 2
    else:
        at = ((unit * (64 // G) + lane // 4 * 8 // G) * D + lane % 4 * (D // 4) + mine) * 2
    return first, second, held, at


@triton.jit
def _byte(at):
    """A byte, in the low bits of a word."""
    return tl.inline_asm_elementwise("ld.global.nc.u8 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _put4(at, a, b, c, d):
    return tl.inline_asm_elementwise(
        "{ st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }",
        "=r,l,r,r,r,r", [at, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _put2(at, a, b):
    return tl.inline_asm_elementwise(
        "{ st.global.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }",
        "=r,l,r,r", [at, a, b], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _put1(at, a):
    return tl.inline_asm_elementwise(
        "{ st.global.b32 [$1], $2; mov.b32 $0, 0; }", "=r,l,r", [at, a], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _put_words(base, lane, words, W: tl.constexpr):
    """Store the W words that a lane has of a plane."""
    if W % 4 == 0:
        for i in tl.static_range(W // 4):
            _put4(base + i * 512 + lane * 16, words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3])
    elif W % 2 == 0:
        for i in tl.static_range(W // 2):
            _put2(base + i * 256 + lane * 8, words[2 * i], words[2 * i + 1])
    else:
        for i in tl.static_range(W):
            _put1(base + i * 128 + lane * 4, words[i])


@triton.jit
def _put16(at, x, held):
    """Store the low half of a word where `held`."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b16 h, i; setp.ne.b32 p, $3, 0; mov.b32 {h, i}, $2; @p st.global.b16 [$1], h; mov.b32 $0, 0; }",
        "=r,l,r,r", [at, x, held.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _put_some2(at, a, b, held):
    """:func:`_put2` where `held`."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.global.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }",
        "=r,l,r,r,r", [at, a, b, held.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _put_some1(at, a, held):
    """:func:`_put1` where `held`."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r,r", [at, a, held.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
