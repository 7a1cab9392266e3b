"""Engines sorted by load: as if they were sorted anew at each question, however many changes came before it."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from parrot.protocol.engine import EngineDescription
from parrot.serve.engines import LEAST_NOTED, Engine, EngineIndex, by_load, by_room

CHANGES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=12)


def engine(number: int) -> Engine:
    return Engine(number, EngineDescription(f"e{number}", "m", "t", "localhost", 1, "emulated", 8, 100, 100))


def sorted_by(key: Callable[[Engine], int], engines: list[Engine]) -> list[int]:
    return [e.id for e in sorted(engines, key=lambda e: (key(e), e.id))]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(CHANGES, st.sampled_from(["ask", "storm", "lose", "come"])), max_size=8))
def test_an_index_is_in_order_whenever_it_is_asked(rounds: list[tuple[list[tuple[int, int]], str]]) -> None:
    engines = [engine(n) for n in range(1, 5)]
    indexes = {key: EngineIndex(key) for key in (by_load, by_room)}
    for index in indexes.values():
        for e in engines:
            index.add(e)
    for changes, then in rounds:
        for number, tokens in changes * (LEAST_NOTED + 2 if then == "storm" else 1):
            e = engines[number % len(engines)]
            e.reserved = tokens
            for index in indexes.values():
                index.update(e)
        if then == "lose" and len(engines) > 1:
            gone = engines.pop(0)
            for index in indexes.values():
                index.remove(gone)
        elif then == "come":
            engines.append(engine(max(e.id for e in engines) + 1))
            for index in indexes.values():
                index.add(engines[-1])
        for key, index in indexes.items():
            expected = sorted_by(key, engines)
            loads = sorted(key(e) for e in engines)
            assert len(index) == len(engines)
            assert index.up_to(loads[0]) == loads.count(loads[0])
            assert [index.first(), index.last()] == [index.at(0), index.at(len(engines) - 1)]
            assert [e.id for e in index] == expected
            assert [e.id for e in index.among(expected[:1])] == expected[:1]
            assert [e.id for e in index.without(expected[:1])] == expected[1:]
