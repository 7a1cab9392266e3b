"""Reads iteration logs (docs/iteration-log.md) into runs: a run is one start of one engine.

Refuses what is no such log, what was cut off, and what is of two engines; it judges no duration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from parrot.latency import BatchShape

#: what must be alike in all runs that are fitted together
ALIKE = ("model", "device", "attn_func", "dtype", "num_threads", "dummy_weights")


class CalibrationError(Exception):
    """Logs that no profile can be fitted to. The message names file, line and reason."""


class Header(msgspec.Struct, frozen=True, tag="header", tag_field="kind"):
    """The first line of a start of an engine."""

    iteration_log: int
    model: str
    device: str
    attn_func: str = ""
    engine: str = ""
    engine_type: str = ""
    dtype: str = ""
    num_threads: int | None = None
    dummy_weights: bool = False
    versions: dict[str, str] = {}


class Iteration(msgspec.Struct, frozen=True, tag="iteration", tag_field="kind"):
    """One iteration: the fields of BatchShape, when it began and how long it took."""

    t: float
    duration_s: float
    decode_rows: int
    prefill_rows: int
    prefill_tokens: int
    prefill_pairs: int
    decode_kv: int
    decode_kv_unique: int
    graph: bool = False
    failed: bool = False

    @property
    def shape(self) -> BatchShape:
        return BatchShape(*(getattr(self, name) for name in BatchShape.FIELDS))


class TaskLine(msgspec.Struct, frozen=True, tag="task", tag_field="kind"):
    """A task that was handed to the engine's scheduler."""

    t: float
    overhead_s: float
    task: str = ""


class Run(msgspec.Struct):
    """One start of one engine. `name`: the log's file name and the start's number in it, from 1."""

    header: Header
    name: str = ""
    iterations: list[Iteration] = []
    tasks: list[TaskLine] = []

    @property
    def size(self) -> int:
        """How many iterations it has."""
        return len(self.iterations)

    @property
    def load(self) -> float:
        """Mean rows of an iteration."""
        return sum(i.decode_rows + i.prefill_rows for i in self.iterations) / max(len(self.iterations), 1)

    @property
    def total_s(self) -> float:
        """What all iterations took."""
        return sum(i.duration_s for i in self.iterations)


def read_log(path: str | Path, *, allow_cut: bool = False) -> list[Run]:
    """The runs of one iteration log. `allow_cut`: a last line that an engine which was killed left half written is left
    out; else it is refused. Raises CalibrationError when the file is empty, cut off, of two engines, or no such log."""
    decoder = msgspec.json.Decoder(Header | Iteration | TaskLine)
    runs: list[Run] = []
    for number, line in lines_of(path, allow_cut):
        try:
            entry = decoder.decode(line)
        except msgspec.DecodeError as error:
            what = "not an iteration log" if not runs else "not a line of an iteration log"
            raise CalibrationError(f"{path}:{number}: {what}: {error}") from None
        if isinstance(entry, Header):
            if entry.iteration_log != 1:
                raise CalibrationError(f"{path}:{number}: iteration log of format {entry.iteration_log}; this reader knows 1")
            runs.append(Run(entry, f"{Path(path).name}#{len(runs) + 1}"))
        elif not runs:
            raise CalibrationError(f"{path}:{number}: an iteration log begins with a header line; this is another file")
        elif isinstance(entry, TaskLine):
            runs[-1].tasks.append(entry)
        elif not entry.failed:
            _check(entry, runs[-1], f"{path}:{number}")
            runs[-1].iterations.append(entry)
    if not runs:
        raise CalibrationError(f"{path}: empty: an iteration log begins with a header line")
    return runs


def _check(entry: Iteration, run: Run, where: str) -> None:
    if entry.duration_s <= 0:
        raise CalibrationError(f"{where}: duration_s is {entry.duration_s}; it must be above 0")
    for name in BatchShape.FIELDS:
        if getattr(entry, name) < 0:
            raise CalibrationError(f"{where}: {name} is {getattr(entry, name)}; it must be 0 or above")
    if run.iterations and entry.t < run.iterations[-1].t:
        raise CalibrationError(
            f"{where}: t goes back from {run.iterations[-1].t:g} to {entry.t:g} with no header between: two engines wrote into "
            "one file, or lines were moved; give each engine a log of its own"
        )


def lines_of(path: str | Path, allow_cut: bool) -> Iterator[tuple[int, bytes]]:
    """The lines of a log with their numbers, from 1. Raises CalibrationError for a last one that is cut off (unless
    `allow_cut`) and for a file that cannot be read."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield number, line
                elif not allow_cut:
                    raise CalibrationError(
                        f"{path}:{number}: cut off inside this line: the file is incomplete, or its engine was killed "
                        "(then --allow-cut leaves the line out)"
                    )
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from error


def read_logs(paths: Sequence[str | Path], *, allow_cut: bool = False) -> list[Run]:
    """The runs of several logs. Raises CalibrationError unless all are of one model, device and attention function."""
    runs: list[Run] = []
    names = [Path(path).name for path in paths]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise CalibrationError(f"{path}: named twice: its iterations would count double")
        for start, run in enumerate(read_log(path, allow_cut=allow_cut), 1):
            if names.count(names[number]) > 1:  # the folder tells them apart
                run.name = f"{path}#{start}"
            for name in ALIKE:
                first, this = getattr((runs[0] if runs else run).header, name), getattr(run.header, name)
                if first != this:
                    raise CalibrationError(f"{path}: mixed logs: its {name} is {this!r}, but {paths[0]} has {first!r}")
            runs.append(run)
    return runs
