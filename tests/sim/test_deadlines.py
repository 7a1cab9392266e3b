"""Programs whose gets have deadlines: in both modes, near and far, simulated and over HTTP's client; what is measured."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from parrot.serve.config import ServeCoreConfig, TenantConfig
from sim.clients import Mode
from sim.network import Constant
from sim.population import simulate
from sim.recorder import Recorder
from sim.workloads.program import Program, read_programs, write_programs
from tests.sim.clusters import engine
from tests.sim.programs import chain, chat, map_reduce, one_call

MODES = pytest.mark.parametrize("mode", list(Mode))


def due(program: Program, deadline_s: float, *ids: str) -> Program:
    """The program with that deadline on the named gets, or on all."""
    gets = tuple(msgspec.structs.replace(g, deadline_s=deadline_s) if g.id in ids or not ids else g for g in program.gets)
    return msgspec.structs.replace(program, gets=gets)


def run(
    *programs: Program, mode: Mode = Mode.SEMANTIC, rtt_ms: float = 0.0, kv_tokens: int = 4096, **config: object
) -> Recorder:
    return simulate(
        programs,
        ServeCoreConfig(**config),  # type: ignore[arg-type]
        [engine(kv_tokens=kv_tokens)],
        mode=mode,
        network=Constant(rtt_ms / 1000),
    )


def jct(program: Program, mode: Mode, rtt_ms: float = 0.0) -> float:
    (row,) = run(program, mode=mode, rtt_ms=rtt_ms).programs
    assert row.jct_s is not None
    return row.jct_s


@MODES
@pytest.mark.parametrize("rtt_ms", [0.0, 30.0])
@pytest.mark.parametrize("program", [one_call(), chain(4), map_reduce(3), chat(3)], ids=lambda p: p.id)
def test_a_program_within_its_deadlines_runs_as_without(program: Program, mode: Mode, rtt_ms: float) -> None:
    longest_s = jct(program, mode, rtt_ms)
    (row,) = run(due(program, longest_s + 0.001), mode=mode, rtt_ms=rtt_ms).programs
    assert (row.state, row.jct_s) == ("finished", longest_s)


@MODES
@pytest.mark.parametrize("rtt_ms", [0.0, 30.0])
def test_a_program_past_a_deadline_has_failed_and_is_counted(mode: Mode, rtt_ms: float) -> None:
    longest_s = jct(chain(4), mode, rtt_ms)
    recorder = run(due(chain(4), longest_s - 0.001), one_call(arrival_s=1.0), mode=mode, rtt_ms=rtt_ms)
    late, other = recorder.programs
    assert (late.state, other.state) == ("failed", "finished")
    assert (late.error or "").startswith("deadline_exceeded")
    assert (recorder.counts["failed"], recorder.errors) == (1, {"deadline_exceeded": 1})
    assert [(get.id, get.returned_s) for get in recorder.gets if get.program == 0 and mode is Mode.SEMANTIC] == (
        [("end", None)] if mode is Mode.SEMANTIC else []
    )


def test_what_nobody_can_use_in_time_stops_running() -> None:
    longest_s = jct(chain(4), Mode.SEMANTIC)
    late = run(due(chain(4), longest_s / 2))
    (program,) = late.programs
    assert program.ended_s == pytest.approx(longest_s / 2)
    states = [task.state for task in late.tasks]
    assert states[-1] == "failed"
    assert states.count("finished") < 4
    assert all(task.finished_s <= program.ended_s for task in late.tasks)


@MODES
def test_a_deadline_counts_from_when_the_get_may_go_out(mode: Mode) -> None:
    program = chat(3, think_s=50.0)
    edges = {f"g{turn}": program.calls[turn].after for turn in range(3)}
    gets = tuple(msgspec.structs.replace(get, after=edges.get(get.id, get.after)) for get in program.gets)
    thinking = due(msgspec.structs.replace(program, gets=gets), 20.0, *edges)
    assert run(thinking, mode=mode).programs[0].state == "finished", "time to think is not counted"
    impatient = due(program, 20.0, *edges)
    assert run(impatient, mode=mode).programs[0].state == "failed"


def test_a_file_of_programs_keeps_deadlines(tmp_path: Path) -> None:
    programs = [due(chat(2), 4.5, "g1"), one_call(arrival_s=1.0)]
    write_programs(tmp_path / "programs.jsonl", programs)
    assert b'"deadline_s":4.5' in (tmp_path / "programs.jsonl").read_bytes()
    assert list(read_programs(tmp_path / "programs.jsonl")) == programs


def test_tenants_limits_hold_in_simulation() -> None:
    """Twenty programs of a greedy tenant and one of another, at once: with a limit the other one need not wait."""
    greedy = [one_call(f"p{i}", output=200, prompt=300, tenant="greedy") for i in range(20)]
    modest = one_call("modest", tenant="modest")
    free = run(*greedy, modest, kv_tokens=8192)
    limited = run(*greedy, modest, kv_tokens=8192, tenants={"greedy": TenantConfig(max_tokens_in_flight=2500)})
    assert limited.counts["finished"] == free.counts["finished"] == 21
    flying = [sum(t.dispatched_s <= now < t.finished_s for t in limited.tasks if t.program < 20) for now in (0.1, 1.0, 3.0)]
    assert max(flying) == 1, "2,348 tokens each: a prompt of 300 and 2,048 that it may generate"
    jcts = [next(p.jct_s for p in recorder.programs if p.id == "modest") for recorder in (free, limited)]
    assert jcts[1] < jcts[0]
    again = run(*greedy, modest, kv_tokens=8192, tenants={"greedy": TenantConfig(max_tokens_in_flight=2500)})
    assert again.programs == limited.programs
    assert again.tasks == limited.tasks
