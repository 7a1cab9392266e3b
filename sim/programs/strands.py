"""Code that waits in virtual time: each strand runs on a stack of its own, and exactly one of them at any moment.

A strand runs until it waits; then the timeline goes on, and wakes it where its wait is over. Strands that are woken at the
same instant run in the order of their ranks. Nothing here decides what they do, nor how long anything takes: computing takes
no time at all.
"""

from __future__ import annotations

import asyncio
import math
import sys
import traceback
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import greenlet

from sim.timeline import Timeline

PROGRAM_TURN = 1.0  #: SimPy priority of strands of rank 0, on which ranks are added, all below the core's
CORE_TURN = 1.5  #: of the core's strand: behind all programs of the instant, in front of the cluster's flush (2)
_RANK = 2.0**-40
MOST_TURNS = 1_000_000  #: waits of a strand in which it never asked the core for anything


class Stopped(BaseException):
    """A strand cannot go on, and neither can the run. No `except Exception` of a program holds it up."""


class Strand(greenlet.greenlet):  # type: ignore[misc]
    """`run_it` on a stack of its own. A program's strand is refused what would block for real (`surroundings`)."""

    def __init__(
        self, strands: Strands, name: str, run_it: Callable[[], Any], *, rank: int = 0, is_program: bool = True
    ) -> None:
        super().__init__(self._run, strands.hub)
        self.name = name
        self.is_program = is_program
        self.loop: asyncio.AbstractEventLoop | None = None  #: what this strand's code has set as its event loop
        self.looks = 0  #: how often it has looked at a clock since it last waited
        self._strands = strands
        self._timeline = strands.timeline
        self._run_it = run_it
        self._priority = PROGRAM_TURN + rank * _RANK if is_program else CORE_TURN
        self._waits = 0  # numbers the waits, so that what would end an earlier one is known as stale
        self._waiting = False
        self._woken = False
        self._turns = 0
        self.dying = False  #: the run is over, and so is this strand

    @property
    def now(self) -> float:
        """Seconds since the run began."""
        return self._timeline.now

    def begin(self) -> None:
        """Runs it now, until it waits for the first time. To be called by the timeline."""
        self._strands.alive[self] = None
        self._enter()

    def wait(self, until_s: float = math.inf) -> None:
        """Lets the timeline go on until `wake`, or `until_s`. It may return early: look whether what you wait for is so."""
        assert greenlet.getcurrent() is self, f"{self.name} is made to wait by another"
        if self.dying:
            raise greenlet.GreenletExit
        if self._woken:
            self._woken = False
            return
        self._turns += 1
        if self.is_program and self._turns > MOST_TURNS:
            stack = "".join(traceback.format_stack())
            raise self._strands.stop(
                f"{self.name} has waited {MOST_TURNS:,} times and asked nothing of the core meanwhile; it is here:\n{stack}"
            )
        self._waits += 1
        self.looks = 0
        if until_s < math.inf:
            self._timeline.call_at(until_s, partial(self._resume, self._waits), self._priority)
        loop = asyncio._get_running_loop()  # of the thread, and so of whichever strand runs; so are the hooks
        hooks = sys.get_asyncgen_hooks() if loop is not None and self.is_program else None
        asyncio._set_running_loop(None)
        self._waiting = True
        try:
            self._strands.hub.switch()
        finally:
            self._waiting = False
            asyncio._set_running_loop(loop)
            if hooks is not None:
                sys.set_asyncgen_hooks(*hooks)

    def wake(self) -> None:
        """Ends its wait, now; or the next one, where it does not wait."""
        if self._woken:
            return
        self._woken = True
        if self._waiting:
            self._timeline.call_at(self._timeline.now, partial(self._resume, self._waits), self._priority)

    def sleep(self, seconds: float) -> None:
        """Waits for so long."""
        end_s = self.now + seconds
        while self.now < end_s:
            self.wait(end_s)

    def go_on(self) -> None:
        """Ends its wait at once, where the timeline goes on no more."""
        if self._waiting:
            self._enter()

    def progressed(self) -> None:
        """It has asked the core for something."""
        self._turns = 0

    def kill(self) -> None:
        """Ends it where it waits; its `finally` blocks run, and may wait no more."""
        self.dying = True
        if self._waiting:
            try:
                self.throw(greenlet.GreenletExit)
            except Exception:  # what a dying program raises is of no interest to anybody
                self._strands.alive.pop(self, None)

    def stack(self) -> str:
        """Where it waits, as a traceback without its head line."""
        frame: FrameType | None = self.gr_frame
        return "" if frame is None else "".join(traceback.format_stack(frame))

    def _run(self) -> None:
        try:
            self._run_it()
        except greenlet.GreenletExit:
            if not self.dying:
                raise
        finally:
            self._strands.alive.pop(self, None)

    def _resume(self, number: int) -> None:
        if number == self._waits and self._waiting:
            self._enter()

    def _enter(self) -> None:
        self._woken = False
        self._strands.switches += 1
        self.switch()
        if self._strands.failure is not None:  # it may have got lost in a task of asyncio
            raise self._strands.failure


class Strands:
    """All strands of a run. `switches` counts how often one went on: a sign of life."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.hub = greenlet.getcurrent()
        self.alive: dict[Strand, None] = {}
        self.switches = 0
        self.failure: BaseException | None = None

    def stop(self, message: str) -> Stopped:
        """The run cannot go on. To be raised in the strand whose fault it is."""
        stopped = self.failure = Stopped(message)
        return stopped

    def kill_programs(self) -> None:
        """The run is over: whatever program still waits, waits no more."""
        self.failure = None
        for strand in [strand for strand in self.alive if strand.is_program]:
            strand.kill()


def running_program() -> Strand | None:
    """The program's strand that runs now; None in every other thread, and in all code of the simulator."""
    current = greenlet.getcurrent()
    return current if isinstance(current, Strand) and current.is_program else None
