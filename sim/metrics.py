"""What a run measured: rows a program, a call and a task, and the summary of a run. The same code for every backend.

Decides how the metrics are computed; never how the numbers are come by. Program metrics are on the client's clock, call and
task metrics from the times of the core's events (`SessionReport`, fetched before a session closes). All times are
seconds; percentiles are numpy's, with linear interpolation between the two nearest ranks.

    ttft        first token − the call became ready (request mode: − its submission), first output of a call
    tpot        (last token − first) / (n − 1) of a task with n ≥ 2 tokens, as its engine measured; `max_gap` beside it
    jct         a program's first request to its last get answered, waits for a refusal included
    normalized  a call's latency (ready or submitted, as for ttft, to its last output finished) / its output tokens

Only what finished has a latency: `failed` counts the programs that did not, and stands beside every percentile.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import msgspec
import numpy as np
import pandas as pd

from parrot.protocol.api import CallReport, SessionReport, TaskReport
from parrot.protocol.engine import TaskId
from parrot.serve.explanations import PlacementReport
from parrot.serve.graph import Call, Task
from sim.clients import Mode, Player


class ProgramRow(NamedTuple):
    """`program` is its number in the run; `jct_s` is null unless it finished."""

    program: int
    id: str
    application: str
    tenant: str
    state: str
    arrival_s: float
    started_s: float
    ended_s: float | None
    jct_s: float | None
    calls: int
    gets: int
    refusals: int
    error: str | None


class GetRow(NamedTuple):
    program: int
    id: str
    var: str
    criteria: str
    issued_s: float
    returned_s: float | None


class CallRow(NamedTuple):
    """A call as the core saw it; in request mode each output of a call is one of its own."""

    program: int
    call: int
    output: int
    name: str
    state: str
    submitted_s: float
    ready_s: float | None
    first_token_s: float | None
    finished_s: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: float | None
    latency_s: float | None
    normalized_latency_s: float | None


class TaskRow(NamedTuple):
    program: int
    call: int
    output: int
    state: str
    attempts: int
    engine: str | None
    criteria: str | None
    depth: int
    ready_s: float | None
    dispatched_s: float | None
    started_s: float | None
    first_token_s: float | None
    finished_s: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    decode_s: float
    max_gap_s: float
    tpot_s: float | None


class Distribution(msgspec.Struct, frozen=True):
    """All null when there is nothing to measure."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class Summary(msgspec.Struct, frozen=True, kw_only=True, tag="run", tag_field="kind"):
    """One run, as `python -m sim.run` prints it. `finished`, `failed`: programs. `refused`: answers 429, each tried again.

    clients: of a closed loop. draw: null, or which draw of `--intervals`. cluster: FILE:COUNT of its engines. outside: what the
    engines did that their profile has not seen, feature -> (most observed, least seen, most seen). policy_errors: what the
    policy did wrong (`least_loaded` placed in its stead) -> how often; empty where the core cannot be asked.
    within_objectives, goodput_programs_per_s: null unless objectives are given.
    """

    policy: str
    rate: float | None
    clients: int | None = None
    arrivals: str | None = None
    seed: int
    repeat: int = 0
    draw: int | None = None
    workload: str
    cluster: tuple[str, ...] = ()
    client: str
    backend: str
    engines: int
    rtt_ms: float | str
    settings: dict[str, Any]
    programs: int
    calls: int
    finished: int
    failed: int
    refused: int
    calls_finished: int
    calls_failed: int
    tasks: int
    attempts: int
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    simulated_s: float
    throughput_tokens_per_s: float | None
    throughput_programs_per_s: float | None
    within_objectives: int | None = None
    goodput_programs_per_s: float | None = None
    ttft_s: Distribution
    tpot_s: Distribution
    max_gap_s: Distribution
    jct_s: Distribution
    normalized_latency_s: Distribution
    errors: dict[str, int]
    outside: dict[str, dict[str, tuple[float, float, float]]] = {}
    policy_errors: dict[str, int] = {}


_IDENTITY = {"rate", "clients", "seed", "repeat", "draw", "engines"}  #: numbers of a summary that say which run it was


def _metrics() -> tuple[str, ...]:
    names: list[str] = []
    for name, hint in get_type_hints(Summary).items():
        if hint is Distribution:
            names += [f"{name}.{part}" for part in Distribution.__struct_fields__]
        elif hint in (int, int | None, float, float | None) and name not in _IDENTITY:
            names.append(name)
    return tuple(names)


METRICS = _metrics()  #: every number that a run measures, as `ttft_s.p99`: distributions by part


def metrics_of(summary: Summary) -> dict[str, float | None]:
    """The numbers of a run by the names in METRICS."""
    values: dict[str, float | None] = {}
    for metric in METRICS:
        name, _, part = metric.partition(".")
        value = getattr(summary, name)
        values[metric] = getattr(value, part) if part else value
    return values


class Recorder:
    """Collects the rows of a run. With `tables` off it keeps eight bytes a value and no rows. `names`: whether it notes which
    task of a program each task of the core is.

    `programs`, `gets`, `calls` and `tasks` are the rows so far, in the order in which they came.
    """

    def __init__(self, mode: Mode, tables: bool = True, names: bool = False) -> None:
        self._from_submission = mode is Mode.REQUEST
        self._tables = tables
        # Plain tuples, each in the order of its row's fields: a NamedTuple a row would cost three times as much.
        self._programs: list[tuple[Any, ...]] = []
        self._gets: list[tuple[Any, ...]] = []
        self._calls: list[tuple[Any, ...]] = []
        self._tasks: list[tuple[Any, ...]] = []
        self.values: dict[str, array[float]] = {
            name: array("d") for name in ("ttft_s", "tpot_s", "max_gap_s", "jct_s", "normalized_latency_s")
        }
        self.counts: dict[str, int] = dict.fromkeys(
            (
                "programs",
                "calls",
                "finished",
                "failed",
                "refused",
                "calls_finished",
                "calls_failed",
                "tasks",
                "attempts",
                "output_tokens",
                "prompt_tokens",
                "cached_tokens",
            ),
            0,
        )
        self.errors: dict[str, int] = {}
        self.last_s = 0.0
        #: of a simulation: latency profile -> input -> (furthest that was asked for, least and most that it was fitted to)
        self.outside: dict[str, dict[str, tuple[float, float, float]]] = {}
        self.policy_errors: dict[str, int] = {}
        self.placements: list[PlacementReport] = []
        #: (session, call, output) as the core counts -> (program, call, output) as the tables do; None: not noted
        self.names: dict[TaskId, tuple[int, int, int]] | None = {} if names else None

    @property
    def programs(self) -> list[ProgramRow]:
        return [ProgramRow(*row) for row in self._programs]

    @property
    def gets(self) -> list[GetRow]:
        return [GetRow(*row) for row in self._gets]

    @property
    def calls(self) -> list[CallRow]:
        return [CallRow(*row) for row in self._calls]

    @property
    def tasks(self) -> list[TaskRow]:
        return [TaskRow(*row) for row in self._tasks]

    def program_ended(self, player: Player) -> None:
        """Takes the program's own times; to be called once, when it has ended."""
        counts = self.counts
        counts["programs"] += 1
        counts["refused"] += player.refusals
        finished = player.error is None
        counts["finished" if finished else "failed"] += 1
        ended_s = player.ended_s if player.ended_s is not None else player.started_s
        if ended_s > self.last_s:
            self.last_s = ended_s
        jct_s = ended_s - player.started_s if finished else None
        if jct_s is not None:
            self.values["jct_s"].append(jct_s)
        if player.error is not None:
            self.errors[player.error.code] = self.errors.get(player.error.code, 0) + 1
        if self._tables:
            program = player.program
            self._programs.append(
                (
                    player.serial,
                    program.id,
                    program.application,
                    program.tenant,
                    "finished" if finished else "failed",
                    program.arrival_s,
                    player.started_s,
                    player.ended_s,
                    jct_s,
                    len(program.calls),
                    len(program.gets),
                    player.refusals,
                    f"{player.error.code}: {player.error.message}" if player.error else None,
                )
            )
            for number, get in enumerate(program.gets):
                if number in player.issued:
                    times = (player.issued[number], player.returned.get(number))
                    self._gets.append((player.serial, get.id, get.var, get.criteria, *times))

    def session_ended(self, serial: int, report: SessionReport, outputs: Mapping[str, tuple[int, int]]) -> None:
        """Takes a session of program `serial`. `outputs`: variable id -> (call, output) of the program."""
        for call in report.reports or ():
            tasks = call.tasks
            number, output = outputs.get(tasks[0].var_id, (-1, 0)) if tasks else (-1, 0)
            for place, task in enumerate(tasks):
                self._task(serial, number, output + place, task, task.attempts, task.engine, task.criteria)
                if self.names is not None:
                    self.names[TaskId(report.session_id, call.request_id, place)] = (serial, number, output + place)
            self._call(serial, number, output, call, tasks)

    def calls_ended(self, serial: int, calls: Sequence[Call], outputs: Mapping[str, tuple[int, int]]) -> None:
        """As `session_ended`, from the core's own calls where they are at hand: nobody need make a report of them."""
        for call in calls:
            tasks = call.tasks
            number, output = outputs.get(tasks[0].output.id, (-1, 0)) if tasks else (-1, 0)
            for place, task in enumerate(tasks):
                self._task(serial, number, output + place, task, task.attempt, task.engine_name, task.criteria)
                if self.names is not None:
                    self.names[task.id] = (serial, number, output + place)
            self._call(serial, number, output, call, tasks)

    def _call(
        self, serial: int, number: int, output: int, call: CallReport | Call, tasks: Sequence[TaskReport] | Sequence[Task]
    ) -> None:
        counts = self.counts
        counts["calls"] += 1
        finished, failed = True, False
        prompt_tokens = cached_tokens = output_tokens = 0
        for task in tasks:
            if task.state != "finished":
                finished = False
                failed = failed or task.state == "failed"
            prompt_tokens += task.prompt_tokens
            cached_tokens += task.cached_tokens
            output_tokens += task.output_tokens
        state = "finished" if finished else "failed" if failed else call.state
        if finished:
            counts["calls_finished"] += 1
        elif failed:
            counts["calls_failed"] += 1
        first = tasks[0] if tasks else None
        since = call.submitted_s if self._from_submission else first.ready_s if first is not None else None
        ttft_s = latency_s = normalized_s = None
        if since is not None and first is not None and first.first_token_s is not None:
            ttft_s = first.first_token_s - since
            self.values["ttft_s"].append(ttft_s)
        if finished and since is not None:
            latency_s = (tasks[-1].finished_s or since) - since
            normalized_s = latency_s / max(output_tokens, 1)
            self.values["normalized_latency_s"].append(normalized_s)
        if self._tables:
            self._calls.append(
                (
                    serial,
                    number,
                    output,
                    call.func_name,
                    state,
                    call.submitted_s,
                    first.ready_s if first is not None else None,
                    first.first_token_s if first is not None else None,
                    tasks[-1].finished_s if finished and first is not None else None,
                    prompt_tokens,
                    cached_tokens,
                    output_tokens,
                    ttft_s,
                    latency_s,
                    normalized_s,
                )
            )

    def _task(
        self,
        serial: int,
        call: int,
        output: int,
        task: TaskReport | Task,
        attempts: int,
        engine: str | None,
        criteria: str | None,
    ) -> None:
        counts = self.counts
        counts["tasks"] += 1
        counts["attempts"] += attempts
        tpot_s = None
        if task.state == "finished":
            output_tokens = task.output_tokens
            counts["prompt_tokens"] += task.prompt_tokens
            counts["cached_tokens"] += task.cached_tokens
            counts["output_tokens"] += output_tokens
            if output_tokens > 1:
                tpot_s = task.decode_s / (output_tokens - 1)
                self.values["tpot_s"].append(tpot_s)
                self.values["max_gap_s"].append(task.max_gap_s)
        if self._tables:
            self._tasks.append(
                (
                    serial,
                    call,
                    output,
                    task.state,
                    attempts,
                    engine,
                    criteria,
                    task.depth,
                    task.ready_s,
                    task.dispatched_s,
                    task.started_s,
                    task.first_token_s,
                    task.finished_s,
                    task.prompt_tokens,
                    task.cached_tokens,
                    task.output_tokens,
                    task.decode_s,
                    task.max_gap_s,
                    tpot_s,
                )
            )

    def summary(self, **run: Any) -> Summary:
        """The summary; `run` gives the fields that say which run it was."""
        span_s = self.last_s
        tokens, programs = self.counts["output_tokens"], self.counts["finished"]
        fields: dict[str, Any] = {
            **run,
            **self.counts,
            **{name: distribution(values) for name, values in self.values.items()},
            "simulated_s": span_s,
            "throughput_tokens_per_s": tokens / span_s if span_s > 0 else None,
            "throughput_programs_per_s": programs / span_s if span_s > 0 else None,
            "errors": dict(sorted(self.errors.items())),
            "outside": self.outside,
            "policy_errors": self.policy_errors,
        }
        return Summary(**fields)

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables programs, gets, calls and tasks, in order of program, call and output."""
        return {
            "programs": _table(ProgramRow, self._programs),
            "gets": _table(GetRow, self._gets),
            "calls": _table(CallRow, self._calls),
            "tasks": _table(TaskRow, self._tasks),
        }


def distribution(values: Sequence[float] | array[float]) -> Distribution:
    """Mean and percentiles of `values`."""
    if not len(values):
        return Distribution(None, None, None, None)
    numbers = np.asarray(values, dtype=float)
    p50, p90, p99 = np.percentile(numbers, (50, 90, 99)).tolist()
    return Distribution(float(numbers.mean()), p50, p90, p99)


_TYPES = {int: "int64", float: "float64", float | None: "float64", str: "string", str | None: "string"}


def _table(kind: Any, rows: Sequence[Any]) -> pd.DataFrame:
    hints = get_type_hints(kind)
    columns = list(zip(*rows, strict=True)) or [()] * len(hints)
    # A column at a time, from the types: pandas need not find them out, row by row.
    table = pd.DataFrame(
        {
            name: pd.array(column, dtype="string") if _TYPES[hint] == "string" else np.array(column, dtype=_TYPES[hint])
            for (name, hint), column in zip(hints.items(), columns, strict=True)
        }
    )
    keys = [name for name in ("program", "call", "output") if name in hints]
    return table.sort_values(keys, kind="stable", ignore_index=True)


def write_tables(tables: Mapping[str, pd.DataFrame], folder: Path) -> None:
    """Writes each table as FOLDER/NAME.parquet; the same rows give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)


def read_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """What `write_tables` wrote."""
    return {path.stem: pd.read_parquet(path) for path in sorted(Path(folder).glob("*.parquet"))}
