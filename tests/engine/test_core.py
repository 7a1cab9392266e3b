"""What EngineCore's rules say, one behaviour a test; the laws are in tests/properties/test_engine_core.py."""

from __future__ import annotations

import gc
from types import FunctionType, ModuleType
from typing import Any

import pytest

from parrot.engine.core import Batch, EngineCore, EngineLimits, EngineTask, Link, Refused
from parrot.engine.running import Task
from parrot.latency import BatchShape


def limits(**changes: Any) -> EngineLimits:
    usual: dict[str, Any] = {
        "num_blocks": 64, "block_size": 4, "max_batch_size": 8, "max_num_batched_tokens": 32, "max_total_tokens": 256,
        "tasks_capacity": 8, "max_seq_len": 128,
    }  # fmt: skip
    return EngineLimits(**(usual | changes))


def task(key: str, *links: tuple[int, int], output: int | None = None, most: int = 4, **fields: Any) -> EngineTask:
    return EngineTask(key, tuple(Link(*link) for link in links), output, most if output is not None else 0, **fields)


def step(core: EngineCore, **ended: int) -> Batch:
    batch = core.next_batch(0.0)
    assert batch is not None
    core.complete(batch, ended, 0.0)
    return batch


def ranges(batch: Batch) -> dict[Any, tuple[int, int]]:
    return {row.key: (row.start, row.stop) for row in batch.rows}


def test_a_prompt_of_several_links_is_one_row_that_samples() -> None:
    core = EngineCore(limits())
    assert core.submit(task("a", (1, 5), (2, 0), (3, 6), output=4), 0.0) == 11
    batch = step(core)
    assert ranges(batch) == {"a": (0, 11)}
    assert batch.rows[0].samples
    assert batch.rows[0].context_id == 3
    assert batch.admitted == (("a", 0),)
    assert ranges(step(core)) == {"a": (11, 12)}


def test_what_another_task_has_filled_is_found() -> None:
    core = EngineCore(limits())
    core.submit(task("a", (1, 10), (2, 3), output=3), 0.0)
    step(core, a=1)
    core.submit(task("b", (1, 10), (4, 2), output=5), 0.0)
    batch = step(core)
    assert ranges(batch) == {"b": (10, 12)}
    assert batch.admitted == (("b", 10),)
    assert len(batch.copies) == 1  # the block in which context 1 ends is context 2's already


def test_a_generated_context_is_cut_to_what_was_kept_and_continued() -> None:
    core = EngineCore(limits())
    core.submit(task("a", (1, 8), output=2, most=9), 0.0)
    for _ in range(5):
        step(core)
    step(core, a=4)
    assert core.spans(2) == [(1, 0, 8), (2, 8, 12)]
    core.submit(task("b", (1, 8), (2, 4), (3, 3), output=4), 0.0)
    assert ranges(step(core)) == {"b": (12, 15)}


def tasks_held(core: EngineCore) -> int:
    """How many tasks can be reached from it."""
    seen, reached = {id(core)}, [core]
    for thing in reached:  # it grows while it is read
        for other in gc.get_referents(thing):
            if id(other) not in seen and not isinstance(other, type | ModuleType | FunctionType):
                seen.add(id(other))
                reached.append(other)
    return sum(isinstance(thing, Task) for thing in reached)


def test_an_engine_on_which_nothing_runs_holds_no_task() -> None:
    core = EngineCore(limits())
    for key, first in (("a", 1), ("b", 3)):
        core.submit(task(key, (first, 8), output=first + 1, most=50), 0.0)
    step(core)
    assert tasks_held(core) == 2
    step(core, a=2)  # ended long before max_gen_length
    step(core, b=3)
    assert core.num_total_tasks == 0
    assert tasks_held(core) == 0


def test_the_last_token_of_an_output_is_computed_by_whoever_goes_on_behind_it() -> None:
    core = EngineCore(limits())
    core.submit(task("a", (1, 8), output=2, most=3), 0.0)
    for _ in range(3):
        step(core)
    assert core.num_total_tasks == 0  # it had max_gen_length tokens
    core.submit(task("b", (1, 8), (2, 3), (3, 2)), 0.0)
    assert ranges(step(core)) == {"b": (10, 13)}
    assert core.num_total_tasks == 0  # it only filled


def test_a_prompt_that_is_held_whole_computes_its_last_token_again() -> None:
    core = EngineCore(limits())
    core.submit(task("a", (1, 8)), 0.0)
    step(core)
    core.submit(task("b", (1, 8), output=2), 0.0)
    batch = step(core)
    assert ranges(batch) == {"b": (7, 8)}
    assert batch.rows[0].samples
    assert batch.admitted == (("b", 7),)


def test_one_task_fills_what_two_need_and_the_other_takes_over_when_it_goes() -> None:
    core = EngineCore(limits(fill_chunk_size=4))
    core.submit(task("a", (1, 12), output=2), 0.0)
    core.submit(task("b", (1, 12), output=3), 0.0)
    assert ranges(step(core)) == {"a": (0, 4)}
    assert core.abort("a")
    assert ranges(step(core)) == {"b": (4, 8)}


def test_a_copy_is_made_only_of_what_an_earlier_batch_has_computed() -> None:
    core = EngineCore(limits(fill_chunk_size=4))
    core.submit(task("a", (1, 6), (2, 3)), 0.0)
    core.submit(task("b", (1, 6), (3, 3)), 0.0)
    step(core)
    core.abort("a")
    taken_over = step(core)
    assert ranges(taken_over) == {"b": (4, 6)}  # not across the boundary, behind which its block begins as a copy
    assert taken_over.copies == ()
    behind = step(core)
    assert ranges(behind) == {"b": (6, 9)}
    assert len(behind.copies) == 1


def test_chunks_share_the_budget_with_decode_rows_which_come_first() -> None:
    core = EngineCore(limits(fill_chunk_size=6, max_num_batched_tokens=10))
    core.submit(task("a", (1, 3), output=2), 0.0)
    step(core)
    core.submit(task("b", (3, 9), output=4), 0.0)
    core.submit(task("c", (5, 9), output=6), 0.0)
    batch = step(core)
    assert [row.key for row in batch.rows] == ["a", "b", "c"]
    assert ranges(batch) == {"a": (3, 4), "b": (0, 6), "c": (0, 3)}
    assert batch.shape == BatchShape(1, 2, 9, 21 + 6, 4, 4)


def test_a_fill_that_may_not_be_cut_and_does_not_fit_runs_alone() -> None:
    core = EngineCore(limits(max_num_batched_tokens=10))
    core.submit(task("a", (1, 3), output=2, most=9), 0.0)
    step(core)
    core.submit(task("b", (3, 25), output=4), 0.0)
    assert ranges(step(core)) == {"b": (0, 25)}
    assert [row.key for row in step(core).rows] == ["a", "b"]


def test_out_of_blocks_the_oldest_retained_context_goes_first() -> None:
    core = EngineCore(limits(num_blocks=6))
    for key in (1, 2, 3):
        core.submit(task(str(key), (key, 8)), 0.0)
        step(core)
    core.submit(task("again", (1, 8)), 0.0)
    step(core)
    core.submit(task("new", (4, 8)), 0.0)
    step(core)
    assert core.take_evicted() == (2,)
    assert core.take_evicted() == ()


def test_what_is_used_again_is_given_up_after_what_is_not() -> None:
    core = EngineCore(limits(num_blocks=6))
    for number, key in enumerate("abc", start=1):
        core.submit(task(key, (number, 8)), 0.0)
        step(core)
    core.submit(task("d", (4, 8)), 0.0)  # the order is made for it
    step(core)
    assert core.take_evicted() == (1,)
    core.submit(task("e", (2, 8), (5, 0)), 0.0)
    step(core)
    core.submit(task("f", (6, 16)), 0.0)
    step(core)
    assert core.take_evicted() == (3, 4)
    core.submit(task("g", (7, 8)), 0.0)
    step(core)
    assert core.take_evicted() == (5, 2)  # a child before its parent


def test_a_task_alone_that_copies_leave_no_room_begins_anew() -> None:
    core = EngineCore(limits(num_blocks=4))
    core.submit(task("a", (1, 10), (2, 2)), 0.0)
    step(core)
    core.submit(task("b", (1, 10), (3, 6)), 0.0)  # behind context 1 it would need a copy: five blocks
    assert ranges(step(core)) == {"b": (0, 16)}


def test_the_youngest_is_preempted_and_its_tokens_are_filled_again() -> None:
    core = EngineCore(limits(num_blocks=8))
    core.submit(task("a", (1, 8), output=2, most=20), 0.0)
    core.submit(task("b", (3, 8), output=4, most=20), 0.0)
    batches = [step(core)]
    while not batches[-1].preempted:
        batches.append(step(core))
    assert batches[-1].preempted == ("b",)
    assert set(ranges(batches[-1])) == {"a"}
    generated = sum("b" in ranges(batch) for batch in batches)
    step(core, a=1)
    again = step(core)
    assert ranges(again)["b"][1] == 8 + generated
    assert again.rows[0].samples
    assert again.admitted == ()  # it was admitted once


def test_max_total_tokens_preempts_too() -> None:
    core = EngineCore(limits(max_total_tokens=24))
    core.submit(task("a", (1, 8), output=2, most=12), 0.0)
    core.submit(task("b", (3, 8), output=4, most=12), 0.0)
    assert any(step(core).preempted for _ in range(8))


def test_forced_tokens_are_filled_and_count() -> None:
    core = EngineCore(limits())
    core.submit(task("a", (1, 8), output=2, most=4, forced_tokens=3), 0.0)
    assert ranges(step(core)) == {"a": (0, 11)}
    assert core.num_total_tasks == 0


def test_freed_parents_stay_until_their_children_go() -> None:
    core = EngineCore(limits())
    core.submit(task("a", (1, 8), (2, 8)), 0.0)
    step(core)
    assert core.free_contexts([1, 99]) == 8
    assert core.cached_tokens == 16
    assert core.free_contexts([2]) == 8
    assert core.cached_tokens == 0
    assert core.take_evicted() == ()


def test_with_a_pipeline_rows_are_issued_as_if_nothing_had_ended() -> None:
    core = EngineCore(limits(pipeline_depth=1))
    core.submit(task("a", (1, 8), output=2), 0.0)
    first, second = core.next_batch(0.0), core.next_batch(0.0)
    assert first is not None
    assert second is not None
    assert ranges(second) == {"a": (8, 9)}
    assert core.next_batch(0.0) is None
    assert core.complete(first, {"a": 1}, 0.0).finished == ("a",)
    assert core.spans(2)[-1] == (2, 8, 9)
    assert core.has_work  # its surplus row is still being computed
    progress = core.complete(second, {}, 0.0)
    assert (progress.first_tokens, progress.finished, progress.preempted) == ((), (), ())
    assert not core.has_work


def test_a_failed_iteration_leaves_nothing_that_was_not_computed() -> None:
    core = EngineCore(limits(fill_chunk_size=4))
    core.submit(task("a", (1, 8), output=2), 0.0)
    step(core)
    batch = core.next_batch(0.0)
    assert batch is not None
    assert core.fail(batch) == ("a",)
    core.submit(task("b", (1, 8), output=3), 0.0)
    assert ranges(step(core)) == {"b": (4, 8)}


def test_a_primitive_continues_a_context_that_is_there() -> None:
    core = EngineCore(limits())
    core.submit(task("a", (1, 8)), 0.0)
    step(core)
    core.submit(task("b", (2, 3), parent_context_id=1), 0.0)
    assert ranges(step(core)) == {"b": (8, 11)}
    core.submit(task("c", output=3, parent_context_id=2), 0.0)
    assert ranges(step(core)) == {"c": (10, 11)}


def test_a_parent_that_is_evicted_while_a_task_waits_fails_that_task() -> None:
    core = EngineCore(limits(num_blocks=4))
    core.submit(task("a", (1, 8)), 0.0)
    step(core)
    core.submit(task("b", (2, 9)), 0.0)
    core.submit(task("c", (3, 1), parent_context_id=1), 0.0)
    core.free_contexts([1])
    step(core)
    assert core.next_batch(0.0) is None
    ((key, refusal),) = core.take_failed()
    assert (key, refusal.code) == ("c", "context_missing")
    assert not core.has_work


@pytest.mark.parametrize(
    ("refused", "code", "names"),
    [
        (task("a", (9, 4)), "conflict", "'a'"),
        (task("b", (9, 120), output=10, most=20), "task_too_large", "120"),
        (task("b", (9, 129)), "task_too_large", "max_seq_len 128"),
        (task("b", (1, 5), output=10), "conflict", "context 1"),
        (task("b", (9, 4), (1, 8), output=10), "conflict", "context 1"),
        (task("b", (9, 4), (9, 4)), "conflict", "twice"),
        (task("b", (9, 4), output=2), "conflict", "context 2"),
        (task("b", (1, 8), (2, 1)), "conflict", "2"),
        (task("b", (9, 4), parent_context_id=77), "context_missing", "77"),
        (task("b", (9, 4), parent_context_id=2), "conflict", "2"),
        (task("b", (9, 0), output=10), "bad_request", "at least 1"),
        (task("b", (9, 4), output=10, most=2, forced_tokens=2), "bad_request", "forced"),
    ],
)
def test_a_refusal_names_what_is_wrong_and_changes_nothing(refused: EngineTask, code: str, names: str) -> None:
    core = EngineCore(limits())
    core.submit(task("a", (1, 8), output=2), 0.0)
    step(core)
    before = (core.held_tokens, core.pool.free, core.num_total_tasks)
    with pytest.raises(Refused) as refusal:
        core.submit(refused, 0.0)
    assert refusal.value.code == code
    assert names in refusal.value.message
    assert before == (core.held_tokens, core.pool.free, core.num_total_tasks)
    assert ranges(step(core)) == {"a": (8, 9)}


def test_the_queue_has_an_end() -> None:
    core = EngineCore(limits(tasks_capacity=2))
    core.submit(task("a", (1, 8)), 0.0)
    core.submit(task("b", (2, 8)), 0.0)
    with pytest.raises(Refused, match="tasks_capacity") as refusal:
        core.submit(task("c", (3, 8)), 0.0)
    assert refusal.value.code == "engine_rejected"


def test_a_batch_is_completed_in_its_order() -> None:
    core = EngineCore(limits(pipeline_depth=1))
    core.submit(task("a", (1, 8), output=2), 0.0)
    first, second = core.next_batch(0.0), core.next_batch(0.0)
    assert first is not None
    assert second is not None
    with pytest.raises(ValueError, match="not the oldest"):
        core.complete(second, {}, 0.0)


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "max_batch_size", "fill_chunk_size", "pipeline_depth"])
def test_limits_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        limits(**{name: -2})
