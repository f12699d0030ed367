"""Decode attention on integer tensor cores: keys with scales a channel, values with scales a token, in fragment order.

A warp takes 64 tokens at a time and keeps everything in registers; tensors of 32 numbers hold one for each lane, and PTX does
what Triton has no word for: 16-byte loads, ``mma.m16n8k32`` on codes, ``movmatrix`` and shuffles (PTX ISA 9.7). Scales are
folded: ``q' = q * scale`` for each channel and ``p' = p * scale`` for each token, each rounded to 16 bits in the page and held
as two int8 parts, high and low, in neighbouring columns; the codes themselves are never converted, only masked. Products are
exact integers, and the rounding of q' and p' is finer than FP16's. Zeros enter as ``q . zero``, one number a row and page, and
as ``sum(p * zero)``. Lane ``4 g + t`` answers row ``t`` for tokens ``8 g`` to ``8 g + 7``; see ``layout.py`` for codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    """The two FP16 numbers of a word."""
    low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def _halves8(at):
    """Eight FP16 numbers from a 16-byte address."""
    w = _load4(at)
    return _halves(w[0]) + _halves(w[1]) + _halves(w[2]) + _halves(w[3])


@triton.jit
def _load_plane(base, lane, BITS: tl.constexpr, D: tl.constexpr):
    """One plane of a block: D * BITS / 16 words a lane."""
    W: tl.constexpr = D * BITS // 16
    words = ()
    if W % 4 == 0:
        for i in tl.static_range(W // 4):
            words = words + _load4(base + i * 512 + lane * 16)
    elif W % 2 == 0:
        for i in tl.static_range(W // 2):
            words = words + _load2(base + i * 256 + lane * 8)
    else:
        for i in tl.static_range(W):
            words = words + (_load1(base + i * 128 + lane * 4),)
    return words


@triton.jit
def _load_block(base, lane, BITS: tl.constexpr, D: tl.constexpr):
    """All planes of a block."""
    words = ()
    if BITS & 8:
        words = words + _load_plane(base, lane, 8, D)
    if BITS & 4:
        words = words + _load_plane(base, lane, 4, D)
    if BITS & 2:
        words = words + _load_plane(base + (BITS & 4) * D * 8, lane, 2, D)
    if BITS & 1:
        words = words + _load_plane(base + (BITS & 6) * D * 8, lane, 1, D)
    return words


@triton.jit
def _field(word, SHIFT: tl.constexpr, BITS: tl.constexpr, TO: tl.constexpr):
    """The field of every byte at bit SHIFT, moved to bit TO."""
    if SHIFT > TO:
        word = word >> (SHIFT - TO)
    elif SHIFT < TO:
        word = word << (TO - SHIFT)
    return word & ((((1 << BITS) - 1) * 0x01010101) << TO)


@triton.jit
def _word(words, R: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """Word R of a block: four codes."""
    if BITS == 8:
        x = words[R]
    else:
        x = 0
        if BITS & 4:
            x = _field(words[R // 2], (R % 2) * 4, 4, 0)
        if BITS & 2:
            START: tl.constexpr = (BITS & 4) * D // 16
            x = x | _field(words[START + R // 4], (R % 4) * 2, 2, BITS & 4)
        if BITS & 1:
            FIRST: tl.constexpr = (BITS & 6) * D // 16
            x = x | _field(words[FIRST + R // 8], R % 8, 1, BITS & 6)
    return x


@triton.jit
def _operand(words, R: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """Words 4 R to 4 R + 3: an A operand."""
    return (
        _word(words, 4 * R, BITS, D), _word(words, 4 * R + 1, BITS, D),
        _word(words, 4 * R + 2, BITS, D), _word(words, 4 * R + 3, BITS, D),
    )  # fmt: skip


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
def _fold(q_at, scales, zeros, part, D: tl.constexpr, SYMMETRIC: tl.constexpr):
    """q' as B operands, what to multiply products by, and q . zero, for the row of this lane's column."""
    y = ()
    size = tl.zeros((32,), tl.float32)
    offset = tl.zeros((32,), tl.float32)
    for s in tl.static_range(D // 32):
        scale = _halves8(scales + s * 16)
        if not SYMMETRIC:
            zero = _halves8(zeros + s * 16)
        q = _reload4(q_at + s * 32) + _reload4(q_at + s * 32 + 16)
        for j in tl.static_range(8):
            one = q[j].to(tl.float32, bitcast=True) * scale[j]
            size = tl.maximum(size, tl.abs(one))
            if not SYMMETRIC:
                offset += q[j].to(tl.float32, bitcast=True) * zero[j]
            y = y + (one,)
    size = tl.maximum(size, _xor(size, 1))
    size = tl.maximum(tl.maximum(size, _xor(size, 2)), 1e-30)
    if not SYMMETRIC:
        offset += _xor(offset, 1)
        offset += _xor(offset, 2)
    inverse = REACH / size
    pairs = 0x51 - part * 0x11
    flip = tl.where(part == 1, 0x80808080 - (1 << 32), 0).to(tl.int32)
    b = ()
    for k in tl.static_range(D // 16):
        low = _bytes(_bits(y[4 * k] * inverse), _bits(y[4 * k + 1] * inverse), pairs)
        high = _bytes(_bits(y[4 * k + 2] * inverse), _bits(y[4 * k + 3] * inverse), pairs)
        b = b + (_bytes(low, high, tl.full((32,), 0x5410, tl.int32)) ^ flip,)
    return b, size * (1.0 / REACH), offset


@triton.jit
def _warp_kernel(
    q_ptr, table_ptr, positions_ptr, out_ptr, lse_ptr, mask_ptr,
    blocks, per_split, first_slot, slots, heads, R, S, mask_batch, mask_head, mask_step, mask_key, lowest, cap,
    P: tl.constexpr, D: tl.constexpr, KBITS: tl.constexpr, KG: tl.constexpr, KSYM: tl.constexpr,
    VBITS: tl.constexpr, VSYM: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr, CAPPED: tl.constexpr,
    FIELDS: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Answer four rows of one head for a share of the blocks of 64 tokens."""
    split = tl.program_id(0)
    inner = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(2)
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    part = g % 2
    column_row = tile * 4 + g // 2
    row = tile * 4 + t
    # Rows beyond the last repeat it; nothing of them is stored.
    q_at = q_ptr.to(tl.int64) + ((inner * R + tl.minimum(column_row, R - 1)) * D + t * (D // 4)) * 4
    if MASK:
        held_row = tl.minimum(row, R - 1)
        head = (inner % heads) * (R // S) + held_row // S
        mask_row = (inner // heads) * mask_batch + head * mask_head + (held_row % S) * mask_step
    m = tl.full((32,), float("-inf"), tl.float32)
    total = tl.zeros((32,), tl.float32)
    offset_total = tl.zeros((32,), tl.float32)
    acc = ()
    for i in tl.static_range(D // 8):
        acc = acc + (tl.zeros((32,), tl.float32),)
    zero4 = (tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32), tl.zeros((32,), tl.int32))
    PER_PAGE: tl.constexpr = P // 64
    end = tl.minimum((split + 1) * per_split, blocks)
    row_of = table_ptr + split * per_split // PER_PAGE * FIELDS
    place = inner * PER_PAGE + split * per_split % PER_PAGE
    keys_at = tl.load(row_of) + place * (8 * D * KBITS)
    values_at = tl.load(row_of + 3) + place * (8 * D * VBITS)
    if PREFETCH:
        keys = _load_block(keys_at, lane, KBITS, D)
        values = _load_block(values_at, lane, VBITS, D)
    for unit in range(split * per_split, end):
        page = unit // PER_PAGE
        block = unit % PER_PAGE
        row_of = table_ptr + page * FIELDS
        if not PREFETCH:
            keys = _load_block(keys_at, lane, KBITS, D)
            values = _load_block(values_at, lane, VBITS, D)
        following = tl.minimum(unit + 1, end - 1)
        next_of = table_ptr + following // PER_PAGE * FIELDS
        place = inner * PER_PAGE + following % PER_PAGE
        keys_at = tl.load(next_of) + place * (8 * D * KBITS)
        values_at = tl.load(next_of + 3) + place * (8 * D * VBITS)
        if PREFETCH:
            next_keys = _load_block(keys_at, lane, KBITS, D)
            next_values = _load_block(values_at, lane, VBITS, D)
        channel_at = ((inner * (P // KG) + block * 64 // KG) * D + t * (D // 4)) * 2
        token_at = (inner * P + block * 64 + g * 8) * 2
        b, unscale, offset = _fold(q_at, tl.load(row_of + 1) + channel_at, tl.load(row_of + 2) + channel_at, part, D, KSYM)
        # Column 2 t holds the high part of row t: its facts lie in the lanes of column 2 t.
        unscale = _from_lane(unscale, t * 8)
        x = ()
        for i in tl.static_range(4):
            c = zero4
            for s in tl.static_range(D // 32):
                c = _mma(_operand(keys, i * (D // 32) + s, KBITS, D), b[2 * s], b[2 * s + 1], c, KSYM)
            x = x + ((c[0] * 256 + c[1]).to(tl.float32) * unscale, (c[2] * 256 + c[3]).to(tl.float32) * unscale)
        if not KSYM:
            offset = _from_lane(offset, t * 8)
        if EXACT:
            marks = _load2(tl.load(row_of + 6) + inner * P + block * 64 + g * 8)
        if MASK:
            mask_at = mask_ptr + mask_row + (tl.load(positions_ptr + page) + block * 64 + g * 8) * mask_key
        scores = ()
        best = m
        for i in tl.static_range(8):
            s = x[i]
            if not KSYM:
                s = s + offset
            if CAPPED:
                s = cap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * 1.4426950408889634) / cap) + 1.0))
            s = s * 1.4426950408889634
            if MASK == 1:
                s = tl.where(tl.load(mask_at + i * mask_key) != 0, s, float("-inf"))
            elif MASK == 2:
                more = tl.load(mask_at + i * mask_key).to(tl.float32)
                s = tl.where(more > lowest, s + more * 1.4426950408889634, float("-inf"))
            if EXACT:
                s = tl.where((marks[i // 4] >> (i % 4 * 8)) & 255 != 0, float("-inf"), s)
            best = tl.maximum(best, s)
            scores = scores + (s,)
        best = _most(best)
        if MASK or EXACT:
            safe = tl.where(best == float("-inf"), 0.0, best)
        else:
            safe = best
        keep = tl.exp2(m - safe)
        m = best
        scale = _halves8(tl.load(row_of + 4) + token_at)
        if not VSYM:
            zero = _halves8(tl.load(row_of + 5) + token_at)
        total = total * keep
        offset_total = offset_total * keep
        weights = ()
        size = tl.zeros((32,), tl.float32)
        for i in tl.static_range(8):
            p = tl.exp2(scores[i] - safe)
            total += p
            if not VSYM:
                offset_total += p * zero[i]
            w = p * scale[i]
            size = tl.maximum(size, w)
            weights = weights + (w,)
        size = tl.maximum(_most(size), 1e-30)
        inverse = REACH / size
        unscale = size * (1.0 / REACH)
        weigh = ()
        for j in tl.static_range(4):
            pair = _bytes(
                _bits(weights[2 * j] * inverse), _bits(weights[2 * j + 1] * inverse), tl.full((32,), 0x4051, tl.int32)
            )
            weigh = weigh + (_transposed(pair ^ (0x80800000 - (1 << 32))),)
        new = ()
        for i in tl.static_range(D // 16):
            o = _mma(_operand(values, 2 * i, VBITS, D), weigh[0], weigh[1], zero4, VSYM)
            o = _mma(_operand(values, 2 * i + 1, VBITS, D), weigh[2], weigh[3], o, VSYM)
            new = new + (
                acc[2 * i] * keep + (o[0] * 256 + o[1]).to(tl.float32) * unscale,
                acc[2 * i + 1] * keep + (o[2] * 256 + o[3]).to(tl.float32) * unscale,
            )
        acc = new
        if PREFETCH:
            keys = next_keys
            values = next_values
    total = _sum(total)
    offset_total = _sum(offset_total)
    safe = tl.where(total > 0.0, total, 1.0)
    slot = inner * slots + first_slot + split
    shown = row < R
    at = out_ptr + (slot * R + row) * D + g
    for i in tl.static_range(D // 8):
        tl.store(at + i * 8, (acc[i] + offset_total) / safe, mask=shown)
    tl.store(lse_ptr + slot * R + row, tl.where(total > 0.0, m + tl.log2(safe), float("-inf")), mask=shown & (g == 0))
