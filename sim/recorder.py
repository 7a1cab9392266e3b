"""Collects what a run measures as it goes: counts, values, and the rows of its tables. `sim.metrics` says what they mean.

One for every backend. It is on the way of every request of a simulation: values of rows lie end to end, in the order of the
row's fields, and are told apart when somebody asks for a table.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from parrot.protocol.api import CallReport, SessionReport, TaskReport
from parrot.protocol.engine import TaskId
from parrot.protocol.errors import ErrorInfo
from parrot.serve.explanations import PlacementReport
from parrot.serve.graph import Call, Task
from sim.clients import Mode
from sim.metrics import CallRow, GetRow, ProgramRow, Summary, TaskRow, distribution, table_of
from sim.player import Player
from sim.workloads.program import Program

if TYPE_CHECKING:
    import pandas as pd

_Row = TypeVar("_Row", ProgramRow, GetRow, CallRow, TaskRow)


_PART: Final = 1024  #: numbers that lie in one piece of memory


class Played(Protocol):
    """What is asked of who played a program: of a `Player`, or of another that keeps its books."""

    serial: int
    started_s: float
    ended_s: float | None
    error: ErrorInfo | None
    refusals: int

    @property
    def program(self) -> Program: ...

    def issued_s(self, number: int) -> float | None: ...

    def returned_s(self, number: int) -> float | None: ...


class _Values:
    """Numbers, eight bytes each. Nothing that was written is touched again before somebody asks: one array of them all would be
    copied as it grows."""

    def __init__(self) -> None:
        self._full: list[array[float]] = []
        self._part = array("d")

    def add(self, number: float) -> None:
        self._part.append(number)
        if len(self._part) == _PART:
            self._full.append(self._part)
            self._part = array("d")

    def all(self) -> array[float]:
        """All that were added, in order."""
        numbers = array("d")
        for part in self._full:
            numbers.extend(part)
        numbers.extend(self._part)
        return numbers


class Recorder:
    """Collects the rows of a run. With `tables` off it keeps eight bytes a value and no rows. `names`: whether it notes which
    task of a program each task of the core is.

    `programs`, `gets`, `calls` and `tasks` are the rows so far, in the order in which they came.
    """

    def __init__(self, mode: Mode, tables: bool = True, names: bool = False) -> None:
        self._from_submission = mode is Mode.REQUEST
        self._tables = tables
        self._program_values: list[Any] = []
        self._get_values: list[Any] = []
        self._call_values: list[Any] = []
        self._task_values: list[Any] = []
        self._ttft_s = _Values()
        self._tpot_s = _Values()
        self._max_gap_s = _Values()
        self._jct_s = _Values()
        self._normalized_latency_s = _Values()
        self._programs = 0
        self._calls = 0
        self._finished = 0
        self._refused = 0
        self._calls_finished = 0
        self._calls_failed = 0
        self._tasks = 0
        self._attempts = 0
        self._output_tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
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
        return _rows(ProgramRow, self._program_values)

    @property
    def gets(self) -> list[GetRow]:
        return _rows(GetRow, self._get_values)

    @property
    def calls(self) -> list[CallRow]:
        return _rows(CallRow, self._call_values)

    @property
    def tasks(self) -> list[TaskRow]:
        return _rows(TaskRow, self._task_values)

    @property
    def counts(self) -> dict[str, int]:
        """What was counted, by its name in the summary."""
        return {
            "programs": self._programs,
            "calls": self._calls,
            "finished": self._finished,
            "failed": self._programs - self._finished,
            "refused": self._refused,
            "calls_finished": self._calls_finished,
            "calls_failed": self._calls_failed,
            "tasks": self._tasks,
            "attempts": self._attempts,
            "output_tokens": self._output_tokens,
            "prompt_tokens": self._prompt_tokens,
            "cached_tokens": self._cached_tokens,
        }

    @property
    def values(self) -> dict[str, array[float]]:
        """What was measured, by its name in the summary."""
        return {
            "ttft_s": self._ttft_s.all(),
            "tpot_s": self._tpot_s.all(),
            "max_gap_s": self._max_gap_s.all(),
            "jct_s": self._jct_s.all(),
            "normalized_latency_s": self._normalized_latency_s.all(),
        }

    # ------------------------------------------------------------------------------------------------- what is told

    def program_ended(self, player: Player | Played) -> None:
        """Takes the program's own times; to be called once, when it has ended."""
        error, started_s, ended_s = player.error, player.started_s, player.ended_s
        self._programs += 1
        self._refused += player.refusals
        last_s = ended_s if ended_s is not None else started_s
        if last_s > self.last_s:
            self.last_s = last_s
        jct_s: float | None = None
        if error is None:
            self._finished += 1
            jct_s = last_s - started_s
            self._jct_s.add(jct_s)
        else:
            self.errors[error.code] = self.errors.get(error.code, 0) + 1
        if self._tables:
            program = player.program
            self._program_values += (
                player.serial,
                program.id,
                program.application,
                program.tenant,
                "finished" if error is None else "failed",
                program.arrival_s,
                started_s,
                ended_s,
                jct_s,
                len(program.calls),
                len(program.gets),
                player.refusals,
                f"{error.code}: {error.message}" if error is not None else None,
            )
            for number, get in enumerate(program.gets):
                issued_s = player.issued_s(number)
                if issued_s is not None:
                    self._get_values += (player.serial, get.id, get.var, get.criteria, issued_s, player.returned_s(number))

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

    def calls_ended(self, serial: int, calls: Sequence[Call], numbers: Sequence[int], first: int = 0) -> None:
        """As `session_ended`, from the core's own calls where they are at hand: nobody need make a report of them.

        numbers: of each call, which of the program's it is; -1, or nothing behind the last: it is not known. first: which of
        that call's outputs its first one is.
        """
        known = len(numbers)
        for accepted, call in enumerate(calls):
            tasks = call.tasks
            number = numbers[accepted] if accepted < known else -1
            output = first if number >= 0 else 0
            for place, task in enumerate(tasks):
                self._task(serial, number, output + place, task, task.attempt, task.engine_name, task.criteria)
                if self.names is not None:
                    self.names[task.id] = (serial, number, output + place)
            self._call(serial, number, output, call, tasks)

    def _call(
        self, serial: int, number: int, output: int, call: Call | CallReport, tasks: Sequence[Task] | Sequence[TaskReport]
    ) -> None:
        self._calls += 1
        finished, failed = True, False
        prompt_tokens = cached_tokens = output_tokens = 0
        first: Task | TaskReport | None = None
        last: Task | TaskReport | None = None
        for task in tasks:
            first = first or task
            last = task
            if task.state != "finished":
                finished = False
                failed = failed or task.state == "failed"
            prompt_tokens += task.prompt_tokens
            cached_tokens += task.cached_tokens
            output_tokens += task.output_tokens
        if finished:
            self._calls_finished += 1
        elif failed:
            self._calls_failed += 1
        ready_s = first.ready_s if first is not None else None
        first_token_s = first.first_token_s if first is not None else None
        finished_s = last.finished_s if finished and last is not None else None
        since = call.submitted_s if self._from_submission else ready_s
        ttft_s: float | None = None
        latency_s: float | None = None
        normalized_s: float | None = None
        if since is not None and first_token_s is not None:
            ttft_s = first_token_s - since
            self._ttft_s.add(ttft_s)
        if finished and since is not None:
            latency_s = (finished_s or since) - since
            normalized_s = latency_s / max(output_tokens, 1)
            self._normalized_latency_s.add(normalized_s)
        if self._tables:
            self._call_values += (
                serial,
                number,
                output,
                call.func_name,
                "finished" if finished else "failed" if failed else call.state,
                call.submitted_s,
                ready_s,
                first_token_s,
                finished_s,
                prompt_tokens,
                cached_tokens,
                output_tokens,
                ttft_s,
                latency_s,
                normalized_s,
            )

    def _task(
        self,
        serial: int,
        call: int,
        output: int,
        task: Task | TaskReport,
        attempts: int,
        engine: str | None,
        criteria: str | None,
    ) -> None:
        self._tasks += 1
        self._attempts += attempts
        tpot_s: float | None = None
        if task.state == "finished":
            output_tokens = task.output_tokens
            self._prompt_tokens += task.prompt_tokens
            self._cached_tokens += task.cached_tokens
            self._output_tokens += output_tokens
            if output_tokens > 1:
                tpot_s = task.decode_s / (output_tokens - 1)
                self._tpot_s.add(tpot_s)
                self._max_gap_s.add(task.max_gap_s)
        if self._tables:
            self._task_values += (
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

    # ------------------------------------------------------------------------------------------------ what is asked

    def summary(self, **run: Any) -> Summary:
        """The summary; `run` gives the fields that say which run it was."""
        span_s = self.last_s
        fields: dict[str, Any] = {
            **run,
            **self.counts,
            **{name: distribution(values) for name, values in self.values.items()},
            "simulated_s": span_s,
            "throughput_tokens_per_s": self._output_tokens / span_s if span_s > 0 else None,
            "throughput_programs_per_s": self._finished / span_s if span_s > 0 else None,
            "errors": dict(sorted(self.errors.items())),
            "outside": self.outside,
            "policy_errors": self.policy_errors,
        }
        return Summary(**fields)

    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables programs, gets, calls and tasks, in order of program, call and output."""
        return {
            "programs": table_of(ProgramRow, self._program_values),
            "gets": table_of(GetRow, self._get_values),
            "calls": table_of(CallRow, self._call_values),
            "tasks": table_of(TaskRow, self._task_values),
        }


def _rows(kind: type[_Row], values: list[Any]) -> list[_Row]:
    width = len(kind._fields)
    return [kind(*values[begin : begin + width]) for begin in range(0, len(values), width)]
