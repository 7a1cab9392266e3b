"""`plas` and `atlas`: least attained service, levels, starvation, and where long and short calls go."""

from __future__ import annotations

import pytest

from parrot.serve.config import TenantConfig
from tests.serve.driver import Driver, out, read, text, value
from tests.serve.policies.scenes import ask, begun, engines_of, rules, run_out


def serve(d: Driver, session: int, key: str, seconds: float) -> None:
    """A call that is in service for so long."""
    ask(d, session, key)
    task = begun(d, key)
    d.start(task)
    d.now += seconds
    d.finish(task)


@pytest.mark.parametrize("policy", ["plas", "atlas"])
def test_a_small_program_overtakes_a_large_one_that_came_first(policy: str) -> None:
    def order(policy: str) -> list[str]:
        d = Driver(policy)
        d.engine(tasks_capacity=1)
        large, small = d.open(), d.open()
        serve(d, large, "first", 10.0)
        ask(d, d.open(), "runs")
        ask(d, large, "large")
        ask(d, small, "small")
        return run_out(d)

    assert order(policy) == ["runs", "small", "large"]
    assert order("least_loaded") == ["runs", "large", "small"]


def test_programs_of_one_level_go_in_order_of_readiness() -> None:
    d = Driver("plas", {"params": {"quantum_s": 20.0}})
    d.engine(tasks_capacity=1)
    large, small = d.open(), d.open()
    serve(d, large, "first", 10.0)
    ask(d, d.open(), "runs")
    ask(d, large, "large")
    ask(d, small, "small")
    assert run_out(d) == ["runs", "large", "small"]


def test_a_program_that_waited_long_for_its_service_goes_first() -> None:
    def after(waited_s: float) -> list[str]:
        d = Driver("plas", {"params": {"beta": 3.0}})
        d.engine(tasks_capacity=1)
        large = d.open()
        serve(d, large, "first", 10.0)
        ask(d, d.open(), "runs")
        ask(d, large, "large")
        d.now += waited_s
        ask(d, d.open(), "small")
        return run_out(d)

    assert after(29.0) == ["runs", "small", "large"]
    assert after(31.0) == ["runs", "large", "small"]


def test_atlas_counts_the_path_behind_a_task_where_plas_counts_its_whole_program() -> None:
    def order(policy: str) -> list[str]:
        d = Driver(policy, {"params": {"quantum_s": 2.0}})  # levels end at 2, 6 and 14 s
        d.engine(tasks_capacity=4)
        wide, narrow = d.open(), d.open()
        # Three branches of 3 s in parallel: 9 s in all, 3 s along any path. The other program: one call of 5 s, then another.
        branches = [d.outputs(d.submit(wide, text(f"branch{i}"), out("x")))[0] for i in range(3)]
        (joined,) = d.outputs(d.submit(wide, text("join"), *[read(f"b{i}", b) for i, b in enumerate(branches)], out("y")))
        d.get(wide, joined)
        ask(d, narrow, "narrow1")
        for dispatch in list(d.dispatches):
            d.start(dispatch)
        for i in range(6):  # programs that were never served keep the engine full
            ask(d, d.open(), f"runs{i}")
        d.now = 3.0
        for i in range(3):
            d.finish(begun(d, f"branch{i}"))
        d.now = 5.0
        d.finish(begun(d, "narrow1"))
        ask(d, narrow, "narrow2")
        return [key for key in run_out(d) if key in {"join", "narrow2"}]

    assert order("atlas") == ["join", "narrow2"], "3 s and 5 s: one level, and the join was ready first"
    assert order("plas") == ["narrow2", "join"], "9 s and 5 s"


def test_attained_service_of_a_join_is_its_longest_branch_under_atlas_and_the_sum_under_plas() -> None:
    def attained(policy: str) -> float:
        d = Driver(policy)
        d.engine()
        session = d.open()
        branches = [d.outputs(d.submit(session, text(f"branch{i}"), out("x")))[0] for i in range(3)]
        (joined,) = d.outputs(d.submit(session, text("join"), *[read(f"b{i}", b) for i, b in enumerate(branches)], out("y")))
        d.get(session, joined)
        for dispatch in list(d.dispatches):
            d.start(dispatch)
        for seconds in (1.0, 2.0, 4.0):  # they end after 1, 3 and 7 s
            d.now += seconds
            d.finish(d.dispatches[0])
        (report,) = d.core.scheduler.explanations.last(1)  # type: ignore[union-attr]
        return report.terms["attained_s"]

    assert attained("plas") == 11.0
    assert attained("atlas") == 7.0


def test_a_long_call_stays_with_its_programs_engine_and_a_short_one_balances() -> None:
    d = Driver("plas", {"params": {"long_tokens": 100}})
    for _ in range(3):
        d.engine()
    session = d.open()
    ask(d, session, "long1", 200)
    ask(d, session, "short1", 50)
    ask(d, session, "long2", 200)
    ask(d, session, "short2", 50)
    assert engines_of(d) == [1, 2, 1, 3]
    assert rules(d) == ["first_home", "short_balanced", "home", "short_balanced"]


def test_a_long_call_leaves_an_engine_without_room() -> None:
    d = Driver("plas", {"params": {"long_tokens": 100}})
    d.engine(tasks_capacity=1)
    d.engine()
    session = d.open()
    for i in range(3):
        (x,) = d.outputs(d.submit(session, text("long", 200), value("q", f"q{i}"), out("x")))
        d.get(session, x)
    assert engines_of(d) == [1, 2, 2]
    assert rules(d) == ["first_home", "home_full", "home"]


@pytest.mark.parametrize("policy", ["plas", "atlas"])
def test_a_starving_task_that_its_tenant_s_limit_holds_is_left_where_it_is(policy: str) -> None:
    d = Driver(policy, {"params": {"beta": 0.0}}, tenants={"a": TenantConfig(max_tokens_in_flight=50)})
    d.engine(tasks_capacity=2)
    session, other = d.open(tenant="a"), d.open(tenant="b")
    serve(d, session, "first", 10.0)  # from here on all of its tasks starve at once
    ask(d, session, "second", 30)
    ask(d, other, "runs")
    ask(d, session, "held", 30)
    ask(d, other, "waits")  # so that the policy looks at the lane
    assert begun(d, "second")
    d.finish(begun(d, "runs"))
    assert run_out(d) == ["second", "waits", "held"]
    assert d.core.scheduler.describe_policy_errors() == {}
