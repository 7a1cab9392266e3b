"""What a submitted call must be before it changes anything, and which variables it gets. All of it is refused, or none.

It decides nothing about when the call runs. The template's own rules are checked before, at the server's edge.
"""

from __future__ import annotations

from typing import Final, Protocol

from parrot.protocol.errors import ParrotError
from parrot.serve import events as ev
from parrot.serve.config import ServeCoreConfig
from parrot.serve.graph import depends_on
from parrot.serve.sessions import Session
from parrot.serve.states import VARIABLE
from parrot.serve.variables import Variable

# By names of this module's own that never change: the compiled module need not look up what each segment is.
_INPUT: Final = ev.Input
_OUTPUT: Final = ev.Output
_SET: Final = VARIABLE.of("set")


class Room(Protocol):
    """What the scheduler says of the queue."""

    @property
    def waiting(self) -> int: ...

    def room_after_s(self, now: float, wanted: int) -> int: ...


def check_form(event: ev.SubmitCall) -> int:
    """How many outputs the call has. Raises bad_template."""
    outputs = 0
    segments = event.segments
    for segment in segments:
        if type(segment) is _OUTPUT:
            outputs += 1
    if not outputs:
        raise ParrotError("bad_template", "the call has no output")
    if type(segments[0]) is _OUTPUT:
        raise ParrotError("bad_template", "the call has an output before any text")
    return outputs


def check_room(session: Session, outputs: int, config: ServeCoreConfig, room: Room, now: float) -> None:
    """Raises queue_full for a session that would begin anew, too_many_tasks for one that has too many."""
    most = config.max_tasks_per_session
    if outputs > most:
        raise ParrotError("bad_template", f"the call has {outputs} outputs; max_tasks_per_session allows {most}")
    if session.unfinished == 0:
        queued, limit = room.waiting, config.global_scheduler.max_queue_size
        if queued >= limit:
            raise ParrotError(
                "queue_full",
                f"{queued} tasks wait for an engine; max_queue_size is {limit}",
                retry_after_s=room.room_after_s(now, queued - limit + 1),
            )
        session.account.check_queue(now)
    elif session.unfinished + outputs > most:
        raise ParrotError(
            "too_many_tasks",
            f"session {session.id} has {session.unfinished} unfinished tasks; max_tasks_per_session is {most}",
            retry_after_s=room.room_after_s(now, session.unfinished + outputs - most),
        )


def check_variables(session: Session, event: ev.SubmitCall) -> None:
    """Raises not_found, conflict or cyclic_dependency; nothing is changed yet."""
    inputs: list[tuple[int, Variable]] = []  # with the number of the call's task that reads it
    outputs: dict[Variable, int] = {}  # the number of the task that writes it
    number = 0
    for segment in event.segments:
        if type(segment) is _INPUT:
            if segment.var_id is not None:
                inputs.append((number, session.variable(segment.var_id)))
        elif type(segment) is _OUTPUT:
            if segment.var_id is not None:
                variable = session.variable(segment.var_id)
                if variable.state != "empty" or variable in outputs:
                    raise ParrotError(
                        "conflict",
                        f"output {segment.name!r}: variable {segment.var_id!r} already has a producer or a content",
                        var_id=segment.var_id,
                    )
                outputs[variable] = number
            number += 1
    if not outputs:
        return  # whoever would wait for an output of this call must know its variable
    # A task may read what an earlier task of its call writes. Only what has a reader, or is read here, can be waited for.
    read = {variable for _, variable in inputs}
    if not any(variable.consumers or variable in read for variable in outputs):
        return
    for reader in dict.fromkeys(number for number, _ in inputs):
        targets = [variable for variable, writer in outputs.items() if writer >= reader]
        needed = [variable for number, variable in inputs if number == reader]
        if targets and depends_on(needed, set(targets)):
            raise _cyclic(event, needed, targets)


def _cyclic(event: ev.SubmitCall, needed: list[Variable], targets: list[Variable]) -> ParrotError:
    """The refusal of a call that waits for itself: what computing one of `needed` needs is among its outputs, `targets`."""
    source, target = next((source, target) for source in needed for target in targets if depends_on([source], {target}))
    names = {(type(s), s.var_id): s.name for s in event.segments if type(s) is _INPUT or type(s) is _OUTPUT}
    call = f"call {event.func_name!r}" if event.func_name else "the call"
    output = f"{names[ev.Output, target.id]!r} (variable {target.id!r})"
    way = "is that variable" if source is target else f"(variable {source.id!r}) is computed from it"
    return ParrotError(
        "cyclic_dependency",
        f"{call} would wait for its own output {output}: its input {names[ev.Input, source.id]!r} {way}; "
        "the output needs another variable",
        var_id=target.id,
    )


def bind(session: Session, event: ev.SubmitCall) -> tuple[Variable | None, ...]:
    """The variable of each segment; values and new outputs get variables of their own."""
    bound: list[Variable | None] = []
    values: dict[str, Variable] = {}
    for segment in event.segments:
        if type(segment) is _INPUT or type(segment) is _OUTPUT:
            var_id, name = segment.var_id, segment.name
            if var_id is not None:
                variable = session.variable(var_id)
            elif name in values:
                variable = values[name]
            else:
                variable = values[name] = session.new_variable(name)
                if type(segment) is _INPUT:
                    variable.state = _SET[variable.state]
                    variable.content = segment.value
            bound.append(variable)
        else:
            bound.append(None)
    return tuple(bound)
