"""Cuts the reading of a batch into work items for the kernels of split_kv.py, as plain numpy arrays.

A row is a packed token: that of a decoding sequence, or one of those that a fill computes. An item is a run of positions of
one sequence's pages, read for one row (narrow) or for neighbouring rows (wide): rows that share a prefix, or a fill's. It gives
each of its rows one partial result; a row's partial results lie next to each other and are merged at the end.
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
#: Integers of an item: first row, number of rows, sequence whose pages are read, first position and the one behind the last,
#: number of the partial result among each row's, position up to which the first row sees (each further row sees one more).
FIELDS = 7


class WorkItems(NamedTuple):
    """`wide`, `narrow`: [items, FIELDS]. `first`: [rows + 1], where each row's partial results begin, and their number."""

    wide: Int32
    narrow: Int32
    first: Int32


class Fill(NamedTuple):
    """`tokens` rows of one sequence, the first of them at position `start`."""

    start: int
    tokens: int


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
    fills: Sequence[Fill] = (),
    *,
    rows_per_item: int,
    pace: Pace,
    most_partials: int,
) -> WorkItems:
    """The items of decoding rows that read `lengths` positions each, those before `own` through `segments`, and of the `fills`
    behind them. Sequences are numbered in the same order.

    Raises ValueError when the partial results are more than `most_partials` however long the items are.
    """
    alone = np.asarray(lengths, dtype=np.int64) - np.asarray(own, dtype=np.int64)
    tiles = _tiles(fills, len(alone), rows_per_item)
    shared = sum(-(-(s.last - s.first) // rows_per_item) * (s.stop - s.start) for s in segments)
    wide = _size(shared + sum(tile.position + tile.rows for tile in tiles), pace.wide)
    narrow = _size(int(alone.sum()), pace.narrow)
    longest = max(
        int(alone.max(initial=0)), *(s.stop - s.start for s in segments), *(tile.position + 1 for tile in tiles), BLOCK
    )
    while True:
        found = _cut(alone, segments, own, tiles, wide, narrow, rows_per_item)
        if found.first[-1] <= most_partials:
            return found
        if min(wide, narrow) >= longest:
            raise ValueError(
                f"{found.first[-1]} partial results of {len(found.first) - 1} rows; there is room for {most_partials}"
            )
        wide, narrow = 2 * wide, 2 * narrow


def _size(positions: int, items: int) -> int:
    """About how many positions an item should have, in whole blocks."""
    once = -(-positions // (items * BLOCK)) * BLOCK
    return max(BLOCK, min(once, USUAL), -(-positions // (ROUNDS * items * BLOCK)) * BLOCK)


class _Tile(NamedTuple):
    """Neighbouring rows of a fill, the first of them `row`, at `position`."""

    row: int
    rows: int
    sequence: int
    position: int


def _tiles(fills: Sequence[Fill], decoding: int, most_rows: int) -> list[_Tile]:
    found, row = [], decoding
    for number, fill in enumerate(fills):
        for first in range(0, fill.tokens, most_rows):
            rows = min(most_rows, fill.tokens - first)
            found.append(_Tile(row + first, rows, decoding + number, fill.start + first))
        row += fill.tokens
    return found


def _cut(
    alone: NDArray[np.int64],
    segments: Sequence[Segment],
    own: Sequence[int],
    tiles: Sequence[_Tile],
    wide_size: int,
    size: int,
    per_item: int,
) -> WorkItems:
    decoding = len(alone)
    total = tiles[-1].row + tiles[-1].rows if tiles else decoding
    parts = np.zeros(total, dtype=np.int64)  # partial results that each row has so far
    wide: list[tuple[int, int, int, int, int, int, int]] = []
    for segment in segments:
        step = _even(segment.stop - segment.start, wide_size)
        ordinal = int(parts[segment.first])
        for start in range(segment.start, segment.stop, step):
            stop = min(start + step, segment.stop)
            for row in range(segment.first, segment.last, per_item):
                wide.append((row, min(per_item, segment.last - row), row, start, stop, ordinal, stop))
            ordinal += 1
        parts[segment.first : segment.last] = ordinal
    for tile in tiles:
        seen = tile.position + 1  # by its first row: each piece begins there, so that every row sees something of it
        step = _even(seen, wide_size)
        starts = range(0, seen, step)
        for ordinal, start in enumerate(starts):
            stop = start + step if ordinal + 1 < len(starts) else tile.position + tile.rows
            wide.append((tile.row, tile.rows, tile.sequence, start, stop, ordinal, tile.position))
        parts[tile.row : tile.row + tile.rows] = len(starts)
    pieces = -(-alone // size)
    steps = -(-alone // np.maximum(pieces, 1) // BLOCK) * BLOCK
    pieces = -(-alone // np.maximum(steps, 1))
    rows = np.repeat(np.arange(decoding), pieces)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts_of = np.asarray(own, dtype=np.int64)[rows] + number * steps[rows]
    stops = np.minimum(starts_of + steps[rows], (np.asarray(own, dtype=np.int64) + alone)[rows])
    narrow = np.column_stack((rows, np.ones_like(rows), rows, starts_of, stops, parts[rows] + number, stops))
    parts[:decoding] += pieces
    first = np.concatenate(([0], np.cumsum(parts)))
    return WorkItems(np.array(wide, dtype=np.int32).reshape(-1, FIELDS), narrow.astype(np.int32), first.astype(np.int32))


def _even(length: int, size: int) -> int:
    """The length of equal pieces, none longer than about `size`, in whole blocks."""
    pieces = -(-length // size)
    return -(-length // (pieces * BLOCK)) * BLOCK
