"""What the core counts on an engine for policies: whole prompts, what is yet to be computed, what is cached."""

from __future__ import annotations

import pytest

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from parrot.serve.engines import Engine, by_load
from parrot.serve.policies.base import Cluster
from tests.serve.driver import Driver, out, read, text, value


def counts(engine: Engine) -> tuple[int, int, int]:
    return engine.prompt_tokens, engine.prefill_tokens, engine.cached_tokens


def ask(d: Driver, session: int, key: str) -> None:
    (x,) = d.outputs(d.submit(session, text("system", 100), value("q", key, 30), out("x", max_gen_length=16)))
    d.get(session, x, Criteria.LATENCY)


def test_counts_follow_a_task_from_its_placement_to_its_end() -> None:
    d = Driver()
    engine = d.core.engines[d.engine(bos_tokens=1)]
    session = d.open()
    ask(d, session, "one")
    assert counts(engine) == (131, 131, 131)
    ask(d, session, "two")  # the system prompt is there, or on its way
    assert counts(engine) == (262, 161, 161)
    assert engine.reserved == 131 + 30 + 2 * 16
    first, second = d.dispatches
    d.first(first)
    assert counts(engine) == (262, 30, 161)
    d.first(first)  # said twice, counted once
    assert counts(engine) == (262, 30, 161)
    d.finish(first, tokens=5)
    assert counts(engine) == (131, 30, 166)
    d.finish(second, tokens=7)  # whose first token was never told of
    assert counts(engine) == (0, 0, 173)
    d.close(session)
    assert counts(engine) == (0, 0, 101), "the leading constant stays, everything else was the session's"


def test_counts_are_given_back_when_an_attempt_comes_to_nothing() -> None:
    d = Driver(scheduler={"max_attempts": 1})
    engine = d.core.engines[d.engine()]
    session = d.open()
    for key in ("one", "two"):
        ask(d, session, key)
    d.first(d.dispatches[0])
    d.fail(d.dispatches[0])
    d.fail(d.dispatches[0])
    assert counts(engine) == (0, 0, 130), "what the first one had filled stays"


def test_an_eviction_is_counted_and_moves_the_engine_in_every_index() -> None:
    d = Driver()
    engines = [d.core.engines[d.engine()] for _ in range(2)]
    session = d.open()
    ask(d, session, "one")
    lane = d.core.calls(session)[0].lane
    least_cached = lane.ordered(cached)
    assert [e.id for e in least_cached] == [2, 1]
    d.finish(d.dispatches[0], tokens=5)
    d.send(ev.ContextsEvicted(1, tuple(reversed(list(engines[0].contexts)))))
    assert engines[0].cached_tokens == 0
    assert [e.id for e in least_cached] == [1, 2]
    assert least_cached is lane.ordered(cached)
    assert least_cached is not lane.ordered(by_load)


def test_a_get_that_makes_a_running_task_latency_sensitive_is_counted_on_its_engine() -> None:
    d = Driver()
    engine = d.core.engines[d.engine()]
    session = d.open()
    (x,) = d.outputs(d.submit(session, text("bulk"), out("x")))
    (y,) = d.outputs(d.submit(session, text("next"), read("x", x), out("y")))
    d.get(session, x, Criteria.THROUGHPUT)
    d.start(d.dispatches[0])
    assert engine.latency_tasks == 0
    d.get(session, y, Criteria.LATENCY)
    assert engine.latency_tasks == 1
    d.finish(d.dispatches[0])
    d.finish(d.dispatches[0])
    assert engine.latency_tasks == 0


def cached(engine: Engine) -> int:
    return engine.cached_tokens


@pytest.mark.parametrize(("kind", "exact"), [("builtin", True), ("emulated", True), ("openai", False)])
def test_the_store_says_whether_it_is_exact_for_an_engine(kind: str, exact: bool) -> None:
    d = Driver()
    engine = d.core.engines[d.engine(engine_type=kind)]
    assert Cluster.exact(engine) is exact
