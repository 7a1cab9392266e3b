"""What is refused before a run: programs that could never end on the cluster as it is configured."""

from __future__ import annotations

import pytest

from parrot.configuration import ConfigurationError
from sim.fit import check_programs
from sim.workloads.program import After, Call, Get, Program, Read, Text, Write
from tests.sim.clusters import engine

MOST = 4


def fan(width: int, *gets: Get, **calls: tuple[After, ...]) -> Program:
    """`width` calls that are read by one more, whose output is "end"."""
    maps = [Call((Text(f"p{n}", 5), Write(f"m{n}", 5)), after=calls.get(f"m{n}", ())) for n in range(width)]
    reads = tuple(Read(f"m{n}") for n in range(width))
    return Program("wide", 0.0, (*maps, Call((*reads, Write("end", 5)))), gets or (Get("g", "end"),))


def passes(program: Program, most_tasks: int | None = MOST) -> bool:
    return list(check_programs(iter([program]), [engine()], "w", most_tasks)) == [program]


def test_a_session_that_is_full_before_anything_in_it_is_wanted_is_refused_and_names_the_limit() -> None:
    assert passes(fan(MOST - 1))
    with pytest.raises(ConfigurationError, match="program 'wide': submits more than 4 tasks, which is max_tasks"):
        passes(fan(MOST))
    assert passes(fan(MOST), most_tasks=None)


def test_what_is_wanted_makes_room_for_the_rest() -> None:
    assert passes(fan(MOST, Get("first", "m0"), Get("g", "end")))
    assert passes(fan(MOST, Get("g", "end"), Get("first", "m0", after=(After(None, 2.0),))))
    assert passes(fan(MOST, Get("first", f"m{MOST - 1}"), Get("g", "end")))
    with pytest.raises(ConfigurationError, match="more than 4 tasks"):
        passes(fan(MOST, Get("g", "end"), Get("late", "m0", after=(After("g"),))))


def test_calls_that_wait_are_not_submitted_yet() -> None:
    assert passes(fan(MOST, m0=(After(None, 5.0),)))


def test_a_call_with_more_outputs_than_a_session_may_have_is_refused() -> None:
    outputs = tuple(Write(f"x{n}", 1) for n in range(MOST + 1))
    program = Program("many", 0.0, (Call((Text("p", 5), Write("a", 5))), Call((Text("q", 5), *outputs))), (Get("g", "a"),))
    with pytest.raises(ConfigurationError, match="call 1: has 5 outputs; max_tasks_per_session is 4"):
        passes(program)
