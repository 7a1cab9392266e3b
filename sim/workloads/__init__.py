"""Workloads: what programs arrive, when, and of what shape. `open_workload` turns what a user names into programs.

A name is a file of programs (JSONL), a generator with parameters, `KIND:PATH` for a trace of another format, or `mix:PATH`
for several of these together. Nothing here runs a program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sim.workloads.arrivals import check_rate, parse_arrivals
from sim.workloads.kinds import Setting, open_source
from sim.workloads.mix import open_mix
from sim.workloads.program import Program, WorkloadError
from sim.workloads.source import Source, settle

__all__ = ["Program", "WorkloadError", "open_workload"]


def open_workload(
    spec: str,
    *,
    rate: float | None = None,
    seed: int = 0,
    count: int | None = None,
    max_gen_length: int = 2048,
    arrivals: str | None = None,
    options: Mapping[str, Any] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Iterator[Program]:
    """The programs that `spec` names, in order of arrival, read as they are asked for.

    spec: FILE of programs, NAME[:parameter=value,…] of a generator, KIND:PATH[:parameter=value,…] of a trace, mix:PATH.
    rate: programs per second. Arrivals that are drawn come at it (1 per second when left out); recorded gaps are scaled to
        it, and keep their length without it.
    seed: 0 or more.
    count: how many, at most; a generator makes 100 when it is left out.
    max_gen_length: the limit of outputs whose trace names none (or the output, where that is longer).
    arrivals: poisson, gamma:CV, constant, recorded[:TIME_SCALE]; None: as recorded, Poisson where nothing is recorded.
    options: parameters of the generator or trace.
    on_note: called at the end with what was left out or estimated, a line each.

    Raises WorkloadError at once for what is wrong with the arguments, and while reading for what is wrong with a file.
    """
    if rate is not None:
        check_rate(rate)
    if count is not None and count < 1:
        raise WorkloadError(f"count {count}: must be at least 1")
    if seed < 0:
        raise WorkloadError(f"seed {seed}: must be 0 or more")
    if max_gen_length < 1:
        raise WorkloadError(f"max_gen_length {max_gen_length}: must be at least 1")
    process = None if arrivals is None else parse_arrivals(arrivals)
    kind, colon, path = spec.partition(":")
    sources: Sequence[Source]
    if colon and kind == "mix":
        if options:
            raise WorkloadError(f"workload {spec!r} takes no parameters, but {', '.join(options)} is given")
        programs, sources = open_mix(path, rate=rate, seed=seed, count=count, max_gen_length=max_gen_length, arrivals=arrivals)
    else:
        source = open_source(spec, options or {}, Setting(rate, seed, count, max_gen_length))
        programs = settle(source, rate=rate, arrivals=process, seed=seed, count=count)
        sources = [source]
    return programs if on_note is None else _noting(programs, sources, on_note)


def _noting(programs: Iterator[Program], sources: Sequence[Source], on_note: Callable[[str], None]) -> Iterator[Program]:
    yield from programs
    for source in sources:
        for note in source.notes():
            on_note(note)
