"""Rows that share pages are found whatever the tree, and every position of every row is read exactly once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot.engine.batches import Span
from parrot.engine.builtin.attention.prefix_groups import Segment, shared_prefixes
from parrot.engine.builtin.attention.work_items import BLOCK, Fill, Pace, cut

PAGE = 16


def chain(*contexts: tuple[int, int]) -> list[Span]:
    """(context, tokens) from the root."""
    spans, at = [], 0
    for context_id, tokens in contexts:
        spans.append(Span(context_id, at, at + tokens))
        at += tokens
    return spans


def test_nested_prefixes_become_segments_in_whole_pages() -> None:
    chains = [
        chain((1, 100), (2, 50), (10, 3)),
        chain((9, 500), (11, 8)),
        chain((1, 100), (3, 40), (12, 5)),
        chain((1, 100), (2, 50), (13, 7)),
    ]
    groups = shared_prefixes(chains, PAGE, 1)
    assert groups.order == [0, 3, 2, 1]
    assert groups.segments == [Segment(0, 3, 0, 96), Segment(0, 2, 96, 144)]
    assert groups.own == [144, 144, 96, 0]


def test_a_shared_part_that_saves_too_little_is_left_to_the_segments_below() -> None:
    chains = [chain((1, 32), (2, 320), (i, 5)) for i in (10, 11, 12)] + [chain((1, 32), (13, 5))]
    groups = shared_prefixes(chains, PAGE, 100)
    assert groups.segments == [Segment(0, 3, 0, 352)]
    assert groups.own == [352, 352, 352, 0]
    assert shared_prefixes(chains, PAGE, 1000).segments == []


def test_a_deep_tree_has_no_more_parts_than_there_is_room_for() -> None:
    """A comb: each row leaves the others one context later."""
    chains = [chain(*((i, 16) for i in range(1, n + 1)), (1000 + n, 5)) for n in range(1, 81)]
    whole = shared_prefixes(chains, PAGE, 1)
    assert whole.parts > 3000
    few = shared_prefixes(chains, PAGE, 1, 400)
    assert 80 < few.parts <= 400
    lengths = [chains[i][-1].stop for i in few.order]
    found = cut(lengths, few.segments, few.own, rows_per_item=64, pace=Pace(1000, 1000), most_partials=400)
    assert found.first[-1] <= 400


def test_arranged_rows_stay_in_their_order() -> None:
    chains = [chain((i % 3, 64), (100 + i, 1)) for i in range(9)]
    order = shared_prefixes(chains, PAGE, 1).order
    assert shared_prefixes([chains[i] for i in order], PAGE, 1).order == list(range(9))


@st.composite
def trees(draw: st.DrawFn) -> list[list[Span]]:
    """Chains in a random tree of contexts; each row ends in a context of its own."""
    contexts: list[tuple[tuple[int, int], ...]] = [()]
    for number in range(draw(st.integers(0, 8))):
        parent = draw(st.sampled_from(contexts))
        contexts.append((*parent, (number, draw(st.sampled_from([0, 1, 15, 16, 17, 40, 200])))))
    rows = draw(st.lists(st.sampled_from(contexts), min_size=1, max_size=12))
    return [chain(*before, (1000 + i, draw(st.integers(1, 90)))) for i, before in enumerate(rows)]


@given(
    trees(),
    st.lists(st.builds(Fill, st.integers(0, 300), st.integers(1, 200)), max_size=4),
    st.integers(0, 200),
    st.integers(1, 40),
    st.sampled_from([1, 2, 64]),
)
def test_every_position_is_read_once_and_only_by_rows_that_see_it(
    chains: list[list[Span]], fills: list[Fill], least_saved: int, items: int, rows_per_item: int
) -> None:
    groups = shared_prefixes(chains, PAGE, least_saved)
    assert sorted(groups.order) == list(range(len(chains)))
    arranged = [chains[i] for i in groups.order]
    lengths = [spans[-1].stop for spans in arranged]
    for segment in groups.segments:
        assert segment.start % PAGE == segment.stop % PAGE == 0
        assert segment.saved_tokens >= max(1, least_saved)
        sharing = [[s for s in spans if s.start < segment.stop and s.stop > s.start] for spans in arranged]
        assert all(sharing[row] == sharing[segment.first] for row in range(segment.first, segment.last))
    found = cut(
        lengths, groups.segments, groups.own, fills, rows_per_item=rows_per_item, pace=Pace(items, items), most_partials=8192
    )
    seen = [*lengths, *(fill.start + i + 1 for fill in fills for i in range(fill.tokens))]
    sequences = [*range(len(chains)), *(len(chains) + n for n, fill in enumerate(fills) for _ in range(fill.tokens))]
    read: list[Counter[int]] = [Counter() for _ in seen]
    places: Counter[int] = Counter()
    for first, rows, of, start, stop, ordinal, sees in np.concatenate((found.wide, found.narrow)).tolist():
        assert start < stop
        assert 1 <= rows <= rows_per_item
        assert of == sequences[first]
        for row in range(first, first + rows):
            mine = range(start, min(stop, sees + row - first + 1))
            assert mine, "a row that sees nothing of its item"
            read[row].update(mine)
            places[int(found.first[row]) + ordinal] += 1
    assert [dict(counts) for counts in read] == [dict.fromkeys(range(length), 1) for length in seen]
    assert places == Counter(range(int(found.first[-1])))


def test_items_grow_until_the_partial_results_have_room() -> None:
    lengths, own = [5000] * 8, [0] * 8
    few = cut(lengths, [], own, rows_per_item=64, pace=Pace(10**6, 10**6), most_partials=100)
    assert 8 <= few.first[-1] <= 100
    assert (few.narrow[:, 3] % BLOCK == 0).all()
    with pytest.raises(ValueError, match="8 rows"):
        cut(lengths, [], own, rows_per_item=64, pace=Pace(1, 1), most_partials=7)
