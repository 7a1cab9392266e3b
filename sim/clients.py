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
from typing import Any, Final

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

_ROUNDING_S: Final = 1e-9  #: an answer at the deadline itself is in time, however its moment was added up

# By names of this module's own that never change: the compiled module need not look up what each segment is.
_TEXT: Final = Text
_READ: Final = Read
_WRITE: Final = Write


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
        sets, calls, gets = program.sets, program.calls, program.gets
        self._first_call = len(sets)
        self._first_get = self._first_call + len(calls)
        self._calls = calls
        self._gets = gets
        self._steps: tuple[Set | Call | Get, ...] = (*sets, *calls, *gets)
        self._blocked = [len(step.after) for step in self._steps]
        self._left = len(self._steps)
        self._returned_s = -1.0  # when a get last returned; below 0: none has
        self._on_get: dict[str, list[tuple[int, float]]] | None = None
        if any(self._blocked):
            self._on_get = {}
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
        if isinstance(action, Close):
            self.ended = True
            return []
        if self.error is not None:
            return []
        out: list[Action] = []
        if isinstance(action, Wait):
            if action.then is not None:
                return [action.then]
            self._unblock(action.nodes, now, out)
        else:
            self._advance(action, answer, now, out)
        return out

    def refuse(self, action: Action, retry_after_s: float, now: float) -> list[Action]:
        """`action` was refused for lack of room (429): it waits and tries again."""
        if self.ended or (self.error is not None and not isinstance(action, Close)):
            return []
        self.refusals += 1
        return [Wait(retry_after_s, then=action)]

    def fail(self, action: Action, error: ErrorInfo, now: float) -> list[Action]:
        """`action` failed for good: so does the program, as one that does not catch the exception."""
        if isinstance(action, Close):
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

    def _advance(self, action: Action, answer: Any, now: float, out: list[Action]) -> None:
        """`action` gave `answer`: what follows goes to `out`."""
        raise NotImplementedError

    def _release(self, node: int, now: float, out: list[Action]) -> None:
        """Nothing holds step `node` back any more."""
        raise NotImplementedError

    def _leave(self, failed: Action) -> list[Action]:
        """What is left to do after `failed` failed the program."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- shared

    def _begin(self, now: float, out: list[Action]) -> None:
        """Releases the steps that nothing holds back and starts the waits that count from the arrival."""
        free = [count == 0 for count in self._blocked]  # as things stand now: a release may free others, and releases them
        for node, step in enumerate(self._steps):
            if free[node]:
                self._release(node, now, out)
            elif step.after:
                delays = [edge.delay_s for edge in step.after if edge.get is None]
                if delays:
                    self._blocked[node] -= len(delays) - 1
                    out.append(Wait(max(self.started_s + max(delays) - now, 0.0), nodes=(node,)))

    def _unblock(self, nodes: Iterable[int], now: float, out: list[Action]) -> None:
        blocked = self._blocked
        for node in nodes:
            blocked[node] -= 1
            if blocked[node] == 0:
                self._release(node, now, out)

    def _get_returned(self, number: int, now: float, out: list[Action]) -> None:
        self.returned[number] = now
        self._returned_s = now
        edges = self._on_get.get(self._gets[number].id) if self._on_get is not None else None
        if edges is None:
            return
        at_once: list[int] = []
        for node, delay_s in edges:
            if delay_s > 0.0:
                out.append(Wait(delay_s, nodes=(node,)))
            else:
                at_once.append(node)
        self._unblock(sorted(at_once), now, out)

    def _left_s(self, number: int, now: float) -> float | None:
        """Seconds to the deadline of get `number`, below 0 after it; None while it has none, or none that runs yet."""
        get = self._gets[number]
        deadline_s = get.deadline_s
        if deadline_s is None:
            return None
        begun_s = self.started_s
        for edge in get.after:
            returned_s = self.started_s if edge.get is None else self.returned.get(self._number_of(edge.get))
            if returned_s is None:
                return None
            begun_s = max(begun_s, returned_s + edge.delay_s)
        return begun_s + deadline_s - now

    def _number_of(self, get_id: str) -> int:
        return next(number for number, get in enumerate(self.program.gets) if get.id == get_id)

    def _is_late(self, number: int, now: float) -> bool:
        """Whether get `number`, answered now, is answered too late; then the program has failed."""
        left_s = self._left_s(number, now)
        if left_s is None or left_s >= -_ROUNDING_S:
            return False
        get = self.program.gets[number]
        self.error = ErrorInfo("deadline_exceeded", f"get {get.id!r} was answered {-left_s:.3f} s after its deadline")
        self.ended_s = now
        return True

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
        self._on_id: dict[str, list[int]] = {}
        self._to_create: list[str] = []
        reads: list[tuple[int, str]] = []
        for number, call in enumerate(self._calls):
            for segment in call.segments:
                if type(segment) is _READ:
                    reads.append((number, segment.var))
        if reads or self._first_call:
            self._hold_all(list(dict.fromkeys(reads)), preallocate)
        else:  # as it does
            self._hold_gets()

    def _hold_gets(self) -> None:
        for number, get in enumerate(self._gets):
            self._hold_until_id(self._first_get + number, get.var)

    def _hold_all(self, reads: list[tuple[int, str]], preallocate: bool) -> None:
        """What reads, gets or gives a variable waits for its id; what must be created first is found. `reads`: call and
        variable."""
        to_create = [source.var for source in self.program.sets]
        producers: dict[str, int] = {}
        for number, call in enumerate(self._calls):
            for segment in call.segments:
                if type(segment) is _WRITE:
                    producers[segment.var] = number
        fed: list[str] = []
        for number, var in reads:
            self._hold_until_id(self._first_call + number, var)
            if var in producers:
                fed.append(var)
                if producers[var] == number:  # only a variable that exists can be read by the call that writes it
                    to_create.append(var)
        self._hold_gets()
        if preallocate and fed:
            to_create += [var for var in dict.fromkeys([*fed, *(get.var for get in self._gets)]) if var in producers]
        self._to_create = list(dict.fromkeys(to_create))
        for var in self._to_create:
            if var in producers:  # its call names the variable, so it needs the id
                self._hold_until_id(self._first_call + producers[var], var)
        for number, source in enumerate(self.program.sets):
            self._hold_until_id(number, source.var)

    def start(self, now: float) -> list[Action]:
        self.started_s = now
        return [Open(self.program.tenant)]

    def _hold_until_id(self, node: int, var: str) -> None:
        self._blocked[node] += 1
        self._on_id.setdefault(var, []).append(node)

    def _advance(self, action: Action, answer: Any, now: float, out: list[Action]) -> None:
        if isinstance(action, Fetch):
            if self._is_late(action.get, now):
                out.append(Close())
                return
            self._left -= 1
            self._get_returned(action.get, now, out)
        elif isinstance(action, Submit):
            self._left -= 1
            place = 0
            for piece in action.pieces:
                if isinstance(piece, Into):
                    self._identified(piece.name, answer[place], now, out)
                    place += 1
        elif isinstance(action, Create):
            self._identified(action.var, answer, now, out)
        elif isinstance(action, Assign):
            self._left -= 1
        else:
            out += [Create(var) for var in self._to_create]
            self._begin(now, out)
        if not self._left and self.ended_s is None:
            self.ended_s = self._returned_s if self.returned else now
            out.append(Close())

    def _identified(self, var: str, var_id: str, now: float, out: list[Action]) -> None:
        if var not in self._ids:
            self._ids[var] = var_id
            nodes = self._on_id.get(var)
            if nodes is not None:
                self._unblock(nodes, now, out)

    def _release(self, node: int, now: float, out: list[Action]) -> None:
        if node >= self._first_get:
            number = node - self._first_get
            get = self._gets[number]
            self.issued[number] = now
            deadline_s = None if get.deadline_s is None else max(self._left_s(number, now) or 0.0, 0.0)
            out.append(Fetch(number, self._ids[get.var], get.criteria, deadline_s))
        elif node >= self._first_call:
            number = node - self._first_call
            call = self._calls[number]
            out.append(Submit(number, call, tuple(self._pieces(call))))
        else:
            source = self.program.sets[node]
            out.append(Assign(self._ids[source.var], Value(source.key, source.tokens)))

    def _pieces(self, call: Call) -> list[Piece]:
        pieces: list[Piece] = []
        for segment in call.segments:
            if type(segment) is _TEXT:
                if segment.tokens:
                    pieces.append(segment)
            elif type(segment) is _READ:
                pieces.append(Reference(segment.var, self._ids[segment.var]))
            else:
                assert type(segment) is _WRITE
                pieces.append(self._into(segment, self._ids.get(segment.var)))
        return pieces

    def _leave(self, failed: Action) -> list[Action]:
        if isinstance(failed, Open):
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
        out: list[Action] = []
        self._begin(now, out)
        return out

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

    def _advance(self, action: Action, answer: Any, now: float, out: list[Action]) -> None:
        assert isinstance(action, Complete)
        var = _writes(action.spec)[action.output].var
        self._values[var] = answer
        if action.output + 1 < self._wanted[action.call]:
            out.append(self._request(action.call, action.output + 1, now))
        self._unblock(self._on_value.get(var, ()), now, out)

    def _release(self, node: int, now: float, out: list[Action]) -> None:
        step = self._steps[node]
        if type(step) is Get:
            number = node - self._first_get
            self.issued[number] = now
            if self._is_late(number, now):
                self.ended = True
                return
            self._gets_left -= 1
            if self._gets_left == 0:
                self.ended_s = now
                self.ended = True
            self._get_returned(number, now, out)
        elif type(step) is Call:
            number = node - self._first_call
            if self._wanted[number]:
                out.append(self._request(number, 0, now))
        else:
            assert type(step) is Set
            self._values[step.var] = Value(step.key, step.tokens)
            self._unblock(self._on_value.get(step.var, ()), now, out)

    def _request(self, number: int, output: int, now: float) -> Complete:
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
        return Complete(number, output, call, self._tenant, tuple(pieces), criteria, self._deadline_s(write.var, now))

    def _deadline_s(self, var: str, now: float) -> float | None:
        """Seconds until nobody can use the variable any more: to the latest deadline of its gets, if all have one."""
        latest: float | None = None
        for number, get in enumerate(self.program.gets):
            if get.var == var:
                left_s = self._left_s(number, now)
                if left_s is None:
                    return None
                latest = max(latest or 0.0, left_s)
        return latest

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
