"""Reads the public Azure LLM inference traces (2023 and 2024): TIMESTAMP, ContextTokens, GeneratedTokens, a request a line.

Each request becomes a program of one call. The trace says nothing of texts, so nothing is shared between requests. A
request that generated 0 tokens sampled the end of its answer at once: it counts as one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from sim.workloads.program import Call, Get, Program, Text, WorkloadError, Write
from sim.workloads.source import Row, Source
from sim.workloads.traces import text_lines

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"

_GETS = (Get(id="answer", var="answer"),)


def azure_source(path: str, *, max_gen_length: int, label: str = "") -> Source:
    """The requests of the trace at `path`. Reading raises WorkloadError with file, line and reason."""
    trace = label + Path(path).stem

    def build(index: int, arrival_s: float, row: Row) -> Program:
        _, context, generated = row
        name = f"{trace}/{index}"
        limit = max_gen_length if generated <= max_gen_length else generated
        call = Call((Text(name, context), Write("answer", generated, limit)), "request", (), False)
        return Program(name, arrival_s, (call,), _GETS, (), trace, "azure")

    return Source(path, lambda: _rows(path), build)


def lengths_of(path: str) -> Iterator[tuple[int, int]]:
    """(context tokens, generated tokens) of each request. Raises WorkloadError."""
    for _, context, generated in _rows(path):
        yield context, generated


def _rows(path: str) -> Iterator[tuple[float, int, int]]:
    """(seconds since the first request, context tokens, generated tokens). This is on the path of large simulations."""
    lines = text_lines(path)
    _, header = next(lines, (1, ""))
    if header.strip() != HEADER:
        raise WorkloadError(f"{path}:1: not an Azure trace: expected {HEADER!r}, found {header.strip()[:80]!r}")
    first: datetime | None = None
    last_s = 0.0
    instant_of = datetime.fromisoformat
    for number, line in lines:
        try:
            time, context_text, generated_text = line.split(",")
            instant = instant_of(time)
            context, generated = int(context_text), int(generated_text)
            if first is None:
                first = instant
            now_s = (instant - first).total_seconds()
        except (ValueError, TypeError) as error:
            if not line.strip():
                continue
            fields = line.count(",") + 1
            reason = f"{fields} fields instead of 3, truncated or mixed" if fields != 3 else error
            raise WorkloadError(f"{path}:{number}: {reason}: {line.strip()[:80]!r}") from None
        if context < 1:
            raise WorkloadError(f"{path}:{number}: ContextTokens is {context}; a request has at least 1")
        if generated < 0:
            raise WorkloadError(f"{path}:{number}: GeneratedTokens is {generated}; it cannot be negative")
        if now_s < last_s:
            raise WorkloadError(f"{path}:{number}: the time {time} is before the line above it")
        last_s = now_s
        yield now_s, context, generated or 1
    if first is None:
        raise WorkloadError(f"{path}: no requests in it")
