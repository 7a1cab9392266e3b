"""What the client of a program does: a state machine from a program and a mode to requests, fed with their answers.

It decides which request goes out when; it never sends one, waits or reads a clock: two shells do, SimPy's in
`sim.population` and asyncio's over HTTP in `sim.http_client`. A shell calls `start`, carries out the actions that it gets,
and hands each of them back with its answer, which gives the next actions; `ended` says when there are no more.

semantic: opens one session and submits what is known in the order of the file; a get goes out as soon as its edges allow
    and its variable has an id, and the session closes after the last one. When the core is far away (`preallocate`) and
    calls feed calls, the variables between them are created first, all at once: then no call waits for another's answer.
request: the baseline, a client that knows no semantic variables. Each output is a request of its own with all values
    filled in, sent when the values that it needs have come back. What nobody fetches is never sent.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Any

from parrot.protocol.api import Criteria
from parrot.protocol.errors import ErrorInfo
from sim.actions import (
    Action,
    Assign,
    Close,
    Complete,
    Create,
    Fetch,
    Given,
    Into,
    Open,
    Piece,
    Reference,
    Submit,
    Value,
    Wait,
)
from sim.workloads.program import Call, Get, Program, Read, Set, Text, Write


class Mode(enum.StrEnum):
    SEMANTIC = "semantic"
    REQUEST = "request"


class Player:
    """Plays one program in one mode. Steps (sets, then calls, then gets) are numbered in the order of the file.

    `serial` makes the keys of generated texts unique in a run; `max_gen_length` stands in for a limit that the program
    does not give (an output that is longer gets its own length).
    """

    def __init__(self, program: Program, serial: int, max_gen_length: int) -> None:
        self.program = program
        self.serial = serial
        self.started_s = 0.0
        self.ended_s: float | None = None  #: when the last get was answered, or the first failure came
        self.ended = False  #: nothing is left to do, the session's close included
        self.error: ErrorInfo | None = None
        self.refusals = 0  #: answers 429, each of which was waited out and tried again
        self.issued: dict[int, float] = {}
        self.returned: dict[int, float] = {}
        self._max_gen_length = max_gen_length
        self._first_call = len(program.sets)
        self._first_get = self._first_call + len(program.calls)
        self._steps: tuple[Set | Call | Get, ...] = (*program.sets, *program.calls, *program.gets)
        self._blocked = [len(step.after) for step in self._steps]
        self._left = len(self._steps)
        self._on_get: dict[str, list[tuple[int, float]]] = {}
        for node, step in enumerate(self._steps):
            for edge in step.after:
                if edge.get is not None:
                    self._on_get.setdefault(edge.get, []).append((node, edge.delay_s))

    # ------------------------------------------------------------------------------------- what a shell calls

    def start(self, now: float) -> list[Action]:
        raise NotImplementedError

    def answer(self, action: Action, answer: Any, now: float) -> list[Action]:
        """`action` was carried out and gave `answer`."""
        if self.ended:
            return []
        if type(action) is Close:
            self.ended = True
            return []
        if self.error is not None:
            return []
        if type(action) is Wait:
            if action.then is not None:
                return [action.then]
            return self._unblock(action.nodes, now)
        return self._advance(action, answer, now)

    def refuse(self, action: Action, retry_after_s: float, now: float) -> list[Action]:
        """`action` was refused for lack of room (429): it waits and tries again."""
        if self.ended or (self.error is not None and type(action) is not Close):
            return []
        self.refusals += 1
        return [Wait(retry_after_s, then=action)]

    def fail(self, action: Action, error: ErrorInfo, now: float) -> list[Action]:
        """`action` failed for good: so does the program, as one that does not catch the exception."""
        if type(action) is Close:
            self.ended = True
        if self.ended or self.error is not None:
            return []
        self.error = error
        self.ended_s = now
        return self._leave(action)

    def waits_for(self) -> str:
        """What the program waits for, for a person to read."""
        pending = [g.id for n, g in enumerate(self.program.gets) if n in self.issued and n not in self.returned]
        if pending:
            variables = {get.id: get.var for get in self.program.gets}
            return ", ".join(f"get {get!r} of variable {variables[get]!r}" for get in pending)
        blocked = [self._name(node) for node, count in enumerate(self._blocked) if count > 0]
        return f"the control edges of {', '.join(blocked)}" if blocked else "answers to its requests"

    # ------------------------------------------------------------------------------------------ the two modes

    def _advance(self, action: Action, answer: Any, now: float) -> list[Action]:
        raise NotImplementedError

    def _release(self, node: int, now: float) -> list[Action]:
        """Nothing holds step `node` back any more."""
        raise NotImplementedError

    def _leave(self, failed: Action) -> list[Action]:
        """What is left to do after `failed` failed the program."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- shared

    def _begin(self, now: float) -> list[Action]:
        """Releases the steps that nothing holds back and starts the waits that count from the arrival."""
        actions: list[Action] = []
        free = [count == 0 for count in self._blocked]  # as things stand now: a release may free others, and releases them
        for node, step in enumerate(self._steps):
            delays = [edge.delay_s for edge in step.after if edge.get is None]
            if free[node]:
                actions += self._release(node, now)
            elif delays:
                late = max(self.started_s + max(delays) - now, 0.0)
                self._blocked[node] -= len(delays) - 1
                actions.append(Wait(late, nodes=(node,)))
        return actions

    def _unblock(self, nodes: Iterable[int], now: float) -> list[Action]:
        actions: list[Action] = []
        for node in nodes:
            self._blocked[node] -= 1
            if self._blocked[node] == 0:
                actions += self._release(node, now)
        return actions

    def _get_returned(self, number: int, now: float) -> list[Action]:
        self.returned[number] = now
        actions: list[Action] = []
        at_once: list[int] = []
        for node, delay_s in self._on_get.get(self.program.gets[number].id, ()):
            if delay_s > 0.0:
                actions.append(Wait(delay_s, nodes=(node,)))
            else:
                at_once.append(node)
        return actions + self._unblock(sorted(at_once), now)

    def _into(self, write: Write, var_id: str | None = None) -> Into:
        most = write.max_gen_length or max(self._max_gen_length, write.tokens)
        key = write.key if write.key is not None else f"{self.serial}/{self.program.id}/{write.var}"
        return Into(write.var, key, min(write.tokens, most), most, var_id)

    def _name(self, node: int) -> str:
        if node < self._first_call:
            return f"set of {self.program.sets[node].var!r}"
        if node < self._first_get:
            number = node - self._first_call
            return f"call {number} ({self.program.calls[number].name!r})"
        return f"get {self.program.gets[node - self._first_get].id!r}"


class SemanticPlayer(Player):
    """One session; the core keeps the variables and runs the DAG."""

    def __init__(self, program: Program, serial: int, max_gen_length: int, preallocate: bool = False) -> None:
        super().__init__(program, serial, max_gen_length)
        self._ids: dict[str, str] = {}
        self._to_create = [source.var for source in program.sets]
        self._on_id: dict[str, list[int]] = {}
        producers = {s.var: n for n, call in enumerate(program.calls) for s in call.segments if type(s) is Write}
        fed: list[str] = []
        for number, call in enumerate(program.calls):
            reads = dict.fromkeys(s.var for s in call.segments if type(s) is Read)
            for var in reads:
                self._hold_until_id(self._first_call + number, var)
                if var in producers:
                    fed.append(var)
                    if producers[var] == number:  # only a variable that exists can be read by the call that writes it
                        self._to_create.append(var)
        for number, get in enumerate(program.gets):
            self._hold_until_id(self._first_get + number, get.var)
        if preallocate and fed:
            self._to_create += [var for var in dict.fromkeys([*fed, *(get.var for get in program.gets)]) if var in producers]
        self._to_create = list(dict.fromkeys(self._to_create))
        for var in self._to_create:
            if var in producers:  # its call names the variable, so it needs the id
                self._hold_until_id(self._first_call + producers[var], var)
        for number in range(self._first_call):
            self._hold_until_id(number, program.sets[number].var)

    def start(self, now: float) -> list[Action]:
        self.started_s = now
        return [Open(self.program.tenant)]

    def _hold_until_id(self, node: int, var: str) -> None:
        self._blocked[node] += 1
        self._on_id.setdefault(var, []).append(node)

    def _advance(self, action: Action, answer: Any, now: float) -> list[Action]:
        kind = type(action)
        if kind is Fetch:
            actions = self._get_returned(action.get, now)  # type: ignore[union-attr]
            return self._done_one(now) if not actions else [*actions, *self._done_one(now)]
        if kind is Submit:
            actions = []
            writes = [s.var for s in action.spec.segments if type(s) is Write]  # type: ignore[union-attr]
            for var, var_id in zip(writes, answer, strict=True):
                actions += self._identified(var, var_id, now)
            return [*actions, *self._done_one(now)]
        if kind is Create:
            return self._identified(action.var, answer, now)  # type: ignore[union-attr]
        if kind is Assign:
            return self._done_one(now)
        creates: list[Action] = [Create(var) for var in self._to_create]
        return [*creates, *self._begin(now), *self._close_if_over(now)]

    def _identified(self, var: str, var_id: str, now: float) -> list[Action]:
        if var in self._ids:
            return []
        self._ids[var] = var_id
        return self._unblock(self._on_id.get(var, ()), now)

    def _done_one(self, now: float) -> list[Action]:
        self._left -= 1
        return self._close_if_over(now)

    def _close_if_over(self, now: float) -> list[Action]:
        if self._left or self.ended_s is not None:
            return []
        self.ended_s = max(self.returned.values(), default=now)
        return [Close()]

    def _release(self, node: int, now: float) -> list[Action]:
        step = self._steps[node]
        if type(step) is Get:
            number = node - self._first_get
            self.issued[number] = now
            return [Fetch(number, self._ids[step.var], step.criteria)]
        if type(step) is Call:
            return [Submit(node - self._first_call, step, tuple(self._pieces(step)))]
        assert type(step) is Set
        return [Assign(self._ids[step.var], Value(step.key, step.tokens))]

    def _pieces(self, call: Call) -> Iterable[Piece]:
        for segment in call.segments:
            if type(segment) is Text:
                if segment.tokens:
                    yield segment
            elif type(segment) is Read:
                yield Reference(segment.var, self._ids[segment.var])
            else:
                assert type(segment) is Write
                yield self._into(segment, self._ids.get(segment.var))

    def _leave(self, failed: Action) -> list[Action]:
        if type(failed) is Open:
            self.ended = True
            return []
        return [Close()]


class RequestPlayer(Player):
    """The baseline: values travel to the client and back with every request.

    The requests of one program share contexts as those of one client would: the program's tenant, or the program alone.
    """

    def __init__(self, program: Program, serial: int, max_gen_length: int) -> None:
        super().__init__(program, serial, max_gen_length)
        self._tenant = program.tenant or f"program/{serial}/{program.id}"
        self._criteria = {get.var: get.criteria for get in reversed(program.gets)}
        self._values: dict[str, Value] = {}
        self._on_value: dict[str, list[int]] = {}
        self._wanted = self._outputs_wanted()
        for number, call in enumerate(program.calls):
            own = {s.var for s in call.segments if type(s) is Write}
            for var in dict.fromkeys(s.var for s in call.segments if type(s) is Read):
                if var not in own:
                    self._hold_until_value(self._first_call + number, var)
        for number, get in enumerate(program.gets):
            self._hold_until_value(self._first_get + number, get.var)
        self._gets_left = len(program.gets)

    def start(self, now: float) -> list[Action]:
        self.started_s = now
        self.ended = not self.program.gets
        return self._begin(now)

    def _hold_until_value(self, node: int, var: str) -> None:
        self._blocked[node] += 1
        self._on_value.setdefault(var, []).append(node)

    def _outputs_wanted(self) -> list[int]:
        """For each call how many of its outputs, from the first, somebody wants; 0: the call is never made."""
        calls = self.program.calls
        place = {s.var: (n, i) for n, c in enumerate(calls) for i, s in enumerate(_writes(c))}
        wanted = [0] * len(calls)
        open_vars = [get.var for get in self.program.gets]
        while open_vars:
            found = place.get(open_vars.pop())
            if found is None or wanted[found[0]] > found[1]:
                continue
            number, output = found
            wanted[number] = output + 1
            open_vars += [s.var for s in calls[number].segments if type(s) is Read and place.get(s.var, (-1,))[0] != number]
        return wanted

    def _advance(self, action: Action, answer: Any, now: float) -> list[Action]:
        assert type(action) is Complete
        write = _writes(action.spec)[action.output]
        actions = self._came(write.var, answer, now)
        if action.output + 1 < self._wanted[action.call]:
            actions = [*self._request(action.call, action.output + 1), *actions]
        return actions

    def _came(self, var: str, value: Value, now: float) -> list[Action]:
        """`var` has its value at the client."""
        self._values[var] = value
        return self._unblock(self._on_value.get(var, ()), now)

    def _release(self, node: int, now: float) -> list[Action]:
        step = self._steps[node]
        if type(step) is Get:
            number = node - self._first_get
            self.issued[number] = now
            self._gets_left -= 1
            if self._gets_left == 0:
                self.ended_s = now
                self.ended = True
            return self._get_returned(number, now)
        if type(step) is Call:
            number = node - self._first_call
            return self._request(number, 0) if self._wanted[number] else []
        assert type(step) is Set
        return self._came(step.var, Value(step.key, step.tokens), now)

    def _request(self, number: int, output: int) -> list[Action]:
        call = self.program.calls[number]
        write = _writes(call)[output]
        pieces: list[Piece] = []
        for place, segment in enumerate(call.segments):
            if segment is write:
                pieces.append(self._into(write))
                break
            if type(segment) is Text:
                if segment.tokens:
                    pieces.append(segment)
            elif not isinstance(segment, Text):
                pieces.append(Given(f"{segment.var}_{place}", self._values[segment.var]))
        criteria = self._criteria.get(write.var, Criteria.LATENCY)
        return [Complete(number, output, call, self._tenant, tuple(pieces), criteria)]

    def _leave(self, failed: Action) -> list[Action]:
        self.ended = True
        return []


def _writes(call: Call) -> Sequence[Write]:
    return [s for s in call.segments if type(s) is Write]


def new_player(program: Program, mode: Mode, *, serial: int, max_gen_length: int, preallocate: bool) -> Player:
    """The player of `program` in `mode`. `preallocate`: the core is a network away (see the module's text)."""
    if mode is Mode.SEMANTIC:
        return SemanticPlayer(program, serial, max_gen_length, preallocate)
    return RequestPlayer(program, serial, max_gen_length)
