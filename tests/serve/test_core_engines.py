"""Engines come and go, and take the tasks that are meant for them; tasks wait for an engine, and not for ever."""

from __future__ import annotations

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from parrot.serve.engines import KEPT_LANES
from tests.serve.driver import Driver, described, out, read, text


def test_tasks_wait_for_an_engine_and_go_to_the_first_that_comes() -> None:
    d = Driver()
    session = d.open()
    request = d.fetched(session, text("t"), out("x"))
    assert d.dispatches == []
    d.engine()
    d.finish(d.dispatches[0], "done")
    assert d.payload(request) == "done"


def test_no_engine_within_the_wait_fails_the_task() -> None:
    d = Driver(scheduler={"engine_wait_timeout": 30.0})
    session = d.open()
    request = d.fetched(session, text("t"), out("x"))
    assert d.core.next_deadline() == 30.0
    d.send(ev.Tick(), at=30.0)
    assert d.error(request).code == "no_engine"


def test_the_wait_begins_again_when_the_last_engine_is_lost() -> None:
    d = Driver(scheduler={"engine_wait_timeout": 30.0})
    engine = d.engine()
    session = d.open()
    request = d.fetched(session, text("t"), out("x"))
    d.now = 20.0
    d.lose(engine)
    assert d.core.next_deadline() == 50.0
    d.now = 40.0
    d.engine("new")
    d.finish(d.dispatches[0], "done")
    assert d.payload(request) == "done"


def test_the_number_of_engines_is_bounded() -> None:
    d = Driver(max_engines_num=1)
    d.engine()
    engine = next(iter(d.core.engines.values()))
    assert d.error(d.ask(ev.RegisterEngine, engine.description)).code == "too_many_engines"


def test_models_and_model_types_route_among_engines() -> None:
    d = Driver()
    d.engine("a", model="A")
    d.engine("b", model="B")
    d.engine("remote", model="B", engine_type="openai")
    session = d.open()
    for fields, expected in (({"models": ("A",)}, 1), ({"models": ("B",)}, 2), ({"models": ("B",), "model_type": "text"}, 3)):
        (x,) = d.outputs(d.submit(session, text("t"), out("x"), output_criteria=Criteria.LATENCY, **fields))
        assert [e.engine_id for e in d.dispatches if e.output_var == x] == [expected]
    assert [m.model_name for m in d.core.models()] == ["A", "B"]


def test_model_lists_that_nobody_asks_for_any_more_are_forgotten() -> None:
    """Clients may name what they like; each list costs something at every change of an engine's load."""
    d = Driver("round_robin")
    d.engine(model="m")

    def one_call(models: tuple[str, ...]) -> None:
        session = d.open()
        (x,) = d.outputs(d.submit(session, text("a"), out("x"), models=models))
        get = d.get(session, x)
        d.finish(d.dispatches[0])
        d.payload(get)
        d.close(session)

    kept = d.open()
    (waiting,) = d.outputs(d.submit(kept, text("a"), out("x"), models=("later",)))
    get = d.get(kept, waiting)
    for n in range(5 * KEPT_LANES):
        one_call(("m", f"other{n}"))
    assert len(d.core.scheduler.engines.lanes) <= KEPT_LANES + 1
    one_call(("m", "other0"))
    d.engine(model="later")
    d.finish(d.dispatches[0])
    d.payload(get)


def test_lengths_of_a_tokenizer_that_comes_later_are_taken_from_its_registration() -> None:
    d = Driver()
    session = d.open()
    var = d.variable(session)
    d.set(session, var, "given", 10)
    d.fetched(session, text("a", 10), read("v", var), out("x"))
    d.ask(ev.RegisterEngine, described(tokenizer="other"), {"given": 3, "a": 4})
    assert [link.tokens for link in d.dispatches[0].chain] == [4, 3]
