"""When a request may be sent: rate limits that we keep to by ourselves, and the pauses that an endpoint asks for.

A limit a minute is kept as a bucket that fills evenly and holds ten seconds' worth, since that is how endpoints enforce it
(Azure OpenAI evaluates its limits over windows of 1 or 10 s). Requests are served in the order in which they came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

WINDOW_S = 10.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0


class Bucket:
    """Holds `per_minute` × WINDOW_S / 60 units, and at least one; what is larger than it is let through when it is full."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._rate = per_minute / 60.0
        self._size = max(1.0, self._rate * WINDOW_S)
        self._level = self._size
        self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken."""
        self._level = min(self._size, self._level + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (min(amount, self._size) - self._level) / self._rate)

    def take(self, amount: float) -> None:
        """Takes it; the level may fall below nothing, which the next ones wait for."""
        self._level -= amount


class Pace:
    """The turns of one engine's requests. `now`: a clock in seconds; `seed`: of the jitter."""

    def __init__(
        self, requests_per_minute: int | None, tokens_per_minute: int | None, now: Callable[[], float], seed: int = 0
    ) -> None:
        self._now = now
        self._requests = Bucket(requests_per_minute, now()) if requests_per_minute else None
        self._tokens = Bucket(tokens_per_minute, now()) if tokens_per_minute else None
        self._closed_until = 0.0
        self._turns = asyncio.Lock()  # first come, first served
        self._random = Random(seed)

    async def turn(self, tokens: int) -> None:
        """Waits until a request of `tokens` tokens may be sent, and counts it."""
        async with self._turns:
            while (wait_s := self._wait_s(tokens)) > 0.0:
                await asyncio.sleep(wait_s)
            if self._requests is not None:
                self._requests.take(1)
            if self._tokens is not None:
                self._tokens.take(tokens)

    def _wait_s(self, tokens: int) -> float:
        now = self._now()
        wait_s = self._closed_until - now
        if self._requests is not None:
            wait_s = max(wait_s, self._requests.wait_s(1, now))
        if self._tokens is not None:
            wait_s = max(wait_s, self._tokens.wait_s(tokens, now))
        return wait_s

    def hold(self, seconds: float) -> None:
        """The endpoint has asked for a pause: no request is sent before it is over."""
        self._closed_until = max(self._closed_until, self._now() + seconds)

    def pause_s(self, tries: int, retry_after_s: float | None) -> float:
        """How long to wait before a request is sent again that was sent `tries` times: what the endpoint asks for, else twice
        as long each time; a random part on top, or off, so that those that failed together do not come together."""
        if retry_after_s is not None:
            return retry_after_s * (1.0 + 0.1 * self._random.random())
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (tries - 1))
        return longest * (0.5 + 0.5 * self._random.random())
