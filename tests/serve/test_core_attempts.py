"""Attempts that come to nothing: on an engine that is lost, fails, or has no room after all; and how the engine fares."""

from __future__ import annotations

from parrot.serve import events as ev
from parrot.serve.effects import FreeContexts
from parrot.serve.pauses import FIRST_PAUSE_S, LONGEST_PAUSE_S, REOPEN_S
from tests.serve.driver import Driver, out, text


def test_what_ran_on_a_lost_engine_is_placed_again_and_stale_results_are_dropped() -> None:
    d = Driver()
    one = d.engine("one")
    session = d.open()
    request = d.fetched(session, text("t"), out("x"))
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
    request = d.fetched(session, text("t"), out("x"))
    for _ in range(3):
        assert request not in d.replies
        d.fail(d.dispatches[0], retryable=True)
        d.tick()
    assert d.error(request).code == "generation_failed"
    assert "attempt 3 of 3" in d.error(request).message


def test_a_restart_costs_no_attempt() -> None:
    d = Driver(scheduler={"max_attempts": 1})
    d.engine()
    session = d.open()
    d.fetched(session, text("t"), out("x"))
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


def test_a_retried_tasks_times_are_those_of_its_last_attempt() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    d.fetched(session, text("a"), out("x"))
    d.now = 1.0
    d.start(d.dispatches[0])
    d.now = 2.0
    d.fail(d.dispatches[0], retryable=True)
    d.tick()
    again_s = d.now
    d.now = 3.0
    d.fail(d.dispatches[0])
    task = d.report(session).reports[0].tasks[0]
    assert (task.dispatched_s, task.started_s, task.finished_s) == (again_s, None, 3.0)
    assert again_s == 2.0 + FIRST_PAUSE_S


def test_contexts_of_a_failed_attempt_are_freed_on_the_suspect_engine() -> None:
    d = Driver()
    engine = d.engine()
    d.fetched(d.open(), text("a"), out("x"))
    (failed,) = d.dispatches
    effects = d.fail(failed, retryable=True)
    made = {failed.generate_context_id, *(link.context_id for link in failed.chain)}
    assert {i for e in effects if isinstance(e, FreeContexts) for i in e.context_ids} == made
    assert not d.core.engines[engine].contexts


def test_an_engine_that_fails_a_task_gets_none_until_a_pause_is_over_and_others_take_the_work() -> None:
    d = Driver()
    bad = d.engine("bad")
    good = d.engine("good", tasks_capacity=1)
    session = d.open()
    first = d.fetched(session, text("a"), out("x"))
    assert d.dispatches[0].engine_id == bad
    d.fail(d.dispatches[0], retryable=True)
    assert d.core.engines[bad].state == "suspect"
    assert [(e.engine_id, e.attempt) for e in d.dispatches] == [(good, 2)]  # the least loaded one is not asked
    d.fetched(session, text("b"), out("x"))
    assert len(d.dispatches) == 1  # the other is full: this one waits
    assert d.tick() == FIRST_PAUSE_S
    assert d.core.engines[bad].state == "live"
    assert [e.engine_id for e in d.dispatches] == [good, bad]
    d.finish(d.dispatches[0], "done")
    assert d.payload(first) == "done"


def test_the_pause_doubles_with_each_failure_in_a_row_up_to_its_bound() -> None:
    d = Driver(scheduler={"max_attempts": 12})
    d.engine()
    d.fetched(d.open(), text("a"), out("x"))
    pauses = []
    while d.dispatches:
        d.fail(d.dispatches[0], retryable=True)
        before_s = d.now
        d.tick()
        pauses.append(round(d.now - before_s, 6))
    doubled = [min(FIRST_PAUSE_S * 2**n, LONGEST_PAUSE_S) for n in range(11)]
    assert pauses[:11] == [round(pause_s, 6) for pause_s in doubled]
    assert pauses[10] == LONGEST_PAUSE_S


def test_a_batch_that_dies_together_counts_once() -> None:
    d = Driver()
    engine = d.engine()
    session = d.open()
    for n in range(5):
        d.fetched(session, text(f"t{n}"), out("x"))
    batch = list(d.dispatches)
    for dispatch in batch[:3]:
        d.fail(dispatch, retryable=True)
    assert d.core.engines[engine].failures == 1
    assert d.tick() == FIRST_PAUSE_S
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
        d.fetched(session, text(f"t{n}"), out("x"))
        d.fail(d.dispatches[0], retryable=True)
        assert round(d.tick(), 6) == FIRST_PAUSE_S
        d.finish(d.dispatches[0])


def test_final_failures_and_rejections_make_nobody_suspect() -> None:
    d = Driver()
    engine = d.engine()
    session = d.open()
    d.fetched(session, text("a"), out("x"))
    d.fetched(session, text("b"), out("x"))
    first, second = d.dispatches
    d.fail(first, retryable=False)
    d.dispatches.remove(second)
    d.send(ev.TaskRejected(second.epoch, second.task, second.attempt, "full"))
    assert (d.core.engines[engine].state, d.core.engines[engine].failures) == ("live", 0)


def test_a_suspect_engine_that_is_lost_is_forgotten() -> None:
    d = Driver()
    engine = d.engine()
    request = d.fetched(d.open(), text("a"), out("x"))
    d.fail(d.dispatches[0], retryable=True)
    d.lose(engine)
    assert d.core.next_deadline() == 120.0  # only the wait for another engine
    d.engine("next")
    d.finish(d.dispatches[0], "done")
    assert d.payload(request) == "done"


def test_a_rejecting_engine_is_asked_again_only_after_its_capacity_has_changed() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    d.fetched(session, text("a"), out("x"))
    d.fetched(session, text("b"), out("x"))
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
    d.fetched(session, text("a"), out("x"))
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
    gets = [d.fetched(session, text(f"p{n}"), out("x")) for n in range(10)]
    while d.dispatches:
        full = d.dispatches.pop(0)
        d.send(ev.TaskRejected(full.epoch, full.task, full.attempt, "full"))
    assert [task.attempts for call in d.report(session).reports for task in call.tasks] == [1] * 10
    d.send(ev.Tick(), at=REOPEN_S)
    for dispatch in list(d.dispatches):
        d.finish(dispatch)
    assert all(d.replies[get].error is None for get in gets)
