"""No task is passed for ever: an engine is kept free for the first of a lane that has waited for its patience."""

from __future__ import annotations

from typing import Any

import pytest

from parrot.serve import events as ev
from parrot.serve.effects import Dispatch
from parrot.serve.policies.base import InOrder, Placement
from parrot.serve.policies.registry import POLICIES
from tests.properties.serve_machine import SHIPPED
from tests.serve.driver import Driver, out, text

SMALL_S = 2.0  #: how long a small task runs
PATIENCE_S = 10.0


def call(d: Driver, session: int, key: str, tokens: int, models: tuple[str, ...] = ()) -> str:
    (var,) = d.outputs(d.submit(session, text(key, tokens), out("x", max_gen_length=10), models=models))
    d.get(session, var)
    return var


def start_of_the_large_one(d: Driver, until_s: float) -> float | None:
    """When a task that needs most of an engine starts, while small ones of another lane come for ever: each engine has two of
    them in flight at any time, out of step."""
    for name in ("one", "two"):
        d.engine(name, tokens_capacity=100)
    session, other = d.open(1), d.open(2)
    ends: dict[float, list[Dispatch]] = {}
    large = ""
    started: float | None = None
    step, number = SMALL_S / 4, 0
    while d.now < until_s and started is None:
        for dispatch in ends.pop(d.now, []):
            d.finish(dispatch)
        number += 1
        call(d, session, f"small{number}", 30)
        if not large and d.now >= 1.0:
            large = call(d, other, "large", 80, ("m",))
        for dispatch in d.dispatches:
            if dispatch.task.session_id == other:
                started = d.now
            elif not any(dispatch in flying for flying in ends.values()):
                ends.setdefault(d.now + SMALL_S, []).append(dispatch)
        now = d.now + step
        while (deadline := d.core.next_deadline()) is not None and deadline < now:
            d.send(ev.Tick(), at=deadline)
        d.now = now
    return started


@pytest.mark.parametrize("policy", SHIPPED)
def test_under_an_endless_stream_of_small_tasks_the_large_one_starts(policy: str) -> None:
    from parrot.serve.config import GlobalSchedulerConfig
    from parrot.serve.policies import parse_policy

    section = parse_policy(policy, GlobalSchedulerConfig())
    named: dict[str, Any] = {name: getattr(section, name) for name in ("app_fifo", "graph_group", "ctx_group", "ctx_aware")}
    impatient = Driver(section.policy, {**named, "params": section.params, "patience": None})
    assert start_of_the_large_one(impatient, 120.0) is None, "it is not passed over, so this shows nothing"
    d = Driver(section.policy, {**named, "params": section.params, "patience": PATIENCE_S})
    started = start_of_the_large_one(d, 120.0)
    assert started is not None
    assert 1.0 + PATIENCE_S <= started <= 1.0 + PATIENCE_S + SMALL_S + SMALL_S / 4


def test_one_engine_is_kept_the_other_goes_on() -> None:
    d = Driver("least_loaded", {"patience": 5.0})
    engines = [d.engine(name, tokens_capacity=100) for name in ("one", "two")]
    session = d.open(1)
    for key in ("a", "b", "c", "d"):
        call(d, session, key, 30)
    call(d, session, "large", 85, ("m",))
    assert d.core.next_deadline() == 5.0
    d.send(ev.Tick(), at=5.0)
    claimed = [engine for engine in d.core.engines.values() if engine.claimed is not None]
    assert [engine.id for engine in claimed] == engines[:1], "the least loaded, the first of equals"
    first, second = [x for x in d.dispatches if x.engine_id == engines[0]]
    d.finish(first)
    call(d, session, "e", 5)  # the emptier engine is the one that is kept
    assert d.dispatches[-1].engine_id == engines[1]
    d.finish(second)
    assert d.dispatches[-1].engine_id == engines[0]
    assert all(engine.claimed is None for engine in d.core.engines.values())


def waiting_for_a_claim(patience: float = 5.0, engines: int = 2) -> tuple[Driver, int, int]:
    """A large task of lane `m` waits; each engine has a small one of the other lane. (driver, session,
    first engine)."""
    d = Driver("least_loaded", {"patience": patience})
    first, *_ = (d.engine(f"e{number}", tokens_capacity=100) for number in range(engines))
    for number in range(engines):
        call(d, d.open(10 + number), f"small{number}", 50)
    large = d.open(1)
    call(d, large, "large", 85, ("m",))
    return d, large, first


def kept(d: Driver) -> list[int]:
    return [engine.id for engine in d.core.engines.values() if engine.claimed is not None]


def test_a_lost_engine_s_claim_goes_to_another_one() -> None:
    d, _, first = waiting_for_a_claim()
    d.send(ev.Tick(), at=5.0)
    assert kept(d) == [first]
    d.lose(first)
    assert kept(d) == [first + 1]


def test_a_suspect_engine_is_kept_for_nobody() -> None:
    d, _, first = waiting_for_a_claim()
    d.send(ev.Tick(), at=5.0)
    (there,) = (x for x in d.dispatches if x.engine_id == first)
    d.fail(there, retryable=True)
    assert kept(d) == [first + 1]


def test_a_task_that_ends_gives_its_engine_back_to_those_that_wait() -> None:
    d, large, first = waiting_for_a_claim(engines=1)
    d.send(ev.Tick(), at=5.0)
    call(d, 10, "small too", 20)
    assert len(d.dispatches) == 1, "the engine is kept"
    d.close(large)
    assert kept(d) == []
    assert len(d.dispatches) == 2
    assert d.core.engines[first].claimed is None


def test_a_task_that_no_engine_could_hold_claims_none() -> None:
    d = Driver("least_loaded", {"patience": 5.0})
    d.engine("small", max_seq_len=50, model="n")
    d.engine("large", tokens_capacity=100)
    call(d, d.open(1), "a", 60)
    session = d.open(2)
    call(d, session, "b", 60, ("m",))
    d.send(ev.Tick(), at=5.0)
    assert [engine.name for engine in d.core.engines.values() if engine.claimed is not None] == ["large"]


def test_each_lane_claims_an_engine_of_its_own() -> None:
    d, _, first = waiting_for_a_claim()
    call(d, d.open(2), "large too", 85, ("m", "n"))
    d.send(ev.Tick(), at=5.0)
    d.send(ev.Tick(), at=5.0)
    assert kept(d) == [first, first + 1]


def test_where_nobody_else_may_fill_the_gaps_nothing_is_kept() -> None:
    d = Driver("least_loaded", {"patience": 5.0})
    d.engine(tokens_capacity=100)
    session = d.open(1)
    call(d, session, "small", 50)
    call(d, session, "large", 85)
    assert d.core.next_deadline() is None
    d.send(ev.Tick(), at=6.0)
    assert kept(d) == []


class Stubborn(InOrder):
    """Places small tasks alone, whatever waits, and nothing large, ever."""

    name = "stubborn"
    in_order = False

    def place(self, queue, cluster, now):  # type: ignore[no-untyped-def]
        for lane in queue.lanes():
            for task in queue.in_order(lane):
                for engine in cluster.engines(lane):
                    if cluster.prompt_tokens(task, engine) < 50 and cluster.fits(task, engine):
                        yield Placement(task, engine)
                        break

    def first(self, queue, lane):  # type: ignore[no-untyped-def]
        return queue.oldest(lane)


def test_the_core_places_whom_a_policy_passes_over_even_within_a_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "stubborn", Stubborn)
    d = Driver("stubborn", {"patience": 5.0})
    d.engine(tokens_capacity=100)
    session = d.open(1)
    call(d, session, "small", 30)
    large = call(d, session, "large", 85)
    d.send(ev.Tick(), at=5.0)
    call(d, session, "late", 30)
    assert len(d.dispatches) == 1, "the engine is kept for the large one"
    d.finish(d.dispatches[0])
    assert [dispatch.output_var for dispatch in d.dispatches] == [large]
    assert d.core.scheduler.describe_policy_errors() == {}


def test_the_oldest_of_a_lane_is_who_became_ready_first() -> None:
    d = Driver("parrot", {"app_fifo": True})
    early, late = d.open(1), d.open(2)
    first = call(d, late, "first", 10)
    call(d, early, "second", 10)
    queue = d.core.scheduler.queue
    (lane,) = queue.lanes()
    assert queue.head(lane).output.id == "v0"
    assert queue.head(lane).session_id == early
    assert (queue.oldest(lane).session_id, queue.oldest(lane).output.id) == (late, first)
    engine = d.engine(tasks_capacity=1)  # the head goes
    for number in range(200):
        call(d, late, f"t{number}", 10)
    assert queue.oldest(lane).output.id == first
    for _ in range(201):
        waiting = [t for c in d.core.calls(late) for t in c.tasks if t.state == "queued"]
        assert queue.oldest(lane) is min(waiting, key=lambda t: t.sequence)
        d.finish(d.dispatches[0])
    assert queue.oldest(lane) is None
    assert engine in d.core.engines
