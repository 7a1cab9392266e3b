"""When a request is sent, in real time: its turn under `RateLimits`, and the pauses before it is sent again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from parrot.engine.rate_limits import RateLimits

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0


class Pace:
    """The turns of one engine's requests. `now`: a clock in seconds; `seed`: of the jitter."""

    def __init__(
        self, requests_per_minute: int | None, tokens_per_minute: int | None, now: Callable[[], float], seed: int = 0
    ) -> None:
        self._now = now
        self._limits = RateLimits(requests_per_minute, tokens_per_minute, now())
        self._turns = asyncio.Lock()  # first come, first served
        self._random = Random(seed)

    async def turn(self, tokens: int) -> None:
        """Waits until a request of `tokens` tokens may be sent, and counts it."""
        async with self._turns:
            while (wait_s := self._limits.ready_at(tokens, now := self._now()) - now) > 0.0:
                await asyncio.sleep(wait_s)
            self._limits.take(tokens, now)

    def hold(self, seconds: float) -> None:
        """The endpoint has asked for a pause: no request is sent before it is over."""
        self._limits.hold(self._now() + seconds)

    def pause_s(self, tries: int, retry_after_s: float | None) -> float:
        """How long to wait before a request is sent again that was sent `tries` times: what the endpoint asks for, else twice
        as long each time; a random part on top, or off, so that those that failed together do not come together."""
        if retry_after_s is not None:
            return retry_after_s * (1.0 + 0.1 * self._random.random())
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (tries - 1))
        return longest * (0.5 + 0.5 * self._random.random())
