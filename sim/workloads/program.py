"""A program: one run of an LLM application, as data. The one format of the simulator's workloads, a JSON object a line.

A program is its arrival, its tenant, the DAG of its calls, what it sets from outside, and what it fetches with which
criteria. Anything may be made to wait: `after` lists control edges, each of which lets it happen `delay_s` seconds after
a named get returned (tool calls, think time, agents), or after the program's arrival when no get is named. With several
edges, the latest counts; with none, it happens at arrival, in the order of the file: sets, calls, gets.

A piece of text is its key (equal keys are equal texts) and its number of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import msgspec
from msgspec import Meta

from parrot.protocol.api import Criteria
from sim.workloads.plain import refuse_compressed

Tokens = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0.0)]


class After(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """`delay_s` after the get named `get` returned; null: after the program's arrival."""

    get: str | None = None
    delay_s: Seconds = 0.0


class Text(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True, tag="text", tag_field="kind"):
    """A constant piece of the prompt."""

    key: str
    tokens: Tokens


class Read(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True, tag="read", tag_field="kind"):
    """The content of a variable of this program."""

    var: str


class Write(
    msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True, tag="write", tag_field="kind"
):
    """An output: the variable that it fills and the number of tokens that the model will really generate (the engine's
    knowledge alone). `key`: the identity of the text, when a later workload repeats it; left out, it is unique."""

    var: str
    tokens: Annotated[int, Meta(ge=1)]
    max_gen_length: Annotated[int, Meta(ge=1)] | None = None
    key: str | None = None


Segment = Text | Read | Write


class Set(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """The program gives the variable `var` a content of its own."""

    var: str
    key: str
    tokens: Tokens
    after: tuple[After, ...] = ()


class Call(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """A semantic call. `models` (): any. `model_type`: null: what those models have (`sim.model_types`)."""

    segments: tuple[Segment, ...]
    name: str = ""
    models: tuple[str, ...] = ()
    cache_prefix: bool = True
    after: tuple[After, ...] = ()
    model_type: Literal["token_id", "text"] | None = None


class Get(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """A fetch, by its own name `id`. `deadline_s`: the value is worthless, and the program has failed, when it is not at the
    client so long after `after` let it be fetched."""

    id: str
    var: str
    criteria: Criteria = Criteria.LATENCY
    after: tuple[After, ...] = ()
    deadline_s: Seconds | None = None


class Program(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True, omit_defaults=True):
    """One run of an application. `arrival_s`: seconds from the workload's start."""

    id: str
    arrival_s: Seconds
    calls: tuple[Call, ...]
    gets: tuple[Get, ...]
    sets: tuple[Set, ...] = ()
    tenant: str = ""
    application: str = ""


class WorkloadError(Exception):
    """A workload that cannot be run. The message names file, line and reason."""


def check(program: Program) -> None:
    """Raises ValueError unless names are unique and resolve, something is fetched, and no variable waits for itself."""
    if not program.gets:
        raise ValueError("`gets` is empty: what nobody fetches is not run, so this program would do nothing")
    producers: dict[str, int] = {}
    for source in program.sets:
        if source.var in producers:
            raise ValueError(f"variable {source.var!r} is set twice")
        producers[source.var] = -1
    for index, call in enumerate(program.calls):
        writes = False
        for segment in call.segments:
            if type(segment) is Write:
                if segment.var in producers:
                    raise ValueError(f"variable {segment.var!r} has two producers")
                producers[segment.var] = index
                writes = True
        if not writes:
            raise ValueError(f"call {index} ({call.name!r}) writes nothing")
        if type(call.segments[0]) is Write:
            raise ValueError(f"call {index} ({call.name!r}) has an output before any text")
    places: dict[str, int] = {}  # of each get: the call that it waits for
    for get in program.gets:
        if get.id in places:
            raise ValueError(f"two gets have the same id {get.id!r}")
        if get.var not in producers:
            raise ValueError(f"get {get.id!r} wants variable {get.var!r}, which nobody writes")
        places[get.id] = producers[get.var]
    if not _is_in_order(program, producers, places):
        _check_acyclic(program, producers)


def _is_in_order(program: Program, producers: dict[str, int], places: dict[str, int]) -> bool:
    """Whether everything waits for earlier calls only, which is usual, and means that nothing waits for itself.

    Raises ValueError for what waits for something that does not exist.
    """
    in_order = True
    for index, call in enumerate(program.calls):
        for segment in call.segments:
            if type(segment) is Read:
                place = producers.get(segment.var)
                if place is None:
                    raise ValueError(f"variable {segment.var!r} is read but nobody writes it")
                in_order = in_order and place <= index
        if call.after:
            in_order = _latest(call.after, places) < index and in_order
    for get in program.gets:
        if get.after:
            in_order = _latest(get.after, places) < places[get.id] and in_order
    for source in program.sets:
        if source.after:
            _latest(source.after, places)
            in_order = False
    return in_order


def _latest(edges: tuple[After, ...], places: dict[str, int]) -> int:
    latest = -2
    for edge in edges:
        if edge.get is not None:
            if edge.get not in places:
                raise ValueError(f"an `after` names get {edge.get!r}, which does not exist")
            latest = max(latest, places[edge.get])
    return latest


def _check_acyclic(program: Program, producers: dict[str, int]) -> None:
    """Walks data and control edges together; a cycle would never end."""
    variable_of = {get.id: get.var for get in program.gets}
    get_named = {get.id: get for get in program.gets}
    set_named = {source.var: source for source in program.sets}
    state: dict[tuple[str, object], int] = {}

    def before(node: tuple[str, object]) -> Iterator[tuple[str, object]]:
        kind, name = node
        after: tuple[After, ...]
        if kind == "get":
            after = get_named[str(name)].after
            yield ("var", variable_of[str(name)])
        elif kind == "var":
            index = producers[str(name)]
            if index >= 0:
                yield ("call", index)
                return
            after = set_named[str(name)].after
        else:
            call = program.calls[int(str(name))]
            after = call.after
            for segment in call.segments:
                if isinstance(segment, Read) and producers[segment.var] != int(str(name)):
                    yield ("var", segment.var)
        for edge in after:
            if edge.get is not None:
                yield ("get", edge.get)

    roots: list[tuple[str, object]] = [("get", get.id) for get in program.gets]
    roots += [("call", index) for index in range(len(program.calls))]
    for root in roots:
        if state.get(root):
            continue
        state[root] = 1
        stack = [(root, before(root))]
        while stack:
            node, children = stack[-1]
            child = next(children, None)
            if child is None:
                state[node] = 2
                stack.pop()
            elif state.get(child) == 1:
                raise ValueError(f"{child[0]} {child[1]!r} waits for itself")
            elif child not in state:
                state[child] = 1
                stack.append((child, before(child)))


KEPT_TEXTS = 32_768  #: of so many different texts at a time the length is remembered, to be held against later ones


class TextLengths:
    """Holds the texts of programs against each other: equal keys are equal texts, so their lengths are equal too. What was
    wrong here would be a context that is longer for one program than for the next. Memory is bounded: texts are compared
    within some KEPT_TEXTS different ones."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def check(self, program: Program) -> None:
        """Raises ValueError for a key that is of two lengths."""
        known = self._tokens
        if len(known) > KEPT_TEXTS:
            known.clear()
        for call in program.calls:
            for segment in call.segments:
                if type(segment) is Text:
                    key, tokens = segment.key, segment.tokens
                elif type(segment) is Write and segment.key is not None:
                    key, most = segment.key, segment.max_gen_length
                    tokens = segment.tokens if most is None else min(segment.tokens, most)
                else:
                    continue
                if known.setdefault(key, tokens) != tokens:
                    raise _two_lengths(key, tokens, known[key])
        for source in program.sets:
            if known.setdefault(source.key, source.tokens) != source.tokens:
                raise _two_lengths(source.key, source.tokens, known[source.key])


def _two_lengths(key: str, tokens: int, before: int) -> ValueError:
    return ValueError(f"the text {key!r} has {tokens} tokens here and {before} before; equal keys are equal texts")


_decoder = msgspec.json.Decoder(Program)
_encoder = msgspec.json.Encoder()


def read_programs(path: str | Path) -> Iterator[Program]:
    """The programs of a JSONL file, one at a time. Raises WorkloadError with file, line and reason."""
    last = 0.0
    known = False  # a program has been read: it is such a file
    lengths = TextLengths()
    try:
        with open(path, "rb") as file:
            refuse_compressed(file)
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    program = _decoder.decode(line)
                    check(program)
                    lengths.check(program)
                    if program.arrival_s < last:
                        raise ValueError(f"arrival_s {program.arrival_s} is before the line above it ({last})")
                except (msgspec.DecodeError, ValueError) as error:
                    hint = "" if known else "; expected a program a line (a trace is named KIND:PATH, a mix mix:PATH)"
                    raise WorkloadError(f"{path}:{number}: {error}{hint}") from error
                known = True
                last = program.arrival_s
                yield program
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}") from error


def write_programs(path: str | Path, programs: Iterable[Program]) -> int:
    """Writes programs as JSONL; returns how many. A file appears whole or not at all, behind its link where `path` is one;
    into what is no file (a pipe, a device) programs go as they come. Raises OSError."""
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            return _write_lines(file, programs)
    target = Path(os.path.realpath(path))
    partial = Path(f"{target}.partial")
    try:
        with open(partial, "wb") as file:
            count = _write_lines(file, programs)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _write_lines(file: BinaryIO, programs: Iterable[Program]) -> int:
    count = 0
    for program in programs:
        file.write(_encoder.encode(program) + b"\n")
        count += 1
    return count
