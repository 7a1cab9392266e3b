"""The steps of a program that have not gone out yet, and what holds each of them back. Steps are sets, then calls, then gets,
numbered in the order of the file.

It counts; what a step is once nothing holds it back is its player's affair (`sim.player`), and so is what lets it go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mypy_extensions import mypyc_attr

from sim.workloads.program import Call, Get, Program, Read, Set, Write

# By names of this module's own that never change: the compiled module need not look up what each segment is.
_READ: Final = Read
_WRITE: Final = Write


@mypyc_attr(acyclic=True)
class Steps:
    """`steps`: all of them. `blocked`: for each, how many things hold it back. `left`: how many have not gone out.

    `on_get`: get -> who waits for it, and for how many seconds after it. `on_var`: variable -> who waits until the client can
    name it (`semantic`: by its id) or has its value (`request`). `ids`: variable -> its id, as far as there are any.
    `to_create`: the variables to be created before anything else.
    """

    __slots__ = ("blocked", "first_call", "first_get", "ids", "left", "on_get", "on_var", "steps", "to_create")

    def __init__(self, program: Program) -> None:
        sets, calls, gets = program.sets, program.calls, program.gets
        self.first_call = len(sets)
        self.first_get = self.first_call + len(calls)
        self.steps: tuple[Set | Call | Get, ...] = sets + calls + gets
        self.blocked = [len(step.after) for step in self.steps]
        self.left = len(self.steps)
        self.on_get: dict[str, list[tuple[int, float]]] | None = None
        self.on_var: dict[str, list[int]] = {}
        self.ids: dict[str, str] = {}
        self.to_create: Sequence[str] = ()
        if any(self.blocked):
            self.on_get = {}
            for node, step in enumerate(self.steps):
                for edge in step.after:
                    if edge.get is not None:
                        self.on_get.setdefault(edge.get, []).append((node, edge.delay_s))

    def hold(self, node: int, var: str) -> None:
        """Step `node` waits for the variable too."""
        self.blocked[node] += 1
        waiting = self.on_var.get(var)
        if waiting is None:
            self.on_var[var] = [node]
        else:
            waiting.append(node)

    def name(self, node: int) -> str:
        """The step, for a person to read."""
        step = self.steps[node]
        if isinstance(step, Set):
            return f"set of {step.var!r}"
        if isinstance(step, Call):
            return f"call {node - self.first_call} ({step.name!r})"
        return f"get {step.id!r}"


def is_plain(program: Program) -> bool:
    """Whether the program is one call that nothing holds back, and gets of its outputs, as most are: it needs no `Steps`."""
    if program.sets or len(program.calls) != 1 or program.calls[0].after:
        return False
    for get in program.gets:
        if get.after:
            return False
    for segment in program.calls[0].segments:  # noqa: SIM110  compiled, `all` makes a list first
        if type(segment) is _READ:
            return False
    return True


def session_steps(program: Program, preallocate: bool) -> Steps:
    """The steps of a client whose variables are the core's: what reads, gets or gives a variable waits for its id.

    preallocate: the core is far away, and variables between calls are created first.
    """
    steps = Steps(program)
    reads: list[tuple[int, str]] = []
    producers: dict[str, int] = {}
    for number, call in enumerate(program.calls):
        for segment in call.segments:
            if type(segment) is _READ:
                reads.append((number, segment.var))
            elif type(segment) is _WRITE:
                producers[segment.var] = number
    to_create = [source.var for source in program.sets]
    fed: list[str] = []
    for number, var in dict.fromkeys(reads):
        steps.hold(steps.first_call + number, var)
        if var in producers:
            fed.append(var)
            if producers[var] == number:  # only a variable that exists can be read by the call that writes it
                to_create.append(var)
    for number, get in enumerate(program.gets):
        steps.hold(steps.first_get + number, get.var)
    if preallocate and fed:
        to_create += [var for var in dict.fromkeys([*fed, *(get.var for get in program.gets)]) if var in producers]
    steps.to_create = list(dict.fromkeys(to_create))
    for var in steps.to_create:
        if var in producers:  # its call names the variable, so it needs the id
            steps.hold(steps.first_call + producers[var], var)
    for number, source in enumerate(program.sets):
        steps.hold(number, source.var)
    return steps
