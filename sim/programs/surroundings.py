"""What a program finds around it in virtual time: clocks and sleeps that are virtual, and refusals of what would block.

It replaces, for as long as a run takes, what a program reaches for: functions of `time`, the event loop policy, standard
output. What cannot be replaced (sockets, processes, threads, input) is refused by an audit hook, so that it never blocks a
run in silence. All of it looks which strand runs, and leaves every other code of the process alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import greenlet
import numpy as np

from sim.network import stream
from sim.programs.loops import Refused, VirtualPolicy, refuse
from sim.programs.strands import Strand, Strands, running_program

EPOCH_S = 1_704_067_200  #: what time.time() says when a run begins: 2024-01-01 00:00 UTC, the same in every run
PATIENCE_S = 30.0  #: of real time, after which a program that neither waits nor ends is stopped
MOST_LOOKS = 200_000  #: at clocks, with no wait in between: time does not pass for who only looks

#: Audit events of what would block for real, by what they mean.
_REFUSED = {
    "time.sleep": "sleeps in real time (with a time.sleep that was taken from its module before the run)",  # from Python 3.13
    "socket.connect": "connects to another host",
    "socket.bind": "listens on the network",
    "socket.sendto": "sends to another host",
    "socket.getaddrinfo": "looks up a host",
    "socket.gethostbyname": "looks up a host",
    "subprocess.Popen": "starts a process",
    "os.system": "starts a process",
    "os.posix_spawn": "starts a process",
    "os.exec": "starts a process",
    "os.fork": "starts a process",
    "os.forkpty": "starts a process",
    "builtins.input": "asks a person for input",
}
_THREAD = "starts a thread (threading, concurrent.futures; use an async program and asyncio.gather)"
_WAIT = "waits in real time for another thread (threading.Event or Condition, queue.Queue; use asyncio's, or time.sleep)"
_hooked = False


@contextlib.contextmanager
def virtual_surroundings(strands: Strands, seed: int) -> Iterator[None]:
    """They are in place inside the `with`, for the program strands of this thread."""
    _install_audit_hook()
    states = random.getstate(), np.random.get_state()
    drawn = stream(seed, "programs").integers(2**31, size=2)
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, *states)
        random.seed(int(drawn[0]))
        np.random.seed(int(drawn[1]))
        for name, function in _clocks().items():
            stack.callback(setattr, time, name, getattr(time, name))
            setattr(time, name, function)
        stack.callback(sys.set_asyncgen_hooks, *sys.get_asyncgen_hooks())
        stack.callback(asyncio.set_event_loop_policy, asyncio.get_event_loop_policy())
        asyncio.set_event_loop_policy(VirtualPolicy())
        stack.callback(setattr, threading.Thread, "start", threading.Thread.start)
        threading.Thread.start = _starting(threading.Thread.start)  # type: ignore[method-assign,assignment]
        stack.callback(setattr, threading.Condition, "wait", threading.Condition.wait)
        threading.Condition.wait = _waiting(threading.Condition.wait)  # type: ignore[method-assign]
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # standard output is for results
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_watched(strands))
        yield


def _restore(python: Any, numpy: Any) -> None:
    random.setstate(python)
    np.random.set_state(numpy)


# --------------------------------------------------------------------------------------------------------------- time


def _clocks() -> dict[str, Callable[..., Any]]:
    """Functions of `time` by name, each virtual for a program's strand and the real one for all others."""

    def clock(name: str, told: Callable[[Strand], float]) -> Callable[[], float]:
        real = getattr(time, name)

        def now() -> float:
            strand = running_program()
            if strand is None:
                return real()  # type: ignore[no-any-return]
            strand.looks += 1
            if strand.looks > MOST_LOOKS:
                strand.looks = 0  # whoever cleans up behind the program may look again
                raise Refused(f"the program looks at time.{name} and never waits: time passes where it sleeps or gets, only")
            return told(strand)

        return now

    real_sleep = time.sleep

    def sleep(seconds: float) -> None:
        strand = running_program()
        if strand is None:
            real_sleep(seconds)
        elif seconds < 0:
            raise ValueError("sleep length must be non-negative")
        else:
            strand.sleep(seconds)

    return {
        "sleep": sleep,
        "time": clock("time", lambda strand: EPOCH_S + strand.now),
        "time_ns": clock("time_ns", lambda strand: EPOCH_S * 10**9 + int(strand.now * 1e9)),
        "monotonic": clock("monotonic", lambda strand: strand.now),
        "monotonic_ns": clock("monotonic_ns", lambda strand: int(strand.now * 1e9)),
        "perf_counter": clock("perf_counter", lambda strand: strand.now),
        "perf_counter_ns": clock("perf_counter_ns", lambda strand: int(strand.now * 1e9)),
    }


# ----------------------------------------------------------------------------------------------------------- refusals


def _install_audit_hook() -> None:
    """Once a process: an audit hook cannot be taken away. It does nothing but in a program's strand."""
    global _hooked
    if not _hooked:
        _hooked = True
        sys.addaudithook(_audit)


def _audit(event: str, _: tuple[Any, ...]) -> None:
    what = _REFUSED.get(event)
    if what is not None and running_program() is not None:
        refuse(what)


def _starting(real: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """`threading.Thread.start`, for everybody but a program."""

    def start(thread: threading.Thread) -> None:
        if running_program() is not None:
            refuse(_THREAD)
        real(thread)

    return start


def _waiting(real: Callable[..., bool]) -> Callable[..., bool]:
    """`threading.Condition.wait`, which events, semaphores and queues wait in, for everybody but a program; who only looks (a
    timeout of 0) may."""

    def wait(condition: threading.Condition, timeout: float | None = None) -> bool:
        if (timeout is None or timeout > 0) and running_program() is not None:
            refuse(_WAIT)
        return real(condition, timeout)

    return wait


@contextlib.contextmanager
def _watched(strands: Strands) -> Iterator[None]:
    """Stops a program that does not come back: an endless loop, a lock that nobody will open. Signals go to the main thread,
    where they end a wait inside the interpreter too."""
    seen = [-1]

    def look(_: int, frame: FrameType | None) -> None:
        strand = running_program()
        if strand is None or strands.switches != seen[0]:
            seen[0] = strands.switches
            return
        stack = "".join(traceback.format_stack(frame))
        raise strands.stop(f"{strand.name} neither waits nor ends for {PATIENCE_S:g} s of real time; it is here:\n{stack}")

    def end(*_: object) -> None:
        strands.failure = KeyboardInterrupt()
        if running_program() is not None or greenlet.getcurrent() is strands.hub:
            raise strands.failure  # else the core's code is not interrupted, and the run ends when it hands over

    before = signal.signal(signal.SIGALRM, look)
    # Not the default handler, which asyncio.run would replace by one that ends one program and not the run.
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE_S, PATIENCE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGINT, interrupt)
