"""Limits a minute: calls and tokens of a tenant, when they come back, and what ends give back."""

from __future__ import annotations

import pytest

from parrot.serve import events as ev
from parrot.serve.config import TenantConfig
from parrot.serve.rates import Allowance
from tests.serve.driver import Driver, content, out, text


def rated(**limits: int) -> Driver:
    d = Driver(tenants={"a": TenantConfig(**limits)})
    d.engine()
    return d


def submit(d: Driver, session: int, tokens: int = 10, most: int = 10, key: str | None = None) -> str:
    (var,) = d.outputs(d.submit(session, text(f"p{d.request}", tokens), out("x", max_gen_length=most), idempotency_key=key))
    d.get(session, var)
    return var


def refused(d: Driver, session: int) -> int:
    """Seconds after which the call that is refused now may come again."""
    error = d.error(d.ask(ev.SubmitCall, session, d.auths[session], (text("t"), out("x"))))
    assert error.code == "rate_limited", error
    return int(error.details["retry_after_s"])


def test_calls_above_the_limit_a_minute_are_refused_until_there_is_one_again() -> None:
    d = rated(requests_per_minute=3)
    a, b = d.open(1, "a"), d.open(2, "b")
    for _ in range(3):
        submit(d, a)
    assert refused(d, a) == 20
    submit(d, b)  # another tenant
    d.now = 19.9
    assert refused(d, a) == 1
    d.now = 20.0
    submit(d, a)
    assert refused(d, a) == 20
    d.now = 500.0  # no more than a minute's worth is saved up
    for _ in range(3):
        submit(d, a)
    refused(d, a)


def test_the_limit_is_the_tenant_s_whatever_its_sessions() -> None:
    d = rated(requests_per_minute=2)
    for number in (1, 2):
        session = d.open(number, "a")
        submit(d, session)
        d.close(session)
    assert refused(d, d.open(3, "a")) == 30


def test_a_repeated_request_is_answered_and_not_counted() -> None:
    d = rated(requests_per_minute=1)
    a = d.open(1, "a")
    first = d.submit(a, text("t"), out("x"), idempotency_key="k")
    assert d.submit(a, text("t"), out("x"), idempotency_key="k") == first
    refused(d, a)


def test_a_call_that_is_refused_for_its_form_counts_for_nothing() -> None:
    d = rated(requests_per_minute=1)
    a = d.open(1, "a")
    assert d.error(d.ask(ev.SubmitCall, a, d.auths[a], (text("t"), out("x", var_id="v9")))).code == "not_found"
    submit(d, a)


def test_tokens_count_as_the_prompt_and_all_that_may_come_until_it_is_known_what_came() -> None:
    d = rated(tokens_per_minute=600)  # ten a second
    a = d.open(1, "a")
    submit(d, a, tokens=300, most=400)
    assert refused(d, a) == 11  # 100 too many, and one that is there
    (dispatch,) = d.dispatches
    done = ev.TaskFinished(dispatch.epoch, dispatch.task, 1, content("o", 50), 50, 300)
    d.send(done)
    submit(d, a, tokens=100, most=150)  # 250 were left
    refused(d, a)


def test_a_task_that_fails_gives_its_tokens_back_and_one_that_is_cancelled_while_it_runs_does_not() -> None:
    d = rated(tokens_per_minute=600)
    a = d.open(1, "a")
    submit(d, a, tokens=300, most=400)
    refused(d, a)
    d.fail(d.dispatches[0])
    submit(d, a, tokens=300, most=400)
    d.start(d.dispatches[0])
    d.close(a)
    assert refused(d, d.open(2, "a")) == 11


def test_a_task_that_is_cancelled_before_it_runs_gives_its_tokens_back() -> None:
    d = Driver(tenants={"a": TenantConfig(tokens_per_minute=600)})  # no engine
    a = d.open(1, "a")
    submit(d, a, tokens=300, most=400)
    refused(d, a)
    d.close(a)
    submit(d, d.open(2, "a"))


def test_a_task_that_is_placed_again_is_charged_once() -> None:
    d = rated(tokens_per_minute=1000)
    a = d.open(1, "a")
    submit(d, a, tokens=300, most=300)
    d.fail(d.dispatches[0], retryable=True, code="engine_failed")
    d.now += 120.0
    d.send(ev.Tick())
    submit(d, a, tokens=300, most=300)
    assert d.core.scheduler.tenants.of("a").minute.tokens.left(d.now) == 400.0  # type: ignore[union-attr]


def test_a_call_whose_inputs_are_not_ready_costs_no_tokens_yet() -> None:
    d = rated(tokens_per_minute=100)
    a = d.open(1, "a")
    (x,) = d.outputs(d.submit(a, text("t", 20), out("x", max_gen_length=70)))
    (y,) = d.outputs(d.submit(a, text("u"), ev.Input("x", var_id=x), out("y", max_gen_length=5000)))
    d.get(a, y)
    submit(d, a, 1, 1)
    d.finish(d.dispatches[0])
    refused(d, a)  # now it is ready


def test_minutes_of_tenants_that_nobody_has_named_are_forgotten_once_they_are_whole() -> None:
    d = Driver(tenants={"*": TenantConfig(requests_per_minute=6)}, max_sessions_num=10)
    for number in range(3000):
        d.now += 0.1
        session = d.open(number + 1, f"t{number}")
        submit(d, session)
        d.close(session)
    assert len(d.core.scheduler.tenants._minutes) < 2100
    refused_one = d.open(9999, "t2999")
    for _ in range(5):
        submit(d, refused_one)
    refused(d, refused_one)


def test_an_earlier_life_s_calls_do_not_count_and_it_is_the_same_for_who_lived_through_it() -> None:
    events = [ev.OpenSession(1, 1, "auth", "a"), *(ev.SubmitCall(i, 1, "auth", (text("t"), out("x"))) for i in range(2, 5))]
    lived = Driver(tenants={"a": TenantConfig(requests_per_minute=3, tokens_per_minute=60)})
    recalled = Driver(tenants={"a": TenantConfig(requests_per_minute=3, tokens_per_minute=60)})
    for d in (lived, recalled):
        d.auths[1], d.request = "auth", 10
    lived.send(*events)
    refused(lived, 1)
    for event in events:
        recalled.core.recall(event, 0.0)
    for d in (lived, recalled):
        d.send(ev.Restarted(1))
        for _ in range(3):
            submit(d, 1, 1, 1)
        assert refused(d, 1) == 20


@pytest.mark.parametrize("taken", [0, 30, 60, 90])
def test_an_allowance_comes_back_evenly_and_never_beyond_a_minute_s_worth(taken: int) -> None:
    allowance = Allowance(60)
    allowance.take(100.0, taken)
    assert allowance.left(100.0) == 60 - taken
    assert allowance.left(110.0) == min(60, 70 - taken)
    assert allowance.left(1000.0) == 60
    assert allowance.wait_s(100.0, 10) == max(0, taken - 50)
    assert allowance.wait_s(100.0, 1000) == taken  # never more than there can be
