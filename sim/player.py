"""A program as its client plays it, as far as both modes have it in common (`sim.clients`): the life of a program from its
first request to its end, failure and refusals; what holds its steps back; the times of its gets, and their deadlines.

It never decides which request stands for a step that nothing holds back any more, nor what an answer to one means: a mode does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from mypy_extensions import mypyc_attr

from parrot.protocol.errors import ErrorInfo
from sim.actions import Action, Close, Into, Wait
from sim.steps import Steps
from sim.workloads.program import Program, Write

_NOT_YET: Final = -1.0  #: in the place of a time that has not come
_ROUNDING_S: Final = 1e-9  #: an answer at the deadline itself is in time, however its moment was added up

_ISSUED: Final = 0
_RETURNED: Final = 1

_WRITE: Final = Write  # by a name that never changes: the compiled module need not look up what each segment is


@mypyc_attr(acyclic=True)
class Player:
    """Plays one program; what is a mode's own, its subclass of that mode does.

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
        # The times of the first get, which for most programs is all, and of the others, two a get from the first on.
        self._issued_s = _NOT_YET
        self._returned_s = _NOT_YET
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

    # --------------------------------------------------------------------------------------- what is a mode's own

    def _advance(self, action: Action, answer: Any, now: float, out: list[Action]) -> None:
        """`action` gave `answer`: what follows goes to `out`."""
        raise NotImplementedError

    def _release(self, steps: Steps, node: int, now: float, out: list[Action]) -> None:
        """Nothing holds step `node` back any more."""
        raise NotImplementedError

    def _leave(self, failed: Action) -> list[Action]:
        """What is left to do after `failed` failed the program."""
        raise NotImplementedError

    # ----------------------------------------------------------------------------- for the modes: steps, gets, deadlines

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

    def _get_issued(self, number: int, now: float) -> None:
        self._note(number, _ISSUED, now)

    def _get_returned(self, number: int, now: float, out: list[Action]) -> None:
        self._note(number, _RETURNED, now)
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
                self._times = [_NOT_YET] * (2 * len(self.program.gets))
            self._times[2 * number + which] = now
        elif which == _ISSUED:
            self._issued_s = now
        else:
            self._returned_s = now

    def _time(self, number: int, which: int) -> float | None:
        time_s = self._issued_s if which == _ISSUED else self._returned_s
        if number:
            time_s = _NOT_YET if self._times is None else self._times[2 * number + which]
        return None if time_s == _NOT_YET else time_s

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
