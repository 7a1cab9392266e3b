"""Engines sorted by load: as if they were sorted anew at each question, however many changes came before it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from parrot.protocol.engine import EngineDescription
from parrot.serve.engine_index import LEAST_NOTED, SHELF, EngineIndex
from parrot.serve.engines import Engine, by_load, by_room

CHANGES = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 4)), max_size=12)
MANY = 3 * SHELF  #: engines: they stand on several shelves


def engine(number: int) -> Engine:
    return Engine(number, EngineDescription(f"e{number}", "m", "t", "localhost", 1, "emulated", 8, 100, 100))


def by_words(e: Engine) -> tuple[str, int]:
    """A load that is no number, as a policy of one's own may have it."""
    return "light" if e.reserved < 2 else "heavy", e.reserved


def sorted_by(key: Callable[[Engine], Any], engines: list[Engine]) -> list[int]:
    return [e.id for e in sorted(engines, key=lambda e: (key(e), e.id))]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([4, MANY]), st.lists(st.tuples(CHANGES, st.sampled_from(["ask", "storm", "lose", "come"])), max_size=8))
def test_an_index_is_in_order_whenever_it_is_asked(count: int, rounds: list[tuple[list[tuple[int, int]], str]]) -> None:
    engines = [engine(n) for n in range(1, count + 1)]
    indexes = {key: EngineIndex(key) for key in (by_load, by_room, by_words)}
    for index in indexes.values():
        for e in engines:
            index.add(e)
    for changes, then in rounds:
        for number, tokens in changes * (max(LEAST_NOTED, count) + 2 if then == "storm" else 1):
            e = engines[number % len(engines)]
            e.reserved = tokens
            for index in indexes.values():
                index.update(e)
        if then == "lose":
            for gone in [engines.pop(0) for _ in range(len(engines) // 2)]:
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
            for load in dict.fromkeys(loads):
                assert index.up_to(load) == bisect_right(loads, load)
                assert [e.id for e in index.after(load)] == expected[index.up_to(load) :] + expected[: index.up_to(load)]
            assert [index.first(), index.last()] == [index.at(0), index.at(len(engines) - 1)]
            assert [e.id for e in index] == expected
            assert [index.at(place).id for place in range(len(engines))] == expected
            assert [e.id for e in index.among(expected[:1])] == expected[:1]
            assert [e.id for e in index.among(expected[::2])] == expected[::2]
            assert [e.id for e in index.without(expected[:1])] == expected[1:]
