"""random, power_of_two, round_robin and session_hash: the policies that know nothing of prefixes."""

from __future__ import annotations

from collections import Counter

import pytest

from parrot.serve.policies.power_of_two import PowerOfTwo
from parrot.serve.policies.session_hash import point_of, points_of
from tests.serve.driver import Driver, text
from tests.serve.policies.support import ask, engines_of, rules


class Scripted:
    """A generator that draws what a test says."""

    def __init__(self, *draws: float) -> None:
        self._draws = list(draws)

    def random(self) -> float:
        return self._draws.pop(0)


def spread(policy: str, engines: int, tasks: int, seed: int = 0, **capacity: int) -> list[int]:
    d = Driver(policy, {"random_seed": seed})
    for _ in range(engines):
        d.engine(**capacity)
    session = d.open()
    for number in range(tasks):
        ask(d, session, text(f"t{number}"))
    return engines_of(d)


def test_random_takes_every_engine_as_often_as_any_other() -> None:
    counts = Counter(spread("random", 4, 240, tasks_capacity=1000))
    assert all(40 <= counts[engine] <= 80 for engine in (1, 2, 3, 4)), counts
    assert spread("random", 4, 30) == spread("random", 4, 30)
    assert spread("random", 4, 30) != spread("random", 4, 30, seed=1)


@pytest.mark.parametrize("policy", ["random", "power_of_two"])
def test_a_draw_finds_the_engines_that_have_room_however_few_they_are(policy: str) -> None:
    placed = spread(policy, 50, 60, tasks_capacity=1)
    assert sorted(placed) == list(range(1, 51)), "each has one task, and ten tasks wait"


def test_a_draw_finds_room_that_is_there_only_because_the_prompt_is_cached() -> None:
    d = Driver("random")
    d.engine(tokens_capacity=300)
    d.engine(tokens_capacity=300)
    session = d.open()
    for _ in range(2):
        ask(d, session, text("long", 200))
    assert sorted(engines_of(d)) == [1, 2], "where it has room as a whole"
    ask(d, session, text("long", 200))
    assert len(d.dispatches) == 3, "a copy of the prompt would have no room anywhere"


def test_power_of_two_takes_the_better_of_the_two_that_the_generator_names() -> None:
    # Engines lie in the order of their room: those that are idle, by id, then those with the most tokens left.
    d = Driver()
    d.core.scheduler.policy = PowerOfTwo({}, Scripted(0.0, 0.3, 0.99, 0.5, 0.99, 0.99, 0.7))  # type: ignore[arg-type]
    for _ in range(4):
        d.engine()
    session = d.open()
    ask(d, session, text("a", 1000))  # 1 and 2, both idle: the lower id
    ask(d, session, text("b", 10))  # of 2, 3, 4, 1 the last and the third: 1 has 1016 tokens, 4 none
    ask(d, session, text("c", 10))  # of 2, 3, 4, 1 the last, twice, which is one engine, and the third: 4 has 26 tokens
    assert engines_of(d) == [1, 4, 4]


def test_round_robin_finds_the_next_engine_with_room_among_many_that_are_full() -> None:
    d = Driver("round_robin")
    for _ in range(100):
        d.engine(tasks_capacity=1)
    session = d.open()
    for number in range(102):
        ask(d, session, text(f"t{number}"))
    first = {dispatch.engine_id: dispatch for dispatch in d.dispatches}
    assert sorted(first) == list(range(1, 101))
    d.finish(first[70])
    d.finish(first[40])
    assert engines_of(d)[-2:] == [70, 40]


def test_session_hash_keeps_a_session_on_its_engine_and_moves_only_the_sessions_of_a_lost_one() -> None:
    d = Driver("session_hash", max_sessions_num=1000)
    for _ in range(8):
        d.engine()
    home: dict[int, int] = {}

    def visit(session: int, turn: int) -> int:
        ask(d, session, text(f"s{session}t{turn}"))
        engine_id = engines_of(d)[-1]
        d.finish(d.dispatches[-1])
        return engine_id

    sessions = [d.open() for _ in range(300)]
    for session in sessions:
        home[session] = visit(session, 0)
        assert visit(session, 1) == home[session]
    counts = Counter(home.values())
    assert all(15 <= counts[engine] <= 75 for engine in range(1, 9)), counts
    d.lose(3)
    moved = {session: visit(session, 2) for session in sessions}
    assert all(moved[session] == home[session] for session in sessions if home[session] != 3)
    assert len({moved[session] for session in sessions if home[session] == 3}) > 3, "the lost engine's load is shared"
    d.engine()  # the ninth takes its share, and nobody moves but to it
    again = {session: visit(session, 3) for session in sessions}
    assert {engine for session, engine in again.items() if engine != moved[session]} == {9}


def test_session_hash_goes_on_clockwise_from_a_full_home_and_comes_back() -> None:
    d = Driver("session_hash")
    for _ in range(3):
        d.engine(tasks_capacity=1)
    session = d.open()
    ask(d, session, text("a"))
    ask(d, session, text("b"))
    home, other = engines_of(d)
    assert home != other
    d.finish(d.dispatches[0])
    ask(d, session, text("c"))
    assert engines_of(d) == [other, home]
    assert rules(d) == ["home", "next", "home"]


def test_session_hash_finds_the_same_engine_by_looking_up_room_as_by_walking_the_ring() -> None:
    def placed(engines_with_room: int) -> list[int]:
        d = Driver("session_hash", {"params": {"points": 8}})
        for number in range(60):
            d.engine(tasks_capacity=2 if number < engines_with_room else 1)
        session = d.open()
        for number in range(60):
            ask(d, session, text(f"t{number}"))
        return engines_of(d)

    once = placed(0)
    assert sorted(once) == list(range(1, 61)), "clockwise, each once"
    assert placed(60) == [engine for engine in once[:30] for _ in range(2)]


def test_the_places_of_an_engine_are_the_same_in_every_process() -> None:
    assert points_of(1, 2) == [10924540682486020936, 11170741458976308432]
    assert point_of(1000) == 3467484930323575787
