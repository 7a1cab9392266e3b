"""A trace obeys the trace-event format, and shows what the tables hold: checked on simulated runs of random programs."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parrot.serve.config import ServeCoreConfig
from sim.clients import Mode
from sim.network import Constant
from sim.population import simulate
from sim.report.perfetto import Edge, edges_of, write_trace
from sim.spec import Run, Specification, runs_of
from sim.workloads.program import Program
from tests.sim.clusters import engine
from tests.sim.programs import chain, chat, map_reduce, programs

RUN: Run = runs_of(Specification(workloads=("w",), backend="real", core_url="http://core"))[0]


def tables_of(work: list[Program], mode: Mode = Mode.SEMANTIC) -> dict[str, Any]:
    engines = [engine("e0"), engine("e1")]
    return simulate(iter(work), ServeCoreConfig(), engines, mode=mode, network=Constant(0.01)).tables()


def trace_of(path: Path, tables: dict[str, Any], work: list[Program]) -> dict[str, Any]:
    write_trace(path, tables, work, RUN)
    with gzip.open(path) as file:
        return json.load(file)


def check_format(trace: dict[str, Any]) -> None:
    """What the Trace Event Format asks for, of the kinds of event that are in use."""
    events = [event for event in trace["traceEvents"] if event["ph"] != "M"]
    named = {e["pid"] for e in trace["traceEvents"] if e["ph"] == "M" and e["name"] == "process_name"}
    assert {event["ph"] for event in events} <= set("XbesfC")
    assert all(event["pid"] in named for event in events)
    times = [event["ts"] for event in events]
    assert times == sorted(times)
    assert all(ts >= 0 for ts in times)
    slices = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            begin = round(event["ts"] * 1000)
            slices[event["pid"], event["tid"]].append((begin, begin + round(event["dur"] * 1000)))
    for track in slices.values():  # each is inside or after what is open
        open_until: list[int] = []
        for begin, end in track:
            while open_until and open_until[-1] <= begin:
                open_until.pop()
            assert begin <= end
            assert not open_until or end <= open_until[-1]
            open_until.append(end)
    pairs: dict[tuple[str, Any, str], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] in "besf":
            pairs[event["cat"], event["id"], event["name"]].append(event)
    assert len({(category, key) for category, key, _ in pairs}) == len(pairs)
    for pair in pairs.values():
        assert [event["ph"] for event in pair] in (["b", "e"], ["s", "f"])
        for event in pair:
            if event["ph"] in "sf":
                at = round(event["ts"] * 1000)
                assert any(begin <= at <= end for begin, end in slices[event["pid"], event["tid"]])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(programs(), min_size=1, max_size=4), st.sampled_from(Mode))
def test_traces_obey_the_format_and_have_every_task(tmp_path: Path, work: list[Program], mode: Mode) -> None:
    work = sorted(work, key=lambda program: program.arrival_s)
    tables = tables_of(work, mode)
    trace = trace_of(tmp_path / "trace.json.gz", tables, work)
    check_format(trace)
    tasks = [event for event in trace["traceEvents"] if event.get("cat") == "task"]
    shown = sorted((e["args"]["program"], e["args"]["call"], e["args"]["output"]) for e in tasks)
    placed = tables["tasks"][tables["tasks"]["engine"].notna()]
    assert shown == sorted(placed[["program", "call", "output"]].itertuples(index=False, name=None))


def test_arrows_lead_from_the_writer_of_a_variable_to_its_reader(tmp_path: Path) -> None:
    work = [map_reduce(3), chain(3, arrival_s=0.1)]
    assert [(e.writer, e.reader) for e in edges_of(work)] == [
        *(((0, i, 0), (0, 3, 0)) for i in range(3)),
        ((1, 0, 0), (1, 1, 0)),
        ((1, 1, 0), (1, 2, 0)),
    ]
    trace = trace_of(tmp_path / "t", tables_of(work), work)
    starts = [event for event in trace["traceEvents"] if event["ph"] == "s"]
    assert sorted(event["name"] for event in starts) == ["m0", "m1", "m2", "v0", "v1"]
    assert "note" not in trace["otherData"]


def test_a_later_output_of_a_call_continues_the_one_before() -> None:
    (*_, last) = edges_of([chat(2)])
    assert last == Edge((0, 1, 0), (0, 1, 1), "a1")


def test_without_specifications_there_are_no_arrows_and_a_note_says_so(tmp_path: Path) -> None:
    tables = tables_of([map_reduce(3)])
    trace = trace_of(tmp_path / "t", tables, [])
    check_format(trace)
    assert not [event for event in trace["traceEvents"] if event["ph"] in "sf"]
    assert "no arrows" in trace["otherData"]["note"]


def test_equal_tables_give_equal_bytes_and_tasks_that_never_ran_are_left_out(tmp_path: Path) -> None:
    tables = tables_of([map_reduce(3)])
    write_trace(tmp_path / "one", tables, [map_reduce(3)], RUN)
    write_trace(tmp_path / "two", tables, [map_reduce(3)], RUN)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    never = tables | {"tasks": tables["tasks"].assign(engine=None, dispatched_s=float("nan"), started_s=float("nan"))}
    check_format(trace_of(tmp_path / "t", never, [map_reduce(3)]))


@pytest.mark.parametrize("mode", list(Mode))
def test_waits_in_the_core_and_loads_are_shown(tmp_path: Path, mode: Mode) -> None:
    work = [map_reduce(20, f"m{i}") for i in range(8)]
    trace = trace_of(tmp_path / "t", tables_of(work, mode), work)
    check_format(trace)
    names = {event["name"] for event in trace["traceEvents"] if event["ph"] in "bC"}
    assert names == {"queued", "queued tasks", "tasks", "KV tokens (estimate)"}


def test_a_task_that_never_ended_is_drawn_to_its_last_stamp_and_one_never_placed_only_in_the_queue(tmp_path: Path) -> None:
    work = [map_reduce(3, "m")]
    tables = tables_of(work)
    tasks = tables["tasks"].copy()
    tasks.loc[0, ["first_token_s", "finished_s"]] = float("nan")  # it had begun
    tasks.loc[1, ["started_s", "first_token_s", "finished_s"]] = float("nan")
    tasks.loc[2, ["dispatched_s", "started_s", "first_token_s", "finished_s"]] = float("nan")
    tasks.loc[2, "engine"] = None
    trace = trace_of(tmp_path / "t", {**tables, "tasks": tasks}, work)
    check_format(trace)
    drawn = {e["args"]["call"]: e["dur"] for e in trace["traceEvents"] if e.get("cat") == "task"}
    assert sorted(drawn) == [0, 1, 3]
    assert drawn[0] == pytest.approx((tasks.loc[0, "started_s"] - tasks.loc[0, "dispatched_s"]) * 1e6)
    assert drawn[1] == 0.0


def test_a_run_of_which_nothing_was_placed_has_a_trace(tmp_path: Path) -> None:
    tables = {name: table.iloc[:0] for name, table in tables_of([chain(2)]).items()}
    trace = trace_of(tmp_path / "t", tables, [chain(2)])
    check_format(trace)
    assert not any(event["ph"] == "X" for event in trace["traceEvents"])
