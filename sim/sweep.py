"""Runs what a specification asks for: every combination, on several processes for simulations, results in a fixed order.

Decides which run goes where and what is written of it; how a run is carried out is `sim.population` (sim) and `sim.backends`
(emulated, real), where its files lie is `sim.results`. Results hold nothing of the wall clock: that goes to timing.json alone.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from parrot.configuration import ConfigurationError
from parrot.latency import OutOfRange
from parrot.protocol.errors import ParrotError
from sim.clients import Mode
from sim.configs import check_files, core_config_of, engine_models_of, open_programs
from sim.fit import check_programs
from sim.metrics import Summary, write_tables
from sim.network import open_network
from sim.objectives import within
from sim.placements import placements_table
from sim.pool import Died, Progress, on_processes, shared_progress
from sim.population import StuckError, simulate
from sim.recorder import Recorder
from sim.results import PLACEMENTS, TRACE, ResultsError, write_finished
from sim.spec import ENGINE_PREFIX, Run
from sim.tables import engine_load
from sim.workloads import WorkloadError
from sim.workloads.ahead import read_ahead
from sim.workloads.program import Program

CHECKED_PROGRAMS = 5_000  #: of each workload of a sweep, before its first run
COLLECT_AFTER = 1_000_000  #: objects more than at the last collection, some 100 MiB, before the next one
POLL_S = 0.2  #: how often a run in this process tells how far it is


class RunError(Exception):
    """A run that failed or was refused. The message is for the user."""


class Result(NamedTuple):
    """A run, its summary, and the seconds that it took from opening its workload to its last table written (None: it was
    kept from before)."""

    run: Run
    summary: Summary
    wall_s: float | None


class Failure(NamedTuple):
    """A run that gave no result, and why."""

    run: Run
    reason: str


Outcome = Result | Failure


class Where(NamedTuple):
    """Where runs are carried out: on `workers` processes (None: one a core), or on the Ray cluster at an address."""

    workers: int | None = None
    ray: str | None = None


def run_all(
    runs: Sequence[Run],
    folder: str | None,
    *,
    where: Where = Where(),
    finished: Mapping[str, Summary] = {},
    on_progress: Callable[[Sequence[Progress]], None] | None = None,
) -> Iterator[Outcome]:
    """What became of `runs`, in their order, each as soon as it and those before it are there.

    finished: summaries by name of run; these runs are not repeated. on_progress: called a few times a second with how far
    each run is that is carried out. Raises RunError when nothing can be carried out at all.
    """
    todo = [run for run in runs if run.name not in finished]
    progress = shared_progress(len(todo))
    tell = functools.partial(on_progress, progress) if on_progress is not None else lambda: None
    places = {run.name: place for place, run in enumerate(runs)}
    outcomes: dict[int, Outcome] = {places[n]: Result(runs[places[n]], finished[n], None) for n in finished if n in places}
    arrived = itertools.chain([None], _carry_out_all(todo, folder, where, progress, tell))
    following = 0
    for outcome in arrived:
        if outcome is not None:
            outcomes[places[outcome.run.name]] = outcome
        while following in outcomes:
            yield outcomes.pop(following)
            following += 1


def _carry_out_all(
    runs: Sequence[Run], folder: str | None, where: Where, progress: Sequence[Progress], tell: Callable[[], None]
) -> Iterator[Outcome]:
    """The outcomes of `runs` as they come."""
    workers = min(where.workers or os.cpu_count() or 1, len(runs))
    simulated = all(run.backend == "sim" for run in runs)
    if where.ray is not None and runs:
        if not simulated:
            raise RunError("--ray: only simulations can be spread over machines; the backend is not sim")
        try:
            from sim.ray_cluster import on_ray
        except ImportError:
            raise RunError("--ray: Ray is not installed; it comes with the extra: pip install 'parrot-testbed[ray]'") from None
        yield from on_ray(runs, folder, where, tell)
    elif workers > 1 and simulated:
        work = [functools.partial(carry_out, run, folder, far) for run, far in zip(runs, progress, strict=True)]
        for number, result in on_processes(work, workers, tell):
            yield Failure(runs[number], result.told) if isinstance(result, Died) else result
    else:
        for run, far in zip(runs, progress, strict=True):
            yield carry_out(run, folder, far, _every(POLL_S, tell))


def _every(seconds: float, function: Callable[[], None]) -> Callable[[], None]:
    """`function`, called at most once in `seconds`."""
    last = 0.0

    def call() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            function()

    return call


# ------------------------------------------------------------------------------------------------------------- one run


def carry_out(run: Run, folder: str | None, progress: Progress, watch: Callable[[], None] = lambda: None) -> Outcome:
    """`run_one`; a refusal becomes a Failure, which travels between processes."""
    try:
        return run_one(run, folder, progress, watch)
    except RunError as error:
        return Failure(run, str(error))


def run_one(run: Run, folder: str | None, progress: Progress | None = None, watch: Callable[[], None] = lambda: None) -> Result:
    """Carries out one run and writes its files. Raises RunError.

    progress: where programs are counted. watch: called as each ends.
    """
    begun_s = time.monotonic()
    counted = progress or shared_progress(1)[0]

    def ended() -> None:
        counted.advance()
        watch()

    if run.backend == "sim":
        recorder, engines = _checked(_simulate, run, counted.expect, ended)
    else:
        from sim.backends import run_on_cluster  # aiohttp, only when it is needed

        recorder, engines = _checked(run_on_cluster, run, keeps_rows(run), counted.expect, ended)
    summary = _summary(run, recorder, engines)
    if folder is not None:
        _checked(_write, run, recorder, summary, Path(folder))
    return Result(run, summary, time.monotonic() - begun_s)


def keeps_rows(run: Run) -> bool:
    """Whether rows of programs, calls and tasks are kept: for tables, a trace, or objectives."""
    return run.tables or run.trace or bool(run.objectives)


def _summary(run: Run, recorder: Recorder, engines: int) -> Summary:
    summary = recorder.summary(
        policy=run.policy,
        rate=run.rate,
        clients=run.clients,
        arrivals=run.arrivals,
        seed=run.seed,
        repeat=run.repeat,
        draw=run.draw,
        workload=run.workload,
        cluster=tuple(f"{group.file}:{group.count}" for group in run.engines),
        client=run.client.value,
        backend=run.backend,
        engines=engines,
        rtt_ms=run.rtt_ms,
        settings=run.settings,
    )
    if not run.objectives:
        return summary
    good = int(within(recorder.tables(), run.objectives).sum())
    goodput = good / summary.simulated_s if summary.simulated_s > 0 else None
    return msgspec.structs.replace(summary, within_objectives=good, goodput_programs_per_s=goodput)


def _write(run: Run, recorder: Recorder, summary: Summary, folder: Path) -> None:
    try:
        (folder / run.name).mkdir(parents=True, exist_ok=True)
        tables = recorder.tables() if run.tables or run.trace else {}
        if run.tables:
            write_tables({**tables, "engines": engine_load(tables["tasks"])}, folder / run.name)
        if run.explain:
            write_tables({PLACEMENTS: placements_table(recorder)}, folder / run.name)
        if run.trace:
            from sim.report.perfetto import write_trace

            programs = open_programs(run) if run.program is None else ()
            write_trace(folder / run.name / TRACE, tables, programs, run)
        write_finished(folder, run, summary)
    except OSError as error:
        raise RunError(f"{folder / run.name}: cannot be written: {error.strerror}") from None


def _simulate(run: Run, expect: Callable[[int], None], ended: Callable[[], None]) -> tuple[Recorder, int]:
    # A simulation makes many objects and hardly any cycles: a collection, which looks at all that thousands of requests under
    # way hold, costs much more than it frees.
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 100)
    try:
        if run.program is not None:
            from sim.programs import simulate_programs

            return simulate_programs(run, keeps_rows(run), expect, ended)
        engines = engine_models_of(run)
        programs = _programs(run, engines, expect)
        gc.freeze()  # what was read stays until it arrives
        recorder = simulate(
            programs,
            core_config_of(run),
            engines,
            mode=run.client,
            network=open_network(run.rtt_ms, run.seed),
            max_gen_length=run.max_gen_length,
            jump=run.jump,
            engine_delay_s=run.engine_delay_ms / 1000.0,
            tables=keeps_rows(run),
            on_ended=ended,
            clients=run.clients,
            strict=run.strict,
        )
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    return recorder, len(engines)


def _programs(run: Run, engines: Sequence[Any], expect: Callable[[int], None]) -> Iterator[Program]:
    """The workload, read to its end once before anything runs, so that what is wrong with it is known first."""
    checked = check_programs(open_programs(run), engines, run.workload, _most_tasks(run))
    count, programs = read_ahead(checked, functools.partial(open_programs, run))
    if not count:
        raise ConfigurationError(f"workload {run.workload!r} has no programs")
    expect(count)
    return programs


def _most_tasks(run: Run) -> int | None:
    """Unfinished tasks that a program's session may have; None when a program is not one session."""
    return core_config_of(run).max_tasks_per_session if run.client is Mode.SEMANTIC else None


def _checked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function`; what it refuses becomes a RunError."""
    try:
        return function(*arguments)
    except (ConfigurationError, WorkloadError, StuckError, OutOfRange, ResultsError, ParrotError) as error:
        raise RunError(str(error)) from None


# --------------------------------------------------------------------------------------------------- before any of them


def check_runs(runs: Sequence[Run]) -> None:
    """Raises RunError for whatever in the runs' files would stop one of them, workloads included.

    Of a workload, the first programs are read, under the first of its rates and seeds: each run reads its own to the end
    before it starts, and a run that is alone needs no more than that.
    """
    for run in _distinct(runs, lambda run: msgspec.structs.replace(run, name="", workload="", **_LOAD)):
        _checked(check_files, run)
    if runs[0].program is not None:  # its instances are no workload
        return
    looked_at = CHECKED_PROGRAMS if len(runs) > 1 else 0
    for run in _distinct(runs, lambda run: (run.workload, run.engines, _of_engines(run.settings))):
        _checked(_check_workload, run, looked_at)


_LOAD: dict[str, Any] = {"rate": None, "clients": None, "seed": 0, "repeat": 0, "draw": None}


def _distinct(runs: Iterable[Run], key: Callable[[Run], Any]) -> list[Run]:
    """The first run of each value of `key`."""
    found: dict[bytes, Run] = {}
    for run in runs:
        found.setdefault(msgspec.json.encode(key(run)), run)
    return list(found.values())


def _of_engines(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name.startswith(ENGINE_PREFIX)}


def _check_workload(run: Run, looked_at: int) -> None:
    programs = open_programs(run)
    if run.backend != "real" and run.core_url is None:
        programs = check_programs(programs, engine_models_of(run), run.workload, _most_tasks(run))
    for _ in itertools.islice(programs, looked_at):
        pass
