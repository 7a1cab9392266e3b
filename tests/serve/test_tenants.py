"""Tenants: limits that refuse at the door, tokens in flight that hold back nobody else, weights; Retry-After."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parrot.configuration import ConfigurationError, parse
from parrot.serve import events as ev
from parrot.serve.config import ServeCoreConfig, TenantConfig
from parrot.serve.policies.base import Cluster, Placement
from parrot.serve.policies.least_loaded import LeastLoaded
from parrot.serve.queue import TaskQueue
from parrot.serve.rates import DrainRate
from tests.serve.driver import Driver, out, text


def call(d: Driver, session: int, key: str, tokens: int = 10, most: int = 10, models: tuple[str, ...] = ()) -> str:
    """Submits a call and asks for its output; its variable."""
    (var,) = d.outputs(d.submit(session, text(key, tokens), out("x", max_gen_length=most), models=models))
    d.get(session, var)
    return var


def refused(d: Driver, session: int) -> dict:
    error = d.error(d.ask(ev.SubmitCall, session, d.auths[session], (text("t"), out("x"))))
    assert error.code == "queue_full"
    return {"message": error.message, **error.details}


def flying(d: Driver) -> list[int]:
    return [dispatch.task.session_id for dispatch in d.dispatches]


# ------------------------------------------------------------------------------------------------ refusals


def test_a_tenant_with_too_many_sessions_is_refused_and_another_is_not() -> None:
    d = Driver(tenants={"a": TenantConfig(max_sessions=2)})
    first = d.open(1, "a")
    d.open(2, "a")
    error = d.error(d.ask(ev.OpenSession, 3, "auth3", "a"))
    assert error.code == "too_many_sessions"
    assert "max_sessions is 2" in error.message
    assert 1 <= error.details["retry_after_s"] <= 60
    d.open(4, "b")
    d.close(first)
    d.open(5, "a")


def test_the_star_is_a_limit_for_each_of_the_others() -> None:
    d = Driver(tenants={"*": TenantConfig(max_sessions=1), "vip": TenantConfig()})
    for session, tenant in enumerate(["x", "y", "vip", "vip", ""]):
        d.open(session, tenant)
    for tenant in ("x", "y", ""):
        assert d.error(d.ask(ev.OpenSession, 99, "auth", tenant)).code == "too_many_sessions"


def test_a_tenant_with_too_many_queued_tasks_is_refused_only_where_a_session_begins() -> None:
    d = Driver(tenants={"a": TenantConfig(max_queued_tasks=2)})
    begun, late, other = d.open(1, "a"), d.open(2, "a"), d.open(3, "b")
    for key in "uvw":  # a session that has begun is never refused, whatever it adds
        call(d, begun, key)
    assert "max_queued_tasks is 2" in refused(d, late)["message"]
    call(d, other, "other")
    d.engine()
    call(d, late, "late")  # nothing waits any more


def test_without_tenants_in_the_configuration_nothing_is_counted() -> None:
    d = Driver()
    assert d.core.scheduler.tenants.limiting is False
    one, two = (d.core.sessions[d.open(session, tenant)] for session, tenant in ((1, "a"), (2, "b")))
    assert one.account is two.account


# ------------------------------------------------------------------------------------------------ tokens in flight


@pytest.mark.parametrize("policy", ["least_loaded", "parrot", "round_robin"])
def test_a_tenant_at_its_tokens_in_flight_waits_and_holds_nobody_else_back(policy: str) -> None:
    d = Driver(policy, tenants={"a": TenantConfig(max_tokens_in_flight=50)})
    d.engine()
    greedy, other = d.open(1, "a"), d.open(2, "b")
    for key in "uvw":
        call(d, greedy, key)  # 20 tokens each: two of them
    call(d, other, "o")
    assert flying(d) == [greedy, greedy, other]
    assert d.core.counts()["queue"] == 1
    d.finish(d.dispatches[0])
    assert flying(d) == [greedy, other, greedy]


def test_one_task_alone_is_always_let_in() -> None:
    d = Driver(tenants={"a": TenantConfig(max_tokens_in_flight=50)})
    d.engine()
    session = d.open(1, "a")
    call(d, session, "large", 500)
    call(d, session, "small", 5)
    assert len(d.dispatches) == 1
    d.finish(d.dispatches[0])
    assert len(d.dispatches) == 1


def test_held_tasks_go_in_the_policy_s_order() -> None:
    d = Driver("parrot", {"app_fifo": True}, tenants={"a": TenantConfig(max_tokens_in_flight=20)})
    d.engine()
    early, late = d.open(1, "a"), d.open(2, "a")
    call(d, late, "first")
    call(d, late, "second")
    call(d, early, "third")
    for expected in (late, early, late):
        assert flying(d) == [expected]
        d.finish(d.dispatches[0])


def test_a_retried_task_keeps_its_tokens_and_an_ended_one_gives_them_back() -> None:
    d = Driver(tenants={"a": TenantConfig(max_tokens_in_flight=30)})
    first, second = d.engine("one"), d.engine("two")
    session = d.open(1, "a")
    lost = call(d, session, "u")
    call(d, session, "v")
    d.lose(first)
    assert [dispatch.engine_id for dispatch in d.dispatches] == [second]
    assert d.dispatches[0].output_var == lost
    d.fail(d.dispatches[0])
    assert [dispatch.output_var for dispatch in d.dispatches] != [lost]
    assert len(d.dispatches) == 1


def test_a_session_that_closes_takes_its_held_tasks_along_and_lets_others_in() -> None:
    d = Driver(tenants={"a": TenantConfig(max_tokens_in_flight=20)})
    d.engine()
    closing, staying = d.open(1, "a"), d.open(2, "a")
    for session, key in ((closing, "u"), (closing, "v"), (staying, "w")):
        call(d, session, key)
    d.dispatches.clear()
    d.close(closing)
    assert flying(d) == [staying]
    assert d.core.scheduler.tenants.held == 0


def test_held_tasks_fail_with_no_engine_as_others_do() -> None:
    d = Driver(tenants={"a": TenantConfig(max_tokens_in_flight=20)})
    session = d.open(1, "a")
    for key in "uv":
        call(d, session, key)
    d.send(ev.Tick(), at=d.core.next_deadline() or 0.0)
    assert d.core.counts()["failed"] == 2


def test_a_held_task_too_large_for_the_engine_that_comes_fails_at_once() -> None:
    d = Driver(tenants={"a": TenantConfig(max_tokens_in_flight=20)})
    session = d.open(1, "a")
    call(d, session, "u")
    call(d, session, "huge", 9000)
    d.engine()
    assert d.core.counts()["failed"] == 1


def test_a_policy_cannot_place_a_held_task() -> None:
    d = Driver(tenants={"a": TenantConfig(max_tokens_in_flight=20)})
    engine = d.engine()
    session = d.open(1, "a")
    call(d, session, "u")
    call(d, session, "v")
    held = d.core.calls(session)[1].tasks[0]
    assert held.held

    class Eager(LeastLoaded):
        def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
            yield Placement(held, d.core.engines[engine])

    d.core.scheduler.policy = Eager({}, None)  # type: ignore[arg-type]
    call(d, d.open(2, "b"), "w")
    assert held.held
    assert flying(d) == [1, 2], "least_loaded placed the other"
    (error,) = d.core.scheduler.describe_policy_errors()
    assert f"placed task {held.id}, which is held" in error


# ------------------------------------------------------------------------------------------------ weights, configuration


def test_policies_read_weights() -> None:
    d = Driver(tenants={"a": TenantConfig(weight=3.0), "*": TenantConfig(weight=0.5)})
    weights = [d.core.scheduler.cluster.weight_of(name) for name in ("a", "b", "")]
    assert weights == [3.0, 0.5, 0.5]
    assert Driver().core.scheduler.cluster.weight_of("a") == 1.0


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"weight": 0}, "'tenants.alice.weight' is 0: expected `float` > 0"),
        ({"max_sessions": 0}, "'tenants.alice.max_sessions' is 0"),
        ({"max_tokens": 5}, "unknown key 'tenants.alice.max_tokens'; expected one of: weight, max_queued_tasks"),
    ],
)
def test_a_wrong_entry_is_refused_by_its_name(entry: dict, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint.replace("[", r"\[")):
        parse({"tenants": {"bob": {"weight": 2}, "alice": entry}}, ServeCoreConfig, "core.json")


# ------------------------------------------------------------------------------------------------ Retry-After


def test_the_wait_is_what_leaves_at_the_rate_of_late() -> None:
    rate = DrainRate()
    assert rate.wait_s(0.0, 0, 5) == 1  # nothing is known
    for second in range(100):
        rate.note(float(second), 2 * second)  # two a second
    assert rate.wait_s(99.0, 198, 1) == 1
    assert rate.wait_s(99.0, 198, 20) == 10
    assert rate.wait_s(99.0, 198, 10_000) == 60


def test_what_was_long_ago_does_not_count() -> None:
    rate = DrainRate()
    for second in range(0, 60, 2):
        rate.note(float(second), 100 * second)
    rate.note(200.0, 6000)
    rate.note(210.0, 6005)
    assert rate.wait_s(210.0, 6005, 10) == 20


def test_when_nothing_leaves_the_wait_grows_with_the_time_that_nothing_did() -> None:
    rate = DrainRate()
    rate.note(0.0, 7)
    assert [rate.wait_s(now, 7, 1) for now in (0.0, 5.0, 40.0, 1000.0)] == [1, 5, 40, 60]


def test_a_refusal_says_when_to_come_again() -> None:
    d = Driver(scheduler={"max_queue_size": 4})
    d.engine(tasks_capacity=1)
    session = d.open(1)
    for number in range(40):
        call(d, session, f"t{number}")
    other = d.open(2)
    for second in range(1, 21):  # one leaves every other second
        d.now = float(second)
        if second % 2 == 0:
            d.finish(d.dispatches[0])
    queued = d.core.counts()["queue"]
    wait_s = refused(d, other)["retry_after_s"]
    assert wait_s == pytest.approx(2 * (queued - 4 + 1), rel=0.2)
