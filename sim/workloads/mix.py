"""Several workloads at once: a JSON file that lists parts, each with its share of the rate and its tenant.

Parts are drawn from independent streams and merged by arrival; ids, and keys of made-up texts, begin with the part's name,
so that parts share no text but what files of programs say is equal.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from parrot.configuration import ConfigurationError, load
from sim.workloads.arrivals import check_rate, parse_arrivals
from sim.workloads.kinds import Setting, open_source
from sim.workloads.program import Program, TextLengths, WorkloadError
from sim.workloads.source import DEFAULT_COUNT, Source, settle

NO_END = 10**15  #: programs of a part that ends with the mix

Positive = Annotated[float, Meta(gt=0.0)]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One workload of a mix.

    name: what ids begin with (part0, part1, …). weight: its share of the mix's rate, against the other parts without a rate
    of their own (1). rate: its own rate. arrivals: how it arrives, when not as the mix. count: at most so many programs of
    it. tenant: whose its programs are, in place of what the workload says. options: parameters of the workload.
    """

    workload: str
    name: str | None = None
    weight: Positive | None = None
    rate: Positive | None = None
    arrivals: str | None = None
    count: Annotated[int, Meta(ge=1)] | None = None
    tenant: str | None = None
    options: dict[str, Any] = {}


class Mix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: its parts, and the rate of all of those without their own (`rate` of the run stands above it)."""

    parts: tuple[Part, ...]
    rate: Positive | None = None


class _Opened(NamedTuple):
    source: Source
    programs: Iterator[Program]
    endless: bool


def open_mix(
    path: str, *, rate: float | None, seed: int, count: int | None, max_gen_length: int, arrivals: str | None
) -> tuple[Iterator[Program], Sequence[Source]]:
    """The programs of all parts in order of arrival, at most `count` in all, and the parts' sources.

    With a part that has no end of its own and no count, `count` is 100 when left out. Raises WorkloadError at once for what
    is wrong in the file, and while reading for what is wrong with a part.
    """
    if not path:
        raise WorkloadError("workload 'mix:': names no file; expected mix:PATH")
    try:
        mix = load(path, Mix)
    except ConfigurationError as error:
        raise WorkloadError(str(error)) from None
    names = _names(path, mix)
    rates = _rates(path, mix, rate)
    opened = []
    for name, part, part_rate in zip(names, mix.parts, rates, strict=True):
        try:
            opened.append(_open(part, Setting(part_rate, seed, part.count or count, max_gen_length, f"{name}/"), arrivals))
        except WorkloadError as error:
            raise WorkloadError(f"{path}: part {name!r}: {error}") from None
    if count is None and any(part.endless for part in opened):
        count = DEFAULT_COUNT
    merged = heapq.merge(*(part.programs for part in opened), key=_arrival)
    return _consistent(path, islice(merged, count)), [part.source for part in opened]


def _consistent(path: str, programs: Iterator[Program]) -> Iterator[Program]:
    """The programs; raises WorkloadError where parts give one text two lengths."""
    lengths = TextLengths()
    for program in programs:
        try:
            lengths.check(program)
        except ValueError as error:
            raise WorkloadError(f"{path}: program {program.id!r}: {error}") from None
        yield program


def _arrival(program: Program) -> float:
    return program.arrival_s


def _names(path: str, mix: Mix) -> list[str]:
    if not mix.parts:
        raise WorkloadError(f"{path}: a mix needs at least one of `parts`")
    names = [part.name if part.name is not None else f"part{index}" for index, part in enumerate(mix.parts)]
    for name in names:
        if not re.fullmatch(r"[\w.\-]+", name):
            raise WorkloadError(f"{path}: part name {name!r}: must be of letters, digits, '_', '-' and '.'")
        if names.count(name) > 1:
            raise WorkloadError(f"{path}: two parts have the name {name!r}")
    return names


def _rates(path: str, mix: Mix, rate: float | None) -> list[float | None]:
    """The rate of each part; None: its own time."""
    total = mix.rate if rate is None else rate
    for index, part in enumerate(mix.parts):
        if part.rate is not None and part.weight is not None:
            raise WorkloadError(f"{path}: parts[{index}] has a rate of its own, so its weight {part.weight:g} means nothing")
        if part.weight is not None and total is None:
            raise WorkloadError(f"{path}: parts[{index}]: a weight shares out a rate, but there is none: give the mix a rate")
    sharing = sum(part.weight or 1.0 for part in mix.parts if part.rate is None)
    if total is None:
        return [part.rate for part in mix.parts]
    if sharing == 0.0:
        raise WorkloadError(f"{path}: every part has a rate of its own; a rate of {total:g} for all of them means nothing")
    check_rate(total)
    return [part.rate if part.rate is not None else total * (part.weight or 1.0) / sharing for part in mix.parts]


def _open(part: Part, setting: Setting, arrivals: str | None) -> _Opened:
    if part.workload.startswith("mix:"):
        raise WorkloadError("a mix cannot be part of a mix; list its parts")
    source = open_source(part.workload, part.options, setting)
    process = part.arrivals if part.arrivals is not None else arrivals
    endless = source.endless and part.count is None
    programs = settle(
        source,
        rate=setting.rate,
        arrivals=None if process is None else parse_arrivals(process),
        seed=setting.seed,
        count=NO_END if endless else part.count,
        label=setting.label,
    )
    return _Opened(source, programs if part.tenant is None else _owned(programs, part.tenant), endless)


def _owned(programs: Iterator[Program], tenant: str) -> Iterator[Program]:
    for program in programs:
        yield msgspec.structs.replace(program, tenant=tenant)
