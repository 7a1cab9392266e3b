"""`parrot`: harm in tokens, groups whole and spread, prefixes followed while they are worth it."""

from __future__ import annotations

from collections import Counter

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from tests.serve.driver import Driver, described, out, read, text, value
from tests.serve.policies.scenes import ask, begun, engines_of, heads, map_reduce, profile, rules


def test_throughput_work_alone_is_spread_evenly() -> None:
    d = Driver("parrot")
    d.engine()
    d.engine()
    session = d.open()
    for i in range(20):
        ask(d, session, f"bulk{i}", 100, criteria=Criteria.THROUGHPUT)
    assert Counter(engines_of(d)) == {1: 10, 2: 10}


def test_one_latency_task_keeps_throughput_work_away_by_no_more_than_it_would_suffer() -> None:
    d = Driver("parrot")
    d.engine()
    d.engine()
    session = d.open()
    ask(d, session, "chat", 100, criteria=Criteria.LATENCY)
    for i in range(20):
        ask(d, session, f"bulk{i}", 100, criteria=Criteria.THROUGHPUT)
    # Harm beside the chat: what is reserved there and once the new tokens; so engine 2 has two tasks more, no more.
    assert Counter(engines_of(d)[1:]) == {1: 9, 2: 11}


def test_latency_tasks_gather_where_capacity_is_lost_already_until_the_bound_is_reached() -> None:
    def chats(**params: int) -> list[int]:
        d = Driver("parrot", {"params": params})
        d.engine()
        d.engine()
        session = d.open()
        for i in range(5):
            ask(d, session, f"chat{i}", 84, criteria=Criteria.LATENCY)  # 100 tokens each
        return engines_of(d)

    assert chats(latency_capacity=300) == [1, 1, 1, 2, 2], "the second engine keeps its capacity while the first has room"
    assert chats() == [1, 2, 1, 2, 1], "without a bound nothing is lost, and load decides"


def test_a_latency_task_waits_for_an_engine_that_holds_no_more_than_the_bound() -> None:
    d = Driver("parrot", {"params": {"latency_capacity": 300}})
    d.engine()
    session = d.open()
    ask(d, session, "bulk", 384, criteria=Criteria.THROUGHPUT)
    ask(d, session, "chat", 84, criteria=Criteria.LATENCY)
    assert heads(d) == ["bulk"]
    d.finish(d.dispatches[0])
    assert heads(d) == ["chat"]


def test_a_group_lands_on_one_engine_where_a_batch_costs_no_more_than_one_of_its_tasks() -> None:
    def spread(fixed_s: float, token_s: float, **params: bool) -> list[int]:
        d = Driver("parrot", {"graph_group": True, "params": params})
        for _ in range(4):
            d.engine(latency_profile=profile(fixed_s, token_s))
        map_reduce(d, d.open(), "m", 8, tokens=100)
        assert set(rules(d)) == {"task_group"}
        return sorted(Counter(engines_of(d)).values())

    assert spread(0.1, 0.0) == [8], "all iterations cost the same: alone or together"
    assert spread(0.0, 0.1) == [2, 2, 2, 2], "every token costs the same: together they take the sum"
    assert spread(0.0, 0.1, spread_groups=False) == [8], "as the paper has it"


def test_a_group_is_spread_where_iterations_go_on_anyway() -> None:
    def spread(running: int) -> list[int]:
        d = Driver("parrot", {"graph_group": True})
        for _ in range(4):
            d.engine(latency_profile=profile(0.1, 0.001))
        session = d.open()
        for i in range(running):
            ask(d, session, f"runs{i}", 10, criteria=Criteria.THROUGHPUT)
        map_reduce(d, d.open(), "m", 8, tokens=40)
        return sorted(Counter(engines_of(d)[running:]).values())

    assert spread(0) == [8], "each engine more would have to pay for iterations of its own"
    assert spread(8) == [2, 2, 2, 2], "only what its own tokens add is to be paid, and it ends sooner"


def test_a_group_keeps_away_from_latency_tasks_by_what_all_of_it_would_make_them_wait() -> None:
    d = Driver("parrot", {"graph_group": True})
    d.engine()
    d.engine()
    session = d.open()
    ask(d, session, "chat", 100, criteria=Criteria.LATENCY)
    ask(d, session, "bulk", 400, criteria=Criteria.THROUGHPUT)
    assert engines_of(d) == [1, 2]
    map_reduce(d, d.open(), "m", 4, tokens=100)
    # Beside the chat: 116 tokens reserved and 464 for it to wait for; 416 are reserved beside the bulk.
    assert engines_of(d)[2:] == [2, 2, 2, 2]


def test_a_group_that_no_engine_can_hold_is_split_over_as_few_as_can() -> None:
    d = Driver("parrot", {"graph_group": True})
    for _ in range(4):
        d.engine(tokens_capacity=300)
    map_reduce(d, d.open(), "m", 8, tokens=84)  # 100 tokens a task
    assert engines_of(d) == [1, 1, 1, 2, 2, 2, 3, 3]


def test_a_group_goes_past_an_engine_that_cannot_hold_it_to_one_that_can() -> None:
    d = Driver("parrot", {"graph_group": True})
    d.engine(tasks_capacity=3)
    d.engine()
    session = d.open()
    map_reduce(d, session, "m", 4)
    assert engines_of(d) == [2, 2, 2, 2]


def test_without_graph_group_a_group_is_placed_task_by_task() -> None:
    d = Driver("parrot")
    for _ in range(2):
        d.engine(latency_profile=profile(0.1))
    map_reduce(d, d.open(), "m", 4)
    assert engines_of(d) == [1, 2, 1, 2]
    assert set(rules(d)) == {"least_harm"}


def test_depth_comes_before_breadth_under_app_fifo_alone() -> None:
    def order(**switches: bool) -> list[str]:
        d = Driver("parrot", switches)
        d.engine(tasks_capacity=1)
        session = d.open()
        ask(d, session, "runs")
        # Two chains of two calls: the second call of the first chain against the first of the second.
        for name in "ab":
            (x,) = d.outputs(d.submit(session, text(f"{name}1"), out("x")))
            (y,) = d.outputs(d.submit(session, text(f"{name}2"), read("x", x), out("y")))
            d.get(session, y)
        seen = []
        while d.dispatches:
            seen.append(heads(d)[0])
            d.finish(d.dispatches[0])
        return seen[1:]

    assert order(app_fifo=True) == ["a1", "a2", "b1", "b2"]
    assert order() == ["a1", "b1", "a2", "b2"]


def test_ctx_group_lets_those_overtake_that_share_the_first_ones_prefix() -> None:
    def order(**switches: bool) -> list[str]:
        d = Driver("parrot", switches)
        d.engine(tasks_capacity=2)
        session = d.open()
        ask(d, session, "runs1")
        ask(d, session, "runs2")
        for i, prefix in enumerate("ABA"):
            (x,) = d.outputs(d.submit(session, text(prefix, 100), value("q", f"q{i}"), out("x")))
            d.get(session, x)
        ended = [ev.TaskFinished(r.epoch, r.task, r.attempt, value("o", r.output_var).value, 5) for r in d.dispatches]  # type: ignore[arg-type, union-attr]
        d.dispatches.clear()
        d.send(*ended)
        return heads(d)

    assert order(ctx_group=True) == ["A", "A"]
    assert order() == ["A", "B"]


def test_ctx_group_follows_a_prefix_only_while_it_outweighs_the_load() -> None:
    def largest(weight: float) -> int:
        d = Driver("parrot", {"ctx_group": True, "params": {"ctx_weight": weight}})
        session = d.open()
        for i in range(12):
            (x,) = d.outputs(d.submit(session, text("hot", 50), value("q", f"q{i}", 84), out("x")))
            d.get(session, x)
        d.send(*(ev.RegisterEngine(900 + i, described(f"e{i}")) for i in range(3)))
        return max(Counter(engines_of(d)).values())

    assert largest(1e9) == 12, "as the paper has it"
    assert largest(2.0) < 8


def test_ctx_aware_says_so_and_counts_harm_against_the_prefix() -> None:
    d = Driver("parrot", {"ctx_aware": True, "params": {"ctx_weight": 1.0}})
    d.engine()
    d.engine()
    session = d.open()

    def prompt(prefix: str, tokens: int, question: str) -> int:
        (x,) = d.outputs(d.submit(session, text(prefix, tokens), value("q", question), out("x")))
        d.get(session, x)
        return engines_of(d)[-1]

    assert prompt("long", 400, "a") == 1
    assert prompt("long", 400, "b") == 2, "426 tokens are reserved there, and the prefix saves 400"
    d.finish(d.dispatches[0])
    assert prompt("long", 400, "c") == 1
    assert rules(d) == ["least_harm", "least_harm", "prefix"]


def test_a_prefix_that_all_engines_hold_does_not_hide_the_least_loaded_one() -> None:
    d = Driver("parrot", {"ctx_aware": True})
    for _ in range(50):
        d.engine()
    session = d.open()
    for i in range(50):  # each goes where nothing is reserved, since no weight follows so short a prefix
        (x,) = d.outputs(d.submit(session, text("hot", 1), value("q", f"q{i}", 100), out("x")))
        d.get(session, x)
    assert sorted(engines_of(d)) == list(range(1, 51))
    victim = next(dispatch for dispatch in d.dispatches if dispatch.engine_id == 37)
    d.finish(victim)
    (x,) = d.outputs(d.submit(session, text("hot", 1), value("q", "last", 100), out("x")))
    d.get(session, x)
    assert engines_of(d)[-1] == 37
    assert begun(d, "hot").engine_id != 37
