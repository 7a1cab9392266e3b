"""The engine's HTTP API over a real EngineCore and a runner that computes nothing."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from parrot.engine.core import EngineCore
from parrot.engine.iteration_log import IterationLog
from parrot.latency import BatchShape
from parrot.protocol.engine import AbortRequest, Failed, Finished, Rejected, Started, TaskId, Tokens
from tests.engine.fakes import EVENT, Engine, fake_engine, last, streamed, task


async def until(condition: Any) -> None:
    """Waits for `condition()`; the test's own timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("depth", [0, 1])
async def test_every_task_s_events_join_to_its_output(depth: int) -> None:
    async with fake_engine(scheduler={"pipeline_depth": depth, "max_batch_size": 8}) as engine:
        requests = [task(n, [(1, 20), (10 + n, n + 1)], 100 + n, max_gen_length=n % 7 + 1) for n in range(24)]
        for request, events in zip(requests, await asyncio.gather(*map(engine.run, requests)), strict=True):
            finished = last(events, Finished)
            assert isinstance(events[0], Started)
            assert streamed(events) == (finished.ids, finished.text)
            assert len(finished.ids) == request.generate.sampling.max_gen_length
            assert finished.reason == "length"
            assert finished.prompt_tokens == sum(len(f.token_ids or ()) for f in request.chain)
        assert engine.runner.tasks == {}
        assert (await engine.info())["num_total_jobs"] == 0


async def test_a_stop_token_is_not_part_of_the_output() -> None:
    async with fake_engine() as engine:
        finished = last(await engine.run(task(0, [(1, 3)], 2, stop_token_ids=(102,))), Finished)
        assert finished.ids == (100, 101)
        assert finished.reason == "stop_token"


async def test_events_come_while_the_task_runs() -> None:
    async with fake_engine() as engine:
        engine.runner.gate.clear()
        async with engine.client.post(engine.url + "/task", data=msgspec.json.encode(task(0, [(1, 3)], 2))) as response:
            assert isinstance(EVENT.decode(await response.content.readline()), Started)
            engine.runner.gate.set()
            rest = [EVENT.decode(line) async for line in response.content]
        last(rest, Finished)


async def test_a_shared_context_is_found_again_until_it_is_freed() -> None:
    async with fake_engine() as engine:
        assert last(await engine.run(task(0, [(1, 32)], 2)), Finished).cached_tokens == 0
        assert last(await engine.run(task(1, [(1, 32), (3, 4)], 4)), Finished).cached_tokens == 32
        # A child of the first output: its five tokens are there but for the last, which was sampled and never computed.
        assert last(await engine.run(task(2, [(1, 32), (2, 5), (5, 4)], 6)), Finished).cached_tokens == 36
        status, answer = await engine.post("/free_context", {"context_ids": [6, 5, 2, 4, 3, 1], "epoch": 0})
        assert status == 200
        assert answer["context_len"] > 0
        await until(lambda: len(engine.runner.dropped_contexts) == 6)
        assert last(await engine.run(task(3, [(11, 32)], 12)), Finished).cached_tokens == 0
        assert (await engine.post("/free_context", {"context_ids": [99], "epoch": 0}))[1]["context_len"] == 0


async def test_an_output_that_is_forced_to_its_full_length_ends_at_once() -> None:
    async with fake_engine() as engine:
        started, finished = await engine.run(task(0, [(1, 3)], 2, max_gen_length=4, forced=4))
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert (finished.ids, finished.reason) == ((100, 101, 102, 103), "length")


async def test_forced_tokens_are_counted_and_not_streamed_again() -> None:
    async with fake_engine() as engine:
        events = await engine.run(task(0, [(1, 3)], 2, max_gen_length=6, forced=4))
        finished = last(events, Finished)
        assert finished.ids == (100, 101, 102, 103, 104, 105)
        assert streamed(events) == ((104, 105), " w104 w105")


async def test_a_client_that_goes_away_aborts_its_task_and_no_other() -> None:
    async with fake_engine() as engine:
        engine.runner.gate.clear()
        other = asyncio.create_task(engine.run(task(1, [(3, 3)], 4)))
        await until(lambda: len(engine.runner.tasks) == 1)
        gone = asyncio.create_task(engine.run(task(0, [(1, 3)], 2)))
        await until(lambda: len(engine.runner.tasks) == 2)
        gone.cancel()
        await until(lambda: engine.running.loop.runtime_info().num_total_jobs <= 1)
        engine.runner.gate.set()
        last(await other, Finished)
        await until(lambda: not engine.runner.tasks)


async def test_an_abort_ends_the_attempt_s_stream() -> None:
    async with fake_engine() as engine:
        engine.runner.gate.clear()
        running = asyncio.create_task(engine.run(task(0, [(1, 3)], 2)))
        await until(lambda: engine.runner.tasks)
        assert (await engine.post("/abort", AbortRequest(0, TaskId(7, 0, 0), 9)))[0] == 200  # another attempt: ignored
        assert not running.done()
        assert (await engine.post("/abort", AbortRequest(0, TaskId(7, 0, 0), 1)))[0] == 200
        assert last(await running, Failed).code == "cancelled"
        engine.runner.gate.set()
        last(await engine.run(task(0, [(1, 3)], 2, attempt=2)), Finished)


@pytest.mark.parametrize("step", ["prepare", "launch", "finish"])
async def test_a_failing_iteration_fails_its_tasks_and_the_engine_goes_on(step: str) -> None:
    async with fake_engine() as engine:
        engine.runner.fail_next = step
        failed = last(await engine.run(task(0, [(1, 32)], 2)), Failed)
        assert failed.code == "engine_failed"
        assert failed.retryable
        assert "out of luck" in failed.message
        again = last(await engine.run(task(0, [(1, 32)], 2, attempt=2)), Finished)
        assert again.cached_tokens == 0  # nothing of the failed iteration is taken for computed
        await until(lambda: not engine.runner.tasks)


async def test_a_broken_scheduler_is_replaced_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_engine() as engine:
        await engine.run(task(0, [(1, 32)], 2))

        def broken(self: EngineCore, *_: Any) -> None:
            monkeypatch.undo()
            raise AssertionError("a bug")

        monkeypatch.setattr(EngineCore, "complete", broken)
        failed = last(await engine.run(task(1, [(1, 32)], 4)), Failed)
        assert failed.retryable
        assert 1 in failed.evicted or 1 in (await engine.run(task(2, [(5, 3)], 6)))[0].evicted
        assert last(await engine.run(task(1, [(1, 32)], 4, attempt=2)), Finished).cached_tokens == 0
        await until(lambda: not engine.runner.tasks)


async def test_a_prompt_longer_than_the_model_s_context_names_both_numbers() -> None:
    async with fake_engine(instance={"device": "cpu", "num_kv_cache_blocks": 4096, "max_seq_len": 50}) as engine:
        failed = last(await engine.run(task(0, [(1, 61)], 2)), Failed)
        assert failed.code == "task_too_large"
        assert not failed.retryable
        assert "61" in failed.message
        assert "50" in failed.message
        last(await engine.run(task(1, [(1, 20)], 2)), Finished)


async def test_a_task_above_the_engine_s_capacity_is_rejected() -> None:
    async with fake_engine(tasks_capacity=1) as engine:
        engine.runner.gate.clear()
        running = asyncio.create_task(engine.run(task(0, [(1, 3)], 2)))
        await until(lambda: engine.runner.tasks)
        assert last(await engine.run(task(1, [(3, 3)], 4)), Rejected).code == "engine_rejected"
        engine.runner.gate.set()
        last(await running, Finished)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (task(0, [(1, 3)], 2, output_length=3), "bad_sampling"),
        (task(0, [(1, 3)], 2, n=2), "bad_sampling"),
        (task(0, [], 2), "bad_request"),
        (task(0, [(1, 0)], 2), "bad_request"),
    ],
)
async def test_what_no_attempt_can_do_fails_for_good(request_: Any, code: str) -> None:
    async with fake_engine() as engine:
        failed = last(await engine.run(request_), Failed)
        assert failed.code == code
        assert not failed.retryable
        assert engine.runner.tasks == {}


async def test_the_same_attempt_twice_is_a_conflict_and_the_first_goes_on() -> None:
    async with fake_engine() as engine:
        engine.runner.gate.clear()
        first = asyncio.create_task(engine.run(task(0, [(1, 3)], 2)))
        await until(lambda: engine.runner.tasks)
        assert last(await engine.run(task(0, [(1, 3)], 2)), Failed).code == "conflict"
        engine.runner.gate.set()
        last(await first, Finished)


async def test_a_new_epoch_ends_all_that_was_of_the_one_before() -> None:
    async with fake_engine() as engine:
        await engine.run(task(0, [(1, 32)], 2))
        engine.runner.gate.clear()
        old = asyncio.create_task(engine.run(task(1, [(3, 3)], 4)))
        await until(lambda: engine.runner.tasks)
        new = asyncio.create_task(engine.run(task(0, [(1, 32)], 2, epoch=1)))
        assert last(await old, Failed).retryable
        engine.runner.gate.set()
        assert last(await new, Finished).cached_tokens == 0  # the same number is another context now
        stale = last(await engine.run(task(5, [(1, 32)], 2)), Failed)
        assert stale.code == "conflict"
        assert (await engine.post("/free_context", {"context_ids": [1], "epoch": 0}))[1]["context_len"] == 0


async def test_contexts_that_had_to_go_are_told_with_the_next_event() -> None:
    async with fake_engine(instance={"device": "cpu", "num_kv_cache_blocks": 64}, scheduler={"max_total_tokens": 64}) as engine:
        await engine.run(task(0, [(1, 32)], 2, max_gen_length=1))
        events = await engine.run(task(1, [(3, 60)], 4, max_gen_length=1))
        told = [i for e in events for i in e.evicted]
        assert 1 in told
        assert len(told) == len(set(told))


async def test_closing_ends_running_tasks_with_unavailable() -> None:
    async with fake_engine() as engine:
        engine.runner.gate.clear()
        running = asyncio.create_task(engine.run(task(0, [(1, 3)], 2)))
        await until(lambda: engine.runner.tasks)
        asyncio.get_running_loop().call_later(0.05, engine.runner.gate.set)
        await engine.running.close()
        failed = last(await running, Failed)
        assert failed.code == "unavailable"
        assert failed.retryable


async def test_the_iteration_log_has_a_line_for_every_iteration_and_task(tmp_path: Path) -> None:
    path = tmp_path / "log" / "iterations.jsonl"
    async with fake_engine(iteration_log=IterationLog(path, {"engine": "fake"})) as engine:
        await asyncio.gather(*(engine.run(task(n, [(1, 20), (10 + n, 3)], 100 + n)) for n in range(3)))
        engine.runner.fail_next = "finish"
        await engine.run(task(9, [(1, 20)], 200))
    lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    assert lines[0] == {"kind": "header", "iteration_log": 1, "engine": "fake"}
    tasks = [line for line in lines if line["kind"] == "task"]
    assert sorted(line["task"] for line in tasks) == ["7.0.0#1", "7.1.0#1", "7.2.0#1", "7.9.0#1"]
    assert all(line["overhead_s"] >= 0 and line["prompt_tokens"] >= 20 for line in tasks)
    iterations = [line for line in lines if line["kind"] == "iteration"]
    good = [line for line in iterations if "failed" not in line]
    assert len(iterations) == len(good) + 1
    assert sum(line["decode_rows"] for line in good) == 3 * 4
    assert sum(line["prefill_tokens"] for line in good) == 20 + 3 * 3
    for line in good:
        assert set(BatchShape.FIELDS) < line.keys()
        assert 0 <= line["run_s"] <= line["duration_s"] + 1e-6
        assert len(line["tasks"]) == line["decode_rows"] + line["prefill_rows"]
    starts = [(line["t"], line["t"] + line["duration_s"]) for line in iterations]
    assert all(before[1] <= after[0] + 2e-6 for before, after in itertools.pairwise(starts))


async def test_bad_requests_are_refused_by_name_and_leave_the_rest_running() -> None:
    async with fake_engine() as engine:
        for path in ("/task", "/abort", "/free_context", "/fill", "/generate", "/generate_stream"):
            async with engine.client.post(engine.url + path, data=b"{no json") as response:
                assert response.status == 400
                assert (await response.json())["error"]["code"] == "bad_request"
            broken = {"Content-Encoding": "gzip", "Connection": "close"}
            async with engine.client.post(engine.url + path, data=b"{}  ", headers=broken) as response:
                assert response.status == 400
                assert "gzip" in (await response.json())["error"]["message"]
        deep = b'{"context_id": 1, "unknown": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
        async with engine.client.post(engine.url + "/free_context", data=deep) as response:
            assert response.status == 400
        assert (await engine.error("/task", {"engine_id": 0}))[:2] == (400, "bad_request")
        assert (await engine.error("/free_context", {}))[:2] == (400, "bad_request")
        assert (await engine.error("/nowhere", {}))[:2] == (404, "not_found")
        async with engine.client.get(engine.url + "/task") as response:
            assert response.status == 405
            assert (await response.json())["error"]["code"] == "method_not_allowed"
        last(await engine.run(task(0, [(1, 3)], 2)), Finished)


# --------------------------------------------------------------------------------------- the primitives, used alone


async def fill(engine: Engine, context: int, parent: int = -1, **content: Any) -> int:
    status, answer = await engine.post("/fill", {"context_id": context, "parent_context_id": parent, **content})
    assert status == 200, answer
    return int(answer["filled_len"])


async def generate(engine: Engine, context: int, parent: int = -1, max_gen_length: int = 5) -> dict[str, Any]:
    body = {"context_id": context, "parent_context_id": parent, "sampling_config": {"max_gen_length": max_gen_length}}
    status, answer = await engine.post("/generate", body)
    assert status == 200, answer
    return dict(answer)


async def test_fill_generate_fork_and_free() -> None:
    async with fake_engine() as engine:
        assert await fill(engine, 1, token_ids=[5] * 20, session_id=3, task_id=4, end_flag=False) == 20
        assert await fill(engine, 1, text="three more words") == 3
        assert await generate(engine, 2, parent=1) == {
            "generated_text": "w100 w101 w102 w103 w104",
            "generated_ids": [100, 101, 102, 103, 104],
        }
        assert await fill(engine, 2, text="and on") == 2
        assert (await generate(engine, 2, max_gen_length=2))["generated_ids"] == [100, 101]
        assert (await engine.post("/free_context", {"context_id": 1}))[1] == {"context_len": 23}
        assert (await generate(engine, 2, max_gen_length=1))["generated_ids"] == [100]  # a child keeps what it inherited
        assert (await engine.post("/free_context", {"context_id": 2}))[1] == {"context_len": 5 + 2 + 2 + 1}
        assert (await engine.error("/free_context", {"context_id": 2}))[:2] == (404, "not_found")


async def test_the_primitives_contexts_are_not_the_core_s() -> None:
    async with fake_engine() as engine:
        await fill(engine, 1, token_ids=[5] * 32)
        assert last(await engine.run(task(0, [(1, 32)], 2)), Finished).cached_tokens == 0
        await engine.post("/free_context", {"context_ids": [1, 2], "epoch": 0})
        assert (await engine.post("/free_context", {"context_id": 1}))[1] == {"context_len": 32}


async def test_a_context_that_was_evicted_is_computed_again() -> None:
    async with fake_engine(instance={"device": "cpu", "num_kv_cache_blocks": 64}, scheduler={"max_total_tokens": 64}) as engine:
        await fill(engine, 1, token_ids=[5] * 40)
        await fill(engine, 2, token_ids=[5] * 60)
        assert len((await generate(engine, 1))["generated_ids"]) == 5


async def test_a_generate_can_be_streamed() -> None:
    async with fake_engine() as engine:
        await fill(engine, 1, text="a prompt")
        async with engine.client.post(engine.url + "/generate_stream", data=msgspec.json.encode({"context_id": 1})) as response:
            events = [EVENT.decode(line) async for line in response.content]
        finished = last(events, Finished)
        assert streamed(events) == (finished.ids, finished.text)
        assert sum(isinstance(e, Tokens) for e in events) == 512


async def test_primitives_are_refused_by_name() -> None:
    async with fake_engine() as engine:
        await fill(engine, 1, text="a prompt")
        both = {"context_id": 5, "text": "a", "token_ids": [1]}
        assert (await engine.error("/fill", both))[:2] == (400, "bad_request")
        assert (await engine.error("/fill", {"context_id": 5}))[:2] == (400, "bad_request")
        assert (await engine.error("/fill", {"context_id": 5, "text": "a", "colour": 1}))[0] == 400
        status, code, message = await engine.error("/fill", {"context_id": 5, "parent_context_id": 77, "text": "a"})
        assert (status, code) == (409, "context_missing")
        assert "77" in message
        assert (await engine.error("/generate", {"context_id": 5}))[:2] == (400, "bad_request")  # nothing filled
        bad = {"context_id": 1, "sampling_config": {"output_length": 3}}
        assert (await engine.error("/generate", bad))[:2] == (400, "bad_sampling")
        assert (await engine.error("/generate_stream", bad))[:2] == (400, "bad_sampling")
        assert await fill(engine, 5, text="a") == 1  # none of the refused ones has made context 5


async def test_two_primitives_on_one_context_at_once_are_a_conflict() -> None:
    async with fake_engine() as engine:
        await fill(engine, 1, text="a prompt")
        engine.runner.gate.clear()
        first = asyncio.create_task(generate(engine, 1))
        await until(lambda: engine.runner.tasks)
        assert (await engine.error("/fill", {"context_id": 1, "text": "a"}))[:2] == (409, "conflict")
        assert (await engine.error("/free_context", {"context_id": 1}))[:2] == (409, "conflict")
        engine.runner.gate.set()
        assert len((await first)["generated_ids"]) == 5
