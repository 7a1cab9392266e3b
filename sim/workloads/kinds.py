"""What a name stands for: a file of programs, a generator with parameters, or a trace of some kind at some path."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sim.workloads.arrivals import stream
from sim.workloads.azure import azure_source
from sim.workloads.burstgpt import BurstGPTParameters, burstgpt_source
from sim.workloads.generators import GENERATORS, generator_source
from sim.workloads.mooncake import MooncakeParameters, mooncake_source
from sim.workloads.paper import open_paper
from sim.workloads.program import Program, Read, Segment, WorkloadError, read_programs
from sim.workloads.sharegpt import ShareGPTParameters, sharegpt_source
from sim.workloads.source import Row, Source, parameters_of
from sim.workloads.traces import byte_lines

#: `PATH:parameter=value,…`: the first colon behind which a parameter stands ends the path
_PATH = re.compile(r"(?P<path>.*?)(?::(?P<parameters>[A-Za-z_][\w.\- ]*=.*))?", re.DOTALL)


@dataclass(frozen=True)
class Setting:
    """What applies to a workload of any kind. `label`: what ids, and keys that it makes up, begin with."""

    rate: float | None
    seed: int
    count: int | None
    max_gen_length: int
    label: str = ""


class AzureParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An Azure trace; it has no parameters."""


class JournalParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A journal of a core in mode `record`."""

    tokenizer: Annotated[str | None, Meta(description="whose lengths to use; none: the first engine's")] = None


def _azure(path: str, _: Any, setting: Setting) -> Source:
    return azure_source(path, max_gen_length=setting.max_gen_length, label=setting.label)


def _burstgpt(path: str, p: BurstGPTParameters, setting: Setting) -> Source:
    return burstgpt_source(path, p, max_gen_length=setting.max_gen_length, label=setting.label)


def _mooncake(path: str, p: MooncakeParameters, setting: Setting) -> Source:
    return mooncake_source(path, p, max_gen_length=setting.max_gen_length, label=setting.label)


def _sharegpt(path: str, p: ShareGPTParameters, setting: Setting) -> Source:
    return sharegpt_source(path, p, max_gen_length=setting.max_gen_length, seed=setting.seed, label=setting.label)


def _journal(path: str, p: JournalParameters, setting: Setting) -> Source:
    from sim.workloads.journal import Recorded, read_journal  # needs the core's events, which traces do not

    read: list[Recorded] = []

    def programs() -> Iterator[Program]:
        if not read:
            read.append(read_journal(path, p.tokenizer))
        return iter(read[0].programs)

    def notes() -> list[str]:
        return [f"{path}: skipped {reason}" for recorded in read for reason in recorded.skipped]

    return _of_programs(path, programs, setting.label, notes)


#: name -> (parameters, what opens a path)
TRACES: dict[str, tuple[type[msgspec.Struct], Callable[[str, Any, Setting], Source]]] = {
    "azure": (AzureParameters, _azure),
    "burstgpt": (BurstGPTParameters, _burstgpt),
    "mooncake": (MooncakeParameters, _mooncake),
    "sharegpt": (ShareGPTParameters, _sharegpt),
    "journal": (JournalParameters, _journal),
}


_HEADER_LINES = {"azure": 1, "mooncake": 0}  #: of traces with a program a line: lines in front of the first


def place_of(spec: str, number: int) -> str:
    """Where program `number`, from 0, of the workload `spec` stands, for a message: FILE:LINE where there is a program a line,
    else `spec`."""
    kind, colon, path = spec.partition(":")
    header = 0
    if colon and kind in _HEADER_LINES:
        match = _PATH.fullmatch(path)
        assert match is not None
        path, header = match["path"], _HEADER_LINES[kind]
    elif kind not in GENERATORS and Path(spec).is_file():
        path = spec
    else:
        return spec
    with contextlib.suppress(WorkloadError):  # it was read a moment ago
        for line, _ in islice(byte_lines(path), header + number, None):
            return f"{path}:{line}"
    return spec


def open_source(spec: str, options: Mapping[str, Any], setting: Setting) -> Source:
    """The workload that `spec` names. Raises WorkloadError for a name or parameter that does not exist."""
    name, colon, rest = spec.partition(":")
    if name in GENERATORS:
        given = {**_parameters(name, rest), **options}
        return generator_source(name, given, seed=setting.seed, label=setting.label)
    if colon and name in TRACES:
        match = _PATH.fullmatch(rest)
        assert match is not None
        if not match["path"]:
            raise WorkloadError(f"workload {spec!r}: names no file; expected {name}:PATH[:parameter=value,…]")
        kind, opener = TRACES[name]
        given = {**_parameters(name, match["parameters"] or ""), **options}
        return opener(match["path"], parameters_of(name, kind, given), setting)
    if options:
        raise WorkloadError(f"workload {spec!r} takes no parameters, but {', '.join(options)} is given")
    if colon and name == "paper":
        return _paper(spec, rest, setting)
    if not Path(spec).is_file():
        kinds = ", ".join([*GENERATORS, *(f"{kind}:PATH" for kind in TRACES), "paper:NAME", "mix:PATH"])
        raise WorkloadError(f"workload {spec!r}: no such file, and none of {kinds}")
    return _of_programs(spec, lambda: read_programs(spec), setting.label)


def _paper(spec: str, rest: str, setting: Setting) -> Source:
    label, seed = setting.label, setting.seed
    if label:  # other parts of a mix may be of the paper too: each draws its own
        seed = int(stream(seed, f"{label}paper").integers(1 << 62))

    def programs() -> Iterator[Program]:
        for program in open_paper(rest, rate=setting.rate, seed=seed, count=setting.count):
            yield _with_own_texts(program, label) if label else program

    return replace(_of_programs(spec, programs, label), paced=True)


def _with_own_texts(program: Program, label: str) -> Program:
    """The same program, of whose texts all keys begin with `label`."""

    def own(segment: Segment) -> Segment:
        if isinstance(segment, Read) or segment.key is None:
            return segment
        return msgspec.structs.replace(segment, key=label + segment.key)

    calls = tuple(msgspec.structs.replace(call, segments=tuple(map(own, call.segments))) for call in program.calls)
    sets = tuple(msgspec.structs.replace(source, key=label + source.key) for source in program.sets)
    return msgspec.structs.replace(program, calls=calls, sets=sets)


def _of_programs(
    where: str, programs: Callable[[], Iterator[Program]], label: str, notes: Callable[[], Sequence[str]] = tuple
) -> Source:
    """A source whose rows are programs already."""

    def build(_: int, arrival_s: float, row: Row) -> Program:
        program: Program = row[1]
        if arrival_s == program.arrival_s and not label:
            return program
        return msgspec.structs.replace(program, arrival_s=arrival_s, id=label + program.id)

    return Source(where, lambda: ((program.arrival_s, program) for program in programs()), build, notes=notes)


def _parameters(name: str, text: str) -> dict[str, Any]:
    """`a=1,b.c=2` as {"a": "1", "b": {"c": "2"}}."""
    parameters: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise WorkloadError(f"workload {name}: {item!r} is no parameter=value")
        section, dot, key = key.strip().rpartition(".")
        place = parameters.setdefault(section, {}) if dot else parameters
        if not isinstance(place, dict):
            raise WorkloadError(f"workload {name}: {item!r}: {section!r} has a value already")
        place[key] = value.strip()
    return parameters
