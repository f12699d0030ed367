"""How programs are shared out among parts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

pytest.importorskip("triton")
from argus.backends.triton import tuning

PARTS = st.lists(st.tuples(st.integers(1, 3000), st.sampled_from([0.9, 1.0, 1.5, 2.2])), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(parts=PARTS, room=st.integers(1, 400))
def test_programs_are_shared_out_by_work(parts, room):
    units, costs = (tuple(column) for column in zip(*parts, strict=True))
    places = tuning.divide(units, costs, room)
    loads: dict[int, float] = {}
    for (first, splits), count, cost in zip(places, units, costs, strict=True):
        assert 1 <= splits <= count
        for program in range(first, first + splits):
            loads[program] = loads.get(program, 0.0) + count * cost / splits
    assert sorted(loads) == list(range(len(loads)))
    assert len(loads) <= max(room, 2 * len(parts))
    work = [count * cost for count, cost in zip(units, costs, strict=True)]
    large = [one for one, (_, splits) in zip(work, places, strict=True) if splits > 1]
    share = sum(work) / min(room, max(tuning.FEWEST, int(sum(work) / tuning.LEAST)))
    # Parts that sit together have no more than a program's share between them.
    for program, load in loads.items():
        tenants = [place for place in places if place[0] <= program < place[0] + place[1]]
        assert len(tenants) == 1 or load <= share * 1.000001
    assert not large or max(loads.values()) <= 2 * share + max(costs)


def test_small_parts_sit_together():
    assert tuning.divide((2, 2, 1, 2030), (2.2, 1.8, 1.0, 0.9), 24) == ((0, 1), (0, 1), (0, 1), (1, 23))
