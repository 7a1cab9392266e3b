"""Cuts the reading of a decoding batch into work items for the kernels of split_kv.py, as plain numpy arrays.

An item is a run of positions of one row's pages, read for one row (narrow) or for neighbouring rows that share them (wide). It
gives each of its rows one partial result; a row's partial results lie next to each other and are merged at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parrot.engine.builtin.attention.prefix_groups import Segment

Int32 = NDArray[np.int32]

#: Positions are cut at multiples of it.
BLOCK = 64
#: Integers of an item: first row, number of rows, row whose pages are read, first and last position, number of the partial
#: result among each row's.
FIELDS = 6


class WorkItems(NamedTuple):
    """`wide`, `narrow`: [items, FIELDS]. `first`: [rows + 1], where each row's partial results begin, and their number."""

    wide: Int32
    narrow: Int32
    first: Int32


class Pace(NamedTuple):
    """Items that keep a device busy once (one for each program that runs at a time, divided by the KV heads), by kind."""

    wide: int
    narrow: int


#: Positions that an item has at least where that still gives every program one: shorter ones are all beginning and end.
USUAL = 256
#: Items for each program where there is more to read: with fewer, the last ones run alone for long.
ROUNDS = 4


def cut(
    lengths: Sequence[int],
    segments: Sequence[Segment],
    own: Sequence[int],
    *,
    rows_per_item: int,
    pace: Pace,
    most_partials: int,
) -> WorkItems:
    """The items of rows that read `lengths` positions each, those before `own` through `segments`.

    Raises ValueError when the partial results are more than `most_partials` however long the items are.
    """
    alone = np.asarray(lengths, dtype=np.int64) - np.asarray(own, dtype=np.int64)
    wide = _size(sum(-(-(s.last - s.first) // rows_per_item) * (s.stop - s.start) for s in segments), pace.wide)
    narrow = _size(int(alone.sum()), pace.narrow)
    longest = max(int(alone.max(initial=0)), *(s.stop - s.start for s in segments), BLOCK)
    while True:
        found = _cut(alone, segments, own, wide, narrow, rows_per_item)
        if found.first[-1] <= most_partials:
            return found
        if min(wide, narrow) >= longest:
            raise ValueError(f"{found.first[-1]} partial results of {len(alone)} rows; there is room for {most_partials}")
        wide, narrow = 2 * wide, 2 * narrow


def _size(positions: int, items: int) -> int:
    """About how many positions an item should have, in whole blocks."""
    once = -(-positions // (items * BLOCK)) * BLOCK
    return max(BLOCK, min(once, USUAL), -(-positions // (ROUNDS * items * BLOCK)) * BLOCK)


def _cut(
    alone: NDArray[np.int64], segments: Sequence[Segment], own: Sequence[int], wide_size: int, size: int, per_item: int
) -> WorkItems:
    before = np.zeros(len(alone), dtype=np.int64)  # partial results that each row has so far
    wide: list[tuple[int, int, int, int, int, int]] = []
    for segment in segments:
        step = _even(segment.stop - segment.start, wide_size)
        ordinal = int(before[segment.first])
        for start in range(segment.start, segment.stop, step):
            stop = min(start + step, segment.stop)
            for row in range(segment.first, segment.last, per_item):
                wide.append((row, min(per_item, segment.last - row), row, start, stop, ordinal))
            ordinal += 1
        before[segment.first : segment.last] = ordinal
    pieces = -(-alone // size)
    steps = -(-alone // np.maximum(pieces, 1) // BLOCK) * BLOCK
    pieces = -(-alone // np.maximum(steps, 1))
    rows = np.repeat(np.arange(len(alone)), pieces)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.asarray(own, dtype=np.int64)[rows] + number * steps[rows]
    stops = np.minimum(starts + steps[rows], (np.asarray(own, dtype=np.int64) + alone)[rows])
    narrow = np.column_stack((rows, np.ones_like(rows), rows, starts, stops, before[rows] + number))
    first = np.concatenate(([0], np.cumsum(before + pieces)))
    return WorkItems(np.array(wide, dtype=np.int32).reshape(-1, FIELDS), narrow.astype(np.int32), first.astype(np.int32))


def _even(length: int, size: int) -> int:
    """The length of equal pieces, none longer than about `size`, in whole blocks."""
    pieces = -(-length // size)
    return -(-length // (pieces * BLOCK)) * BLOCK
