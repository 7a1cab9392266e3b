"""How long to wait for room: an estimate from how fast room came lately, and what may be taken in a minute. What a refusal's
Retry-After says.

It knows no clock: whoever keeps the count of what has left says when, so that the same events give the same estimate.
"""

from __future__ import annotations

import math
from collections import deque

LEAST_S, MOST_S = 1, 60  #: of what is ever told, whole seconds
WINDOW_S = 30.0  #: how far back "lately" reaches
SPACING_S = 1.0  #: between two samples, so that there are few


class DrainRate:
    """Samples of a running count of what has left, the oldest first."""

    __slots__ = ("_samples",)

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def note(self, now: float, left: int) -> None:
        """So many have left until now. To be called whenever that may have changed."""
        samples = self._samples
        if samples:
            last = samples[-1][0]
            if now - last < SPACING_S:
                return
            if now - last > WINDOW_S:
                samples.clear()
        samples.append((now, left))
        if samples[0][0] < now - WINDOW_S:
            samples.popleft()

    def wait_s(self, now: float, left: int, wanted: int) -> int:
        """After how many seconds, LEAST_S to MOST_S, `wanted` more will have left at the rate of late. When none has left
        since the first sample: as long again as nothing happened."""
        samples = self._samples
        if not samples:
            return LEAST_S
        since, before = samples[0]
        watched_s, gone = now - since, left - before
        seconds = wanted * watched_s / gone if gone > 0 else watched_s
        return min(max(math.ceil(seconds), LEAST_S), MOST_S)


class Allowance:
    """What may be taken in a minute: it comes back evenly, and a minute's worth lies ready at most (a token bucket). More may
    be taken than is there; then there is nothing until that has come back."""

    __slots__ = ("_at", "_level", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self._level = float(most)
        self._at = 0.0

    def left(self, now: float) -> float:
        """How much there is; below zero after more was taken."""
        return min(self._level + (now - self._at) * self.most / 60.0, self.most)

    def take(self, now: float, amount: float) -> None:
        """Less than nothing gives back."""
        self._level, self._at = self.left(now) - amount, now

    def wait_s(self, now: float, wanted: float) -> int:
        """After how many seconds there will be `wanted`: a whole number, 0 for none."""
        missing = min(wanted, self.most) - self.left(now)
        return max(0, math.ceil(missing * 60.0 / self.most))
