"""A run as a trace for Perfetto (https://ui.perfetto.dev) or chrome://tracing: Chrome trace event JSON, gzipped.

    clients        a slice for each program, from its first request to its last answer
    core           a slice for each task that waits for its dispatch, and how many do
    ENGINE         tracks as many as tasks overlap; a slice for each task from its dispatch to its end, and in it the engine's
                   queue, prefill and decode; below them what it ran and held (`sim.tables.engine_load`)
    arrows         from the task that wrote a variable to the task that read it, as the programs' specifications say

Only what the tables hold is drawn, and equal tables give equal bytes. Times in the file are microseconds, to the nanosecond.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd

from sim.report.lanes import lanes_of
from sim.spec import Run
from sim.tables import engine_load, last_stamps, queue_over_time
from sim.workloads.program import Program, Read, Write

CLIENTS, CORE, FIRST_ENGINE = 1, 2, 3  #: process ids in the trace
ARROW_NS = 1000  #: an arrow leaves its slice this long before the slice's end, to be clearly inside

TaskKey = tuple[int, int, int]  #: program, call, output


class Event(NamedTuple):
    """A trace event: when, for how long (0: not a slice), and all else that its JSON says."""

    at_ns: int
    lasts_ns: int
    rest: dict[str, Any]


class Edge(NamedTuple):
    """`reader` needs what `writer` wrote to `var`."""

    writer: TaskKey
    reader: TaskKey
    var: str


def edges_of(programs: Iterable[Program]) -> Iterator[Edge]:
    """The data edges between the tasks of each program, which are numbered in their order. A task reads what stands before its
    output and after the output before, which it continues; the latter is an edge too."""
    for serial, program in enumerate(programs):
        writers: dict[str, TaskKey] = {}
        for number, call in enumerate(program.calls):
            outputs = [segment.var for segment in call.segments if type(segment) is Write]
            writers |= {var: (serial, number, output) for output, var in enumerate(outputs)}
        for number, call in enumerate(program.calls):
            reader = (serial, number, 0)
            seen: set[str] = set()
            for segment in call.segments:
                if type(segment) is Read and segment.var in writers and segment.var not in seen:
                    seen.add(segment.var)
                    yield Edge(writers[segment.var], reader, segment.var)
                elif type(segment) is Write:
                    following = (serial, number, reader[2] + 1)
                    if segment.var not in seen and following[2] < _outputs(call.segments):
                        seen.add(segment.var)
                        yield Edge(reader, following, segment.var)
                    reader = following


def _outputs(segments: Sequence[Any]) -> int:
    return sum(type(segment) is Write for segment in segments)


def write_trace(path: str | Path, tables: Mapping[str, pd.DataFrame], programs: Iterable[Program], run: Run) -> None:
    """Writes the trace of `run` to `path`.

    tables: those of `sim.metrics`. programs: the run's, in order of their serial numbers; empty when there are none to be had
    (applications' own code): then there are no arrows, and the trace's `otherData.note` says so.
    """
    slices = _slices(tables["tasks"], tables["calls"])
    clients = _in_lanes(_program_rows(tables["programs"]))
    events = [*_program_events(clients), *_wait_events(tables["tasks"]), *_task_events(slices), *_counters(tables["tasks"])]
    edges = list(edges_of(programs))
    events += _arrows(edges, slices)
    events.sort(key=lambda event: (event.at_ns, event.rest["ph"] != "X", -event.lasts_ns))  # a slice before what is in it
    about: dict[str, Any] = {"run": run.name, "policy": run.policy, "rate": run.rate, "seed": run.seed}
    if not edges:
        about["note"] = "no arrows: no program's specification says which task reads what another wrote"
    encode = msgspec.json.Encoder().encode
    lines = itertools.chain(map(encode, _metadata(slices, clients)), map(_line, events))
    with open(path, "wb") as file, gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as out:
        out.write(b'{"displayTimeUnit":"ms","otherData":' + encode(about) + b',"traceEvents":[\n' + next(lines))
        for line in lines:
            out.write(b",\n" + line)
        out.write(b"\n]}\n")


def _line(event: Event) -> bytes:
    times = {"ts": event.at_ns / 1000}
    if event.rest["ph"] == "X":
        times["dur"] = event.lasts_ns / 1000
    return msgspec.json.encode(event.rest | times)


# ------------------------------------------------------------------------------------------------------- tasks and programs


def _nanoseconds(seconds: Any) -> Any:
    return np.round(np.asarray(seconds, dtype=float) * 1e9).astype(np.int64)


def _in_lanes(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows (columns pid, begin, end and others) in order of pid and begin, with a column lane from 1 on."""
    rows = rows.sort_values(["pid", "begin", "end"], kind="stable", ignore_index=True)
    lanes: list[int] = []
    for _, group in rows.groupby("pid", sort=True):
        lanes += lanes_of(group["begin"].tolist(), group["end"].tolist())
    return rows.assign(lane=np.array(lanes, dtype=np.int64) + 1)


def _slices(tasks: pd.DataFrame, calls: pd.DataFrame) -> pd.DataFrame:
    """The tasks that were dispatched, on the track of their engine; begin, started, first and end in nanoseconds."""
    rows = tasks[tasks["engine"].notna() & tasks["dispatched_s"].notna()].reset_index(drop=True)
    engines = sorted(rows["engine"].unique())
    begin, end = _nanoseconds(rows["dispatched_s"]), _nanoseconds(last_stamps(rows))
    started = _nanoseconds(rows["started_s"].where(rows["started_s"].notna(), last_stamps(rows)))
    first = _nanoseconds(rows["first_token_s"].where(rows["first_token_s"].notna(), last_stamps(rows)))
    names = calls.drop_duplicates(["program", "call"]).set_index(["program", "call"])["name"]
    named = names.reindex(pd.MultiIndex.from_frame(rows[["program", "call"]])).fillna("").to_numpy(dtype=object)
    pid = rows["engine"].map({engine: FIRST_ENGINE + number for number, engine in enumerate(engines)}).astype("int64")
    return _in_lanes(rows.assign(pid=pid, begin=begin, started=started, first=first, end=end, name=named))


def _task_events(slices: pd.DataFrame) -> Iterator[Event]:
    for row in slices.itertuples():
        place = {"ph": "X", "pid": row.pid, "tid": row.lane}
        arguments = {
            "program": row.program,
            "call": row.call,
            "output": row.output,
            "state": row.state,
            "prompt_tokens": row.prompt_tokens,
            "cached_tokens": row.cached_tokens,
            "output_tokens": row.output_tokens,
            "criteria": row.criteria if isinstance(row.criteria, str) else None,
            "depth": row.depth,
            "attempts": row.attempts,
        }
        name = row.name or f"call {row.call}"
        yield Event(row.begin, row.end - row.begin, {"name": name, "cat": "task", **place, "args": arguments})
        for phase, begin, end in (
            ("engine queue", row.begin, row.started),
            ("prefill", row.started, row.first),
            ("decode", row.first, row.end),
        ):
            if end > begin:
                yield Event(begin, end - begin, {"name": phase, "cat": "phase", **place})


def _wait_events(tasks: pd.DataFrame) -> Iterator[Event]:
    """Waits for a dispatch, as asynchronous slices: there may be thousands at once, more than a track each could show."""
    rows = tasks[tasks["ready_s"].notna()]
    begins = _nanoseconds(rows["ready_s"]).tolist()
    ends = _nanoseconds(rows["dispatched_s"].where(rows["dispatched_s"].notna(), last_stamps(rows))).tolist()
    for row, begin, end in zip(rows.itertuples(), begins, ends, strict=True):
        if end > begin:
            one = {"name": "queued", "cat": "queue", "id": f"{row.program}/{row.call}/{row.output}", "pid": CORE, "tid": 1}
            yield Event(begin, 0, {**one, "ph": "b", "args": {"program": row.program, "call": row.call, "output": row.output}})
            yield Event(end, 0, {**one, "ph": "e"})


def _program_rows(programs: pd.DataFrame) -> pd.DataFrame:
    ended = programs["ended_s"].where(programs["ended_s"].notna(), programs["started_s"])
    return programs.assign(pid=CLIENTS, begin=_nanoseconds(programs["started_s"]), end=_nanoseconds(ended))


def _program_events(clients: pd.DataFrame) -> Iterator[Event]:
    for row in clients.itertuples():
        arguments = {
            "id": row.id,
            "tenant": row.tenant,
            "state": row.state,
            "calls": row.calls,
            "refusals": row.refusals,
            "error": row.error if isinstance(row.error, str) else None,
        }
        name = f"{row.application or 'program'} {row.program}"
        one = {"name": name, "cat": "program", "ph": "X", "pid": CLIENTS, "tid": row.lane, "args": arguments}
        yield Event(row.begin, row.end - row.begin, one)


# ----------------------------------------------------------------------------------------------- arrows, counters, names


def _arrows(edges: Sequence[Edge], slices: pd.DataFrame) -> Iterator[Event]:
    """A start inside the writer's slice and a finish at the beginning of the reader's, where both were dispatched."""
    keys = slices[["program", "call", "output"]].itertuples(index=False, name=None)
    places = slices[["pid", "lane", "begin", "end"]].itertuples(index=False, name=None)
    found = dict(zip(keys, places, strict=True))
    for number, edge in enumerate(edges):
        writer, reader = found.get(edge.writer), found.get(edge.reader)
        if writer is None or reader is None:
            continue
        leaves = writer[3] - min(ARROW_NS, (writer[3] - writer[2]) // 2)
        if leaves > reader[2]:
            continue  # the reader was placed on what an earlier attempt of the writer gave
        one = {"name": edge.var, "cat": "dag", "id": number}
        yield Event(leaves, 0, {**one, "ph": "s", "pid": writer[0], "tid": writer[1]})
        yield Event(reader[2], 0, {**one, "ph": "f", "bp": "e", "pid": reader[0], "tid": reader[1]})


def _counters(tasks: pd.DataFrame) -> Iterator[Event]:
    """Loads and the queue, a value where it changes."""
    load = engine_load(tasks)
    for number, (_, rows) in enumerate(load.groupby("engine", sort=True)):
        yield from _counter(rows, FIRST_ENGINE + number, "tasks", ("running", "waiting"))
        yield from _counter(rows, FIRST_ENGINE + number, "KV tokens (estimate)", ("kv_tokens",))
    yield from _counter(queue_over_time(tasks), CORE, "queued tasks", ("queued",))


def _counter(rows: pd.DataFrame, pid: int, name: str, columns: tuple[str, ...]) -> Iterator[Event]:
    values = rows[list(columns)].round(3)
    changed = (values != values.shift()).any(axis=1)
    for at_ns, row in zip(_nanoseconds(rows["time_s"][changed]).tolist(), values[changed].to_numpy().tolist(), strict=True):
        one = {"name": name, "ph": "C", "pid": pid, "tid": 0, "args": dict(zip(columns, row, strict=True))}
        yield Event(at_ns, 0, one)


def _metadata(slices: pd.DataFrame, clients: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """The names of processes and threads, and their order."""
    engines = slices.groupby("pid", sort=True)
    processes = [(CLIENTS, "clients", "program", clients["lane"].max()), (CORE, "core", "", 0)]
    processes += [(pid, f"engine {rows['engine'].iloc[0]}", "task", rows["lane"].max()) for pid, rows in engines]
    for pid, name, thread, lanes in processes:
        yield {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}
        yield {"name": "process_sort_index", "ph": "M", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
        for lane in range(1, int(lanes or 0) + 1 if pd.notna(lanes) else 1):
            yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": lane, "args": {"name": f"{thread} {lane}"}}
            yield {"name": "thread_sort_index", "ph": "M", "pid": pid, "tid": lane, "args": {"sort_index": lane}}
