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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from mypy_extensions import mypyc_attr

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
from sim.steps import Steps, is_plain, session_steps
from sim.workloads.program import Call, Get, Program, Read, Set, Text, Write

NOT_YET: Final = -1.0  #: in the place of a time that has not come
_ROUNDING_S: Final = 1e-9  #: an answer at the deadline itself is in time, however its moment was added up

_ISSUED: Final = 0
_RETURNED: Final = 1

# By names of this module's own that never change: the compiled module need not look up what each segment is.
_TEXT: Final = Text
_READ: Final = Read
_WRITE: Final = Write


class Mode(enum.StrEnum):
    SEMANTIC = "semantic"
    REQUEST = "request"


@mypyc_attr(acyclic=True)
class Player:
    """Plays one program in one mode.

    `serial` makes the keys of generated texts unique in a run; `max_gen_length` stands in for a limit that the program
    does not give (an output that is longer gets its own length).
    """

    def __init__(self, program: Program, serial: int, max_gen_length: int, steps: Steps | None) -> None:
        self.program = program
        self.serial = serial
        self.started_s = 0.0
        self.ended_s: float | None = None  #: when the last get was answered, or the first failure came
        self.ended = False  #: nothing is left to do, the session's close included
        self.error: ErrorInfo | None = None
        self.refusals = 0  #: answers 429, each of which was waited out and tried again
        self._max_gen_length = max_gen_length
        self._steps = steps  # None: nothing is held back, or not any more
        self._left = len(program.sets) + len(program.calls) + len(program.gets)  # steps that are not done
        self._last_returned_s = NOT_YET
        # The times of the first get, which for most programs is all, and of the others, two a get from the first on.
        self._issued_s = NOT_YET
        self._returned_s = NOT_YET
        self._times: list[float] | None = None

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
        gets = self.program.gets
        issued = [n for n in range(len(gets)) if self.issued_s(n) is not None]
        pending = [gets[n] for n in issued if self.returned_s(n) is None]
        if pending:
            return ", ".join([f"get {get.id!r} of variable {get.var!r}" for get in pending])
        steps = self._steps
        blocked = [steps.name(node) for node, count in enumerate(steps.blocked) if count > 0] if steps is not None else []
        return f"the control edges of {', '.join(blocked)}" if blocked else "answers to its requests"

    def issued_s(self, number: int) -> float | None:
        """When get `number` went out (`request`: was due); None: not yet."""
        return self._time(number, _ISSUED)

    def returned_s(self, number: int) -> float | None:
        """When get `number` was answered; None: not yet."""
        return self._time(number, _RETURNED)

    def output_key(self, call: int, output: int) -> str:
        """The content key of what is generated into output `output` of call number `call`."""
        for segment in self.program.calls[call].segments:
            if type(segment) is _WRITE:
                if not output:
                    return segment.key if segment.key is not None else f"{self.serial}/{self.program.id}/{segment.var}"
                output -= 1
        raise IndexError(f"call {call} of program {self.program.id!r} has no such output")

    # ------------------------------------------------------------------------------------------ the two modes

    def _advance(self, action: Action, answer: Any, now: float, out: list[Action]) -> None:
        """`action` gave `answer`: what follows goes to `out`."""
        raise NotImplementedError

    def _release(self, steps: Steps, node: int, now: float, out: list[Action]) -> None:
        """Nothing holds step `node` back any more."""
        raise NotImplementedError

    def _leave(self, failed: Action) -> list[Action]:
        """What is left to do after `failed` failed the program."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- shared

    def _begin(self, steps: Steps, now: float, out: list[Action]) -> None:
        """Releases the steps that nothing holds back and starts the waits that count from the arrival."""
        free = [count == 0 for count in steps.blocked]  # as things stand now: a release may free others, and releases them
        for node, step in enumerate(steps.steps):
            if free[node]:
                self._go(steps, node, now, out)
            elif step.after:
                delays = [edge.delay_s for edge in step.after if edge.get is None]
                if delays:
                    steps.blocked[node] -= len(delays) - 1
                    out.append(Wait(max(self.started_s + max(delays) - now, 0.0), nodes=(node,)))

    def _unblock(self, nodes: Iterable[int], now: float, out: list[Action]) -> None:
        steps = self._steps
        if steps is None:
            return
        blocked = steps.blocked
        for node in nodes:
            blocked[node] -= 1
            if blocked[node] == 0:
                self._go(steps, node, now, out)

    def _go(self, steps: Steps, node: int, now: float, out: list[Action]) -> None:
        steps.left -= 1
        if not steps.left:
            self._steps = None
        self._release(steps, node, now, out)

    def _get_returned(self, number: int, now: float, out: list[Action]) -> None:
        self._note(number, _RETURNED, now)
        self._last_returned_s = now
        steps = self._steps
        if steps is None or steps.on_get is None:
            return
        edges = steps.on_get.get(self.program.gets[number].id)
        if edges is None:
            return
        at_once: list[int] = []
        for node, delay_s in edges:
            if delay_s > 0.0:
                out.append(Wait(delay_s, nodes=(node,)))
            else:
                at_once.append(node)
        self._unblock(sorted(at_once), now, out)

    def _note(self, number: int, which: int, now: float) -> None:
        """Get `number` was issued or answered (`which`)."""
        if number:
            if self._times is None:
                self._times = [NOT_YET] * (2 * len(self.program.gets))
            self._times[2 * number + which] = now
        elif which == _ISSUED:
            self._issued_s = now
        else:
            self._returned_s = now

    def _time(self, number: int, which: int) -> float | None:
        time_s = self._issued_s if which == _ISSUED else self._returned_s
        if number:
            time_s = NOT_YET if self._times is None else self._times[2 * number + which]
        return None if time_s == NOT_YET else time_s

    def _left_s(self, number: int, now: float) -> float | None:
        """Seconds to the deadline of get `number`, below 0 after it; None while it has none, or none that runs yet."""
        get = self.program.gets[number]
        deadline_s = get.deadline_s
        if deadline_s is None:
            return None
        begun_s = self.started_s
        for edge in get.after:
            returned_s = self.started_s if edge.get is None else self.returned_s(self._number_of(edge.get))
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
        return Into(write.var, min(write.tokens, most), most, var_id)


@mypyc_attr(acyclic=True)
class SemanticPlayer(Player):
    """One session; the core keeps the variables and runs the DAG."""

    def __init__(self, program: Program, serial: int, max_gen_length: int, preallocate: bool = False) -> None:
        steps = None if is_plain(program) else session_steps(program, preallocate)
        super().__init__(program, serial, max_gen_length, steps)
        self._plain = steps is None

    def start(self, now: float) -> list[Action]:
        self.started_s = now
        return [Open(self.program.tenant)]

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
        elif self._steps is not None:
            out += [Create(var) for var in self._steps.to_create]
            self._begin(self._steps, now, out)
        else:
            self._submit(0, {}, out)
        if not self._left and self.ended_s is None:
            self.ended_s = self._last_returned_s if self._last_returned_s != NOT_YET else now
            out.append(Close())

    def _identified(self, var: str, var_id: str, now: float, out: list[Action]) -> None:
        steps = self._steps
        if steps is None:
            if self._plain:
                for number, get in enumerate(self.program.gets):
                    if get.var == var:
                        self._fetch(number, var_id, now, out)
        elif var not in steps.ids:
            steps.ids[var] = var_id
            nodes = steps.on_var.get(var)
            if nodes is not None:
                self._unblock(nodes, now, out)

    def _release(self, steps: Steps, node: int, now: float, out: list[Action]) -> None:
        if node >= steps.first_get:
            number = node - steps.first_get
            self._fetch(number, steps.ids[self.program.gets[number].var], now, out)
        elif node >= steps.first_call:
            self._submit(node - steps.first_call, steps.ids, out)
        else:
            source = self.program.sets[node]
            out.append(Assign(steps.ids[source.var], Value(source.key, source.tokens)))

    def _submit(self, number: int, ids: Mapping[str, str], out: list[Action]) -> None:
        call = self.program.calls[number]
        out.append(Submit(number, call, tuple(self._pieces(call, ids))))

    def _fetch(self, number: int, var_id: str, now: float, out: list[Action]) -> None:
        get = self.program.gets[number]
        self._note(number, _ISSUED, now)
        deadline_s = None if get.deadline_s is None else max(self._left_s(number, now) or 0.0, 0.0)
        out.append(Fetch(number, var_id, get.criteria, deadline_s))

    def _pieces(self, call: Call, ids: Mapping[str, str]) -> list[Piece]:
        pieces: list[Piece] = []
        for segment in call.segments:
            if type(segment) is _TEXT:
                if segment.tokens:
                    pieces.append(segment)
            elif type(segment) is _READ:
                pieces.append(Reference(segment.var, ids[segment.var]))
            else:
                assert type(segment) is _WRITE
                pieces.append(self._into(segment, ids.get(segment.var)))
        return pieces

    def _leave(self, failed: Action) -> list[Action]:
        if isinstance(failed, Open):
            self.ended = True
            return []
        return [Close()]


@mypyc_attr(acyclic=True)
class RequestPlayer(Player):
    """The baseline: values travel to the client and back with every request.

    The requests of one program share contexts as those of one client would: the program's tenant, or the program alone.
    """

    def __init__(self, program: Program, serial: int, max_gen_length: int) -> None:
        steps = Steps(program)
        super().__init__(program, serial, max_gen_length, steps)
        self._tenant = program.tenant or f"program/{serial}/{program.id}"
        self._criteria = {get.var: get.criteria for get in reversed(program.gets)}
        self._values: dict[str, Value] = {}
        self._wanted = self._outputs_wanted()
        for number, call in enumerate(program.calls):
            own = {s.var for s in call.segments if type(s) is Write}
            for var in dict.fromkeys(s.var for s in call.segments if type(s) is Read):
                if var not in own:
                    steps.hold(steps.first_call + number, var)
        for number, get in enumerate(program.gets):
            steps.hold(steps.first_get + number, get.var)
        self._gets_left = len(program.gets)

    def start(self, now: float) -> list[Action]:
        self.started_s = now
        self.ended = not self.program.gets
        out: list[Action] = []
        if self._steps is not None:
            self._begin(self._steps, now, out)
        return out

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
        if self._steps is not None:
            self._unblock(self._steps.on_var.get(var, ()), now, out)

    def _release(self, steps: Steps, node: int, now: float, out: list[Action]) -> None:
        step = steps.steps[node]
        if type(step) is Get:
            number = node - steps.first_get
            self._note(number, _ISSUED, now)
            if self._is_late(number, now):
                self.ended = True
                return
            self._gets_left -= 1
            if self._gets_left == 0:
                self.ended_s = now
                self.ended = True
            self._get_returned(number, now, out)
        elif type(step) is Call:
            number = node - steps.first_call
            if self._wanted[number]:
                out.append(self._request(number, 0, now))
        else:
            assert type(step) is Set
            self._values[step.var] = Value(step.key, step.tokens)
            self._unblock(steps.on_var.get(step.var, ()), now, out)

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
