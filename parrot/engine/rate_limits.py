"""When a request to a remote endpoint may be sent under limits a minute. Pure: who asks says what time it is.

A limit of N a minute is kept twice over. As a bucket that fills evenly and holds ten seconds' worth, since that is how
endpoints enforce it (Azure OpenAI evaluates its limits over windows of 1 or 10 s); and as a count, so that no minute sees more
than N. The engine behind an endpoint and its model in simulation keep to their limits with this one class.
"""

from __future__ import annotations

from collections import deque

WINDOW_S = 10.0
MINUTE_S = 60.0


class Bucket:
    """Holds `per_minute` × WINDOW_S / 60 units, and at least one; what is larger than it is let through when it is full."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._rate = per_minute / MINUTE_S
        self._size = max(1.0, self._rate * WINDOW_S)
        self._level = self._size
        self._at = now

    def ready_at(self, amount: float, now: float) -> float:
        """The first moment from `now` on at which `amount` may be taken, if nothing else is taken before."""
        missing = min(amount, self._size) - self._level_at(now)
        return now + missing / self._rate if missing > 0.0 else now

    def take(self, amount: float, now: float) -> None:
        """Takes it; the level may fall below nothing, which the next ones wait for."""
        self._level = self._level_at(now) - amount
        self._at = now

    def _level_at(self, now: float) -> float:
        return min(self._size, self._level + (now - self._at) * self._rate)


class Minute:
    """Lets no more than `most` units through in any minute; what is larger than that goes alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: deque[tuple[float, int]] = deque()  # when, how much: of the last minute, the oldest first
        self._sum = 0

    def ready_at(self, amount: int, now: float) -> float:
        """As `Bucket.ready_at`."""
        room = self._most - min(amount, self._most)
        left, at = self._sum, now
        for taken_at, units in self._taken:
            if left <= room:
                break
            left -= units
            at = max(now, taken_at + MINUTE_S)
        return at

    def take(self, amount: int, now: float) -> None:
        while self._taken and self._taken[0][0] + MINUTE_S <= now:
            self._sum -= self._taken.popleft()[1]
        self._taken.append((now, amount))
        self._sum += amount


class RateLimits:
    """Limits on requests and on tokens a minute, each null where there is none, and pauses that an endpoint asked for. Times
    are seconds and never decrease. Who shares limits takes turns: first come, first served."""

    def __init__(self, requests_per_minute: int | None, tokens_per_minute: int | None, now: float = 0.0) -> None:
        self._requests = (Bucket(requests_per_minute, now), Minute(requests_per_minute)) if requests_per_minute else None
        self._tokens = (Bucket(tokens_per_minute, now), Minute(tokens_per_minute)) if tokens_per_minute else None
        self._closed_until = now

    def ready_at(self, tokens: int, now: float) -> float:
        """The first moment from `now` on at which a request of `tokens` tokens may be sent, if none is sent before."""
        at = max(now, self._closed_until)
        for limits, amount in ((self._requests, 1), (self._tokens, tokens)):
            if limits is not None:
                bucket, minute = limits
                at = max(at, bucket.ready_at(amount, now), minute.ready_at(amount, now))
        return at

    def take(self, tokens: int, now: float) -> None:
        """A request of `tokens` tokens is sent."""
        for limits, amount in ((self._requests, 1), (self._tokens, tokens)):
            if limits is not None:
                bucket, minute = limits
                bucket.take(amount, now)
                minute.take(amount, now)

    def hold(self, until: float) -> None:
        """The endpoint has asked for a pause: no request is sent before it is over."""
        self._closed_until = max(self._closed_until, until)
