"""What an engine has room for, by the core's books, and what is too large for it."""

from __future__ import annotations

from tests.serve.driver import Driver, out, text


def test_capacity_bounds_what_an_engine_gets_and_one_task_alone_is_always_admitted() -> None:
    d = Driver()
    d.engine(tokens_capacity=60)
    session = d.open()
    for i in range(3):
        d.fetched(session, text(f"t{i}", 10), out("x"))
    assert len(d.dispatches) == 2  # 26 tokens each
    d.finish(d.dispatches[0])
    assert len(d.dispatches) == 2
    for dispatch in list(d.dispatches):
        d.finish(dispatch)
    d.fetched(session, text("huge", 500), out("x"))
    assert len(d.dispatches) == 1


def test_a_task_that_gives_up_its_place_in_the_queue_lets_the_next_one_run() -> None:
    d = Driver()
    d.engine(tokens_capacity=100)
    first, large, small = d.open(), d.open(), d.open()
    d.fetched(first, text("a", 10), out("x"))
    d.fetched(large, text("b", 90), out("x"))
    d.fetched(small, text("c", 10), out("x"))
    assert [dispatch.task.session_id for dispatch in d.dispatches] == [first]
    d.close(large)
    assert [dispatch.task.session_id for dispatch in d.dispatches] == [first, small]


def test_a_prompt_too_long_for_every_engine_fails_at_once_and_names_the_numbers() -> None:
    d = Driver()
    d.engine(max_seq_len=50)
    session = d.open()
    request = d.fetched(session, text("long", 50), out("x"))
    assert d.error(request).code == "task_too_large"
    assert "50 tokens" in d.error(request).message
    d.engine("larger", max_seq_len=100)
    d.fetched(session, text("long", 50), out("x"))
    assert d.dispatches[0].engine_id == 2


def test_a_task_too_large_for_one_engine_goes_to_another() -> None:
    d = Driver()
    d.engine("small")
    d.engine("large", tokens_capacity=99)
    session = d.open()
    request = d.fetched(session, text("t"), out("x"))
    (dispatch,) = d.dispatches
    assert dispatch.engine_id == 1
    d.fail(dispatch, code="task_too_large")
    assert d.dispatches[0].engine_id == 2
    d.fail(d.dispatches[0], code="task_too_large")
    assert d.error(request).code == "task_too_large"
