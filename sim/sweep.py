"""Runs what a specification asks for: every combination, on several processes for simulations, results in a fixed order.

Decides which run goes where and what is written; how a run is carried out is `sim.population` (sim) and `sim.backends`
(emulated, real). Results hold nothing of the wall clock: that goes to timing.json alone.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from parrot.configuration import ConfigurationError
from parrot.protocol.errors import ParrotError
from sim.metrics import Recorder, Summary, write_tables
from sim.network import open_network
from sim.population import StuckError, simulate
from sim.results import write_finished
from sim.spec import Run, check_files, check_programs, core_config_of, engine_models_of
from sim.workloads import WorkloadError, open_workload
from sim.workloads.program import Program

KEPT_PROGRAMS = 50_000  #: a workload up to this size is read once and kept; a longer one is read again for the run


class RunError(Exception):
    """A run that failed or was refused. The message is for the user."""


class Result(NamedTuple):
    """A run, its summary, and the seconds that it took from opening its workload to its last table written."""

    run: Run
    summary: Summary
    wall_s: float


def run_all(
    runs: Sequence[Run],
    folder: str | None,
    *,
    workers: int | None = None,
    on_program: Callable[[Run], None] | None = None,
) -> Iterator[Result]:
    """The results of `runs`, in their order, each as soon as it and those before it are there. Raises RunError.

    workers: processes for simulations (None: one a core). on_program: called as programs end, when a run is carried out in
    this process.
    """
    for run in runs:
        _checked(check_files, run)
    if folder is not None:
        prepare_folder(folder)
    workers = min(workers or os.cpu_count() or 1, len(runs))
    if workers > 1 and all(run.backend == "sim" for run in runs):
        yield from _on_pool(runs, folder, workers)
        return
    for run in runs:
        yield run_one(run, folder, on_program)


def run_one(run: Run, folder: str | None, on_program: Callable[[Run], None] | None = None) -> Result:
    """Carries out one run and writes its tables. Raises RunError."""
    begun_s = time.monotonic()
    watch = (lambda: on_program(run)) if on_program is not None else None
    tables = folder is not None and run.tables
    if run.backend == "sim":
        recorder, engines = _checked(_simulate, run, tables, watch)
    else:
        from sim.backends import run_on_cluster  # aiohttp, only when it is needed

        recorder, engines = _checked(run_on_cluster, run, tables, watch)
    summary = recorder.summary(
        policy=run.policy,
        rate=run.rate,
        clients=run.clients,
        arrivals=run.arrivals,
        seed=run.seed,
        repeat=run.repeat,
        draw=run.draw,
        cluster=tuple(f"{group.file}:{group.count}" for group in run.engines),
        workload=run.workload,
        client=run.client.value,
        backend=run.backend,
        engines=engines,
        rtt_ms=run.rtt_ms,
        settings=run.settings,
    )
    if folder is not None:
        if tables:
            write_tables(recorder.tables(), Path(folder) / run.name)
        write_finished(Path(folder), run, summary)
    return Result(run, summary, time.monotonic() - begun_s)


def _simulate(run: Run, tables: bool, watch: Callable[[], None] | None) -> tuple[Recorder, int]:
    engines = engine_models_of(run)
    programs = _programs(run, engines)
    config = core_config_of(run)
    # A simulation makes many objects and hardly any cycles: collecting often costs more than it frees.
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    try:
        recorder = simulate(
            programs,
            config,
            engines,
            mode=run.client,
            network=open_network(run.rtt_ms, run.seed),
            max_gen_length=run.max_gen_length,
            jump=run.jump,
            engine_delay_s=run.engine_delay_ms / 1000.0,
            tables=tables,
            on_ended=watch,
        )
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    return recorder, len(engines)


def open_programs(run: Run) -> Iterator[Program]:
    """The run's workload."""
    return open_workload(run.workload, rate=run.rate, seed=run.seed, count=run.count, max_gen_length=run.max_gen_length)


def _programs(run: Run, engines: Sequence[Any]) -> Iterator[Program]:
    """The workload, read to its end once before anything runs, so that what is wrong with it is known first."""
    checked = check_programs(open_programs(run), engines, run.workload)
    kept = list(itertools.islice(checked, KEPT_PROGRAMS + 1))
    if not kept:
        raise ConfigurationError(f"workload {run.workload!r} has no programs")
    if len(kept) <= KEPT_PROGRAMS:
        return iter(kept)
    for _ in checked:
        pass
    return open_programs(run)


def _checked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function`; what it refuses becomes a RunError, which travels between processes."""
    try:
        return function(*arguments)
    except (ConfigurationError, WorkloadError, StuckError, ParrotError) as error:
        raise RunError(str(error)) from None


# ------------------------------------------------------------------------------------------------------------ the pool


def _on_pool(runs: Sequence[Run], folder: str | None, workers: int) -> Iterator[Result]:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _leave_interrupts_to_the_parent)
    try:
        yield from pool.map(run_one, runs, itertools.repeat(folder))
    except BrokenProcessPool:
        raise RunError("a worker process died (killed, or out of memory); --workers 1 shows which run it was") from None
    except BaseException:
        processes = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------------------------- results


def prepare_folder(folder: str) -> None:
    """Makes the folder of results. Raises RunError when it cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"--out {folder}: cannot be written: {error.strerror}") from None


def write_timing(results: Sequence[Result], wall_s: float, folder: str) -> None:
    """DIR/timing.json: the wall clock, which is in no other file."""
    rows = [
        {"policy": r.run.policy, "rate": r.run.rate, "seed": r.run.seed, "run": r.run.name, "wall_s": r.wall_s} for r in results
    ]
    (Path(folder) / "timing.json").write_bytes(msgspec.json.format(msgspec.json.encode({"wall_s": wall_s, "runs": rows})))
