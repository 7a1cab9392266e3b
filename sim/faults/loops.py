"""One life of a process: an asyncio event loop in virtual time. The real shells run on it, and know no difference.

It decides when what is ready runs: in order, in one turn an instant, now and then a little late. A process that is killed
runs nothing any more, not even its `finally`s' effects on others; one that hangs goes on later, with all that came meanwhile.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Callable
from typing import Any

from sim.timeline import Timeline

_LATENESS_S = 1e-9
TURN = 1.5  # SimPy priority: behind everything that arrives in the instant


class ProcessLoop(asyncio.AbstractEventLoop):
    """`late_s` draws how much later a turn runs; `step` is called after everything that ran, and may kill the process."""

    def __init__(
        self,
        timeline: Timeline,
        name: str,
        failed: Callable[[str], None],
        late_s: Callable[[], float] | None = None,
        step: Callable[[], None] | None = None,
    ) -> None:
        self.timeline = timeline
        self.name = name
        self.alive = True
        self.connections: dict[Any, None] = {}  #: open ends of this process
        self.host: Any = None  #: what the process is, for its stand-ins of the outside world
        self._failed = failed
        self._late_s = late_s
        self._step = step
        self._ready: deque[asyncio.Handle] = deque()
        self._planned = False
        self._frozen_until = 0.0
        self._coroutines: list[Any] = []

    # ---------------------------------------------------------------------------------------- what asyncio asks of it

    def time(self) -> float:
        return self.timeline.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return self.alive

    def is_closed(self) -> bool:
        return not self.alive

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        handle = asyncio.Handle(callback, args, self, context)
        if self.alive:
            self._ready.append(handle)
            if not self._planned:
                self._plan()
        return handle

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        # Never early, as no real timer is: rounding must not make a process wait for a moment that does not come.
        return self.call_at(self.timeline.now + delay + _LATENESS_S, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if self.alive:
            self.timeline.call_at(when, lambda: self._due(handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        self._coroutines.append(coro)
        return asyncio.Task(coro, loop=self, name=name or "task", context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """At once: threads have no place in a deterministic run."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self.alive:
            self._failed(f"{self.name}: {context.get('message')}: {context.get('exception')!r}")

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    # ---------------------------------------------------------------------------------------------- life and death

    def kill(self) -> None:
        """The process is gone, between two of its steps."""
        self.alive = False
        self._ready.clear()
        for coroutine in self._coroutines:
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()  # never begun, and nobody's fault
        self._coroutines.clear()

    def hang(self, seconds: float) -> None:
        """The process stands still for so long."""
        self._frozen_until = max(self._frozen_until, self.timeline.now + seconds)

    def thaw(self) -> None:
        """It goes on now at the latest."""
        self._frozen_until = self.timeline.now
        if self._ready:
            self._plan()

    def _due(self, handle: asyncio.TimerHandle) -> None:
        if self.alive and not handle.cancelled():
            self._ready.append(handle)
            if not self._planned:
                self._plan()

    def _plan(self) -> None:
        self._planned = True
        late_s = self._late_s() if self._late_s is not None else 0.0
        self.timeline.call_at(max(self.timeline.now + late_s, self._frozen_until), self._turn, TURN)

    def _turn(self) -> None:
        if not self.alive:
            return
        if self.timeline.now < self._frozen_until:
            self.timeline.call_at(self._frozen_until, self._turn, TURN)
            return
        self._planned = False
        ready, step = self._ready, self._step
        asyncio._set_running_loop(self)
        try:
            while ready and self.alive:
                handle = ready.popleft()
                if not handle.cancelled():
                    handle._run()
                    if step is not None:
                        step()
        finally:
            asyncio._set_running_loop(None)
