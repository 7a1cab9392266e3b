"""Reads the BurstGPT traces: Timestamp (s), [Session ID, Elapsed time,] Model, Request tokens, Response tokens, Total tokens,
Log Type, a request a line; columns are found by their names.

Each request becomes a program of one call. The trace says nothing of texts, so nothing is shared between requests, not
inside a session either. A request with 0 request or response tokens failed: it is left out (and counted), or kept as one of
1 token each (`failed=keep`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sim.workloads.program import Call, Get, Program, Text, WorkloadError, Write
from sim.workloads.source import Row, Source
from sim.workloads.traces import text_lines

COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")

_GETS = (Get(id="answer", var="answer"),)


class BurstGPTParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A BurstGPT trace."""

    model: Annotated[
        dict[str, str], Meta(description="model.NAME=ENGINE_MODEL for every model of the trace; none: any engine serves all")
    ] = {}
    failed: Annotated[
        Literal["skip", "keep"], Meta(description="what to do with failed requests: leave them out, or 1 token each")
    ] = "skip"


def burstgpt_source(path: str, p: BurstGPTParameters, *, max_gen_length: int, label: str = "") -> Source:
    """The requests of the trace at `path`. Reading raises WorkloadError with file, line and reason."""
    trace = label + Path(path).stem
    reader = _Reader(path, p)

    def build(index: int, arrival_s: float, row: Row) -> Program:
        _, models, prompt, generated, log = row
        name = f"{trace}/{index}"
        limit = max_gen_length if generated <= max_gen_length else generated
        call = Call((Text(name, prompt), Write("answer", generated, limit)), log, models, False)
        return Program(name, arrival_s, (call,), _GETS, (), trace, "burstgpt")

    return Source(path, reader.rows, build, notes=reader.notes)


class _Reader:
    """Reads the rows and counts the failed ones."""

    def __init__(self, path: str, parameters: BurstGPTParameters) -> None:
        self._path = path
        self._models = {name: (model,) for name, model in parameters.model.items()}
        self._keep = parameters.failed == "keep"
        self._failed = 0

    def notes(self) -> Sequence[str]:
        if not self._failed:
            return ()
        what = "kept with 1 token each" if self._keep else "left out"
        return (f"{self._path}: failed requests (0 tokens): {self._failed}, {what}",)

    def rows(self) -> Iterator[tuple[float, tuple[str, ...], int, int, str]]:
        """(seconds since the first request, models, request tokens, response tokens, log type)."""
        path = self._path
        lines = text_lines(path)
        width, places = _columns(path, next(lines, (1, ""))[1])
        self._failed = 0
        first_s = last_s = None
        for number, line in lines:
            fields = line.rstrip("\r\n").split(",")
            if len(fields) != width:
                if not line.strip():
                    continue
                raise WorkloadError(
                    f"{path}:{number}: {len(fields)} fields instead of {width}, truncated or mixed: {line.strip()[:80]!r}"
                )
            time, model, request_text, response_text, log = [fields[place] for place in places]
            try:
                now_s, prompt, generated = float(time), int(request_text), int(response_text)
            except ValueError as error:
                raise WorkloadError(f"{path}:{number}: {error}: {line.strip()[:80]!r}") from None
            if prompt < 0 or generated < 0:
                name = "Request tokens" if prompt < 0 else "Response tokens"
                raise WorkloadError(f"{path}:{number}: {name} is {min(prompt, generated)}; it cannot be negative")
            if not math.isfinite(now_s):
                raise WorkloadError(f"{path}:{number}: the Timestamp {time} is no time in seconds")
            if last_s is not None and now_s < last_s:
                raise WorkloadError(f"{path}:{number}: the Timestamp {time} is before the line above it ({last_s:g})")
            if self._models and model not in self._models:
                known = ", ".join(self._models)
                raise WorkloadError(f"{path}:{number}: no model.{model}=NAME says which engines serve it; there is: {known}")
            last_s = now_s
            if first_s is None:
                first_s = now_s
            if not (prompt and generated):
                self._failed += 1
                if not self._keep:
                    continue
            yield now_s - first_s, self._models.get(model, ()), prompt or 1, generated or 1, log
        if first_s is None:
            raise WorkloadError(f"{path}: no requests in it")


def _columns(path: str, header: str) -> tuple[int, list[int]]:
    """How many columns there are, and where those of COLUMNS stand."""
    names = [name.strip() for name in header.split(",")]
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise WorkloadError(f"{path}:1: not a BurstGPT trace: no column {', '.join(missing)}; found {header.strip()[:100]!r}")
    return len(names), [names.index(name) for name in COLUMNS]
