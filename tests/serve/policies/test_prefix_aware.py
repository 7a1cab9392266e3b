"""cache_aware, weighted, kv_cost and lmetric, worked out by hand: each where its rule shows."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from parrot.protocol.errors import ParrotError
from parrot.serve.config import GlobalSchedulerConfig
from parrot.serve.policies import parse_policy
from parrot.serve.policies.kv_cost import odds
from tests.serve.driver import Driver, text, value
from tests.serve.policies.support import ask, engines_of, hot, reasons, rules


def holding(policy: str, *, engines: int = 2, prefix: int = 100, seed: int = 0, **params: float) -> tuple[Driver, int]:
    """Engine 1 holds the hot prefix and what followed it, and is idle; the others came later and hold nothing."""
    d = Driver(policy, {"params": params, "random_seed": seed})
    d.engine()
    session = d.open()
    hot(d, session, 0, prefix)
    d.finish(d.dispatches[0])
    for _ in range(engines - 1):
        d.engine()
    return d, session


# ---------------------------------------------------------------------------------------------------- cache_aware


def test_cache_aware_follows_a_prefix_until_loads_are_out_of_balance_and_then_spreads_it() -> None:
    d = Driver("cache_aware", {"params": {"balance_abs_threshold": 2, "balance_rel_threshold": 1.5}})
    for _ in range(2):
        d.engine()
    session = d.open()
    for number in range(7):
        hot(d, session, number)
    assert engines_of(d) == [1, 1, 1, 2, 2, 2, 1], "three against none is too much; from then on both hold it"
    assert rules(d) == ["smallest_cache", "longest_prefix", "longest_prefix", "shortest_queue"] + 3 * ["longest_prefix"]


def test_cache_aware_needs_both_thresholds_to_be_passed() -> None:
    def leaves_at(absolute: int, relative: float) -> int:
        d = Driver("cache_aware", {"params": {"balance_abs_threshold": absolute, "balance_rel_threshold": relative}})
        d.engine()
        session = d.open()
        for number in range(4):
            ask(d, session, text(f"other{number}"))
        d.engine()
        for number in range(4):
            ask(d, session, text(f"more{number}", 5))  # to the smaller cache
        assert engines_of(d) == 4 * [1] + 4 * [2]
        for number in range(8):
            ask(d, session, text("other0"), value("q", f"q{number}", 5))
        return engines_of(d)[8:].index(2)

    assert leaves_at(2, 1.0) == 3, "7 on engine 1 are 3 more than 4"
    assert leaves_at(5, 1.0) == 6, "10 are 6 more than 4"
    assert leaves_at(2, 1.9) == 4, "8 are more than 1.9 times 4"


def test_cache_aware_follows_no_prefix_that_is_too_small_a_part_of_the_prompt() -> None:
    def goes_to(own: int) -> int:
        d, session = holding("cache_aware", prefix=30)
        hot(d, session, 1, 30, own)
        return engines_of(d)[0]

    assert goes_to(69) == 1
    assert goes_to(70) == 2, "0.3 of it is not more than 0.3: the smallest cache"


def test_cache_aware_takes_the_smallest_cache_not_the_least_loaded_engine() -> None:
    d, session = holding("cache_aware", engines=2)
    ask(d, session, text("new"))  # engine 2: nothing is cached there
    ask(d, session, text("newer"))  # engine 2 again: a task runs there, but 10 tokens are fewer than 115
    assert engines_of(d) == [2, 2]
    assert rules(d)[1:] == ["smallest_cache", "smallest_cache"]


def test_cache_aware_passes_a_full_favourite_and_comes_back_to_it() -> None:
    d = Driver("cache_aware")
    for _ in range(2):
        d.engine(tasks_capacity=1)
    session = d.open()
    for number in range(2):
        hot(d, session, number)
    assert engines_of(d) == [1, 2]
    d.finish(d.dispatches[0])
    hot(d, session, 2)
    assert engines_of(d) == [2, 1]
    second = reasons(d)[1]
    assert [(c.engine_id, c.fits) for c in second.candidates] == [(1, False), (2, True)]
    assert rules(d) == ["smallest_cache", "smallest_cache", "longest_prefix"]


# ---------------------------------------------------------------------------------------------------- weighted


def test_weighted_adds_three_scores_and_spreads_a_hot_prefix_as_its_engine_fills() -> None:
    d = Driver("weighted")
    for _ in range(2):
        d.engine(tokens_capacity=1000)
    session = d.open()
    for number in range(12):
        hot(d, session, number)
    # Engine 1, from the second task on: 3 · 100/110 + 2 · 0 + 2 · (1 − u), u = 0.126, 0.152, …; engine 2: 2 · 1 + 2 · 1.
    assert engines_of(d) == 11 * [1] + [2]
    first, second, *_, last = reasons(d)
    assert first.terms == pytest.approx({"score": 4.0, "prefix": 0.0, "queue": 1.0, "kv_utilisation": 1.0})
    best, other = second.candidates
    assert (best.engine_id, other.engine_id) == (1, 2)
    assert best.terms == pytest.approx(
        {"score": 300 / 110 + 2 * 0.874, "prefix": 100 / 110, "queue": 0.0, "kv_utilisation": 0.874}
    )
    assert other.terms == pytest.approx({"score": 4.0, "prefix": 0.0, "queue": 1.0, "kv_utilisation": 1.0})
    assert last.candidates[1].terms["score"] == pytest.approx(300 / 110 + 2 * (1 - 0.386))


def test_weighted_scales_the_queue_between_the_shortest_and_the_longest() -> None:
    d = Driver("weighted", {"params": {"prefix": 0, "kv_utilisation": 0}})
    d.engine()
    session = d.open()
    for number in range(4):
        ask(d, session, text(f"a{number}"))
    d.engine()
    ask(d, session, text("b"))
    d.engine()
    ask(d, session, text("c"))
    ask(d, session, text("d"))
    last = reasons(d)[-1]
    assert {c.engine_id: c.terms["queue"] for c in last.candidates} == {1: 0.0, 2: 1.0, 3: 1.0}
    assert last.engine_id == 2
    ask(d, session, text("e"))
    ask(d, session, text("f"))
    assert {c.engine_id: c.terms["queue"] for c in reasons(d)[-1].candidates} == {1: 0.0, 2: 1.0, 3: 1.0}
    ask(d, session, text("g"))
    assert {c.engine_id: c.terms["queue"] for c in reasons(d)[-1].candidates} == {1: 0.0, 2: 0.0 + 1 / 2, 3: 1.0}


# ---------------------------------------------------------------------------------------------------- kv_cost


def test_kv_cost_weighs_prefill_against_decode_blocks() -> None:
    def places(weight: float, first_token: bool) -> tuple[int, dict[int, float]]:
        d, session = holding("kv_cost", overlap_weight=weight, block_size=10)
        hot(d, session, 1)
        assert engines_of(d) == [1], "idle, it costs 1 + 11 blocks where engine 2 costs 11 + 11"
        if first_token:
            d.first(d.dispatches[0])
        hot(d, session, 2)
        return engines_of(d)[1], {c.engine_id: c.terms["cost"] for c in reasons(d)[-1].candidates}

    assert places(1.0, True) == (2, {1: 1 + 22, 2: 11 + 11})
    assert places(1.0, False) == (2, {1: 2 + 22, 2: 11 + 11})
    assert places(2.0, True) == (1, {1: 2 * 1 + 22, 2: 2 * 11 + 11})
    assert places(0.0, True) == (2, {1: 22, 2: 11})


def test_kv_cost_draws_by_cost_when_the_temperature_is_above_zero() -> None:
    def drawn(temperature: float, seeds: int = 300) -> Counter[int]:
        counts: Counter[int] = Counter()
        for seed in range(seeds):
            d, session = holding("kv_cost", temperature=temperature, seed=seed)
            hot(d, session, 1)
            counts[engines_of(d)[0]] += 1
        return counts

    d, session = holding("kv_cost", temperature=1.0)
    hot(d, session, 1)
    share = 1 / (1 + math.exp(-1))
    assert {c.engine_id: (c.terms["cost"], c.terms["probability"]) for c in reasons(d)[-1].candidates} == {
        1: pytest.approx(((10 + 110) / 16, share)),
        2: pytest.approx(((110 + 110) / 16, 1 - share)),
    }
    assert drawn(0.0, 20) == {1: 20}
    share = math.exp(-1 / 0.5) / (1 + math.exp(-1 / 0.5))  # of the dearer one of two
    deviation = math.sqrt(300 * share * (1 - share))
    assert abs(drawn(0.5)[2] - 300 * share) < 4 * deviation
    assert 100 < drawn(1000.0)[2] < 200, "hot, hardly a difference"


def test_kv_cost_odds_are_those_of_costs_scaled_to_their_range() -> None:
    assert odds(np.array([12.0, 22.0, 17.0]), 1.0) == pytest.approx(
        np.array([1.0, math.exp(-1), math.exp(-0.5)]) / (1 + math.exp(-1) + math.exp(-0.5))
    )
    assert odds(np.array([12.0, 22.0, 17.0]), 1.0) == pytest.approx(odds(np.array([0.0, 1.0, 0.5]), 1.0))
    assert odds(np.array([3.0, 3.0]), 0.1) == pytest.approx([0.5, 0.5])


def test_kv_cost_draws_only_engines_with_room() -> None:
    d = Driver("kv_cost", {"params": {"temperature": 5.0}})
    for _ in range(6):
        d.engine(tasks_capacity=1)
    session = d.open()
    for number in range(7):
        hot(d, session, number)
    assert sorted(engines_of(d)) == [1, 2, 3, 4, 5, 6]
    assert all(0 < report.terms["probability"] <= 1 for report in reasons(d))


# ---------------------------------------------------------------------------------------------------- lmetric


def test_lmetric_multiplies_tokens_to_prefill_by_the_batch() -> None:
    d, session = holding("lmetric")
    hot(d, session, 1)  # both are idle: the one that holds the prefix
    for number in range(3):
        ask(d, session, text(f"t{number}", 200))
    # Engine 2 was idle for the first; then 1 × (10 + 200) and 1 × (200 + 200): to engine 1; then 2 × 410 and 1 × 400.
    assert engines_of(d) == [1, 2, 1, 2]
    last = {c.engine_id: (c.terms["score"], c.terms["prefill_tokens"], c.terms["batch"]) for c in reasons(d)[-1].candidates}
    assert last == {1: (2 * 410, 410, 2), 2: (1 * 400, 400, 1)}


def test_lmetric_spreads_a_hot_prefix_once_its_batch_outweighs_it() -> None:
    d, session = holding("lmetric")
    ask(d, session, text("other", 50))  # engine 1 and 2 are idle, and it is new to both
    first = d.dispatches[0].engine_id
    d.finish(d.dispatches[0])
    assert first == 1
    hot(d, session, 1)
    ask(d, session, text("busy", 50))
    assert engines_of(d) == [1, 2]
    for dispatch in d.dispatches:
        d.first(dispatch)
    placed = []
    for number in range(2, 14):
        hot(d, session, number)
        d.first(d.dispatches[-1])
        placed.append(d.dispatches[-1].engine_id)
    # 10 × B on engine 1, B = 1, 2, …; 110 × 1 on engine 2: equal at B = 11, where the fewer tokens decide.
    assert placed == 11 * [1] + [2]


@pytest.mark.parametrize(
    "wrong", ["cache_aware:cache_threshold=1.5", "kv_cost:temperature=-1", "kv_cost:block_size=0", "weighted:prefix=-1"]
)
def test_parameters_out_of_range_are_refused(wrong: str) -> None:
    with pytest.raises(ParrotError, match="expected"):
        parse_policy(wrong, GlobalSchedulerConfig())
