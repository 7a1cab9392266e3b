"""Bugs to be planted, one at a time, so that a run without violations means something: each must be found.

A plant takes away one rule that the system rests on, as a small slip in the code would. They are named for the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

from parrot.engine.context_ids import ContextIds
from parrot.engine.tasks import Tasks
from parrot.protocol.engine import GenerateSpec
from parrot.serve import recovery, states
from parrot.serve.core import ServeCore
from parrot.serve.ledger import Ledger
from parrot.serve.shell import Shell
from parrot.serve.streams import OutputStream
from parrot.serve.task_stream import TaskStream


@contextmanager
def _attempt_check() -> Iterator[None]:
    """The core takes a task's events whatever their attempt."""

    def in_flight(core: Any, event: Any) -> Any:
        session = core.sessions.get(event.task.session_id) if event.epoch == core.scheduler.epoch else None
        task = session.task(event.task) if session is not None else None
        return task if task is not None and task.state in states.IN_FLIGHT else None

    with mock.patch.object(ServeCore, "_in_flight", in_flight):
        yield


@contextmanager
def _epoch_check() -> Iterator[None]:
    """The core takes the events of an earlier life."""

    def in_flight(core: Any, event: Any) -> Any:
        session = core.sessions.get(event.task.session_id)
        task = session.task(event.task) if session is not None else None
        return task if task is not None and task.attempt == event.attempt and task.state in states.IN_FLIGHT else None

    with mock.patch.object(ServeCore, "_in_flight", in_flight):
        yield


@contextmanager
def _early_reply() -> Iterator[None]:
    """No reply waits for the commit."""
    instant = Ledger.instant

    def without_waiting(ledger: Any, *arguments: Any) -> Any:
        return instant(ledger, *arguments)[0], set()

    with mock.patch.object(Ledger, "instant", without_waiting):
        yield


@contextmanager
def _unstored_stream() -> Iterator[None]:
    """Text is shown before it is stored."""

    async def show(shell: Any, session_id: int, var_id: str, stream: OutputStream) -> None:
        stream.shown = True

    with mock.patch.object(Shell, "show", show):
        yield


@contextmanager
def _forgotten_idempotency() -> Iterator[None]:
    """A recovered core does not know the answers that it gave."""
    recover = recovery.recover

    def forgetful(*arguments: Any) -> Any:
        core: Any = recover(*arguments)
        core.registry._opened.clear()
        for session in core.sessions.values():
            session.answers = None
        return core

    with mock.patch("parrot.serve.server.recover", forgetful):
        yield


@contextmanager
def _from_the_start() -> Iterator[None]:
    """An attempt does not go on behind what was shown."""

    def from_the_start(generate: GenerateSpec, stream: OutputStream) -> GenerateSpec:
        return generate

    with mock.patch("parrot.serve.task_stream.continued", from_the_start):
        yield


@contextmanager
def _believing() -> Iterator[None]:
    """What an engine says is taken for true."""
    with mock.patch.object(TaskStream, "_check_finished", return_value=None):
        yield


@contextmanager
def _old_contexts() -> Iterator[None]:
    """An engine keeps the contexts of an earlier epoch."""

    def forget(tasks: Any, reason: str) -> None:
        for job in list(tasks._running.values()):
            if not job.ended:
                tasks._loop.abort(job.key)
                job.fail("unavailable", reason, retryable=True)
        tasks._running.clear()
        ids: ContextIds = tasks._ids
        ids.next_life()
        tasks.epoch = None

    with mock.patch.object(Tasks, "forget", forget):
        yield


@contextmanager
def _unkept_gets() -> Iterator[None]:
    """The journal does not hold which outputs were wanted."""
    from parrot.serve import events, ledger

    is_kept = ledger._is_kept

    def without_gets(event: Any, *arguments: Any) -> bool:
        return type(event) is not events.GetVariable and is_kept(event, *arguments)

    with mock.patch.object(ledger, "_is_kept", without_gets):
        yield


PLANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "attempt-check": _attempt_check,
    "epoch-check": _epoch_check,
    "early-reply": _early_reply,
    "unstored-stream": _unstored_stream,
    "forgotten-idempotency": _forgotten_idempotency,
    "from-the-start": _from_the_start,
    "believing": _believing,
    "old-contexts": _old_contexts,
    "unkept-gets": _unkept_gets,
}


def planted(name: str | None) -> AbstractContextManager[None]:
    """The system with that bug; None: as it is."""
    return nullcontext() if name is None else PLANTS[name]()
