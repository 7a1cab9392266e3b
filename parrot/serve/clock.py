"""What time it is for a core: seconds of this process's life in which it could listen.

A process that is stopped and continued (SIGSTOP, a paused machine, a loop that was blocked) finds the clock far ahead, and
what clients and engines sent meanwhile unread in its sockets. Were that time counted, all sessions would expire, all gets
time out and all engines be lost before one of their messages is read. So a standstill is not counted, but for `BEAT_S` of it:
after it everything has as much time left as before. Times between two lives of a core are left out for the same reason.
Wall-clock time is never looked at, so that setting it changes nothing.
"""

from __future__ import annotations

import asyncio
from time import monotonic

BEAT_S = 0.5
#: A beat that comes later than this is a standstill; shorter ones are the ordinary lateness of a busy loop.
TOLERANCE_S = 1.0


class Clock:
    """Goes on from `begin_s`; never decreases. To be made in a running event loop, and closed."""

    def __init__(self, begin_s: float = 0.0) -> None:
        self._now = begin_s
        self._beat_s = monotonic()
        self._start_s = self._beat_s - begin_s
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    def now(self) -> float:
        """Seconds. It notices a standstill by itself: whoever asks first after one may come before the beat."""
        now = monotonic()
        late_s = now - self._beat_s - BEAT_S
        if late_s > TOLERANCE_S:
            self._start_s += late_s
            self._beat_s += late_s
        self._now = max(self._now, now - self._start_s)
        return self._now

    def _beat(self) -> None:
        self.now()
        self._beat_s = monotonic()
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    def close(self) -> None:
        """No more beats. It stands still from here on."""
        self._timer.cancel()
