"""`parrot_artifact`: the three choices of the published artifact, and the default."""

from __future__ import annotations

from typing import Any

import pytest

from parrot.protocol.api import Criteria
from tests.serve.driver import Driver, out, read, text, value
from tests.serve.policies.scenes import ask, begun, engines_of, heads, run_out


def crowded(**switches: Any) -> Driver:
    """Three engines with 4, 2 and 3 places, the first of which has one task."""
    d = Driver("parrot_artifact", switches)
    for places in (4, 2, 3):
        d.engine(tasks_capacity=places)
    return d


def test_the_default_is_the_engine_with_the_most_free_places() -> None:
    d = crowded()
    session = d.open()
    for i in range(6):
        ask(d, session, f"t{i}")
    assert engines_of(d) == [1, 1, 3, 1, 2, 3]


def test_graph_group_takes_the_engine_with_the_fewest_free_places() -> None:
    d = crowded(graph_group=True)
    session = d.open()
    for i in range(6):
        ask(d, session, f"t{i}")
    assert engines_of(d) == [2, 2, 3, 3, 3, 1]


def test_ctx_aware_takes_the_first_engine_that_holds_the_first_constant() -> None:
    def where(**switches: bool) -> int:
        d = crowded(**switches)
        session = d.open()
        for i in range(4):
            ask(d, session, f"t{i}")  # on 1, 1, 3, 1: engines 1, 2 and 3 have 1, 2 and 2 places left
        (x,) = d.outputs(d.submit(session, text("t2"), value("q", "why"), out("x")))
        d.get(session, x)
        return engines_of(d)[-1]

    assert where(ctx_aware=True) == 3
    assert where() == 2


def test_app_fifo_pulls_successors_before_what_begins_a_program() -> None:
    def order(**switches: bool) -> list[str]:
        d = Driver("parrot_artifact", switches)
        d.engine(tasks_capacity=1)
        first, second = d.open(), d.open()
        (x,) = d.outputs(d.submit(first, text("a1"), out("x")))
        (y,) = d.outputs(d.submit(first, text("a2"), read("x", x), out("y")))
        d.get(first, y)
        for i in range(2):
            ask(d, second, f"b{i}")
        return run_out(d)

    assert order(app_fifo=True) == ["a1", "a2", "b0", "b1"]
    assert order() == ["a1", "b0", "b1", "a2"]


def test_a_task_without_room_does_not_hold_back_the_next() -> None:
    d = Driver("parrot_artifact")
    d.engine(tokens_capacity=200)
    session = d.open()
    for i, tokens in enumerate((100, 150, 20)):
        ask(d, session, f"t{i}", tokens)
    assert heads(d) == ["t0", "t2"]
    d.finish(begun(d, "t0"))
    assert heads(d) == ["t2"], "t1 needs more than what is left"
    d.finish(begun(d, "t2"))
    assert heads(d) == ["t1"]


def test_a_task_that_comes_back_is_offered_to_all_engines() -> None:
    d = Driver("parrot_artifact")
    d.engine()
    d.engine()
    ask(d, d.open(), "t")
    d.lose(engines_of(d)[0])
    assert [e.engine_id for e in d.effects if hasattr(e, "chain")] == [1, 2]


@pytest.mark.parametrize(("bound", "placed"), [(None, 4), (2, 2)])
def test_a_latency_task_bounds_the_tasks_of_its_engine_as_annotated(bound: int | None, placed: int) -> None:
    d = Driver("parrot_artifact", {"graph_group": True, "params": {"latency_tasks": bound}})
    d.engine()
    session = d.open()
    ask(d, session, "chat", criteria=Criteria.LATENCY)
    for i in range(3):
        ask(d, session, f"bulk{i}", criteria=Criteria.THROUGHPUT)
    assert len(d.dispatches) == placed
