"""The baseline, a client that knows no semantic variables: each output is a request of its own with all values filled in, sent
when the values that it needs have come back to the client. What nobody fetches is never sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mypy_extensions import mypyc_attr

from parrot.protocol.api import Criteria
from sim.actions import Action, Complete, Given, Piece, Value
from sim.player import Player
from sim.steps import Steps
from sim.workloads.program import Call, Get, Program, Read, Set, Text, Write


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

    def waits_for(self) -> str:
        """The outputs that were requested and have not come."""
        steps, asked = self._steps, []
        if steps is not None:
            for number, call in enumerate(self.program.calls):
                missing = [s.var for s in _writes(call)[: self._wanted[number]] if s.var not in self._values]
                if missing and steps.blocked[steps.first_call + number] == 0:
                    asked.append(f"output {missing[0]!r} of {steps.name(steps.first_call + number)}")
        return ", ".join(asked) if asked else super().waits_for()

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
            self._get_issued(number, now)
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
