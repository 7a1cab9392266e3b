"""The folder of results: where everything lies, how a finished run is told from another, and the one reader of it.

    OUT/spec.json            the specification, as `--spec` takes it
    OUT/inputs.json          the digest of each file that the runs read
    OUT/RUN/run.json         {"run", "summary"}: written last and at once, so that a run that has it is finished
    OUT/RUN/*.parquet        the tables of the run (sim.metrics, sim.tables)
    OUT/RUN/trace.json.gz    its Perfetto trace
    OUT/summary.jsonl, cells.jsonl, timing.json, report.html   when all runs have ended

Decides what is kept between two starts of a sweep; never what a run does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import msgspec
import pandas as pd

from parrot.configuration import ConfigurationError
from sim.metrics import Summary, read_tables
from sim.spec import Run, Specification, load_specification, runs_of

SPECIFICATION, INPUTS, FINISHED = "spec.json", "inputs.json", "run.json"
SUMMARIES, CELLS, TIMING, REPORT = "summary.jsonl", "cells.jsonl", "timing.json", "report.html"
PRESENTATION = ("about", "confidence", "metrics", "report")  #: fields of a specification that change no run


class ResultsError(Exception):
    """A folder of results that cannot be read or written. The message names the file and the reason."""


class Finished(msgspec.Struct, frozen=True):
    """run.json."""

    run: Run
    summary: Summary


class RunResult(NamedTuple):
    """A finished run, and where it lies."""

    run: Run
    summary: Summary
    folder: Path

    def tables(self) -> dict[str, pd.DataFrame]:
        """Its tables by name. Raises ResultsError when there are none, or one cannot be read."""
        if not self.run.tables:
            raise ResultsError(f"{self.folder}: the run was made without tables (--no-tables)")
        try:
            tables = read_tables(self.folder)
        except (OSError, ValueError) as error:
            raise ResultsError(f"{self.folder}: a table cannot be read: {error}") from None
        if missing := {"programs", "gets", "calls", "tasks"} - set(tables):
            raise ResultsError(f"{self.folder}: no {', '.join(sorted(missing))}.parquet")
        return tables


class ResultFolder(NamedTuple):
    """A sweep. runs: the finished ones, in the specification's order; draws: those of `--intervals` among its runs, apart;
    missing: the names of those that have not finished."""

    path: Path
    specification: Specification
    runs: list[RunResult]
    draws: list[RunResult]
    missing: list[str]


def read_results(folder: str | Path) -> ResultFolder:
    """What `python -m sim.run --out FOLDER` wrote. Raises ResultsError for another folder, and for one with no finished run."""
    path = Path(folder)
    if not (path / SPECIFICATION).is_file():
        raise ResultsError(f"{path}: no folder of results of sim.run: it has no {SPECIFICATION}")
    try:
        specification = load_specification(str(path / SPECIFICATION))
        runs = runs_of(specification)
    except ConfigurationError as error:
        raise ResultsError(f"{error} (of another version?)") from None
    finished: list[RunResult] = []
    missing = []
    for run in runs:
        summary = read_finished(path, run)
        if summary is None:
            missing.append(run.name)
        else:
            finished.append(RunResult(run, summary, path / run.name))
    if not finished:
        raise ResultsError(f"{path}: no run of it has finished (none has a {FINISHED})")
    plain = [result for result in finished if result.run.draw is None]
    return ResultFolder(path, specification, plain, [r for r in finished if r.run.draw is not None], missing)


def read_finished(folder: Path, run: Run) -> Summary | None:
    """The summary of `run` if it has finished in `folder`. Raises ResultsError for a run.json of another run, or of none."""
    path = folder / run.name / FINISHED
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Finished)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ResultsError(f"{path}: cannot be read: {error}") from None
    if found.run != run:
        raise ResultsError(f"{path}: of another run: {', '.join(_differing(found.run, run))} differ")
    return found.summary


def write_finished(folder: Path, run: Run, summary: Summary) -> None:
    """Marks `run` as finished: to be called when all else of it is written."""
    (folder / run.name).mkdir(parents=True, exist_ok=True)
    write_whole(folder / run.name / FINISHED, msgspec.json.format(msgspec.json.encode(Finished(run, summary))) + b"\n")


def write_specification(folder: Path, specification: Specification) -> None:
    """OUT/spec.json."""
    write_whole(folder / SPECIFICATION, msgspec.json.format(msgspec.json.encode(specification)) + b"\n")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is there as a whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _differing(a: msgspec.Struct, b: msgspec.Struct) -> list[str]:
    return [name for name in a.__struct_fields__ if getattr(a, name) != getattr(b, name)]
