"""Turns what a core recorded (`record_path`, docs/record.md) into programs that can be run again, in simulation or not.

The record holds the events that happened to a ServeCore, so a fresh ServeCore is fed with them and its replies say which
variables the calls got and when each get was answered. Nothing is guessed but one thing: what a program was waiting for
when it did the next step. A step follows the gets that had been answered since the program's step before it, and comes
as long after the last of them as it did in the record (think time, tools, the network).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from parrot.protocol.api import CallAnswer, Criteria
from parrot.protocol.engine import TaskId
from parrot.serve import events as ev
from parrot.serve.core import ServeCore
from parrot.serve.effects import Reply
from parrot.serve.record import VERSION, Header, Instant
from sim.workloads.program import After, Call, Get, Program, Read, Segment, Set, Text, WorkloadError, Write, check


class Recorded(msgspec.Struct, frozen=True):
    """The programs of a record in order of arrival, and why each other session is none: `session 12: …`."""

    programs: list[Program]
    skipped: list[str]


@dataclass
class _Call:
    event: ev.SubmitCall
    answer: CallAnswer
    after: tuple[After, ...]


@dataclass
class _Get:
    id: str
    var: str
    criteria: Criteria
    after: tuple[After, ...]
    answered: bool = False


@dataclass
class _Session:
    """What one session did, in order."""

    opened_s: float
    tenant: str
    calls: list[_Call] = field(default_factory=list)
    gets: list[_Get] = field(default_factory=list)
    sets: list[Set] = field(default_factory=list)
    #: the gets answered since the last step, and the instant of the last of them
    answered: list[str] = field(default_factory=list)
    anchor: tuple[str, ...] = ()
    anchor_s: float = 0.0
    pending: int = 0
    fault: str | None = None

    def step(self, now: float) -> tuple[After, ...]:
        """The control edges of a step that is done at `now`."""
        if self.answered:
            self.anchor = tuple(self.answered)
            self.answered = []
        delay_s = max(0.0, now - (self.anchor_s if self.anchor else self.opened_s))
        if not self.anchor:
            return (After(None, delay_s),) if delay_s > 0 else ()
        return tuple(After(get, delay_s) for get in self.anchor)


def read_record(path: str | Path, tokenizer: str | None = None) -> Recorded:
    """The sessions of a record as programs; lengths are those of `tokenizer`, or of the first engine's when left out.

    A session that was still running at the record's end, or in which something failed, is skipped with its reason.
    Raises WorkloadError with file, line and reason.
    """
    reader = _Reader(path, tokenizer)
    for instant in _instants(path, reader):
        reader.take(instant)
    return reader.result()


def _instants(path: str | Path, reader: _Reader) -> Iterator[Instant]:
    header = msgspec.json.Decoder(Header)
    decoder = msgspec.json.Decoder(Instant)
    number, last_s = 0, 0.0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    first = header.decode(line)
                    if first.record != VERSION:
                        raise WorkloadError(f"{path}:1: record format {first.record}; this reader knows {VERSION}")
                    reader.core = ServeCore(first.config, epoch=first.epoch)
                    continue
                if not line.endswith(b"\n"):
                    return  # the core was killed while it wrote
                instant = decoder.decode(line)
                if instant.t < last_s:
                    raise WorkloadError(f"{path}:{number}: time {instant.t} is before the line above it ({last_s})")
                last_s = instant.t
                yield instant
    except msgspec.DecodeError as error:
        what = "not a record of a core" if number == 1 else "not an instant of a record"
        raise WorkloadError(f"{path}:{number}: {what}: {error}") from error
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}") from error
    if number == 0:
        raise WorkloadError(f"{path}: empty: a core's record begins with a header line")


class _Reader:
    """Feeds a fresh core and keeps, for every session, what it did."""

    core: ServeCore

    def __init__(self, path: str | Path, tokenizer: str | None) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.sessions: dict[int, _Session] = {}
        self.output_tokens: dict[TaskId, int] = {}
        self.keys: dict[TaskId, str] = {}
        self._asked: dict[int, Any] = {}  # request -> its event, or the get that it began

    def take(self, instant: Instant) -> None:
        for event in instant.events:
            self._before(event, instant.t)
        for effect in self.core.handle(instant.events, instant.t):
            if isinstance(effect, Reply):
                self._reply(effect, instant.t)

    def _before(self, event: ev.AnyEvent, now: float) -> None:
        match event:
            case ev.RegisterEngine():
                self.tokenizer = self.tokenizer or event.engine.tokenizer
            case ev.OpenSession():
                self.sessions.setdefault(event.session_id, _Session(now, event.tenant))
            case ev.SubmitCall() | ev.SetVariable():
                session = self.sessions.get(event.session_id)
                self._asked[event.request] = (event, session.step(now) if session else ())
            case ev.GetVariable():
                self._begin_get(event, now)
            case ev.CancelGet():
                self._end_get(event.request, now, answered=False)
            case ev.TaskFinished():
                self.output_tokens[event.task] = event.output_tokens
                self.keys[event.task] = event.content.key
            case _:
                pass

    def _begin_get(self, event: ev.GetVariable, now: float) -> None:
        session = self.sessions.get(event.session_id)
        if session is None:
            return
        get = _Get(f"get{len(session.gets)}", event.var_id, event.criteria or Criteria.THROUGHPUT, session.step(now))
        session.gets.append(get)
        session.pending += 1
        self._asked[event.request] = (event, get)

    def _end_get(self, request: int, now: float, *, answered: bool) -> None:
        event, get = self._asked.pop(request, (None, None))
        if not isinstance(get, _Get):
            return
        session = self.sessions[event.session_id]
        session.pending -= 1
        get.answered = answered
        if answered:
            session.answered.append(get.id)
            session.anchor_s = now

    def _reply(self, reply: Reply, now: float) -> None:
        event, after = self._asked.get(reply.request, (None, ()))
        if isinstance(event, ev.GetVariable):
            self._end_get(reply.request, now, answered=reply.error is None)
            if reply.error is not None and reply.error.code != "timeout":
                self._fault(event.session_id, f"variable {event.var_id} failed: {reply.error.message}")
            return
        self._asked.pop(reply.request, None)
        session = self.sessions.get(event.session_id) if event is not None else None
        if session is None or reply.error is not None:
            return  # refused, so it changed nothing
        if isinstance(event, ev.SubmitCall) and isinstance(reply.payload, CallAnswer):
            if all(call.answer.request_id != reply.payload.request_id for call in session.calls):  # else a repeat
                session.calls.append(_Call(event, reply.payload, after))
        elif isinstance(event, ev.SetVariable) and all(known.var != event.var_id for known in session.sets):
            session.sets.append(Set(event.var_id, event.content.key, self._length(event.content), after))

    def _fault(self, session_id: int, reason: str) -> None:
        session = self.sessions[session_id]
        session.fault = session.fault or reason

    def _length(self, content: ev.Content) -> int:
        name = self.tokenizer or next(iter(content.lengths), "")
        if name not in content.lengths:
            known = ", ".join(content.lengths) or "none"
            raise WorkloadError(f"{self.path}: text {content.key} has no length under tokenizer {name!r}; it has: {known}")
        return content.lengths[name]

    def result(self) -> Recorded:
        """The programs; their arrivals are relative to the first session."""
        if not hasattr(self, "core"):
            raise WorkloadError(f"{self.path}: empty: a core's record begins with a header line")
        start_s = min((s.opened_s for s in self.sessions.values()), default=0.0)
        programs, skipped = [], []
        for session_id, session in self.sessions.items():
            reason = session.fault or _why_not(session)
            if reason:
                skipped.append(f"session {session_id}: {reason}")
                continue
            program = self._program(session_id, session, session.opened_s - start_s)
            try:
                check(program)
            except ValueError as error:
                skipped.append(f"session {session_id}: {error}")
                continue
            programs.append(program)
        return Recorded(sorted(programs, key=lambda p: p.arrival_s), skipped)

    def _program(self, session_id: int, session: _Session, arrival_s: float) -> Program:
        sets, calls, gets = list(session.sets), [], []
        for index, call in enumerate(session.calls):
            event = call.event
            sets += self._given(call)
            calls.append(
                Call(
                    segments=tuple(self._segments(session_id, index, call)),
                    name=event.func_name,
                    models=event.models,
                    cache_prefix=event.cache_prefix,
                    after=call.after,
                )
            )
            if event.output_criteria is not None:  # it activates the call's last output, as a get at submission would
                last = [p.var_id for p in call.answer.param_info if p.is_output][-1]
                gets.append(Get(f"activate{index}", last, event.output_criteria, call.after))
        gets += [Get(g.id, g.var, g.criteria, _answered_only(g.after, session.gets)) for g in session.gets if g.answered]
        return Program(
            id=f"session-{session_id}",
            arrival_s=arrival_s,
            calls=tuple(calls),
            gets=tuple(gets),
            sets=tuple(sets),
            tenant=session.tenant,
            application=calls[0].name if calls else "",
        )

    def _segments(self, session_id: int, index: int, call: _Call) -> Iterator[Segment]:
        """The call's segments; `param_info` names the variable of every placeholder in template order."""
        places = iter(call.answer.param_info)
        outputs = 0
        for segment in call.event.segments:
            if isinstance(segment, ev.Constant):
                yield Text(segment.content.key, self._length(segment.content))
                continue
            variable = next(places).var_id
            if isinstance(segment, ev.Output):
                task = TaskId(session_id, index, outputs)
                tokens = self.output_tokens.get(task, 1)  # never activated: it will not run in a replay either
                limit = max(tokens, segment.sampling.max_gen_length)
                yield Write(variable, max(1, tokens), max_gen_length=limit, key=self.keys.get(task))
                outputs += 1
            else:
                yield Read(variable)

    def _given(self, call: _Call) -> Iterator[Set]:
        """The values that came with the call: variables of the core, which later calls may read."""
        inputs = [segment for segment in call.event.segments if not isinstance(segment, ev.Constant)]
        seen: set[str] = set()
        for segment, place in zip(inputs, call.answer.param_info, strict=True):
            if isinstance(segment, ev.Input) and segment.value is not None and place.var_id not in seen:
                seen.add(place.var_id)
                yield Set(place.var_id, segment.value.key, self._length(segment.value), call.after)


def _why_not(session: _Session) -> str | None:
    if session.pending:
        return f"{session.pending} of its gets still waited when the record ended"
    if not any(get.answered for get in session.gets):
        return "it fetched nothing"
    return None


def _answered_only(after: tuple[After, ...], gets: Sequence[_Get]) -> tuple[After, ...]:
    known = {get.id for get in gets if get.answered}
    return tuple(edge for edge in after if edge.get is None or edge.get in known)
