"""What has ended leaves nothing in a cycle: its memory is given back at once, and the garbage collector finds nothing to do."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from tests.serve.driver import Driver, out, read, text


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fails when what runs in it leaves an object of the core to the garbage collector."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        found = Counter(type(o).__name__ for o in gc.garbage if type(o).__module__.startswith("parrot.serve."))
        assert not found
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def diamond(d: Driver, criteria: Criteria = Criteria.LATENCY, **fields: Any) -> int:
    """A session whose four calls fan out and in again; the last one is fetched."""
    session = d.open()
    (first,) = d.outputs(d.submit(session, text("system", 20), text(f"q{session}"), out("first"), **fields))
    middle = [d.outputs(d.submit(session, text(f"part{i}"), read("first", first), out("part"), **fields))[0] for i in range(2)]
    reads = [read(f"r{i}", var_id) for i, var_id in enumerate(middle)]
    (last,) = d.outputs(d.submit(session, text("system", 20), *reads, out("last"), **fields))
    d.get(session, last, criteria, timeout=50.0)
    return session


def finish_all(d: Driver) -> None:
    while d.dispatches:
        d.first(d.dispatches[0])
        d.finish(d.dispatches[0])


def finished(d: Driver, sessions: list[int]) -> None:
    finish_all(d)


def half_way(d: Driver, sessions: list[int]) -> None:
    d.finish(d.dispatches[0])


def failed(d: Driver, sessions: list[int]) -> None:
    d.finish(d.dispatches[0])
    d.fail(d.dispatches[0])


def tried_again(d: Driver, sessions: list[int]) -> None:
    d.fail(d.dispatches[0], retryable=True)
    d.send(ev.Tick(), at=d.now + 30.0)
    d.send(ev.TaskRejected(d.dispatches[0].epoch, d.dispatches[0].task, d.dispatches[0].attempt))
    del d.dispatches[0]
    d.send(ev.Tick(), at=d.now + 30.0)
    finish_all(d)


def engine_lost(d: Driver, sessions: list[int]) -> None:
    d.finish(d.dispatches[0])
    d.lose(d.dispatches[0].engine_id)
    d.engine("another")
    finish_all(d)


def evicted(d: Driver, sessions: list[int]) -> None:
    finish_all(d)
    for engine in d.core.engines.values():
        d.send(ev.ContextsEvicted(engine.id, tuple(engine.contexts)))


def cancelled(d: Driver, sessions: list[int]) -> None:
    for session in sessions:
        d.ask(ev.CancelCall, session, d.auths[session], 0)


def timed_out(d: Driver, sessions: list[int]) -> None:
    d.send(ev.Tick(), at=d.now + 60.0)
    d.send(ev.CancelGet(d.request))


WAYS = [finished, half_way, failed, tried_again, engine_lost, evicted, cancelled, timed_out]


@pytest.mark.parametrize("way", WAYS, ids=[way.__name__ for way in WAYS])
@pytest.mark.parametrize("policy", ["least_loaded", "parrot"])
def test_a_session_leaves_no_cycle_however_it_goes(policy: str, way: Callable[[Driver, list[int]], None]) -> None:
    everything = {"app_fifo": True, "graph_group": True, "ctx_group": True, "ctx_aware": True}
    with nothing_left():
        d = Driver(policy, everything if policy == "parrot" else {}, session_life_span=1e6)
        for _ in range(2):
            d.engine(f"e{len(d.core.engines)}")
        sessions = [diamond(d), diamond(d, Criteria.THROUGHPUT), diamond(d, deadline=40.0)]
        way(d, sessions)
        for session in sessions:
            d.close(session)
        assert not d.faults
        assert not d.core.counts()["sessions"]
        d.send(ev.Tick(), at=d.now + 1e5)  # shared contexts, too, are given up
        assert not [engine.contexts for engine in d.core.engines.values() if engine.contexts]
