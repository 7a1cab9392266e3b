"""Turns the journal of a core in mode `record` (docs/journal.md) into programs that can be run again, in simulation or not.

The journal says what every client asked, what the core answered, and what was generated. Nothing is guessed but one thing:
what a program was waiting for when it did the next step. A step follows the gets that had been answered since the program's
step before it, and comes as long after the last of them as it did in the journal (think time, tools, the network). A
session that lived through a restart of the core is one program: a get that the restart cut off and that is asked again is
the same get, and what else a client waited for while the core was away counts as think time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from parrot.configuration import ConfigurationError
from parrot.protocol.api import CallAnswer, Criteria
from parrot.protocol.engine import TaskId
from parrot.serve import events as ev
from parrot.serve import journal
from parrot.serve.effects import AnyEffect, Reply, SessionEnded
from parrot.serve.ledger import EFFECT, KEPT, Row, decode_event
from sim.workloads.program import After, Call, Get, Program, Read, Segment, Set, Text, WorkloadError, Write, check

_EFFECTS = msgspec.msgpack.Decoder(AnyEffect)


class Recorded(msgspec.Struct, frozen=True):
    """The programs of a journal in order of arrival, and why each other session is none: `session 12: …`."""

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
    deadline_s: float | None = None
    answered: bool = False


@dataclass
class _Session:
    """What one session did, in order."""

    opened_s: float
    tenant: str
    calls: dict[Any, _Call] = field(default_factory=dict)  #: by the call's id: a repeat is the same call
    gets: list[_Get] = field(default_factory=list)
    sets: dict[str, tuple[ev.Content, tuple[After, ...]]] = field(default_factory=dict)  #: by variable
    #: the gets answered since the last step, and the instant of the last of them
    answered: list[str] = field(default_factory=list)
    anchor: tuple[str, ...] = ()
    anchor_s: float = 0.0
    pending: int = 0
    #: gets that waited when a life ended, by variable
    cut_off: dict[str, list[_Get]] = field(default_factory=dict)
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


def read_journal(path: str | Path, tokenizer: str | None = None) -> Recorded:
    """The sessions of a `record` journal as programs; lengths are those of `tokenizer`, or of the first engine's when left out.

    A session that was still running at the journal's end, or in which something failed, is skipped with its reason.
    Raises WorkloadError: the journal cannot be read, or was not written in mode `record`.
    """
    reader = _Reader(path, tokenizer)
    try:
        with journal.read(path) as reading:
            if reading.mode != "record":
                raise WorkloadError(
                    f"{path}: its journal_mode is {reading.mode!r}, which forgets sessions as they end; "
                    'set "journal_mode": "record", with a journal_path of its own, and run again'
                )
            ends = [life.instant for life in reading.lives[1:]]
            for begin, end in zip([0, *ends], [*ends, None], strict=True):
                for _, rows in groupby(reading.rows(begin, end), lambda row: row.instant):
                    reader.take(list(rows))
                reader.end_life()
    except ConfigurationError as error:
        raise WorkloadError(str(error)) from error
    except msgspec.DecodeError as error:
        raise WorkloadError(f"{path}: a row cannot be read: {error}: is it of another version?") from error
    return reader.result()


class _Reader:
    """Keeps, for every session, what it did."""

    def __init__(self, path: str | Path, tokenizer: str | None) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.sessions: dict[int, _Session] = {}
        self.output_tokens: dict[TaskId, int] = {}
        self.keys: dict[TaskId, str] = {}
        self._asked: dict[int, Any] = {}  # request of this life -> its event, or the get that it began
        self._later_lengths: dict[str, dict[str, int]] = {}  # tokenizer -> key -> tokens, of contents that came before it

    def take(self, instant: Sequence[Row]) -> None:
        """Takes in the rows of an instant."""
        for row in instant:
            if row.kind != EFFECT:
                self._before(decode_event(row.body), row.kind == KEPT, row.t)
        for row in instant:
            if row.kind == EFFECT:
                effect = _EFFECTS.decode(row.body)
                if isinstance(effect, Reply):
                    self._reply(effect, row.t)
                elif isinstance(effect, SessionEnded) and effect.session_id in self.sessions:
                    self.sessions[effect.session_id].cut_off.clear()  # nobody asked for these again

    def end_life(self) -> None:
        """The core stopped: nobody is answered any more. Clients of the next life number their requests anew."""
        for event, get in self._asked.values():
            if isinstance(get, _Get):
                session = self.sessions[event.session_id]
                session.pending -= 1
                session.cut_off.setdefault(get.var, []).append(get)
        self._asked.clear()

    def _before(self, event: ev.AnyEvent, kept: bool, now: float) -> None:
        match event:
            case ev.RegisterEngine():
                self.tokenizer = self.tokenizer or event.engine.tokenizer
                self._later_lengths.setdefault(event.engine.tokenizer, {}).update(event.lengths)
            case ev.OpenSession():
                self._asked[event.request] = (event, ())
            case ev.SubmitCall() | ev.SetVariable():
                session = self.sessions.get(event.session_id)
                self._asked[event.request] = (event, session.step(now) if session else ())
            case ev.GetVariable():
                self._begin_get(event, now)
            case ev.CancelGet():
                self._end_get(event.request, now, answered=False)
            case ev.TaskFinished() if kept:  # else it came too late
                self.output_tokens[event.task] = event.output_tokens
                self.keys[event.task] = event.content.key
            case _:
                pass

    def _begin_get(self, event: ev.GetVariable, now: float) -> None:
        session = self.sessions.get(event.session_id)
        if session is None:
            return
        if again := session.cut_off.get(event.var_id):
            get = again.pop(0)
        else:
            criteria = event.criteria or Criteria.THROUGHPUT
            get = _Get(f"get{len(session.gets)}", event.var_id, criteria, session.step(now), event.deadline)
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
        if event is None or reply.error is not None:
            return  # refused, so it changed nothing
        if isinstance(event, ev.OpenSession):
            if reply.payload == event.session_id:  # else a repeat, answered with the session that it opened before
                self.sessions[event.session_id] = _Session(now, event.tenant)
            return
        session = self.sessions.get(event.session_id)
        if session is None:
            return
        if isinstance(event, ev.SubmitCall):
            answer = msgspec.convert(reply.payload, CallAnswer)
            session.calls.setdefault(answer.request_id, _Call(event, answer, after))
        elif isinstance(event, ev.SetVariable):
            session.sets.setdefault(event.var_id, (event.content, after))

    def _fault(self, session_id: int, reason: str) -> None:
        session = self.sessions[session_id]
        session.fault = session.fault or reason

    def _length(self, content: ev.Content) -> int:
        name = self.tokenizer or next(iter(content.lengths), "")
        length = content.lengths.get(name, self._later_lengths.get(name, {}).get(content.key))
        if length is None:
            known = ", ".join(content.lengths) or "none"
            raise WorkloadError(f"{self.path}: text {content.key} has no length under tokenizer {name!r}; it has: {known}")
        return length

    def result(self) -> Recorded:
        """The programs; their arrivals are relative to the first session."""
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
        sets = [Set(var, content.key, self._length(content), after) for var, (content, after) in session.sets.items()]
        calls, gets = [], []
        for index, call in enumerate(session.calls.values()):
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
        for g in session.gets:
            if g.answered:
                gets.append(Get(g.id, g.var, g.criteria, _answered_only(g.after, session.gets), g.deadline_s))
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
    if waiting := session.pending + sum(map(len, session.cut_off.values())):
        return f"{waiting} of its gets still waited when the journal ended"
    if not any(get.answered for get in session.gets):
        return "it fetched nothing"
    return None


def _answered_only(after: tuple[After, ...], gets: Sequence[_Get]) -> tuple[After, ...]:
    known = {get.id for get in gets if get.answered}
    return tuple(edge for edge in after if edge.get is None or edge.get in known)
