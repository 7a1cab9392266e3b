"""Reads iteration logs (docs/iteration-log.md) into runs: a run is one start of one engine.

Refuses what is no such log, what was cut off, and what is of two engines; it judges no duration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from parrot.latency import BatchShape

#: what must be alike in all runs that are fitted together
ALIKE = ("model", "device", "attn_func", "dtype", "num_threads", "dummy_weights", "fill_graphs")


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
    fill_graphs: tuple[int, ...] = ()
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
    decoder: Any = msgspec.json.Decoder(Header | Iteration | TaskLine)
    runs: list[Run] = []
    for where, entry in entries_of(path, decoder, "iteration log", allow_cut):
        if isinstance(entry, Header):
            runs.append(Run(entry, f"{Path(path).name}#{len(runs) + 1}"))
        elif isinstance(entry, TaskLine):
            runs[-1].tasks.append(entry)
        elif not entry.failed:
            _check(entry, runs[-1], where)
            runs[-1].iterations.append(entry)
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


def entries_of(path: str | Path, decoder: Any, kind: str, allow_cut: bool) -> Iterator[tuple[str, Any]]:
    """The entries of a log of that `kind`, each with its file and line; the first is a header, as that of every start is.
    Raises CalibrationError for a file that is empty, cut off or no such log."""
    one = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    begun = False
    for number, line in lines_of(path, allow_cut):
        where = f"{path}:{number}"
        try:
            entry = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise CalibrationError(f"{where}: {f'not a line of {one}' if begun else f'not {one}'}: {error}") from None
        form = getattr(entry, "iteration_log", None)  # a header has it
        if form is None and not begun:
            raise CalibrationError(f"{where}: {one} begins with a header line; this is another file")
        if form not in (None, 1):
            raise CalibrationError(f"{where}: {kind} of format {form}; this reader knows 1")
        begun = True
        yield where, entry
    if not begun:
        raise CalibrationError(f"{path}: empty: {one} begins with a header line")


def read_logs(paths: Sequence[str | Path], *, allow_cut: bool = False) -> list[Run]:
    """The runs of several logs. Raises CalibrationError unless all are of one model, device and attention function."""
    return read_together(paths, functools.partial(read_log, allow_cut=allow_cut), ALIKE, "iterations")


class Started(Protocol):
    """A run as its log has it."""

    name: str

    @property
    def header(self) -> Any: ...


S = TypeVar("S", bound=Started)


def read_together(
    paths: Sequence[str | Path], read: Callable[[str | Path], list[S]], alike: Sequence[str], counted: str
) -> list[S]:
    """The runs of several logs, which are to be fitted together. Raises CalibrationError for one that is named twice, and
    unless what `alike` names is the same in all headers."""
    runs: list[S] = []
    names = [Path(path).name for path in paths]
    places = [Path(path).resolve() for path in paths]
    for number, path in enumerate(paths):
        if places[number] in places[:number]:
            raise CalibrationError(f"{path}: named twice: its {counted} would count double")
        for start, run in enumerate(read(path), 1):
            if names.count(names[number]) > 1:  # the folder tells them apart
                run.name = f"{path}#{start}"
            for name in alike:
                first, this = getattr((runs[0] if runs else run).header, name), getattr(run.header, name)
                if first != this:
                    raise CalibrationError(f"{path}: mixed logs: its {name} is {this!r}, but {paths[0]} has {first!r}")
            runs.append(run)
    return runs
