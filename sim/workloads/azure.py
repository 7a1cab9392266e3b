"""Reads the public Azure LLM inference traces (2023 and 2024): TIMESTAMP, ContextTokens, GeneratedTokens, a request a line.

Each request becomes a program of one call. The trace says nothing of texts, so nothing is shared between requests. A
request that generated 0 tokens sampled the end of its answer at once: it counts as one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path

from sim.workloads.arrivals import scale_to_rate
from sim.workloads.program import Call, Get, Program, Text, WorkloadError, Write

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"

#: (seconds since the first request, context tokens, generated tokens)
Row = tuple[float, int, int]


def read_azure(path: str | Path, *, rate: float | None, count: int | None, max_gen_length: int) -> Iterator[Program]:
    """The requests of the trace as programs, at their recorded times or with their gaps scaled to `rate` per second.

    Raises WorkloadError with file, line and reason.
    """
    factor = 1.0
    if rate is not None:
        requests, last_s = 0, 0.0
        for now_s, _, _ in islice(_rows(path), count):
            requests, last_s = requests + 1, now_s
        factor = scale_to_rate(requests, 0.0, last_s, rate, str(path))
    trace = Path(path).stem
    get = (Get(id="answer", var="answer"),)
    for index, (arrival_s, context, generated) in enumerate(islice(_rows(path), count)):
        name = f"{trace}/{index}"
        answer = Write("answer", generated, max_gen_length=max(generated, max_gen_length))
        call = Call(segments=(Text(name, context), answer), name="request", cache_prefix=False)
        yield Program(id=name, arrival_s=arrival_s * factor, calls=(call,), gets=get, tenant=trace, application="azure")


def _rows(path: str | Path) -> Iterator[Row]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            yield from _checked(path, file)
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path}: not a text file: {error}") from error


def _checked(path: str | Path, lines: Iterator[str]) -> Iterator[Row]:
    header = next(lines, "").strip().lstrip("\ufeff")
    if header != HEADER:
        raise WorkloadError(f"{path}:1: not an Azure trace: expected {HEADER!r}, found {header[:80]!r}")
    first: datetime | None = None
    last_s = 0.0
    for number, line in enumerate(lines, 2):
        fields = line.split(",")
        if len(fields) != 3:
            if not line.strip():
                continue
            raise WorkloadError(
                f"{path}:{number}: {len(fields)} fields instead of 3, truncated or mixed: {line.strip()[:80]!r}"
            )
        try:
            instant = datetime.fromisoformat(fields[0])
            context, generated = int(fields[1]), int(fields[2])
            if first is None:
                first = instant
            now_s = (instant - first).total_seconds()
        except (ValueError, TypeError) as error:
            raise WorkloadError(f"{path}:{number}: {error}: {line.strip()[:80]!r}") from None
        if context < 1:
            raise WorkloadError(f"{path}:{number}: ContextTokens is {context}; a request has at least 1")
        if generated < 0:
            raise WorkloadError(f"{path}:{number}: GeneratedTokens is {generated}; it cannot be negative")
        if now_s < last_s:
            raise WorkloadError(f"{path}:{number}: the time {fields[0]} is before the line above it")
        last_s = now_s
        yield now_s, context, generated or 1
    if first is None:
        raise WorkloadError(f"{path}: no requests in it")
