"""A process of its own for each run, so many at a time, on this machine.

Decides when a run starts and what is told of one whose process dies; never what a run does. A process that dies takes its
own run with it and no other; none outlives the one that started it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

POLL_S = 0.2  #: how often progress is read while nothing ends
STOP_S = 5.0  #: how long a process has to go when it is told to
_STOPPING = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1  #: of Linux's prctl(2)


class Died(NamedTuple):
    """What became of a run that gave no result. `told`: why, for the user."""

    told: str


class Progress(NamedTuple):
    """How far a run is, in memory that its process shares: programs ended, and all of them (0: not known yet)."""

    counts: ctypes.Array[ctypes.c_longlong]
    place: int

    def expect(self, programs: int) -> None:
        self.counts[self.place + 1] = programs

    def advance(self) -> None:
        self.counts[self.place] += 1

    def finish(self, programs: int) -> None:
        """The run has ended with so many programs, wherever it was carried out."""
        self.counts[self.place] = self.counts[self.place + 1] = programs

    def read(self) -> tuple[int, int]:
        return self.counts[self.place], self.counts[self.place + 1]


def shared_progress(runs: int) -> list[Progress]:
    """One for each of `runs` runs."""
    counts = multiprocessing.RawArray(ctypes.c_longlong, 2 * runs)
    return [Progress(counts, 2 * number) for number in range(runs)]


class _Worker(NamedTuple, Generic[T]):
    number: int
    process: multiprocessing.process.BaseProcess


def on_processes(
    work: Sequence[Callable[[], T]], workers: int, on_wait: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, T | Died]]:
    """Calls each of `work` in a forked process, at most `workers` at a time; yields (number, result) as they end.

    on_wait: called a few times a second. When the iteration ends early, so do the processes.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(range(len(work))))
    live: dict[Connection, _Worker[T]] = {}
    try:
        while waiting or live:
            while waiting and len(live) < workers:
                number = waiting.pop()
                receiver, writer = context.Pipe(duplex=False)
                process = context.Process(target=_carry_out, args=(work[number], writer, os.getpid()), daemon=True)
                with _signals_wait():
                    process.start()
                writer.close()  # the process alone has it now, so that its end can be seen
                live[receiver] = _Worker(number, process)
            for ready in wait(list(live), timeout=POLL_S):
                assert isinstance(ready, Connection)
                reader: Connection = ready
                worker = live[reader]
                try:
                    result: T | Died = reader.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    result = Died(_end_of(worker.process.exitcode))
                worker.process.join()
                del live[reader]
                reader.close()
                yield worker.number, result
            on_wait()
    finally:
        for worker in live.values():
            worker.process.terminate()
        for worker in live.values():
            worker.process.join(STOP_S)
            worker.process.kill()
            worker.process.join()


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Holds back what would interrupt a fork: Python loses an exception that a signal raises in its callbacks at fork, and a
    child is not to take the parent's signals for its own. The child lets them come again when it is ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_of(status: int | None) -> str:
    if status is not None and status < 0:
        return f"its process was killed by {signal.Signals(-status).name} (out of memory?)"
    return f"its process ended with status {status} and no result"


def _carry_out(work: Callable[[], T], writer: Connection, parent: int) -> None:
    """The life of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went before it could be asked for
            os._exit(1)
    try:
        writer.send(work())
    except Exception:
        writer.send(Died(f"a fault of the simulator:\n{traceback.format_exc()}"))
