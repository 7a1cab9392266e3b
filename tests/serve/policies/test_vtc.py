"""`vtc`: tenants held even in weighted tokens, the lift of one that comes late, and the correction when a task ends."""

from __future__ import annotations

from collections import Counter

import pytest

from parrot.serve.policies.base import Cluster
from tests.serve.driver import Driver
from tests.serve.policies.scenes import ask, heads


def backlog(policy: str = "vtc", tasks: int = 60) -> Driver:
    """Tenant `a` asked for twice as much before `b` asked for anything; each call of `b` has a prompt twice as long."""
    d = Driver(policy, max_sessions_num=10)
    d.engine(tasks_capacity=1)
    a, b = d.open(tenant="a"), d.open(tenant="b")
    for i in range(2 * tasks):
        ask(d, a, f"a{i}", 50, most=25)
    for i in range(tasks):
        ask(d, b, f"b{i}", 150, most=25)
    return d


def served(d: Driver, tasks: int, tokens: int = 25) -> Counter[str]:
    """What each tenant got with the next `tasks` placements, a prompt token counting 1 and an output token 2."""
    found: Counter[str] = Counter()
    for _ in range(tasks):
        key = heads(d)[0]
        found[key[0]] += (50 if key[0] == "a" else 150) + 2 * tokens
        d.finish(d.dispatches[0], key=f"out:{key}", tokens=tokens)
    return found


def test_two_tenants_are_held_even_in_tokens_whoever_came_first() -> None:
    d = backlog()
    found = served(d, 60)
    assert abs(found["a"] - found["b"]) <= 200 + 2 * 25, "the bound: no more than the largest task"
    assert set(served(backlog("least_loaded"), 60)) == {"a"}


def test_a_tenant_of_twice_the_weight_gets_twice_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cluster, "weight_of", staticmethod(lambda tenant: 2.0 if tenant == "b" else 1.0))
    found = served(backlog(), 60)
    assert found["b"] / found["a"] == pytest.approx(2.0, rel=0.1)


def test_the_true_length_replaces_the_expected_one() -> None:
    d = Driver("vtc")
    d.engine(tasks_capacity=2)
    a, b = d.open(tenant="a"), d.open(tenant="b")
    ask(d, a, "a0", 10, most=100)
    ask(d, b, "b0", 10, most=20)
    for i in range(1, 3):
        ask(d, a, f"a{i}", 10, most=100)
        ask(d, b, f"b{i}", 10, most=20)
    service = d.core.scheduler.service
    assert service is not None
    assert [service.tenant(t).expected_tokens for t in "ab"] == [100, 20]
    d.finish(d.dispatches[0], tokens=4)  # a's was expected to be 100, and was 4
    assert service.tenant("a").output_tokens == 4
    assert heads(d) == ["b0", "a1"], "so a has had 10 + 2·4, and b is charged with 10 + 2·20"


def test_a_tenant_that_comes_late_is_lifted_and_gets_no_arrears() -> None:
    d = Driver("vtc")
    d.engine(tasks_capacity=1)
    a, b = d.open(tenant="a"), d.open(tenant="b")
    for i in range(40):
        ask(d, a, f"a{i}", 50, most=25)
    for _ in range(20):
        d.finish(d.dispatches[0], tokens=25)
    for i in range(20):
        ask(d, b, f"b{i}", 50, most=25)
    order = []
    for _ in range(12):
        order.append(heads(d)[0][0])
        d.finish(d.dispatches[0], tokens=25)
    assert order.count("b") in {5, 6, 7}, f"b does not get the first twenty to make up for its absence: {order}"


def test_a_tenant_that_comes_to_an_empty_queue_begins_where_the_last_one_left() -> None:
    d = Driver("vtc")
    d.engine(tasks_capacity=1)
    a, b = d.open(tenant="a"), d.open(tenant="b")
    for i in range(10):
        ask(d, a, f"a{i}", 50, most=25)
    while d.dispatches:
        d.finish(d.dispatches[0], tokens=25)
    for i in range(6):
        ask(d, b, f"b{i}", 50, most=25)
    for i in range(6):
        ask(d, a, f"again{i}", 50, most=25)
    order = []
    for _ in range(8):
        order.append(heads(d)[0][0])
        d.finish(d.dispatches[0], tokens=25)
    assert order.count("b") <= 5, f"ten tasks of a's past are not b's to catch up with: {order}"


def test_an_attempt_that_came_to_nothing_is_not_charged_and_a_cancelled_task_is() -> None:
    d = Driver("vtc")
    lost = d.engine()
    a = d.open(tenant="a")
    ask(d, a, "a0", 30, most=25)
    service = d.core.scheduler.service
    assert service is not None
    account = service.tenant("a")
    assert (account.prompt_tokens, account.expected_tokens) == (30, 25)
    d.lose(lost)
    assert (account.prompt_tokens, account.expected_tokens, account.output_tokens) == (0, 0, 0)
    d.engine()
    d.close(a)
    assert (account.prompt_tokens, account.expected_tokens, account.output_tokens) == (30, 0, 25)
