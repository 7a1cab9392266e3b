"""Reads request logs, which engines behind remote endpoints write, into runs: a run is one start of one engine.

Refuses what is no such log, what was cut off, what is of two endpoints, and times that cannot be; it judges no duration. Knows,
of each run, how many requests were in flight at any time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from sim.calibrate.logs import CalibrationError, entries_of, lines_of, read_together

Array = NDArray[np.float64]

#: what must be alike in all runs that are fitted together
ALIKE = ("model", "endpoint", "api_endpoint")
ENDED = ("eos", "stop_str", "length")  #: reasons of a request whose output is whole
REFUSED = "engine_rejected"  #: that of one which the endpoint answered 429
ROUNDING_S = 1e-5  #: times are written in whole microseconds


class RemoteHeader(msgspec.Struct, frozen=True, tag="header", tag_field="kind"):
    """The first line of a start of an engine behind an endpoint."""

    iteration_log: int
    model: str
    endpoint: str
    engine: str = ""
    engine_type: str = ""
    api_endpoint: str = ""
    tokenizer: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tasks_capacity: int | None = None
    versions: dict[str, str] = {}


class Request(msgspec.Struct, frozen=True, tag="request", tag_field="kind"):
    """One request, as `parrot.engine.openai.request_log` has it; `total_s` and `limit_tokens` are not in older logs."""

    t: float
    running: int
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None
    decode_s: float
    wait_s: float = 0.0
    total_s: float | None = None
    limit_tokens: int | None = None
    tries: int = 1
    reason: str = ""

    @property
    def ends_at(self) -> float | None:
        """When it ended, where the log says so."""
        if self.total_s is not None:
            return self.t + self.total_s
        return None if self.ttft_s is None else self.t + self.ttft_s + self.decode_s

    @property
    def decodes(self) -> bool:
        """Whether it tells how long tokens take: its output is whole, and has two at least."""
        return self.ttft_s is not None and self.reason in ENDED and self.output_tokens > 1 and self.decode_s > 0.0


class RemoteRun(msgspec.Struct):
    """One start of one engine. `name`: the log's file name and the start's number in it, from 1."""

    header: RemoteHeader
    name: str = ""
    requests: list[Request] = []

    @property
    def size(self) -> int:
        """How many requests it has."""
        return len(self.requests)

    @property
    def load(self) -> float:
        """Mean number of requests in flight when one was sent."""
        return sum(request.running for request in self.requests) / max(len(self.requests), 1)

    def in_flight(self) -> InFlight:
        """How many requests were in flight at any time."""
        spans = [(r.t, end) for r in self.requests if (end := r.ends_at) is not None]
        return InFlight(np.array([begin for begin, _ in spans]), np.array([end for _, end in spans]))


class InFlight:
    """The number of requests in flight as a function of time, from when each began and ended."""

    def __init__(self, begins: Array, ends: Array) -> None:
        times = np.concatenate([begins, ends])
        changes = np.concatenate([np.ones(len(begins)), -np.ones(len(ends))])
        order = np.argsort(times, kind="stable")
        self._times = times[order]
        self._counts = np.maximum(np.cumsum(changes[order]), 0.0)  # from each time to the next

    def integral(self, value: Callable[[Array], Array], begins: Array, ends: Array) -> Array:
        """∫ value(number in flight) dt from each of `begins` to its of `ends`."""
        steps = value(self._counts[:-1]) * np.diff(self._times)
        sums = np.concatenate([[0.0], np.cumsum(steps)])
        return np.asarray(np.interp(ends, self._times, sums) - np.interp(begins, self._times, sums))


def kind_of_log(path: str | Path, *, allow_cut: bool = False) -> Literal["iterations", "requests"]:
    """What a log has a line of, by its header. What is no log at all is taken for one of iterations, whose reader refuses it.
    Raises CalibrationError for a file that cannot be read."""
    for _, line in lines_of(path, allow_cut):
        try:
            header: Any = msgspec.json.decode(line)
        except msgspec.DecodeError:
            break
        remote = isinstance(header, dict) and (header.get("engine_type") == "openai" or header.get("kind") == "request")
        return "requests" if remote else "iterations"
    return "iterations"


def read_request_log(path: str | Path, *, allow_cut: bool = False) -> list[RemoteRun]:
    """The runs of one request log; `allow_cut` as of `sim.calibrate.logs.read_log`. Raises CalibrationError when the file is
    empty, cut off, of two engines, or no such log, and for times and counts that cannot be."""
    decoder: Any = msgspec.json.Decoder(RemoteHeader | Request)
    runs: list[RemoteRun] = []
    last_s = 0.0
    for where, entry in entries_of(path, decoder, "request log", allow_cut):
        if isinstance(entry, RemoteHeader):
            runs.append(RemoteRun(entry, f"{Path(path).name}#{len(runs) + 1}"))
            last_s = 0.0
        else:
            last_s = _check(entry, last_s, where)
            runs[-1].requests.append(entry)
    return runs


def _check(entry: Request, last_s: float, where: str) -> float:
    """When the latest request so far ended. Raises CalibrationError."""
    for name in ("t", "wait_s", "ttft_s", "decode_s", "total_s", "prompt_tokens", "output_tokens", "limit_tokens"):
        value = getattr(entry, name)
        if value is not None and not value >= 0:
            raise CalibrationError(f"{where}: {name} is {value}; it must be 0 or above")
    if entry.ttft_s == 0.0:
        raise CalibrationError(f"{where}: ttft_s is 0; it must be above 0")
    if entry.running < 1:
        raise CalibrationError(f"{where}: running is {entry.running}; a request that is sent is one itself")
    ends_at = entry.ends_at
    if ends_at is None:
        return last_s
    if ends_at < last_s - ROUNDING_S:
        raise CalibrationError(
            f"{where}: it ended at {ends_at:g}, but the line above at {last_s:g}, with no header between: two engines wrote "
            "into one file, or lines were moved; give each engine a log of its own"
        )
    return ends_at


def read_request_logs(paths: Sequence[str | Path], *, allow_cut: bool = False) -> list[RemoteRun]:
    """The runs of several logs. Raises CalibrationError unless all are of one model at one endpoint."""
    return read_together(paths, functools.partial(read_request_log, allow_cut=allow_cut), ALIKE, "requests")
