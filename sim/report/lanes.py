"""Lanes: where things overlap in time, each gets a row of its own. One assignment for the timelines and for the trace."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush


def lanes_of(starts: Sequence[float], ends: Sequence[float]) -> list[int]:
    """For intervals in order of their start: the lowest lane that is free, so that none overlaps another in its lane.

    One that begins where another ends may share its lane.
    """
    lanes: list[int] = []
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    for start, end in zip(starts, ends, strict=True):
        while busy and busy[0][0] <= start:
            heappush(free, heappop(busy)[1])
        lane = heappop(free) if free else len(busy)
        heappush(busy, (end, lane))
        lanes.append(lane)
    return lanes
