"""What a lane can do that Triton has no word for: loads of several words, tensor core products, shuffles (PTX ISA 9.7).

Tensors of 32 numbers hold one for each lane of a warp. Lane ``4 g + t`` is told by ``g < 8`` and ``t < 4``, as the fragments
of ``mma`` are.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MAGIC = tl.constexpr(12583040.0)
"""1.5 * 2^23 + 128: adding it leaves a rounded integer plus 128 in the low bits, so that byte 1 is its high part."""
REACH = tl.constexpr(32512.0)
"""The largest 16-bit number whose high part is an int8."""


@triton.jit
def _load4(at):
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _stream4(at):
    """:func:`_load4` of what is read once: it does not stay in the L1 cache."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _reload4(at):
    """:func:`_load4` that the compiler may not hoist out of a loop: what is cheap to read again need not hold registers."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _load2(at):
    return tl.inline_asm_elementwise(
        "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [at], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )


@triton.jit
def _load1(at):
    return tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _load16(at):
    """Two bytes, in the low half of a word."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 x; ld.global.nc.b16 x, [$1]; cvt.u32.u16 $0, x; }", "=r,l", [at], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _load1_if(at, held):
    """A word where `held`, else 0."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }",
        "=&r,l,r", [at, held.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _load16_if(at, held):
    """Two bytes in the low half of a word where `held`, else 0."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b16 x; setp.ne.b32 p, $2, 0; mov.b16 x, 0; @p ld.global.nc.b16 x, [$1]; cvt.u32.u16 $0, x; }",
        "=r,l,r", [at, held.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _half(at):
    """An FP16 number as float32."""
    return _load16(at).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _words(at, COUNT: tl.constexpr):
    """COUNT neighbouring words from one address a lane."""
    if COUNT == 1:
        words = (_load1(at),)
    elif COUNT == 2:
        words = _load2(at)
    else:
        words = ()
        for i in tl.static_range(COUNT // 4):
            words = words + _load4(at + i * 16)
    return words


@triton.jit
def _floats(at, COUNT: tl.constexpr):
    """COUNT neighbouring float32 from one address a lane."""
    words = _words(at, COUNT)
    x = ()
    for i in tl.static_range(COUNT):
        x = x + (words[i].to(tl.float32, bitcast=True),)
    return x


@triton.jit
def _fetch(at):
    """Bring a line of 128 bytes to the L2 cache, for a load that comes later: it takes no registers."""
    return tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _store1(at, x, held):
    """Store a float32 where `held`. Triton's own stores and loads, one by one, would take its layout pass minutes."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,f,r", [at, x, held.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _store2(at, x, y, held):
    """Store two neighbouring float32 where `held`."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.global.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }",
        "=r,l,f,f,r", [at, x, y, held.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _xor(x, LANES: tl.constexpr):
    """The number that the lane whose index differs in these bits holds."""
    if LANES == 1:
        y = tl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 1, 31, -1;", "=f,f", [x], tl.float32, True, 1)
    elif LANES == 2:
        y = tl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 2, 31, -1;", "=f,f", [x], tl.float32, True, 1)
    elif LANES == 4:
        y = tl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 4, 31, -1;", "=f,f", [x], tl.float32, True, 1)
    elif LANES == 8:
        y = tl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 8, 31, -1;", "=f,f", [x], tl.float32, True, 1)
    else:
        y = tl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 16, 31, -1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def _from_lane(x, lane):
    return tl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=f,f,r", [x, lane], tl.float32, True, 1)


@triton.jit
def _bytes(a, b, which):
    """Bytes of a (0 to 3) and b (4 to 7), chosen by the four hexadecimal digits of which."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, which], tl.int32, True, 1)


@triton.jit
def _transposed(x):
    """The 8 x 8 matrix of 16-bit numbers whose row g lies in lanes 4 g to 4 g + 3, transposed."""
    return tl.inline_asm_elementwise("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], tl.int32, True, 1)


@triton.jit
def _mma(a, b0, b1, c, SIGNED: tl.constexpr):
    """c + a @ b for 16 x 32 codes and 32 x 8 int8."""
    if SIGNED:
        d = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        d = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return d


@triton.jit
def _halves(word):
    """The two FP16 numbers of a word. In one piece, so that each is one instruction that reads its half."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
        "=f,=f,r", [word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _halves8(w):
    """The eight FP16 numbers of four words."""
    return _halves(w[0]) + _halves(w[1]) + _halves(w[2]) + _halves(w[3])


@triton.jit
def _bits(y):
    return (y + MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def _most(x):
    """The largest over the lanes that share t."""
    x = tl.maximum(x, _xor(x, 4))
    x = tl.maximum(x, _xor(x, 8))
    return tl.maximum(x, _xor(x, 16))


@triton.jit
def _sum(x):
    """The sum over the lanes that share t."""
    x += _xor(x, 4)
    x += _xor(x, 8)
    return x + _xor(x, 16)


@triton.jit
def _partner(x):
    """The word of the lane whose index differs in bit 2: the other lane of a pair ``g``, ``g ^ 1``."""
    return tl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 4, 31, -1;", "=r,r", [x], tl.int32, True, 1)


@triton.jit
def _mma16(a0, a1, a2, a3, b0, b1, c, BF16: tl.constexpr):
    """c + a @ b for 16 x 16 and 16 x 8 numbers of 16 bits."""
    if BF16:
        d = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        d = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return d


@triton.jit
def _short(x, BF16: tl.constexpr):
    """16 bits of the number nearest to x, and what it leaves."""
    if BF16:
        near = x.to(tl.bfloat16)
    else:
        near = x.to(tl.float16)
    return near.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF, x - near.to(tl.float32)


@triton.jit
def _weights(x, BF16: tl.constexpr):
    """Numbers of row t, of token g, as eight rows of a product's second factor, in two parts like queries."""
    high, rest = _short(x, BF16)
    low, none = _short(rest, BF16)
    return _transposed(high | (low << 16))


@triton.jit
def _seen(s, pos, seen, mask, lowest, latest, MASK: tl.constexpr):
    """Base-2 scores after masks; ``mask`` points to the row's mask of position 0, with its stride.

    MASK 0: none, 1: boolean, 2: additive, 3: causal by position.
    """
    if MASK == 1:
        seen = seen & (tl.load(mask[0] + pos * mask[1], mask=seen, other=0) != 0)
    elif MASK == 2:
        more = tl.load(mask[0] + pos * mask[1], mask=seen, other=0.0).to(tl.float32)
        seen = seen & (more > lowest)
        s += more * LOG2E
    elif MASK == 3:
        seen = seen & (pos <= latest)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _base2(s, cap, CAPPED: tl.constexpr):
    """Scores in base 2, capped as Gemma 2 does."""
    if CAPPED:
        s = cap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2E) / cap) + 1.0))
    return s * LOG2E


@triton.jit
def _from_e4m3(word):
    """Four E4M3 codes as two words of two FP16."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }",
        "=r,=r,r", [word], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _from_int8(word):
    """Four int8 codes as two words of two FP16: over 1024 a unit is the last bit, so a byte is put there and 1152 taken off."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 u, a, b, o; xor.b32 u, $2, 0x80808080; mov.b32 o, 0x64806480;"
        " prmt.b32 a, u, 0x64646464, 0x4140; prmt.b32 b, u, 0x64646464, 0x4342;"
        " sub.rn.f16x2 $0, a, o; sub.rn.f16x2 $1, b, o; }",
        "=r,=r,r", [word], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _times(a, b):
    """Products of two FP16 in a word each."""
    return tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)
