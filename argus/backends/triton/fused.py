"""One decode step in two launches: all parts that a warp can answer for at once, and the merge of all answers.

Every program answers for a share of one part (a *split*) with its average and base-2 log-sum-exp, as FlashDecoding does
(Dao et al. 2023); the merge is the online-softmax identity. Nothing decoded is written to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from argus.backends.triton.book import _book_share
from argus.backends.triton.codes import _codes_share
from argus.backends.triton.few import _few_share
from argus.backends.triton.halves import _halves_share
from argus.backends.triton.lanes import LOG2E
from argus.backends.triton.projected import _projected_share

CODES, PROJECTED, PAGES, DENSE, FEW, BOOK = (tl.constexpr(number) for number in range(6))
"""Which share answers: integer tensor cores on codes in fragment order; projected pages; pages of 16-bit tokens or E4M3 codes;
16-bit tokens in a row; few pages of codes of different widths; codes of a codebook."""


@triton.jit
def _number(odd):
    """What ``launch.odd`` made of a number."""
    return (odd - 3) >> 1


@triton.jit
def _share(
    q_ptr, source, at, where, heads, mask, lowest, latest, cap, begin, end,
    SHARE: tl.constexpr, C, D: tl.constexpr, CAPPED: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Answer for units `begin` to `end` of a part, by the share that knows it."""
    if SHARE == CODES:
        _codes_share(
            q_ptr, source, at, where, mask, lowest, cap, begin, end,
            C[0], D, C[1], C[2], C[3], C[4], C[5], C[6], C[7],
            CAPPED, FIELDS, C[8], C[9], C[10],
        )  # fmt: skip
    elif SHARE == FEW:
        _few_share(q_ptr, source, at, where, mask, lowest, cap, begin, end, C[0], D, C[1], C[2], CAPPED, FIELDS, C[3], C[4])
    elif SHARE == PROJECTED:
        _projected_share(
            q_ptr, source, at, where, mask, lowest, latest, cap, begin, end,
            C[0], D, C[1], C[2], CAPPED, FIELDS, C[3], C[4], C[5], C[6],
        )  # fmt: skip
    elif SHARE == PAGES:
        _halves_share(
            q_ptr, source, at, where, mask, lowest, latest, cap, begin, end,
            C[0], D, C[1], C[2], False, False, C[3], C[4], C[5], C[6],
            C[7], C[8], C[9], CAPPED, FIELDS, C[10], C[11],
        )  # fmt: skip
    elif SHARE == BOOK:
        _book_share(
            source, at, where, mask, lowest, latest, cap, begin, end,
            C[0], D, C[1], C[2], C[3], C[4], C[5], C[6], C[7], CAPPED, FIELDS,
        )  # fmt: skip
    else:
        batch = where[0] // heads
        head = where[0] % heads
        tokens = _number(source[3])
        start = _number(source[4])
        if C[4]:
            tokens = tl.load(source[11])
            start = tl.load(source[11] + 1)
        SIZE: tl.constexpr = 1 if C[3] else 2
        keys = source[0].to(tl.int64) + (batch * _number(source[5]) + head * _number(source[6])) * SIZE
        values = source[1].to(tl.int64) + (batch * _number(source[8]) + head * _number(source[9])) * SIZE
        if C[1]:
            placed = source[2] + where[0] * tokens
        else:
            placed = start
        if C[3]:
            k_scale = source[11].to(tl.int64) + where[0] * (tokens * 2)
            v_scale = source[12].to(tl.int64) + where[0] * (tokens * 2)
        else:
            k_scale = keys
            v_scale = values
        _halves_share(
            q_ptr, (keys, values, _number(source[7]), _number(source[10]), placed, tokens, k_scale, v_scale),
            at, where, mask, lowest, latest, cap, begin, end,
            16, D, 1, C[0], True, C[1], C[3], C[3], D, C[3], D, C[2], False, CAPPED, FIELDS, False, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=(
    "first_slot", "slots", "heads", "R", "S", "start", "mask_batch", "mask_head", "mask_step", "mask_key",
))  # fmt: skip
def _decode_kernel(
    q_ptr, out_ptr, lse_ptr, mask_ptr,
    first_slot, slots, heads, R, S, start, mask_batch, mask_head, mask_step, mask_key, lowest, cap, counts, jobs,
    D: tl.constexpr, MASKED: tl.constexpr, CAPPED: tl.constexpr, FIELDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Answer four rows of one head for a share of one of the parts, or of several small ones.

    counts: of each part its first program, its programs a head, its first slot and its units of work, as ``launch.odd`` makes
    them; side by side, since every program reads them all. Of a part with room a page's units, and where the number of pages
    lies. jobs: of each part what its share takes, which share that is, and its constants.
    """
    if EARLY:
        gdc_launch_dependents()
    number = tl.program_id(0)
    inner = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(2) * 4
    where = (inner, first_row, R)
    held_row = tl.minimum(first_row + tl.arange(0, 32) % 4, R - 1)
    latest = start + held_row % S
    mask = (mask_ptr, mask_key)
    if MASKED:
        query_head = (inner % heads) * (R // S) + held_row // S
        mask = (mask_ptr + (inner // heads) * mask_batch + query_head * mask_head + (held_row % S) * mask_step, mask_key)
    for j in tl.static_range(len(jobs)):
        first = _number(counts[j][0])
        splits = _number(counts[j][1])
        if (number >= first) & (number < first + splits):
            share = (number - first).to(tl.int64)
            units = _number(counts[j][3])
            if len(counts[j]) > 4:
                units *= tl.load(counts[j][4])
            slot = inner * slots + first_slot + _number(counts[j][2]) + share
            at = (out_ptr + slot * R * D, lse_ptr + slot * R)
            begin = (share * units // splits).to(tl.int32)
            end = ((share + 1) * units // splits).to(tl.int32)
            _share(
                q_ptr, jobs[j][0], at, where, heads, mask, lowest, latest, cap, begin, end,
                jobs[j][1], jobs[j][2], D, CAPPED, FIELDS,
            )  # fmt: skip


@triton.jit(do_not_specialize=("slots", "heads", "R", "S"))
def _merge_kernel(
    part_ptr, lse_ptr, sinks_ptr, out_ptr, slots, heads, R, S,
    D: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr, SINKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge the answers of all splits for one row and some channels."""
    inner = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    ch = tl.program_id(2) * CB + tl.arange(0, CB)
    m = -float("inf")
    total = 0.0
    acc = tl.zeros((CB,), tl.float32)
    if SINKS:
        m = tl.load(sinks_ptr + (inner % heads) * (R // S) + row // S).to(tl.float32) * LOG2E
        total = 1.0
    if EARLY:
        gdc_wait()
    for begin in range(0, slots, NB):
        n = begin + tl.arange(0, NB)
        at = (inner * slots + n) * R + row
        lse = tl.load(lse_ptr + at, mask=n < slots, other=float("-inf"))
        part = tl.load(part_ptr + at[:, None] * D + ch[None, :], mask=(n < slots)[:, None] & (ch < D)[None, :], other=0.0)
        best = tl.maximum(m, tl.max(lse, 0))
        safe = tl.where(best == float("-inf"), 0.0, best)
        w = tl.exp2(lse - safe)
        keep = tl.exp2(m - safe)
        acc = acc * keep + tl.sum(part * w[:, None], 0)
        total = total * keep + tl.sum(w, 0)
        m = best
    tl.store(out_ptr + (inner * R + row) * D + ch, acc / tl.where(total > 0.0, total, 1.0), mask=ch < D)
