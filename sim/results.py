"""The folder of results: where everything lies, how a finished run is told from another, and the one reader of it.

    OUT/spec.json            the specification, as `--spec` takes it
    OUT/inputs.json          the digest of each file that the runs read
    OUT/RUN/run.json         {"run", "summary"}: written last and at once, so that a run that has it is finished
    OUT/RUN/*.parquet        the tables of the run (sim.metrics, sim.tables)
    OUT/RUN/placements.parquet    why each task went where it went (sim.placements), with --explain
    OUT/RUN/trace.json.gz    its Perfetto trace
    OUT/summary.jsonl, cells.jsonl, timing.json, report.html   when all runs have ended
    OUT/standings.csv, report-WORKLOAD.html                    with the report, of several policies and workloads

Decides what is kept between two starts of a sweep; never what a run does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import pandas as pd

from parrot import compiled
from parrot.configuration import ConfigurationError
from parrot.serve.policies import source_of_policy
from sim.configs import engine_configs_of, profiles_of
from sim.metrics import Summary, read_tables
from sim.spec import Run, Specification, load_specification, runs_of

SPECIFICATION, INPUTS, FINISHED = "spec.json", "inputs.json", "run.json"
SUMMARIES, CELLS, TIMING, REPORT = "summary.jsonl", "cells.jsonl", "timing.json", "report.html"
STANDINGS, REPORT_OF = "standings.csv", "report-{}.html"  #: which policy wins where; the report of one workload of several
TABLES, TRACE = ("programs", "gets", "calls", "tasks", "engines"), "trace.json.gz"
PLACEMENTS = "placements"  #: the table of `explain`
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
        if missing := set(TABLES) - set(tables):
            raise ResultsError(f"{self.folder}: no {', '.join(sorted(missing))}.parquet")
        return tables


class ResultFolder(NamedTuple):
    """A sweep. runs: the finished ones, in the specification's order; draws: those of `--intervals`, which are apart;
    missing: the names of the runs (not draws) that have not finished."""

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
        if summary is not None:
            finished.append(RunResult(run, summary, path / run.name))
        elif run.draw is None:
            missing.append(run.name)
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
    _write_whole(folder / run.name / FINISHED, _json(Finished(run, summary)))


def place_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes the files of a run that was carried out elsewhere, run.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(contents, key=lambda name: name == FINISHED):
        _write_whole(folder / name, contents[name])


# ------------------------------------------------------------------------------------------------- a sweep's beginning


def open_folder(
    folder: Path, specification: Specification, inputs: Mapping[str, str], fresh: bool = False
) -> dict[str, Summary]:
    """Makes the folder ready for the runs of `specification`; returns the summaries, by name, of those that it has already.

    inputs: as `inputs_of` gives them. fresh: what an earlier sweep left is removed. Raises ResultsError for a folder that
    cannot be written, and for one with finished runs of another specification or of files that have changed since.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            _clear(folder)
        runs = runs_of(specification)
        if any(folder.glob(f"*/{FINISHED}")):
            _check_same(folder, specification, inputs)
        _write_whole(folder / SPECIFICATION, _json(specification))
        _write_whole(folder / INPUTS, _json(inputs))
        found = {run.name: read_finished(folder, run) for run in runs}
        return {name: summary for name, summary in found.items() if summary is not None}
    except OSError as error:
        raise ResultsError(f"--out {folder}: cannot be written: {error.strerror}") from None


def inputs_of(runs: Iterable[Run]) -> dict[str, str]:
    """The digest of each file that `runs` read, of each latency profile, and of each policy that is not this package's own, by
    name. Raises ConfigurationError."""
    files: set[str] = set()
    digests: dict[str, str] = {}
    seen: set[bytes] = set()
    for policy in dict.fromkeys(run.policy for run in runs):
        source = source_of_policy(policy)
        if source is not None:
            digests[f"policy {policy}"] = _digest(Path(source).read_bytes())
    for run in runs:
        key = msgspec.json.encode((run.workload, run.engines, run.settings))
        if key in seen:
            continue
        seen.add(key)
        named = [value for name in run.__struct_fields__ if isinstance(value := getattr(run, name), str)]
        parts = [part for value in named for part in (value, *re.split("[:,=+]", value))]
        files.update(filter(os.path.isfile, [*parts, *(group.file for group in run.engines)]))
        if run.core_url is None and run.backend != "real":
            for _, profile in profiles_of(run, engine_configs_of(run)):
                digests[f"profile {profile.name}"] = _digest(msgspec.json.encode(profile))
    for file in files:
        with open(file, "rb") as content:
            digests[file] = hashlib.file_digest(content, "sha256").hexdigest()
    return dict(sorted(digests.items()))


def _check_same(folder: Path, specification: Specification, inputs: Mapping[str, str]) -> None:
    """Raises ResultsError unless the folder's runs are of `specification` and of the same files."""
    ways = f"--fresh removes what is in {folder}, another --out leaves it"
    try:
        before = load_specification(str(folder / SPECIFICATION))
        read = msgspec.json.decode((folder / INPUTS).read_bytes(), type=dict[str, str])
    except (ConfigurationError, OSError, msgspec.DecodeError) as error:
        raise ResultsError(f"{folder}: has results, but of no specification that can be read ({error}); {ways}") from None
    differing = [name for name in _differing(before, specification) if name not in PRESENTATION]
    if differing:
        said = "; ".join(
            f"{name} {_short(getattr(before, name))} there, {_short(getattr(specification, name))} here" for name in differing
        )
        raise ResultsError(f"{folder}: has the results of another specification: {said}; {ways}")
    changed = [name for name in sorted({*read, *inputs}) if read.get(name) != inputs.get(name)]
    if changed:
        raise ResultsError(f"{folder}: its results are of other contents of {', '.join(changed)}; {ways}")


def _clear(folder: Path) -> None:
    """Removes what a sweep wrote, and nothing else: folders that hold a run.json, or are named as runs of its spec.json."""
    try:
        names = {run.name for run in runs_of(load_specification(str(folder / SPECIFICATION)))}
    except ConfigurationError:
        names = set()
    names.update(path.parent.name for path in folder.glob(f"*/{FINISHED}"))
    for run in [folder / name for name in names if (folder / name).is_dir()]:
        for name in (*(f"{table}.parquet" for table in (*TABLES, PLACEMENTS)), TRACE, FINISHED, f".{FINISHED}.partial"):
            (run / name).unlink(missing_ok=True)
        if not any(run.iterdir()):
            run.rmdir()
    reports = [path.name for path in folder.glob(REPORT_OF.format("*"))]
    for name in (SPECIFICATION, INPUTS, SUMMARIES, CELLS, TIMING, REPORT, STANDINGS, *reports):
        (folder / name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------- and its end


def write_results(folder: Path, summaries: Iterable[Summary], cells: Iterable[msgspec.Struct]) -> None:
    """OUT/summary.jsonl and OUT/cells.jsonl."""
    for name, items in ((SUMMARIES, summaries), (CELLS, cells)):
        _write_whole(folder / name, b"".join(msgspec.json.encode(item) + b"\n" for item in items))


def write_timing(folder: Path, wall_s: float, runs: Iterable[tuple[Run, float | None]]) -> None:
    """OUT/timing.json: the wall clock, which is in no other file. A run that was kept has the time that stood there before."""
    try:
        before = {row["run"]: row["wall_s"] for row in msgspec.json.decode((folder / TIMING).read_bytes())["runs"]}
    except (OSError, msgspec.DecodeError, KeyError, TypeError):
        before = {}
    rows = [
        {
            "policy": run.policy,
            "rate": run.rate,
            "seed": run.seed,
            "run": run.name,
            "wall_s": seconds if seconds is not None else before.get(run.name),
        }
        for run, seconds in runs
    ]
    _write_whole(folder / TIMING, _json({"wall_s": wall_s, "compiled": compiled.in_use(), "runs": rows}))


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value)) + b"\n"


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is there as a whole or not at all. Raises ResultsError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ResultsError(f"{path}: cannot be written: {error.strerror}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _differing(a: msgspec.Struct, b: msgspec.Struct) -> list[str]:
    return [name for name in a.__struct_fields__ if getattr(a, name) != getattr(b, name)]


def _short(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
