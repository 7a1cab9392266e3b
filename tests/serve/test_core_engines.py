"""Engines come and go, tasks are placed again, contexts are shared, freed and forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from parrot.serve.effects import Dispatch, FreeContexts
from parrot.serve.engines import KEPT_LANES
from parrot.serve.pauses import FIRST_PAUSE_S, LONGEST_PAUSE_S, REOPEN_S
from tests.serve.driver import Driver, out, read, text, value


def fetched(d: Driver, session: int, *segments: ev.Segment) -> int:
    (x,) = d.outputs(d.submit(session, *segments))
    return d.get(session, x)


def tick(d: Driver) -> float:
    """Lets time pass to the next deadline, as a shell does; how long that was."""
    deadline = d.core.next_deadline()
    if deadline is None:
        return 0.0
    passed_s, d.now = deadline - d.now, deadline
    d.send(ev.Tick())
    return passed_s


def test_tasks_wait_for_an_engine_and_go_to_the_first_that_comes() -> None:
    d = Driver()
    session = d.open()
    request = fetched(d, session, text("t"), out("x"))
    assert d.dispatches == []
    d.engine()
    d.finish(d.dispatches[0], "done")
    assert d.payload(request) == "done"


def test_no_engine_within_the_wait_fails_the_task() -> None:
    d = Driver(scheduler={"engine_wait_timeout": 30.0})
    session = d.open()
    request = fetched(d, session, text("t"), out("x"))
    assert d.core.next_deadline() == 30.0
    d.send(ev.Tick(), at=30.0)
    assert d.error(request).code == "no_engine"


def test_the_wait_begins_again_when_the_last_engine_is_lost() -> None:
    d = Driver(scheduler={"engine_wait_timeout": 30.0})
    engine = d.engine()
    session = d.open()
    request = fetched(d, session, text("t"), out("x"))
    d.now = 20.0
    d.lose(engine)
    assert d.core.next_deadline() == 50.0
    d.now = 40.0
    d.engine("new")
    d.finish(d.dispatches[0], "done")
    assert d.payload(request) == "done"


def test_what_ran_on_a_lost_engine_is_placed_again_and_stale_results_are_dropped() -> None:
    d = Driver()
    one = d.engine("one")
    session = d.open()
    request = fetched(d, session, text("t"), out("x"))
    (old,) = d.dispatches
    d.start(old)
    d.first(old)
    d.lose(one)
    d.engine("two")
    (new,) = d.dispatches
    assert (new.task, new.attempt) == (old.task, 2)
    assert new.parent == -1
    assert d.finish(old, "stale") == []
    assert request not in d.replies
    d.finish(new, "fresh")
    assert d.payload(request) == "fresh"
    assert d.report(session).reports[0].tasks[0].attempts == 2


def test_attempts_are_bounded() -> None:
    d = Driver(scheduler={"max_attempts": 3})
    d.engine()
    session = d.open()
    request = fetched(d, session, text("t"), out("x"))
    for _ in range(3):
        assert request not in d.replies
        d.fail(d.dispatches[0], retryable=True)
        tick(d)
    assert d.error(request).code == "generation_failed"
    assert "attempt 3 of 3" in d.error(request).message


def test_an_engine_that_fails_a_task_gets_none_until_a_pause_is_over_and_others_take_the_work() -> None:
    d = Driver()
    bad = d.engine("bad")
    good = d.engine("good", tasks_capacity=1)
    session = d.open()
    first = fetched(d, session, text("a"), out("x"))
    assert d.dispatches[0].engine_id == bad
    d.fail(d.dispatches[0], retryable=True)
    assert d.core.engines[bad].state == "suspect"
    assert [(e.engine_id, e.attempt) for e in d.dispatches] == [(good, 2)]  # the least loaded one is not asked
    fetched(d, session, text("b"), out("x"))
    assert len(d.dispatches) == 1  # the other is full: this one waits
    assert tick(d) == FIRST_PAUSE_S
    assert d.core.engines[bad].state == "live"
    assert [e.engine_id for e in d.dispatches] == [good, bad]
    d.finish(d.dispatches[0], "done")
    assert d.payload(first) == "done"


def test_the_pause_doubles_with_each_failure_in_a_row_up_to_its_bound() -> None:
    d = Driver(scheduler={"max_attempts": 12})
    d.engine()
    fetched(d, d.open(), text("a"), out("x"))
    pauses = []
    while d.dispatches:
        d.fail(d.dispatches[0], retryable=True)
        before_s = d.now
        tick(d)
        pauses.append(round(d.now - before_s, 6))
    doubled = [min(FIRST_PAUSE_S * 2**n, LONGEST_PAUSE_S) for n in range(11)]
    assert pauses[:11] == [round(pause_s, 6) for pause_s in doubled]
    assert pauses[10] == LONGEST_PAUSE_S


def test_a_batch_that_dies_together_counts_once() -> None:
    d = Driver()
    engine = d.engine()
    session = d.open()
    for n in range(5):
        fetched(d, session, text(f"t{n}"), out("x"))
    batch = list(d.dispatches)
    for dispatch in batch[:3]:
        d.fail(dispatch, retryable=True)
    assert d.core.engines[engine].failures == 1
    assert tick(d) == FIRST_PAUSE_S
    late = [dispatch for dispatch in d.dispatches if dispatch in batch]
    assert len(late) == 2
    for dispatch in late:  # sent before the pause: nothing new, though it is over
        d.fail(dispatch, retryable=True)
    assert (d.core.engines[engine].failures, d.core.engines[engine].state) == (1, "live")
    d.fail(d.dispatches[0], retryable=True)
    assert (d.core.engines[engine].failures, d.core.engines[engine].state) == (2, "suspect")


def test_a_finished_task_ends_the_row() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    for n in range(3):
        fetched(d, session, text(f"t{n}"), out("x"))
        d.fail(d.dispatches[0], retryable=True)
        assert round(tick(d), 6) == FIRST_PAUSE_S
        d.finish(d.dispatches[0])


def test_final_failures_and_rejections_make_nobody_suspect() -> None:
    d = Driver()
    engine = d.engine()
    session = d.open()
    fetched(d, session, text("a"), out("x"))
    fetched(d, session, text("b"), out("x"))
    first, second = d.dispatches
    d.fail(first, retryable=False)
    d.dispatches.remove(second)
    d.send(ev.TaskRejected(second.epoch, second.task, second.attempt, "full"))
    assert (d.core.engines[engine].state, d.core.engines[engine].failures) == ("live", 0)


def test_a_suspect_engine_that_is_lost_is_forgotten() -> None:
    d = Driver()
    engine = d.engine()
    request = fetched(d, d.open(), text("a"), out("x"))
    d.fail(d.dispatches[0], retryable=True)
    d.lose(engine)
    assert d.core.next_deadline() == 120.0  # only the wait for another engine
    d.engine("next")
    d.finish(d.dispatches[0], "done")
    assert d.payload(request) == "done"


def test_contexts_of_a_failed_attempt_are_freed_on_the_suspect_engine() -> None:
    d = Driver()
    engine = d.engine()
    fetched(d, d.open(), text("a"), out("x"))
    (failed,) = d.dispatches
    effects = d.fail(failed, retryable=True)
    made = {failed.generate_context_id, *(link.context_id for link in failed.chain)}
    assert {i for e in effects if isinstance(e, FreeContexts) for i in e.context_ids} == made
    assert not d.core.engines[engine].contexts


def test_a_fault_at_a_deadline_costs_that_one_alone_and_no_deadline_stays_in_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    d = Driver(session_life_span=10.0)
    first, second = d.open(), d.open()
    end = d.core.requests.end_session

    def fails(session: Any, by: str, now: float) -> None:
        if session.id == first:
            raise RuntimeError("a bug")
        end(session, by, now)

    monkeypatch.setattr(d.core.requests, "end_session", fails)
    d.send(ev.Tick(), at=10.0)
    assert [str(fault.error) for fault in d.faults] == ["a bug"]
    assert d.error(d.ask(ev.DescribeSession, second, d.auths[second])).code == "session_expired"

    def always_fails(now: float) -> None:
        raise RuntimeError("another bug")

    monkeypatch.setattr(d.core.scheduler, "_ask_again", always_fails)
    get = d.get(first, d.variable(first), timeout=5.0)
    d.send(ev.Tick(), at=15.0)
    assert d.error(get).code == "timeout"
    monkeypatch.setattr(d.core.scheduler, "next_deadline", lambda: 0.0)  # and what it waits for stays
    d.send(ev.Tick(), at=16.0)
    assert d.core.next_deadline() == 17.0
    d.send(ev.CancelGet(1), at=16.5)
    assert d.core.next_deadline() == 17.0


def test_a_fault_at_placing_is_contained_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    d = Driver()
    d.engine()
    place = d.core.scheduler.place
    broken = True

    def fails(now: float) -> None:
        if broken:
            d.core.scheduler.changed = False
            raise RuntimeError("a bug")
        place(now)

    monkeypatch.setattr(d.core.scheduler, "place", fails)
    request = fetched(d, d.open(), text("a"), out("x"))
    assert [str(fault.error) for fault in d.faults] == ["a bug"]
    assert d.core.next_deadline() == 1.0
    d.send(ev.Tick(), at=1.0)
    assert len(d.faults) == 2
    assert d.core.next_deadline() == 2.0
    broken = False
    d.send(ev.Tick(), at=2.0)
    d.finish(d.dispatches[0], "done")
    assert d.payload(request) == "done"


def test_a_restart_costs_no_attempt() -> None:
    d = Driver(scheduler={"max_attempts": 1})
    d.engine()
    session = d.open()
    fetched(d, session, text("t"), out("x"))
    (old,) = d.dispatches
    d.dispatches.clear()
    d.send(ev.Restarted(1))
    d.engine()
    (new,) = d.dispatches
    assert (new.epoch, new.attempt) == (1, 2)
    assert d.finish(old, "of an earlier life") == []
    request = d.get(session, new.output_var)  # who asked before is gone
    d.finish(new, "done")
    assert d.payload(request) == "done"


def test_a_rejecting_engine_is_asked_again_only_after_its_capacity_has_changed() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    fetched(d, session, text("a"), out("x"))
    fetched(d, session, text("b"), out("x"))
    first, second = d.dispatches
    d.dispatches.remove(second)
    d.send(ev.TaskRejected(second.epoch, second.task, second.attempt, "full"))
    assert d.dispatches == [first]
    d.finish(first)
    (again,) = d.dispatches
    assert (again.task, again.attempt) == (second.task, 2)


def test_an_idle_engine_that_rejects_is_asked_again_a_little_later() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    fetched(d, session, text("a"), out("x"))
    (old,) = d.dispatches
    d.dispatches.clear()
    d.send(ev.TaskRejected(old.epoch, old.task, old.attempt, "full"))
    assert d.dispatches == []
    assert d.core.next_deadline() == REOPEN_S
    d.send(ev.Tick(), at=REOPEN_S)
    assert len(d.dispatches) == 1


def test_rejections_of_several_tasks_cost_each_one_attempt() -> None:
    """A rejection is no change of capacity: it lets nobody else try again."""
    d = Driver(scheduler={"max_attempts": 3})
    d.engine()
    session = d.open()
    gets = [fetched(d, session, text(f"p{n}"), out("x")) for n in range(10)]
    while d.dispatches:
        full = d.dispatches.pop(0)
        d.send(ev.TaskRejected(full.epoch, full.task, full.attempt, "full"))
    assert [task.attempts for call in d.report(session).reports for task in call.tasks] == [1] * 10
    d.send(ev.Tick(), at=REOPEN_S)
    for dispatch in list(d.dispatches):
        d.finish(dispatch)
    assert all(d.replies[get].error is None for get in gets)


def test_a_task_that_gives_up_its_place_in_the_queue_lets_the_next_one_run() -> None:
    d = Driver()
    d.engine(tokens_capacity=100)
    first, large, small = d.open(), d.open(), d.open()
    fetched(d, first, text("a", 10), out("x"))
    fetched(d, large, text("b", 90), out("x"))
    fetched(d, small, text("c", 10), out("x"))
    assert [dispatch.task.session_id for dispatch in d.dispatches] == [first]
    d.close(large)
    assert [dispatch.task.session_id for dispatch in d.dispatches] == [first, small]


def test_a_retried_tasks_times_are_those_of_its_last_attempt() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    fetched(d, session, text("a"), out("x"))
    d.now = 1.0
    d.start(d.dispatches[0])
    d.now = 2.0
    d.fail(d.dispatches[0], retryable=True)
    tick(d)
    again_s = d.now
    d.now = 3.0
    d.fail(d.dispatches[0])
    task = d.report(session).reports[0].tasks[0]
    assert (task.dispatched_s, task.started_s, task.finished_s) == (again_s, None, 3.0)
    assert again_s == 2.0 + FIRST_PAUSE_S


def test_a_prompt_too_long_for_every_engine_fails_at_once_and_names_the_numbers() -> None:
    d = Driver()
    d.engine(max_seq_len=50)
    session = d.open()
    request = fetched(d, session, text("long", 50), out("x"))
    assert d.error(request).code == "task_too_large"
    assert "50 tokens" in d.error(request).message
    d.engine("larger", max_seq_len=100)
    fetched(d, session, text("long", 50), out("x"))
    assert d.dispatches[0].engine_id == 2


def test_a_task_too_large_for_one_engine_goes_to_another() -> None:
    d = Driver()
    d.engine("small")
    d.engine("large", tokens_capacity=99)
    session = d.open()
    request = fetched(d, session, text("t"), out("x"))
    (dispatch,) = d.dispatches
    assert dispatch.engine_id == 1
    d.fail(dispatch, code="task_too_large")
    assert d.dispatches[0].engine_id == 2
    d.fail(d.dispatches[0], code="task_too_large")
    assert d.error(request).code == "task_too_large"


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


def test_capacity_bounds_what_an_engine_gets_and_one_task_alone_is_always_admitted() -> None:
    d = Driver()
    d.engine(tokens_capacity=60)
    session = d.open()
    for i in range(3):
        fetched(d, session, text(f"t{i}", 10), out("x"))
    assert len(d.dispatches) == 2  # 26 tokens each
    d.finish(d.dispatches[0])
    assert len(d.dispatches) == 2
    for dispatch in list(d.dispatches):
        d.finish(dispatch)
    fetched(d, session, text("huge", 500), out("x"))
    assert len(d.dispatches) == 1


def test_contexts_are_shared_along_a_common_prefix_and_reservations_count_only_what_is_new() -> None:
    d = Driver()
    engine = d.engine()
    session = d.open()
    fetched(d, session, text("system", 100), value("q", "one", 5), out("x"))
    (a,) = d.dispatches
    assert d.core.engines[engine].reserved == 121
    fetched(d, session, text("system", 100), value("q", "two", 5), out("x"))
    b = d.dispatches[1]
    assert d.core.engines[engine].reserved == 121 + 21
    assert a.chain[0].context_id == b.chain[0].context_id
    assert a.chain[1].context_id != b.chain[1].context_id
    assert b.parent == -1  # being filled by the other, not known to be complete
    d.first(a)
    fetched(d, session, text("system", 100), value("q", "one", 5), out("x"))
    c = d.dispatches[2]
    assert c.parent == a.chain[1].context_id
    assert c.cached_links == 2


def test_leading_constants_are_shared_across_sessions_and_nothing_else_is() -> None:
    d = Driver()
    d.engine()
    one, two, three = d.open(), d.open(), d.open()
    for session in (one, two):
        fetched(d, session, text("system"), text("more"), out("x"))
    (x,) = d.outputs(d.submit(three, text("system"), out("x"), cache_prefix=False))
    d.get(three, x)
    a, b, c = d.dispatches
    assert a.chain[0].context_id == b.chain[0].context_id
    assert a.chain[1].context_id != b.chain[1].context_id
    assert c.chain[0].context_id not in {a.chain[0].context_id, b.chain[0].context_id}


def test_a_value_behind_an_empty_constant_is_no_leading_constant() -> None:
    d = Driver()
    d.engine()
    for _ in range(2):
        fetched(d, d.open(), text("blank", 0), value("v", "secret", 30), out("x"))
    one, other = d.dispatches
    assert one.chain[0].context_id != other.chain[0].context_id


def test_sessions_of_one_tenant_share_contexts() -> None:
    d = Driver()
    d.engine()
    for tenant in ("t", "t", "other"):
        fetched(d, d.open(tenant=tenant), text("system"), value("v", "same"), out("x"))
    a, b, c = d.dispatches
    assert a.chain[1].context_id == b.chain[1].context_id
    assert c.chain[1].context_id != a.chain[1].context_id


def test_a_sessions_contexts_are_freed_with_it_and_the_shared_head_outlives_it_for_its_lifetime() -> None:
    d = Driver(constant_prefix_var_timeout=50.0)
    engine = d.engine()
    session = d.open()
    fetched(d, session, text("system"), value("v", "mine"), out("x"))
    (dispatch,) = d.dispatches
    d.finish(dispatch)
    head, own = (link.context_id for link in dispatch.chain)
    d.now = 10.0
    before = len(d.effects)
    d.close(session)
    freed = [e for e in d.effects[before:] if isinstance(e, FreeContexts)]
    assert [(e.engine_id, set(e.context_ids)) for e in freed] == [(engine, {own, dispatch.generate_context_id})]
    assert d.core.next_deadline() == 50.0
    assert d.send(ev.Tick(), at=50.0) == [FreeContexts(engine, (head,))]
    assert d.core.engines[engine].contexts == {}


def test_an_evicted_context_is_computed_again() -> None:
    d = Driver()
    engine = d.engine()
    session = d.open()
    fetched(d, session, text("system"), out("x"))
    (a,) = d.dispatches
    d.finish(a)
    d.send(ev.ContextsEvicted(engine, (a.chain[0].context_id,)))
    fetched(d, session, text("system"), out("x"))
    (b,) = d.dispatches
    assert b.parent == -1
    assert b.chain[0].context_id != a.chain[0].context_id


def test_an_equal_output_on_the_same_prefix_is_freed_as_a_duplicate() -> None:
    d = Driver()
    engine = d.engine()
    session = d.open()
    for _ in range(2):
        fetched(d, session, text("t"), out("x"))
    a, b = d.dispatches
    d.finish(a, "same")
    assert d.finish(b, "same")[-1] == FreeContexts(engine, (b.generate_context_id,))


def test_a_bos_counts_once_at_the_head() -> None:
    d = Driver()
    engine = d.engine(bos_tokens=1)
    session = d.open()
    fetched(d, session, text("a", 10), value("v", "b", 10), out("x"))
    assert [link.tokens for link in d.dispatches[0].chain] == [11, 10]
    assert d.core.engines[engine].reserved == 21 + 16


def test_lengths_of_a_tokenizer_that_comes_later_are_taken_from_its_registration() -> None:
    d = Driver()
    session = d.open()
    var = d.variable(session)
    d.set(session, var, "given", 10)
    fetched(d, session, text("a", 10), read("v", var), out("x"))
    description = {"engine_name": "e", "model": "m", "tokenizer": "other", "host": "h", "port": 1, "engine_type": "builtin"}
    from parrot.protocol.engine import EngineDescription

    engine = EngineDescription(**description, tasks_capacity=1, tokens_capacity=1000, max_seq_len=1000)
    d.ask(ev.RegisterEngine, engine, {"given": 3, "a": 4})
    assert [link.tokens for link in d.dispatches[0].chain] == [4, 3]


def test_the_same_events_give_the_same_effects() -> None:
    def run() -> list[object]:
        d = Driver("parrot", {"app_fifo": True, "graph_group": True, "ctx_group": True, "ctx_aware": True})
        for name in ("a", "b", "c"):
            d.engine(name, tasks_capacity=2)
        for _ in range(5):
            session = d.open()
            maps = [d.outputs(d.submit(session, text("map"), value("c", f"c{i}"), out("s")))[0] for i in range(4)]
            reads = [read(f"s{i}", v) for i, v in enumerate(maps)]
            fetched(d, session, text("reduce"), *reads, out("f"))
        while d.dispatches:
            d.now += 1.0
            d.finish(d.dispatches[0])
        return d.effects

    first = run()
    assert any(isinstance(e, Dispatch) for e in first)
    assert first == run()
