"""The loop around ServeCore: what happens in one turn of the event loop becomes one call of `handle`, and its effects.

It decides when the core is asked (once a turn, and when a deadline comes), what time it is, and when an answer may be told:
one that promises something waits until its instant is in the journal. It never decides what the core decides, and no
exception of the core, of an effect, of the disk or of a client ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.serve.clock import Clock
from parrot.serve.effects import Abort, AnyEffect, Dispatch, FreeContexts, Reply, SessionEnded
from parrot.serve.events import AnyEvent, CancelGet, Tick
from parrot.serve.ledger import PROMISING, Entry, Ledger
from parrot.serve.streams import OutputStream

_log = logging.getLogger(__name__)

#: After an exception inside the core its deadline may still be in the past: wait this long before the next try.
_RECOVERY_S = 1.0

OnReply = Callable[[Reply], None]


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

    def session_ended(self, session_id: int) -> Iterable[str]: ...  # keys of the texts that nobody names any more


class Journal(Protocol):
    """Where instants are written; `parrot.serve.journal.Journal` says more."""

    @property
    def failing(self) -> ErrorInfo | None: ...

    def append(self, entry: Entry) -> None: ...

    def after_commit(self, callback: Callable[[ErrorInfo | None], None]) -> None: ...


class Shell:
    """Feeds one core. Everything here runs on the event loop that was running when it was made.

    `journal` goes with its `ledger`. `begin_s`: the core's clock goes on from there.
    """

    def __init__(
        self,
        core: Core,
        outside: Outside,
        journal: Journal | None = None,
        ledger: Ledger | None = None,
        begin_s: float = 0.0,
    ) -> None:
        self._core = core
        self._outside = outside
        self._journal = journal
        self._ledger = ledger
        self._loop = asyncio.get_running_loop()
        self._clock = Clock(begin_s)
        self._events: list[AnyEvent] = []
        self._replies: dict[int, tuple[OnReply | None, OnReply]] = {}
        self._last_request = 0
        self._flushed: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._closing = False

    def now(self) -> float:
        """Seconds since the journal's (or this process's) beginning, as `parrot.serve.clock` counts them; never decreases."""
        return self._clock.now()

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

    def ask(self, event: Any, on_reply: OnReply | None = None) -> asyncio.Future[Any]:
        """Hands over an event with a request number. The future gets the payload or the ParrotError; when that is a promise,
        once it is in the journal, or `unavailable` when it cannot be written.

        `on_reply` sees what the core replied, as the effects are carried out in order, come what may. Raises ParrotError
        `unavailable` when the server is shutting down, or the journal is failing and `event` asks for a promise.
        """
        if self._closing:
            raise ParrotError("unavailable", "the server is shutting down")
        if self._journal is not None and self._journal.failing is not None and isinstance(event, PROMISING):
            raise ParrotError.of(self._journal.failing)
        future: asyncio.Future[Any] = self._loop.create_future()

        def settle(reply: Reply) -> None:
            if future.done():
                return  # who asked is gone
            if reply.error is None:
                future.set_result(reply.payload)
            else:
                future.set_exception(ParrotError.of(reply.error))
                future.exception()  # retrieved: nobody need wait any more

        self._replies[event.request] = (on_reply, settle)
        self.post(event)
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

    async def show(self, session_id: int, var_id: str, stream: OutputStream) -> None:
        """Returns when a getter may see all that is in `stream` now: it is in the journal, so that no later life and no
        other attempt can say otherwise. Raises ParrotError `unavailable` when the journal cannot be written."""
        stream.shown = True
        if self._journal is None or self._ledger is None:
            return
        if stream.final:
            await self.flushed()  # the end of the output, which says all of it, is on its way to the core
        else:
            ids, text = stream.take_unstored()
            if ids or text:
                self._journal.append(self._ledger.show(session_id, var_id, ids, text))
        future: asyncio.Future[None] = self._loop.create_future()

        def committed(error: ErrorInfo | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(ParrotError.of(error))

        self._journal.after_commit(committed)
        await future

    def close(self) -> None:
        """No more requests; who still waits is answered `unavailable`. Events may come to the end; they go nowhere."""
        self._flush()
        self._closing = True
        self._clock.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        error = ErrorInfo("unavailable", "the server is shutting down")
        for request in list(self._replies):
            self._reply(Reply(request, error=error), False)

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
        try:
            effects = self._core.handle(events, now)
        except Exception:
            _log.exception("the core failed on %d events, the first %r", len(events), events[0])
            self._answer_internal(events)
            self._set_timer(now + _RECOVERY_S)
            return
        for what, error in self._core.take_faults():
            _log.error("%s", what, exc_info=error)
        promised = self._write(now, events, effects)
        for effect in effects:
            try:
                self._carry_out(effect, promised)
            except Exception:
                _log.exception("an effect could not be carried out: %r", effect)
        self._set_timer(self._core.next_deadline())

    def _write(self, now: float, events: Sequence[AnyEvent], effects: Sequence[AnyEffect]) -> set[int]:
        """Hands the instant to the journal. Returns the requests whose replies wait for it."""
        dropped = {e.session_id: self._outside.session_ended(e.session_id) for e in effects if type(e) is SessionEnded}
        if self._ledger is None or self._journal is None:
            return set()
        try:
            entry, promised = self._ledger.instant(now, events, effects, dropped)
        except Exception:  # a bug of ours: what follows is told all the same
            _log.exception("an instant of %d events could not be written down", len(events))
            return set()
        self._journal.append(entry)
        return promised

    def _carry_out(self, effect: AnyEffect, promised: set[int]) -> None:
        if isinstance(effect, Reply):
            self._reply(effect, effect.request in promised)
        elif isinstance(effect, Dispatch):
            self._outside.dispatch(effect)
        elif isinstance(effect, Abort):
            self._outside.abort(effect)
        elif isinstance(effect, FreeContexts):
            self._outside.free_contexts(effect)

    def _reply(self, reply: Reply, promises: bool) -> None:
        on_reply, settle = self._replies.pop(reply.request, (None, None))
        if on_reply is not None:
            on_reply(reply)
        if settle is None:
            return
        if promises and self._journal is not None:
            told = settle
            self._journal.after_commit(lambda error: told(reply if error is None else Reply(reply.request, error=error)))
        else:
            settle(reply)

    def _answer_internal(self, events: Sequence[AnyEvent]) -> None:
        error = ErrorInfo("internal", "an error inside the server; its log has the details")
        for event in events:
            request = getattr(event, "request", None)
            if request is not None:
                self._reply(Reply(request, error=error), False)

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
