"""Outliers for lanes: what exact numbers add to a warp's scores and answers, beside what codes say at their places.

Scores of tokens get ``q[channel] * (exact - decoded)``, answers ``p[token] * (exact - decoded)``. Sixteen outliers at a time
are the inner side of a product on ``mma.m16n8k16``: its first factor says which token, or channel, each is of, by comparing
small integers as FP16 numbers; its second is what they add for four rows, each as two FP16 parts, high and low, in
neighbouring columns. A lane reads one outlier; then lane ``4 g + t`` works out those of lanes ``8 j + g`` for row ``t``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from argus.backends.triton.lane_reading import _number
from argus.backends.triton.lanes import _fetch, _floats, _from_lane, _load1_if, _load16_if, _mma16, _transposed, _weights
from argus.backends.triton.products import _packed
from argus.backends.triton.tile_outliers import _row_of

LARGE, HIGHEST = tl.constexpr(16.0), tl.constexpr(65504.0)
"""What outliers add is kept as so many times FP16 numbers, at most the highest."""


@triton.constexpr_function
def _twice(number):
    """A small integer as two FP16 numbers in a word."""
    power = number.bit_length() - 1
    half = 0 if number == 0 else (power + 15 << 10) + ((number << 10 >> power) & 1023)
    return half << 16 | half


@triton.constexpr_function
def _further(i, per, jump, step):
    """The i-th of numbers in groups of `per`: those of a group are `step` apart, and groups `jump`."""
    return i // per * jump + i % per * step


@triton.jit
def _pair(x):
    """Small integers as two equal FP16 numbers in a word."""
    return _packed(x.to(tl.float32), x.to(tl.float32))


@triton.jit
def _less(a, b):
    """Differences of two FP16 in a word each."""
    return tl.inline_asm_elementwise("sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _are(a, NUMBER: tl.constexpr):
    """Which of two FP16 are a number: ones and zeros."""
    b = tl.full((32,), _twice(NUMBER), tl.int32)
    return tl.inline_asm_elementwise("set.eq.f16x2.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _factor(x):
    """What outliers g add for row t, as :func:`_placed` takes it."""
    return _weights(tl.minimum(tl.maximum(x * (1 / LARGE), -HIGHEST), HIGHEST), False)


@triton.jit
def _exact_of(kept, page, inner, HELD: tl.constexpr):
    """Where the outliers of a page and head begin and end; kept: the first page that has any, ends, places and numbers."""
    begin = tl.full((), 0, tl.int32)
    end = begin
    if HELD:
        begin, end = _row_of(kept[1], (page - ((kept[0] - 3) >> 1)).to(tl.int64) * tl.num_programs(1) + inner)
    return begin, end


@triton.jit
def _exact_rows(run, number, inner, P: tl.constexpr, KEXACT: tl.constexpr, VEXACT: tl.constexpr):
    """The same of a page of a run, for keys and for values."""
    page = tl.load(run[1] + number) // P
    return _exact_of(run[2], page, inner, KEXACT), _exact_of(run[3], page, inner, VEXACT)


@triton.jit
def _fetch_exact(keys, k_begin, k_end, values, v_begin, v_end):
    """Bring outliers of a page, some hundred, to the L2 cache."""
    lane = tl.arange(0, 32)
    at = lane % 4 * 64
    k_at = tl.maximum(tl.minimum(k_begin + at, k_end - 1), 0)
    v_at = tl.maximum(tl.minimum(v_begin + at, v_end - 1), 0)
    places = tl.where(lane < 16, (keys[2] + k_at).to(tl.int64), (values[2] + v_at).to(tl.int64))
    numbers = tl.where(lane < 16, (keys[3] + k_at).to(tl.int64), (values[3] + v_at).to(tl.int64))
    _fetch(tl.where(lane % 16 < 8, places, numbers))


@triton.jit
def _place(kept, at, held):
    """The place of an outlier, 0 where it is not `held`."""
    if kept[2].dtype.element_ty == tl.int16:
        place = _load16_if(kept[2].to(tl.int64) + at * 2, held)
    else:
        place = _load1_if(kept[2].to(tl.int64) + at * 4, held)
    return place


@triton.jit
def _within(kept, begin, end, low, high):
    """The part of outliers `begin` to `end` whose places are at least `low` and below `high`."""
    before = tl.zeros((32,), tl.int32)
    until = tl.zeros((32,), tl.int32)
    # Four loads at once: what a page has of them, mostly.
    for n in range(begin, end, 128):
        for i in tl.static_range(4):
            at = n + 32 * i + tl.arange(0, 32)
            place = _place(kept, at.to(tl.int64), at < end)
            before += tl.where((at < end) & (place < low), 1, 0)
            until += tl.where((at < end) & (place < high), 1, 0)
    return begin + tl.sum(before, 0), begin + tl.sum(until, 0)


@triton.jit
def _read(kept, n, end):
    """Places and numbers of outliers `n` to `n` + 31 before `end`, one a lane."""
    at = (n + tl.arange(0, 32)).to(tl.int64)
    held = at < end
    if kept[3].dtype.element_ty == tl.float32:
        number = _load1_if(kept[3].to(tl.int64) + at * 4, held).to(tl.float32, bitcast=True)
    else:
        word = _load16_if(kept[3].to(tl.int64) + at * 2, held)
        if kept[3].dtype.element_ty == tl.bfloat16:
            number = (word << 16).to(tl.float32, bitcast=True)
        else:
            number = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return _place(kept, at, held), number, held


@triton.jit
def _beyond(
    read, page, more, inner, P: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr,
    G: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """By how much exact numbers that were read are beyond decoded ones, whose facts are those of ``lane_reading._number``."""
    decoded = _number(page, more, read[0] // D, read[0] % D, inner, P, D, KIND, BITS, TOKENS, G, SIGNED)
    return tl.where(read[2], read[1] - decoded, 0.0)


@triton.jit
def _eight(read, beyond, first, J: tl.constexpr, D: tl.constexpr):
    """Of outlier 8 J + g its token, from `first` on, its channel, and by how much it is beyond what is decoded."""
    lane = tl.arange(0, 32) // 4 + 8 * J
    place = _from_lane(read[0].to(tl.float32, bitcast=True), lane).to(tl.int32, bitcast=True)
    return place // D - first, place % D, _from_lane(beyond, lane)


@triton.jit
def _key_factors(one, other, q_row, base, UNIT: tl.constexpr):
    """Of 16 outliers of keys: their tokens less `base`, a number a lane, and the second factor, for queries at `q_row`.

    UNIT: what a score of 1 is.
    """
    near = _less(_transposed(_pair(one[0])), _pair(base))
    far = _less(_transposed(_pair(other[0])), _pair(base))
    b0 = _factor(_floats(q_row + one[1] * 4, 1)[0] * (one[2] * UNIT))
    b1 = _factor(_floats(q_row + other[1] * 4, 1)[0] * (other[2] * UNIT))
    return near, far, b0, b1


@triton.jit
def _value_factors(one, other, weigh, base, above, channel_base, N: tl.constexpr, STEP: tl.constexpr):
    """Of 16 outliers of values: their channels less `channel_base`, a number a lane, and the second factor.

    weigh: N words of weights as the second factor of products, of tokens `base` + STEP * i of lanes 2 t; `above` of lanes
    2 t + 1.
    """
    steps = _packed(base.to(tl.float32), above.to(tl.float32))
    near = _less(_pair(one[0]), steps)
    far = _less(_pair(other[0]), steps)
    zero = tl.zeros((32,), tl.float32)
    p = (zero, zero, zero, zero)
    for i in tl.static_range(N // 2):
        p = _mma16(
            _are(near, 2 * i * STEP), _are(far, 2 * i * STEP), _are(near, (2 * i + 1) * STEP), _are(far, (2 * i + 1) * STEP),
            weigh[2 * i], weigh[2 * i + 1], p, False,
        )  # fmt: skip
    b0 = _factor((p[0] + p[1]) * one[2])
    b1 = _factor((p[2] + p[3]) * other[2])
    near = _less(_transposed(_pair(one[1])), _pair(channel_base))
    far = _less(_transposed(_pair(other[1])), _pair(channel_base))
    return near, far, b0, b1


@triton.jit
def _placed(f, c, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """`c`, and what 16 outliers add where theirs is FIRST, and where it is SECOND, in two parts each."""
    return _mma16(_are(f[0], FIRST), _are(f[0], SECOND), _are(f[1], FIRST), _are(f[1], SECOND), f[2], f[3], c, False)


@triton.jit
def _more(
    x, f, h, N: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, STEP: tl.constexpr, PER: tl.constexpr,
    JUMP: tl.constexpr,
):  # fmt: skip
    """N numbers a lane and what two times 16 outliers add to them.

    Numbers 2 i and 2 i + 1 are of FIRST and SECOND, both as much further as :func:`_further` tells.
    """
    zero = tl.zeros((32,), tl.float32)
    y = ()
    for i in tl.static_range(N // 2):
        c = (zero, zero, zero, zero)
        c = _placed(f, c, FIRST + _further(i, PER, JUMP, STEP), SECOND + _further(i, PER, JUMP, STEP))
        c = _placed(h, c, FIRST + _further(i, PER, JUMP, STEP), SECOND + _further(i, PER, JUMP, STEP))
        y = y + (x[2 * i] + (c[0] + c[1]) * LARGE, x[2 * i + 1] + (c[2] + c[3]) * LARGE)
    return y


@triton.jit
def _more_scores(
    x, kept, exact, page, more, first, inner, q_row, base, N: tl.constexpr, SECOND: tl.constexpr, STEP: tl.constexpr,
    UNIT: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """Scores of N tokens a lane, and what outliers of keys add to them: see :func:`_more`, :func:`_beyond`.

    exact: where the outliers begin and end. first: the first token; those of a lane are `base` further.
    """
    read = _read(kept, exact[0], exact[1])
    for n in range(exact[0], exact[1], 32):
        following = _read(kept, n + 32, exact[1])
        beyond = _beyond(read, page, more, inner, P, D, KIND, BITS, TOKENS, G, SIGNED)
        f = _key_factors(_eight(read, beyond, first, 0, D), _eight(read, beyond, first, 1, D), q_row, base, UNIT)
        h = _key_factors(_eight(read, beyond, first, 2, D), _eight(read, beyond, first, 3, D), q_row, base, UNIT)
        x = _more(x, f, h, N, 0, SECOND, STEP, N, 0)
        read = following
    return x


@triton.jit
def _more_answers(
    x, kept, exact, page, more, first, inner, weigh, base, above, channel, W: tl.constexpr, BETWEEN: tl.constexpr,
    N: tl.constexpr, SECOND: tl.constexpr, STEP: tl.constexpr, PER: tl.constexpr, JUMP: tl.constexpr,
    P: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """Answers in N channels a lane, from `channel` on, and what outliers of values add to them.

    weigh: W words of weights, of tokens as :func:`_value_factors` tells, BETWEEN apart.
    """
    read = _read(kept, exact[0], exact[1])
    for n in range(exact[0], exact[1], 32):
        following = _read(kept, n + 32, exact[1])
        beyond = _beyond(read, page, more, inner, P, D, KIND, BITS, TOKENS, G, SIGNED)
        one, other = _eight(read, beyond, first, 0, D), _eight(read, beyond, first, 1, D)
        f = _value_factors(one, other, weigh, base, above, channel, W, BETWEEN)
        one, other = _eight(read, beyond, first, 2, D), _eight(read, beyond, first, 3, D)
        h = _value_factors(one, other, weigh, base, above, channel, W, BETWEEN)
        x = _more(x, f, h, N, 0, SECOND, STEP, PER, JUMP)
        read = following
    return x
