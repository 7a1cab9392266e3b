"""preble_e2, worked out by hand: 1 ms to prefill a token, 10 ms to decode one, 16 tokens of output (0.16 s) a task."""

from __future__ import annotations

import pytest

from parrot.latency_profile import FixedCost, Hinge, LatencyProfile
from tests.serve.driver import Driver, text
from tests.serve.policies.support import ask, engines_of, hot, reasons, rules

MILLISECONDS = {"prefill_token_s": 0.001, "decode_token_s": 0.01}


def driver(**params: float) -> Driver:
    return Driver("preble_e2", {"params": {**MILLISECONDS, **params}})


@pytest.mark.parametrize(("own", "rule", "engine"), [(99, "exploit", 1), (100, "explore", 2)])
def test_a_prefix_is_exploited_only_if_it_is_longer_than_the_rest(own: int, rule: str, engine: int) -> None:
    d = driver()
    for _ in range(2):
        d.engine()
    session = d.open()
    hot(d, session, 0)
    hot(d, session, 1, own=own)
    assert engines_of(d) == [1, engine]
    assert rules(d) == ["explore", rule]


def test_exploring_adds_load_and_recompute_cost() -> None:
    d = driver()
    for _ in range(2):
        d.engine()
    session = d.open()
    hot(d, session, 0, prefix=100, own=10)  # engine 1: 0.11 + 0.16 s
    ask(d, session, text("other", 190))  # engine 2: 0.19 + 0.16 s
    hot(d, session, 1, prefix=100, own=150)  # 0.27 + 0.15 s against 0.35 + 0.25 s
    assert engines_of(d) == [1, 2, 1]
    assert {c.engine_id: c.terms for c in reasons(d)[-1].candidates} == {
        1: pytest.approx({"cost_s": 0.42, "load_s": 0.27, "eviction_s": 0, "recompute_s": 0.15, "cached_tokens": 100}),
        2: pytest.approx({"cost_s": 0.60, "load_s": 0.35, "eviction_s": 0, "recompute_s": 0.25, "cached_tokens": 0}),
    }


def test_of_equal_matches_the_less_loaded_engine_is_taken() -> None:
    d = driver(balance_ratio=1.0, balance_requests=1)
    for _ in range(2):
        d.engine()
    session = d.open()
    for number in range(6):
        hot(d, session, number)
    # Both hold it from the second task on. Loads: 0.27 | 0.27, then + 0.17 each in turn.
    assert engines_of(d) == [1, 2, 1, 2, 1, 2]
    assert rules(d) == ["explore", "rebalance", "exploit", "exploit", "exploit", "exploit"]


def test_a_hot_prefix_is_copied_when_its_engine_has_too_much_of_the_load() -> None:
    def rebalanced_at(ratio: float, requests: int) -> int:
        d = driver(balance_ratio=ratio, balance_requests=requests)
        for _ in range(2):
            d.engine()
        session = d.open()
        ask(d, session, text("a", 90))  # engine 1: 0.25 s
        hot(d, session, 0)  # engine 2: 0.27 s, then 0.17 s a task
        for number in range(1, 12):
            hot(d, session, number)
        assert rules(d).count("rebalance") == 1, "from then on both hold it, and the less loaded one is taken"
        return rules(d).index("rebalance")

    assert rebalanced_at(3.0, 1) == 5, "0.27 + 3 · 0.17 is more than 3 · 0.25"
    assert rebalanced_at(4.0, 1) == 7, "0.27 + 5 · 0.17 is more than 4 · 0.25"
    assert rebalanced_at(3.0, 9) == 9


def test_load_is_forgotten_after_the_window() -> None:
    def second(seconds: float) -> int:
        d = driver()
        for _ in range(2):
            d.engine()
        session = d.open()
        ask(d, session, text("a", 100))
        d.finish(d.dispatches[0])
        d.now = seconds
        ask(d, session, text("b", 100))
        return engines_of(d)[0]

    assert second(180.0) == 2
    assert second(180.1) == 1


def test_what_has_to_be_evicted_costs_as_much_as_it_is_used() -> None:
    d = driver()
    for _ in range(2):
        d.engine(tokens_capacity=400)
    session = d.open()
    ask(d, session, text("used", 300))  # engine 1
    ask(d, session, text("b", 300), max_gen_length=20)  # engine 2, with 0.04 s more to decode
    for dispatch in list(d.dispatches):
        d.finish(dispatch)
    ask(d, session, text("c", 300))
    # Each must give up its 5 tokens of output, which no prompt used, and a prompt of 0.3 s that half the requests used.
    terms = {c.engine_id: c.terms for c in reasons(d)[-1].candidates}
    assert terms[1] == pytest.approx(
        {"cost_s": 0.46 + 0.15 + 0.3, "load_s": 0.46, "eviction_s": 0.15, "recompute_s": 0.3, "cached_tokens": 0}
    )
    assert engines_of(d) == [1]


def test_a_costly_eviction_is_avoided() -> None:
    d = driver()
    d.engine(tokens_capacity=400)
    session = d.open()
    ask(d, session, text("used", 380), max_gen_length=1)  # 0.38 + 0.01 s
    d.finish(d.dispatches[0])
    for _ in range(3):
        ask(d, session, text("used", 380), max_gen_length=1)  # cached: 0.01 s
        d.finish(d.dispatches[0])
    d.engine(tokens_capacity=4000)
    ask(d, session, text("slow", 100), max_gen_length=45)  # engine 2: 0.55 s, more than engine 1 has
    d.finish(d.dispatches[0])
    assert reasons(d)[-1].engine_id == 2
    ask(d, session, text("new", 100), max_gen_length=1)
    terms = {c.engine_id: c.terms for c in reasons(d)[-1].candidates}
    # On engine 1 the 380 tokens must go, and 4 of 5 requests used them: 0.42 + 0.8 · 0.38 against 0.55 s.
    assert terms[1]["load_s"] == pytest.approx(0.42)
    assert terms[1]["eviction_s"] == pytest.approx(0.304)
    assert (terms[2]["load_s"], terms[2]["eviction_s"]) == pytest.approx((0.55, 0))
    assert engines_of(d) == [2]


def test_times_come_from_the_engines_latency_profile_where_it_has_one() -> None:
    profile = LatencyProfile(
        name="p",
        model="m",
        device="d",
        attn_func="a",
        fixed=(FixedCost(64, 0.5),),
        hinges=(Hinge(0.0, 0.001),),
        pair_s=0.0,
        kv_s=0.0,
    )
    d = driver()
    d.engine(latency_profile=profile)
    session = d.open()
    ask(d, session, text("a", 100), max_gen_length=2)
    ask(d, session, text("b", 100), max_gen_length=2)
    second = reasons(d)[-1].terms
    assert second["recompute_s"] == pytest.approx(0.5 + 0.1)
    assert second["load_s"] == pytest.approx(0.6 + 2 * 0.501)
