"""Deduction, step by step in whatever order calls and gets come, against the same from scratch."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from parrot.serve.graph import Task
from tests.properties.deduction_reference import Deduced, Known, Name, deduce
from tests.serve.driver import Driver, out, read, text

EXAMPLES = int(os.environ.get("PARROT_EXAMPLES", "300"))

#: A get of the call's output by number, with its criteria; or the call's submission.
Step = tuple[int, Criteria | None]


@st.composite
def graphs(draw: st.DrawFn) -> list[list[int]]:
    """Which outputs each output's task reads. Output 0 comes last; an output reads others of higher numbers."""
    size = draw(st.integers(1, 9))
    return [
        draw(st.lists(st.sampled_from(range(i + 1, size)), unique=True, max_size=4)) if i + 1 < size else []
        for i in range(size)
    ]


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[list[int]], list[tuple[int, ...]], list[tuple[str, int, Criteria]]]:
    """A graph, which outputs each call has (in the order of its template), and calls and gets in the order of their arrival."""
    reads = draw(graphs())
    order = draw(st.permutations(range(len(reads))))
    calls: list[tuple[int, ...]] = []
    for output in order:  # an output may go on from the call before, as the second output of a call
        before = calls[-1] if calls else ()
        if before and output < before[-1] and before[-1] not in reads[output] and draw(st.booleans()):
            calls[-1] = (*before, output)
        else:
            calls.append((output,))
    for call in calls:
        for first, second in itertools.pairwise(call):
            reads[second] = [*reads[second], first]
    steps = [("call", number, Criteria.THROUGHPUT) for number in range(len(calls))]
    named = st.tuples(st.just("get"), st.integers(0, len(reads) - 1), st.sampled_from(list(Criteria)))
    steps += draw(st.lists(named, max_size=6))
    return reads, calls, draw(st.permutations(steps))


class Play:
    """Sends steps to a core, and knows all that was sent."""

    def __init__(self, reads: list[list[int]], calls: list[tuple[int, ...]]) -> None:
        self.reads = reads
        self.calls = calls
        self.d = Driver()
        self.session = self.d.open()
        self.variables = [self.d.variable(self.session) for _ in reads]
        self.named: dict[int, list[Criteria]] = {output: [] for output in range(len(reads))}
        self.names: dict[int, Name] = {}  # output -> the task that makes it
        self.tasks: dict[Name, Task] = {}

    def step(self, kind: str, number: int, criteria: Criteria) -> None:
        if kind == "get":
            self.named[number].append(criteria)
            self.d.get(self.session, self.variables[number], criteria)
            return
        segments: list[Any] = []
        before: int | None = None
        for output in self.calls[number]:
            segments.append(text(f"t{output}"))
            segments += [read(f"r{i}", self.variables[i]) for i in self.reads[output] if i != before]
            segments.append(out(f"o{output}", self.variables[output]))
            before = output
        answer = self.d.submit(self.session, *segments)
        call = self.d.core.calls(self.session)[answer.request_id]
        for output, task in zip(self.calls[number], call.tasks, strict=True):
            self.names[output] = name = (task.id.call, task.id.output)
            self.tasks[name] = task

    def known(self) -> dict[Name, Known]:
        readers: dict[int, list[int]] = {output: [] for output in self.names}
        sources = {o: [i for i in self.reads[o] if i in self.names] for o in self.names}
        for output in self.names:
            for source in sources[output]:
                readers[source].append(output)
        return {
            name: Known(
                tuple(self.names[r] for r in readers[output]),
                tuple(self.names[r] for r in readers[output] if len(sources[r]) == 1),
                tuple(self.named[output]),
            )
            for output, name in self.names.items()
        }


def as_deduced(task: Task) -> Deduced:
    aim = None if task.aim is None else (task.aim.id.call, task.aim.id.output)
    members = None if task.group is None else frozenset((m.id.call, m.id.output) for m in task.group.members)
    return Deduced(task.activated, task.criteria, task.depth, aim, task.level, members, task.latency_sensitive)


STRICTNESS = {None: 0, Criteria.THROUGHPUT: 1, Criteria.TPOT: 2, Criteria.TTFT: 2, Criteria.LATENCY: 3}


@settings(max_examples=EXAMPLES, deadline=None)
@given(arrivals())
def test_deduction_in_any_order_is_deduction_from_scratch(
    arrival: tuple[list[list[int]], list[tuple[int, ...]], list[tuple[str, int, Criteria]]],
) -> None:
    reads, calls, steps = arrival
    play = Play(reads, calls)
    for step in steps:
        before = {name: as_deduced(task) for name, task in play.tasks.items()}
        pinned = {name for name, task in play.tasks.items() if task.pinned}
        play.step(*step)
        assert play.d.faults == []
        for name, wanted in deduce(play.known()).items():
            task = play.tasks[name]
            found = as_deduced(task)
            if task.pinned:
                assert found.sensitive
                assert name in pinned or before[name].sensitive, "only what a get found so is kept so"
                found = found._replace(sensitive=wanted.sensitive)
            assert found == wanted, name
            assert task.group is None or task.group.root.call == (task.aim or task).id.call
            for source in task.awaited():
                assert source.rank < task.rank
            assert [s.id for s in task.producers()] == [s.id for s in task.awaited()] or task.sources is not None
        for name, old in before.items():  # what a get, or a call, said is never taken back
            task = play.tasks[name]
            assert STRICTNESS[task.criteria] >= STRICTNESS[old.criteria]
            assert task.depth >= old.depth
            assert task.activated >= old.activated
            if step[0] == "get":
                assert task.latency_sensitive >= old.sensitive, "a get has loosened"
    ready = [task for task in play.tasks.values() if task.activated and not task.missing]
    assert sorted(t.id for t in ready) == sorted(t.id for t in play.tasks.values() if t.state == "queued")
    for task in play.tasks.values():
        assert {c.id for c in task.consumers()} == {t.id for t in play.tasks.values() if task.output in t.inputs()}
        assert {p.id for p in task.producers()} == {t.id for t in play.tasks.values() if t.output in task.inputs()}


@settings(max_examples=EXAMPLES, deadline=None)
@given(arrivals(), st.data())
def test_a_cycle_is_refused_in_whatever_order_its_calls_come(
    arrival: tuple[list[list[int]], list[tuple[int, ...]], list[tuple[str, int, Criteria]]], data: st.DataObject
) -> None:
    """After any calls of a graph, one more is refused exactly if it would close a cycle."""
    reads, calls, steps = arrival
    play = Play(reads, calls)
    submitted = steps[: data.draw(st.integers(0, len(steps)))]
    for step in submitted:
        play.step(*step)
    free = [output for output in range(len(reads)) if output not in play.names]
    if not free:
        return
    target = data.draw(st.sampled_from(free))
    inputs = data.draw(st.lists(st.sampled_from(range(len(reads))), unique=True, min_size=1, max_size=3))
    needed, stack = set(), list(inputs)
    while stack:
        output = stack.pop()
        if output not in needed:
            needed.add(output)
            stack += reads[output] if output in play.names else []
    segments = (text("t"), *(read(f"r{i}", play.variables[i]) for i in inputs), out("o", play.variables[target]))
    request = play.d.ask(ev.SubmitCall, play.session, play.d.auths[play.session], segments)
    error = play.d.replies[request].error
    assert (error.code if error is not None else None) == ("cyclic_dependency" if target in needed else None)


# ---------------------------------------------------------------------------------------------- what it costs


def visits(d: Driver) -> int:
    return d.core.dataflow.deduction.visited


def chain(d: Driver, session: int, length: int, backward: bool) -> list[str]:
    variables = [d.variable(session) for _ in range(length)]
    for i in reversed(range(length)) if backward else range(length):
        inputs = [read("x", variables[i - 1])] if i else []
        d.submit(session, text("A"), *inputs, out("y", variables[i]))
    return variables


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("get_first", [False, True])
def test_a_chain_costs_its_length_in_whatever_order_it_comes(backward: bool, get_first: bool) -> None:
    length = 4096
    d = Driver()
    session = d.open()
    variables = [d.variable(session) for _ in range(length)]
    if get_first:
        d.get(session, variables[-1], Criteria.LATENCY)
    for i in reversed(range(length)) if backward else range(length):
        before = visits(d)
        inputs = [read("x", variables[i - 1])] if i else []
        d.submit(session, text("A"), *inputs, out("y", variables[i]))
        if backward or not get_first or i < length - 1:
            assert visits(d) - before <= 4, f"call {i}"
    if not get_first:
        d.get(session, variables[-1], Criteria.LATENCY)
    tasks = [call.tasks[0] for call in sorted(d.core.calls(session), key=lambda c: c.variables[-1].id)]  # type: ignore[union-attr]
    assert all(task.latency_sensitive for task in tasks)
    assert max(task.depth for task in tasks) == length - 1
    assert visits(d) <= 5 * length
    before = visits(d)
    for _ in range(1000):
        d.get(session, variables[-1], Criteria.LATENCY)
    assert visits(d) == before, "gets that say nothing new"


@pytest.mark.parametrize("reduce_first", [False, True])
def test_a_wide_fan_in_costs_its_width(reduce_first: bool) -> None:
    width = 4095
    d = Driver()
    session = d.open()
    variables = [d.variable(session) for _ in range(width)]

    def reduce() -> None:
        (final,) = d.outputs(d.submit(session, text("R"), *[read(f"x{i}", v) for i, v in enumerate(variables)], out("y")))
        d.get(session, final, Criteria.LATENCY)

    if reduce_first:
        reduce()
    for variable in variables:
        before = visits(d)
        d.submit(session, text("M"), out("y", variable))
        assert visits(d) - before <= 6
    if not reduce_first:
        reduce()
    assert visits(d) <= 5 * width
    group = next(c.tasks[0].group for c in d.core.calls(session) if c.tasks[0].depth)
    assert group is not None
    assert len(group.members) == width


def test_a_get_beside_a_large_graph_costs_what_it_changes() -> None:
    """4,000 outputs that read the same two tasks behind a ladder: the first get walks all of it, the others look at two."""
    d = Driver(max_tasks_per_session=10_000)
    session = d.open()
    pair = [d.outputs(d.submit(session, text("A"), out("y")))[0] for _ in range(2)]
    for _ in range(1000):
        pair = [d.outputs(d.submit(session, text("A"), *[read(f"x{v}", v) for v in pair], out("y")))[0] for _ in range(2)]
    outputs = [d.outputs(d.submit(session, text("B"), *[read(f"x{v}", v) for v in pair], out("y")))[0] for _ in range(4000)]
    before = visits(d)
    d.get(session, outputs[0], Criteria.LATENCY)
    assert visits(d) - before <= 1 + 2 * 2 * 1001
    for output in outputs[1:]:
        before = visits(d)
        d.get(session, output, Criteria.LATENCY)
        assert visits(d) - before <= 3


def test_a_ladder_that_comes_backward_is_walked_once() -> None:
    """Each task reads the two before it; calls come in the opposite order, so that numbers say nothing of what needs what."""
    length = 2000
    d = Driver()
    session = d.open()
    variables = [d.variable(session) for _ in range(length)]
    for i in reversed(range(length)):
        d.submit(session, text("A"), *[read(f"x{j}", variables[j]) for j in (i - 1, i - 2) if j >= 0], out("y", variables[i]))
    before = visits(d)
    d.get(session, variables[-1], Criteria.LATENCY)
    assert visits(d) - before <= 1 + 2 * length
    assert sorted(call.tasks[0].depth for call in d.core.calls(session)) == list(range(length))
