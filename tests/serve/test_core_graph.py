"""Calls, variables and what a get makes of the graph: activation, order, criteria, depth, task groups."""

from __future__ import annotations

import pytest

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from parrot.serve.effects import Abort, FreeContexts, SessionEnded
from tests.serve.driver import Driver, out, read, text, value


def test_a_call_runs_only_when_its_output_is_fetched() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    (var,) = d.outputs(d.submit(session, text("hello"), out("x")))
    assert d.dispatches == []
    request = d.get(session, var)
    (dispatch,) = d.dispatches
    assert request not in d.replies
    d.finish(dispatch, "world")
    assert d.payload(request) == "world"


def test_output_criteria_activates_at_submission() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    d.submit(session, text("hello"), out("x"), output_criteria=Criteria.LATENCY)
    assert len(d.dispatches) == 1
    assert d.report(session).reports[0].tasks[0].criteria == "latency"


def test_a_get_may_come_before_the_producer() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    var = d.variable(session, "later")
    request = d.get(session, var)
    d.submit(session, text("hello"), out("x", var))
    d.finish(d.dispatches[0], "there")
    assert d.payload(request) == "there"


def test_a_get_may_come_before_a_set() -> None:
    d = Driver()
    session = d.open()
    var = d.variable(session)
    request = d.get(session, var)
    d.set(session, var, "given")
    assert d.payload(request) == "given"


def test_ancestors_run_before_what_needs_them_and_nothing_else_runs() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    (a,) = d.outputs(d.submit(session, text("A"), out("a")))
    (b,) = d.outputs(d.submit(session, text("B"), read("a", a), out("b")))
    d.submit(session, text("unwanted"), out("c"))
    request = d.get(session, b)
    assert [x.output_var for x in d.dispatches] == [a]
    d.finish(d.dispatches[0], "a-text")
    assert [x.output_var for x in d.dispatches] == [b]
    assert d.dispatches[0].chain[1].keys == ("a-text",)
    d.finish(d.dispatches[0], "b-text")
    assert d.payload(request) == "b-text"
    assert d.dispatches == []


def test_map_reduce_makes_one_task_group_and_depths() -> None:
    d = Driver()
    d.engine(tasks_capacity=2)
    session = d.open()
    maps = [d.outputs(d.submit(session, text("map"), value("chunk", f"c{i}"), out("s")))[0] for i in range(4)]
    inputs = [read(f"s{i}", v) for i, v in enumerate(maps)]
    (final,) = d.outputs(d.submit(session, text("reduce"), *inputs, out("final")))
    d.get(session, final, Criteria.LATENCY)
    tasks = [call.tasks[0] for call in d.core.sessions[session].calls]
    groups = {task.group for task in tasks[:4]}
    assert len(groups) == 1
    assert None not in groups
    assert tasks[4].group is None
    assert [task.depth for task in tasks] == [1, 1, 1, 1, 0]
    assert all(task.criteria is Criteria.LATENCY for task in tasks)
    assert [task.latency_sensitive for task in tasks] == [False] * 4 + [True]


def test_a_task_group_forms_however_late_its_members_come() -> None:
    d = Driver()
    d.engine(tasks_capacity=1)
    session = d.open()
    one, two, final = d.variable(session), d.variable(session), d.variable(session)
    d.get(session, final, Criteria.LATENCY)
    d.submit(session, text("reduce"), read("a", one), read("b", two), out("f", final))
    d.submit(session, text("m1"), out("a", one))
    d.submit(session, text("m2"), out("b", two))
    tasks = [call.tasks[0] for call in d.core.sessions[session].calls]
    assert tasks[1].group is not None
    assert tasks[1].group is tasks[2].group


def test_a_later_get_tightens_and_never_loosens() -> None:
    d = Driver()
    session = d.open()
    (a,) = d.outputs(d.submit(session, text("A"), out("a")))
    (b,) = d.outputs(d.submit(session, text("B"), read("a", a), out("b")))
    tasks = [call.tasks[0] for call in d.core.sessions[session].calls]
    d.get(session, b, Criteria.THROUGHPUT)
    assert [t.criteria for t in tasks] == [Criteria.THROUGHPUT, Criteria.THROUGHPUT]
    d.get(session, b, Criteria.LATENCY)
    assert [t.criteria for t in tasks] == [Criteria.LATENCY, Criteria.LATENCY]
    d.get(session, b)
    assert [t.criteria for t in tasks] == [Criteria.LATENCY, Criteria.LATENCY]


def test_ttft_and_tpot_name_the_fetched_output_and_together_make_latency() -> None:
    d = Driver()
    session = d.open()
    (a,) = d.outputs(d.submit(session, text("A"), out("a")))
    d.get(session, a, Criteria.TTFT)
    task = d.core.sessions[session].calls[0].tasks[0]
    assert task.criteria is Criteria.TTFT
    d.get(session, a, Criteria.TPOT)
    assert task.criteria is Criteria.LATENCY


def test_several_outputs_in_one_call_run_in_turn_and_continue_the_context() -> None:
    d = Driver()
    engine = d.engine()
    session = d.open()
    answer = d.submit(session, text("one"), out("a"), text("two"), out("b"))
    a, b = d.outputs(answer)
    request = d.get(session, b)
    (first,) = d.dispatches
    assert first.output_var == a
    d.finish(first, "A!", tokens=7)
    (second,) = d.dispatches
    assert [link.keys for link in second.chain] == [("one",), ("A!",), ("two",)]
    assert [link.output for link in second.chain] == [False, True, False]
    assert second.engine_id == engine
    assert second.chain[1].context_id == first.generate_context_id
    assert second.parent == first.generate_context_id
    assert second.chain[1].tokens == 7
    d.finish(second, "B!")
    assert d.payload(request) == "B!"


def test_param_info_has_every_placeholder_in_template_order() -> None:
    d = Driver()
    session = d.open()
    answer = d.submit(session, text("t"), value("x", "v"), text("u"), value("x", "v"), out("y"), func_name="f")
    assert [i.parameter_name for i in answer.param_info] == ["x", "x", "y"]
    assert answer.param_info[0].var_id == answer.param_info[1].var_id
    assert [i.is_output for i in answer.param_info] == [False, False, True]
    assert answer.request_id == 0
    assert d.submit(session, text("t"), out("z")).request_id == 1


def test_a_failed_producer_answers_its_getters_and_fails_what_reads_it() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    (a,) = d.outputs(d.submit(session, text("A"), out("a")))
    (b,) = d.outputs(d.submit(session, text("B"), read("a", a), out("b")))
    on_a, on_b = d.get(session, a), d.get(session, b)
    d.fail(d.dispatches[0])
    assert d.error(on_a).code == "generation_failed"
    assert d.error(on_b).code == "input_failed"
    assert d.error(on_b).details["cause"] == "generation_failed"
    late = d.get(session, b)
    assert d.error(late).code == "input_failed"
    (c,) = d.outputs(d.submit(session, text("C"), read("b", b), out("c")))
    assert d.error(d.get(session, c)).details["variable"] == a
    assert d.core.counts()["failed"] == 3


def test_a_cycle_is_refused_and_changes_nothing() -> None:
    d = Driver()
    session = d.open()
    x, y = d.variable(session, "x"), d.variable(session, "y")
    d.submit(session, text("A"), read("x", x), out("y", y))
    request = d.ask(ev.SubmitCall, session, d.auths[session], (text("B"), read("y", y), out("x", x)))
    assert d.error(request).code == "cyclic_dependency"
    assert "own output 'x' (variable 'v0'): its input 'y' (variable 'v1') is computed from it" in d.error(request).message
    itself = d.ask(ev.SubmitCall, session, d.auths[session], (text("B"), read("x", x), out("x", x)))
    assert d.error(itself).code == "cyclic_dependency"
    assert "own output 'x' (variable 'v0'): its input 'x' is that variable; the output needs another" in d.error(itself).message
    assert len(d.report(session).reports) == 1
    d.set(session, x, "still settable")


def test_a_call_may_read_what_it_has_written_before_and_what_follows_from_it() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    draft, review = d.variable(session), d.variable(session)
    d.submit(session, text("review"), read("draft", draft), out("review", review))
    own = (text("A"), out("draft", draft), read("draft2", draft), read("review", review), out("final"))
    final = d.outputs(d.submit(session, *own))[-1]
    get = d.get(session, final)
    while d.dispatches:
        d.finish(d.dispatches[0])
    assert d.replies[get].error is None


def test_a_call_may_not_read_what_it_writes_later_not_even_by_way_of_another() -> None:
    d = Driver()
    session = d.open()
    x, y = d.variable(session), d.variable(session)
    d.submit(session, text("A"), read("x", x), out("y", y))
    for reads in (x, y):
        segments = (text("B"), out("o"), read("in", reads), out("x", x))
        assert d.error(d.ask(ev.SubmitCall, session, d.auths[session], segments)).code == "cyclic_dependency"


def test_a_failure_passes_down_a_chain_of_any_length() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    (last,) = d.outputs(d.submit(session, text("A"), out("x")))
    for _ in range(1500):
        (last,) = d.outputs(d.submit(session, text("A"), read("x", last), out("x")))
    get = d.get(session, last)
    d.fail(d.dispatches[0])
    assert d.faults == []
    error = d.error(get)
    assert error.code == "input_failed"
    assert error.details == {"cause": "generation_failed", "variable": "v0"}
    assert len(error.message) < 200
    assert d.core.counts()["failed"] == 1501


def test_the_longest_way_to_the_fetched_output_is_its_depth_in_whatever_order_inputs_are_read() -> None:
    """Quick also where there are exponentially many ways."""
    for order in (1, -1):
        d = Driver()
        session = d.open()
        made: list[str] = []
        for n in range(120):
            inputs = [read(f"x{var}", var) for var in made][::order]
            made += d.outputs(d.submit(session, text("A"), *inputs, out(f"y{n}")))
        d.get(session, made[-1])
        assert [call.tasks[0].depth for call in d.report(session).reports] == list(range(119, -1, -1))


@pytest.mark.parametrize("segments", [(text("no output"),), (out("first"),)])
def test_a_call_without_text_before_an_output_is_refused(segments: tuple[ev.Segment, ...]) -> None:
    d = Driver()
    session = d.open()
    assert d.error(d.ask(ev.SubmitCall, session, d.auths[session], segments)).code == "bad_template"


def test_a_second_set_or_producer_is_a_conflict() -> None:
    d = Driver()
    session = d.open()
    var = d.variable(session)
    d.payload(d.set(session, var, "one"))
    assert d.error(d.set(session, var, "two")).code == "conflict"
    assert d.error(d.ask(ev.SubmitCall, session, d.auths[session], (text("A"), out("x", var)))).code == "conflict"
    (a,) = d.outputs(d.submit(session, text("A"), out("a")))
    assert d.error(d.set(session, a, "mine")).code == "conflict"
    assert d.error(d.ask(ev.SubmitCall, session, d.auths[session], (text("A"), out("x", a)))).code == "conflict"


def test_closing_a_session_aborts_its_work_and_answers_its_gets() -> None:
    d = Driver()
    engine = d.engine(tasks_capacity=1)
    session = d.open()
    outputs = [d.outputs(d.submit(session, text(f"t{i}"), out("x")))[0] for i in range(3)]
    gets = [d.get(session, var) for var in outputs]
    (running,) = d.dispatches
    d.start(running)
    before = len(d.effects)
    d.payload(d.close(session))
    effects = d.effects[before:]
    assert [e.attempt for e in effects if isinstance(e, Abort)] == [1]
    assert [e.session_id for e in effects if isinstance(e, SessionEnded)] == [session]
    assert {e.engine_id for e in effects if isinstance(e, FreeContexts)} == {engine}
    assert {d.error(g).code for g in gets} == {"session_closed"}
    assert d.finish(running) == []  # what comes too late is dropped
    assert d.core.counts() == {"sessions": 0, "gets": 0, "queue": 0}
    assert d.core.engines[engine].reserved == 0
    assert d.error(d.get(session, outputs[0])).code == "session_closed"


def test_fused_fills_share_one_context() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    segments = (text("a", 3), value("v", "b", 4), text("c", 5), out("x"), text("d", 6), out("y"))
    _, y = d.outputs(d.submit(session, *segments, fuse_fill=True))
    d.get(session, y)
    (first,) = d.dispatches
    assert [(link.keys, link.tokens) for link in first.chain] == [(("a", "b", "c"), 12)]
    d.finish(first, "X", tokens=2)
    (second,) = d.dispatches
    assert [link.keys for link in second.chain] == [("a", "b", "c"), ("X",), ("d",)]


def test_an_empty_input_makes_no_context_and_an_empty_prompt_fails() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    (x,) = d.outputs(d.submit(session, text("a"), value("v", "empty", 0), out("x")))
    d.get(session, x)
    assert [link.keys for link in d.dispatches[0].chain] == [("a",)]
    (y,) = d.outputs(d.submit(session, value("v", "empty", 0), out("y")))
    assert d.error(d.get(session, y)).code == "bad_template"
