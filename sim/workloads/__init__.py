"""Workloads: what programs arrive, when, and of what shape. `open_workload` turns what a user names into programs.

A name is a file of programs (JSONL), a generator (`chain`, `map_reduce`, `chat`, with `:parameter=value,…` behind it), or
`KIND:PATH` for a trace of another format. Nothing here runs a program.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from sim.workloads.arrivals import check_rate, scale_to_rate
from sim.workloads.azure import read_azure
from sim.workloads.generators import GENERATORS, generate
from sim.workloads.program import Program, WorkloadError, read_programs

__all__ = ["Program", "WorkloadError", "open_workload"]

LATER_KINDS = ("mooncake", "burstgpt", "sharegpt")


def open_workload(
    spec: str,
    *,
    rate: float | None = None,
    seed: int = 0,
    count: int | None = None,
    max_gen_length: int = 2048,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Program]:
    """The programs that `spec` names, in order of arrival.

    spec: FILE of programs, NAME[:parameter=value,…] of a generator, or KIND:PATH (azure, journal).
    rate: programs per second. A generator's arrivals are Poisson (1 per second when left out); recorded gaps are scaled to
        it, and keep their length without it.
    count: how many, at most; a generator makes 100 when it is left out.
    max_gen_length: the limit of outputs whose trace names none (or the output, where that is longer).
    options: parameters of a generator.

    Raises WorkloadError at once for what is wrong with the arguments, and while reading for what is wrong with a file.
    """
    if rate is not None:
        check_rate(rate)
    if count is not None and count < 1:
        raise WorkloadError(f"count {count}: must be at least 1")
    name, colon, rest = spec.partition(":")
    if name in GENERATORS:
        return generate(name, {**_parameters(name, rest), **(options or {})}, rate=rate, seed=seed, count=count)
    if options:
        raise WorkloadError(f"workload {spec!r} takes no parameters, but {', '.join(options)} is given")
    if colon and name == "azure":
        return read_azure(rest, rate=rate, count=count, max_gen_length=max_gen_length)
    if colon and name == "journal":
        from sim.workloads.journal import read_journal  # needs the core's events, which traces do not

        return _scaled(read_journal(rest).programs, rate=rate, count=count, where=rest)
    if name in LATER_KINDS:
        raise WorkloadError(f"workload kind {name!r} comes with the simulator's release; now: azure:PATH, journal:PATH")
    if not Path(spec).is_file():
        names = ", ".join(GENERATORS)
        raise WorkloadError(f"workload {spec!r}: no such file, and none of {names}, azure:PATH, journal:PATH")
    return _read_file(spec, rate=rate, count=count)


def _parameters(name: str, text: str) -> dict[str, str]:
    """`a=1,b=2` as a dictionary."""
    parameters = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise WorkloadError(f"workload {name}: {item!r} is no parameter=value")
        parameters[key.strip()] = value.strip()
    return parameters


def _read_file(path: str, *, rate: float | None, count: int | None) -> Iterator[Program]:
    if rate is None:
        return islice(read_programs(path), count)
    return _scaled_stream(path, rate, count)


def _scaled_stream(path: str, rate: float, count: int | None) -> Iterator[Program]:
    """Two passes, so that a long file is never held in memory."""
    total, first_s, last_s = 0, 0.0, 0.0
    for program in islice(read_programs(path), count):
        last_s = program.arrival_s
        if total == 0:
            first_s = last_s
        total += 1
    factor = scale_to_rate(total, first_s, last_s, rate, path)
    for program in islice(read_programs(path), count):
        yield msgspec.structs.replace(program, arrival_s=(program.arrival_s - first_s) * factor)


def _scaled(programs: list[Program], *, rate: float | None, count: int | None, where: str) -> Iterator[Program]:
    programs = programs[:count]
    if rate is None or not programs:
        return iter(programs)
    first_s = programs[0].arrival_s
    factor = scale_to_rate(len(programs), first_s, programs[-1].arrival_s, rate, where)
    return (msgspec.structs.replace(p, arrival_s=(p.arrival_s - first_s) * factor) for p in programs)
