"""Times and events of the emulated engine; that jumping equals stepping is in tests/properties/test_engine_jump.py."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from parrot.engine.contexts import Context
from parrot.engine.core import Batch, EngineLimits, EngineTask, Link
from parrot.engine.emulated.engine import EmulatedEngine, EmulatedEvent, Iterations
from parrot.engine.running import Task
from parrot.latency import FixedCost, LatencyModel, LatencyProfile


def engine(overhead_s: float = 0.0, fixed_s: float = 1.0, **options: Any) -> EmulatedEngine:
    profile = LatencyProfile(
        name="t", model="m", device="d", attn_func="a", fixed=(FixedCost(8, fixed_s),), hinges=(), pair_s=0.0, kv_s=0.0,
        task_overhead_s=overhead_s,
    )  # fmt: skip
    limits = EngineLimits(64, 4, 8, 32, 256, 4, 128, pipeline_depth=options.pop("pipeline_depth", 0))
    return EmulatedEngine(limits, LatencyModel(profile), **options)


def run(emulated: EmulatedEngine) -> list[EmulatedEvent]:
    events: list[EmulatedEvent] = []
    while (edge := emulated.next_edge()) is not None:
        events += emulated.advance(edge)
    return events


def chat(key: str, context_id: int, most: int = 100) -> EngineTask:
    return EngineTask(key, (Link(context_id, 8),), context_id + 1, most)


def test_an_output_takes_an_iteration_a_token() -> None:
    emulated = engine()
    emulated.submit(chat("a", 1), 5, 10.0)
    assert [(e.kind, e.at) for e in run(emulated)] == [("started", 10.0), ("first_token", 11.0), ("finished", 15.0)]


def test_what_is_finished_says_how_it_went() -> None:
    emulated = engine()
    emulated.submit(chat("a", 1), 5, 0.0)
    emulated.advance(2.5)
    emulated.submit(EngineTask("b", (Link(1, 8), Link(5, 3)), 6, 100), 2, 2.5)
    last = {event.key: event for event in run(emulated) if event.kind == "finished"}
    assert last["a"] == EmulatedEvent("finished", "a", 5.0, 0, 0, 5, 8, 4.0, 1.0)
    assert last["b"] == EmulatedEvent("finished", "b", 5.0, 8, 0, 2, 11, 1.0, 1.0)


def test_max_gen_length_cuts_what_it_would_say() -> None:
    emulated = engine()
    emulated.submit(chat("a", 1, most=3), 50, 0.0)
    assert run(emulated)[-1].output_tokens == 3


@pytest.mark.parametrize("depth", [0, 1])
def test_tasks_of_one_instant_begin_together(depth: int) -> None:
    emulated = engine(pipeline_depth=depth)
    emulated.submit(chat("a", 1), 2, 0.0)
    emulated.submit(chat("b", 3), 2, 0.0)
    assert [e.at for e in run(emulated)] == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


def test_a_task_is_admitted_after_its_overhead() -> None:
    emulated = engine(overhead_s=0.25)
    emulated.submit(chat("a", 1), 1, 0.0)
    assert [(e.kind, e.at) for e in run(emulated)] == [("started", 0.25), ("first_token", 1.25), ("finished", 1.25)]


def test_what_arrives_at_an_edge_comes_before_it() -> None:
    emulated = engine()
    emulated.submit(chat("a", 1), 9, 0.0)
    emulated.advance(0.0)
    emulated.submit(chat("b", 3), 1, 3.0)
    assert [e.at for e in run(emulated) if e.key == "b"] == [3.0, 4.0, 4.0]


def test_jumping_passes_over_edges_at_which_nothing_changes() -> None:
    noted: list[Iterations] = []
    emulated = engine(observe=noted.append)
    emulated.submit(chat("a", 1), 90, 0.0)
    edges = 0
    while (edge := emulated.next_edge()) is not None:
        emulated.advance(edge)
        edges += 1
    assert edges == 3  # it begins; its fill ends; it ends
    assert sum(note.iterations for note in noted) == 90


def test_an_aborted_task_is_told_of_no_more() -> None:
    emulated = engine()
    emulated.submit(chat("a", 1), 5, 0.0)
    emulated.advance(1.0)
    assert emulated.abort("a", 1.5)
    assert not emulated.abort("a", 1.5)
    assert run(emulated) == []
    assert not emulated.core.has_work


def test_what_has_ended_is_gone_without_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        before = {id(thing) for thing in gc.get_objects() if isinstance(thing, Task | Context | Batch)}
        emulated = engine()
        emulated.submit(chat("a", 1), 9, 0.0)
        emulated.submit(EngineTask("b", (Link(1, 8), Link(3, 3)), 4, 20), 9, 0.0)
        emulated.submit(EngineTask("c", (Link(1, 8), Link(3, 3)), 5, 20), 9, 0.0)  # goes on in a copy of the block
        emulated.submit(chat("d", 6), 9, 0.0)
        emulated.advance(3.0)
        emulated.abort("c", 3.5)  # while it decodes
        emulated.submit(chat("e", 8), 9, 4.0)
        emulated.abort("e", 4.0)  # before it arrives
        run(emulated)
        emulated.free_contexts(range(10), 99.0)
        assert not emulated.core.cached_tokens
        left = [thing for thing in gc.get_objects() if isinstance(thing, Task | Context | Batch)]
        assert [thing for thing in left if id(thing) not in before] == []
    finally:
        gc.enable()


def test_a_late_shell_loses_no_event_and_no_time() -> None:
    emulated = engine()
    emulated.submit(chat("a", 1), 3, 0.0)
    emulated.submit(chat("b", 3), 1, 7.0)
    assert emulated.next_edge() == 0.0
    told = emulated.advance(20.0)
    assert [(e.key, e.kind, e.at) for e in told] == [
        ("a", "started", 0.0), ("a", "first_token", 1.0), ("a", "finished", 3.0),
        ("b", "started", 7.0), ("b", "first_token", 8.0), ("b", "finished", 8.0),
    ]  # fmt: skip


def test_no_room_is_rejected_and_nonsense_is_failed() -> None:
    emulated = engine()
    for i in range(5):
        emulated.submit(chat(str(i), 2 * i + 1), 1, 0.0)
    emulated.submit(chat("0", 99), 1, 0.0)
    told = emulated.advance(0.0)
    assert [(e.key, e.kind, e.code) for e in told if e.code] == [
        ("0", "failed", "conflict"),
        ("4", "rejected", "engine_rejected"),
    ]
    emulated.submit(EngineTask("huge", (Link(50, 500),), 51, 9), 1, 30.0)
    assert [(e.kind, e.code) for e in run(emulated) if e.key == "huge"] == [("failed", "task_too_large")]


def test_an_output_that_was_streamed_whole_before_ends_at_once() -> None:
    emulated = engine()
    emulated.submit(EngineTask("a", (Link(1, 8),), 2, 3, forced_tokens=3), 9, 0.0)
    last = run(emulated)[-1]
    assert (last.kind, last.key, last.at) == ("finished", "a", 1.0)


def test_streamed_tokens_are_told_one_by_one() -> None:
    emulated = engine()
    emulated.submit(chat("a", 1), 4, 0.0, stream=True)
    assert [e.at for e in run(emulated) if e.kind == "progressed"] == [1.0, 2.0, 3.0, 4.0]


def test_without_streaming_one_can_ask_how_far_a_task_is() -> None:
    emulated = engine()
    emulated.submit(chat("a", 1), 50, 0.0)
    emulated.advance(1.0)
    assert [emulated.generated("a", t) for t in (1.5, 7.25, 7.75, 30.0)] == [1, 7, 7, 29]
    assert emulated.generated("b", 30.0) == 0


def test_an_engine_without_cost_needs_no_time() -> None:
    emulated = engine(fixed_s=0.0)
    emulated.submit(chat("a", 1), 100, 5.0)
    assert [e.at for e in emulated.advance(5.0)] == [5.0, 5.0, 5.0]
    assert emulated.next_edge() is None


def test_an_output_ends_where_the_engine_s_room_behind_its_prompt_does() -> None:
    emulated = engine()  # takes 128 tokens in all
    emulated.submit(EngineTask("a", (Link(1, 100),), 2, 512), 300, 0.0)
    finished = run(emulated)[-1]
    assert (finished.kind, finished.output_tokens) == ("finished", 28)
    emulated.submit(EngineTask("b", (Link(3, 128),), 4, 512), 1, 50.0)
    assert [(e.kind, e.code) for e in run(emulated)] == [("failed", "task_too_large")]
