"""Which decoding rows read the same pages, found from the contexts of their chains. Pure Python; computes nothing.

Rows whose chains begin with the same contexts share those contexts' whole pages (a page that a context only partly fills
may go on differently in each child). A shared part that saves enough reading becomes a segment, at any depth of the tree;
one that does not is left to the segments or rows below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from parrot.engine.batches import Span


class Segment(NamedTuple):
    """Positions [start, stop), whole pages, that rows [first, last) of the arranged batch share."""

    first: int
    last: int
    start: int
    stop: int

    @property
    def saved_tokens(self) -> int:
        """Tokens that need not be read again."""
        return (self.last - self.first - 1) * (self.stop - self.start)


class Groups(NamedTuple):
    """`order`: the arranged batch, by indices of the given one; rows of a segment are neighbours. `segments`: those around a
    segment stand before it. `own`: by arranged row, the first position that it reads for itself alone."""

    order: list[int]
    segments: list[Segment]
    own: list[int]

    @property
    def parts(self) -> int:
        """What the rows are read in, at least: each its own, and each segment for each of its rows."""
        return len(self.order) + sum(segment.last - segment.first for segment in self.segments)


def shared_prefixes(
    chains: Sequence[Sequence[Span]], page_tokens: int, least_saved: int, most_parts: int | None = None
) -> Groups:
    """The groups of rows with these chains (root first; the last context of each is the row's own output).

    A segment saves at least `least_saved` tokens of reading; more, where the segments of all rows and their own parts would
    be more than `most_parts` (a deep tree that loses a row at each level), which must be as many as there are rows.
    """
    while True:
        found = Groups([], [], [])
        _descend(chains, range(len(chains)), 0, 0, page_tokens, least_saved, found)
        if most_parts is None or not found.segments or found.parts <= most_parts:
            return found
        least_saved = 2 * max(1, least_saved)


def _descend(
    chains: Sequence[Sequence[Span]],
    rows: Sequence[int],
    depth: int,
    start: int,
    page_tokens: int,
    least_saved: int,
    found: Groups,
) -> None:
    """Arranges `rows`, whose chains are the same above `depth`, and whose positions before `start` are read by segments."""
    branches: dict[int | None, list[int]] = {}
    for row in rows:
        chain = chains[row]
        branches.setdefault(chain[depth].context_id if depth < len(chain) else None, []).append(row)
    for context_id, members in branches.items():
        if len(members) == 1 or context_id is None:
            found.order.extend(members)
            found.own.extend([start] * len(members))
            continue
        below = _common(chains, members, depth)
        stop = chains[members[0]][below - 1].stop // page_tokens * page_tokens
        segment = Segment(len(found.order), len(found.order) + len(members), start, max(start, stop))
        if segment.saved_tokens >= max(1, least_saved):
            found.segments.append(segment)
            _descend(chains, members, below, stop, page_tokens, least_saved, found)
        else:
            _descend(chains, members, below, start, page_tokens, least_saved, found)


def _common(chains: Sequence[Sequence[Span]], rows: Sequence[int], depth: int) -> int:
    """How many contexts the chains of `rows` have in common, all of them those above `depth` at least and one more."""
    first = chains[rows[0]]
    below = depth + 1
    while below < len(first) and all(
        below < len(chains[row]) and chains[row][below].context_id == first[below].context_id for row in rows
    ):
        below += 1
    return below
