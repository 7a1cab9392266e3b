"""The client of semantic variables: opens one session and submits what is known in the order of the file; a get goes out as
soon as its edges allow and its variable has an id, and the session closes after the last one. The core keeps the variables and
runs the DAG.

When the core is far away (`preallocate`) and calls feed calls, the variables between them are created first, all at once: then
no call waits for another's answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mypy_extensions import mypyc_attr

from sim.actions import Action, Assign, Close, Create, Fetch, Into, Open, Piece, Reference, Submit, Value
from sim.player import Player
from sim.steps import Steps, is_plain, session_steps
from sim.workloads.program import Call, Program, Read, Text, Write

_NO_GET: Final = -1.0  # in the place of the moment at which a get was last answered

# By names of this module's own that never change: the compiled module need not look up what each segment is.
_TEXT: Final = Text
_READ: Final = Read
_WRITE: Final = Write


@mypyc_attr(acyclic=True)
class SemanticPlayer(Player):
    """One session; the core keeps the variables and runs the DAG."""

    def __init__(self, program: Program, serial: int, max_gen_length: int, preallocate: bool = False) -> None:
        steps = None if is_plain(program) else session_steps(program, preallocate)
        super().__init__(program, serial, max_gen_length, steps)
        self._plain = steps is None
        self._left = len(program.sets) + len(program.calls) + len(program.gets)  # steps that are not done
        self._last_returned_s = _NO_GET

    def start(self, now: float) -> list[Action]:
        self.started_s = now
        return [Open(self.program.tenant)]

    def _advance(self, action: Action, answer: Any, now: float, out: list[Action]) -> None:
        if isinstance(action, Fetch):
            if self._is_late(action.get, now):
                out.append(Close())
                return
            self._left -= 1
            self._last_returned_s = now
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
            self.ended_s = self._last_returned_s if self._last_returned_s != _NO_GET else now
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
        self._get_issued(number, now)
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
