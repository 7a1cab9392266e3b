"""The loop around ServeCore: what happens in one turn of the event loop becomes one call of `handle`, and its effects.

It decides when the core is asked (once a turn, and when a deadline comes) and what time it is. It never decides what the
core decides, and no exception of the core, of an effect or of a client ends it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.serve.effects import Abort, AnyEffect, Dispatch, FreeContexts, Reply, SessionEnded
from parrot.serve.events import AnyEvent, CancelGet, Tick

_log = logging.getLogger(__name__)

#: After an exception inside the core its deadline may still be in the past: wait this long before the next try.
_RECOVERY_S = 1.0
_RECORD_FLUSH_S = 0.2


class Core(Protocol):
    """The surface of a ServeCore."""

    def handle(self, events: Sequence[AnyEvent], now: float) -> list[AnyEffect]: ...

    def next_deadline(self) -> float | None: ...

    def take_faults(self) -> Sequence[tuple[str, Exception]]: ...


class Outside(Protocol):
    """Who carries out the effects that reach out of the process. These calls never block and never raise."""

    def dispatch(self, effect: Dispatch) -> None: ...

    def abort(self, effect: Abort) -> None: ...

    def free_contexts(self, effect: FreeContexts) -> None: ...

    def session_ended(self, session_id: int) -> None: ...


class Record(Protocol):
    """Where instants are written before their effects are carried out."""

    def write(self, now: float, events: Sequence[AnyEvent]) -> None: ...

    def flush(self) -> None: ...


class Shell:
    """Feeds one core. Everything here runs on the event loop that was running when it was made."""

    def __init__(self, core: Core, outside: Outside, record: Record | None = None) -> None:
        self._core = core
        self._outside = outside
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._start_s = time.monotonic()
        self._now = 0.0
        self._events: list[AnyEvent] = []
        self._replies: dict[int, Callable[[Reply], None]] = {}
        self._last_request = 0
        self._flushed: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._record_timer: asyncio.TimerHandle | None = None
        self._closing = False

    def now(self) -> float:
        """Seconds since the start; never decreases."""
        self._now = max(self._now, time.monotonic() - self._start_s)
        return self._now

    # ------------------------------------------------------------------------------------------- what comes in

    def number(self) -> int:
        """A new request number."""
        self._last_request += 1
        return self._last_request

    def post(self, event: AnyEvent) -> None:
        """Hands over an event that has no answer."""
        if self._closing:
            return
        if not self._events:
            self._loop.call_soon(self._flush)
        self._events.append(event)

    def submit(self, event: Any, on_reply: Callable[[Reply], None]) -> None:
        """Hands over an event with a request number; `on_reply` is called once, as the effects are carried out in order.

        Raises ParrotError `unavailable` when the server is shutting down.
        """
        if self._closing:
            raise ParrotError("unavailable", "the server is shutting down")
        self._replies[event.request] = on_reply
        self.post(event)

    def ask(self, event: Any, on_reply: Callable[[Reply], None] | None = None) -> asyncio.Future[Any]:
        """As `submit`, for awaiting: the payload, or the ParrotError. `on_reply` sees the reply first, come what may."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def settle(reply: Reply) -> None:
            if on_reply is not None:
                on_reply(reply)
            if future.done():
                return  # who asked is gone
            if reply.error is None:
                future.set_result(reply.payload)
            else:
                future.set_exception(ParrotError.of(reply.error))
                future.exception()  # retrieved: nobody need wait any more

        self.submit(event, settle)
        return future

    def cancel_get(self, request: int) -> None:
        """Whoever asked for this get is gone; nobody wants its reply."""
        if self._replies.pop(request, None) is not None:
            self.post(CancelGet(request))

    async def flushed(self) -> None:
        """Waits until the core has handled all that was handed over so far."""
        if self._events:
            if self._flushed is None:
                self._flushed = self._loop.create_future()
            await asyncio.shield(self._flushed)

    def close(self) -> None:
        """No more requests; who still waits is answered `unavailable`. Events may come to the end; they go nowhere."""
        self._flush()
        self._closing = True
        for timer in (self._timer, self._record_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._record_timer = None
        error = ErrorInfo("unavailable", "the server is shutting down")
        for request in list(self._replies):
            self._reply(Reply(request, error=error))

    # ---------------------------------------------------------------------------------------------- one instant

    def _flush(self) -> None:
        events, self._events = self._events, []
        if events and not self._closing:
            self._instant(events)
        if self._flushed is not None:
            if not self._flushed.done():
                self._flushed.set_result(None)
            self._flushed = None

    def _instant(self, events: list[AnyEvent]) -> None:
        now = self.now()
        if self._record is not None:
            self._write(now, events)
        try:
            effects = self._core.handle(events, now)
        except Exception:
            _log.exception("the core failed on %d events, the first %r", len(events), events[0])
            self._answer_internal(events)
            self._set_timer(now + _RECOVERY_S)
            return
        for what, error in self._core.take_faults():
            _log.error("%s", what, exc_info=error)
        for effect in effects:
            try:
                self._carry_out(effect)
            except Exception:
                _log.exception("an effect could not be carried out: %r", effect)
        self._set_timer(self._core.next_deadline())

    def _carry_out(self, effect: AnyEffect) -> None:
        if isinstance(effect, Reply):
            self._reply(effect)
        elif isinstance(effect, Dispatch):
            self._outside.dispatch(effect)
        elif isinstance(effect, Abort):
            self._outside.abort(effect)
        elif isinstance(effect, FreeContexts):
            self._outside.free_contexts(effect)
        elif isinstance(effect, SessionEnded):
            self._outside.session_ended(effect.session_id)

    def _reply(self, reply: Reply) -> None:
        on_reply = self._replies.pop(reply.request, None)
        if on_reply is not None:
            on_reply(reply)

    def _answer_internal(self, events: Sequence[AnyEvent]) -> None:
        error = ErrorInfo("internal", "an error inside the server; its log has the details")
        for event in events:
            request = getattr(event, "request", None)
            if request is not None:
                self._reply(Reply(request, error=error))

    # ------------------------------------------------------------------------------------------------- deadlines

    def _set_timer(self, deadline: float | None) -> None:
        """A timer that comes too early looks again, so that moving a deadline back costs nothing."""
        if deadline is None or (self._timer is not None and self._timer_at <= deadline):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_later(max(0.0, deadline - self.now()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        deadline = self._core.next_deadline()
        if deadline is not None and deadline <= self.now():
            self.post(Tick())
        else:
            self._set_timer(deadline)

    # ------------------------------------------------------------------------------------------------- the record

    def _write(self, now: float, events: Sequence[AnyEvent]) -> None:
        assert self._record is not None
        try:
            self._record.write(now, events)
        except Exception:
            _log.exception("an instant of %d events could not be recorded", len(events))
        if self._record_timer is None:
            self._record_timer = self._loop.call_later(_RECORD_FLUSH_S, self._flush_record)

    def _flush_record(self) -> None:
        self._record_timer = None
        if self._record is not None:
            self._record.flush()
