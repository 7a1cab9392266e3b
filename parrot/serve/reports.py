"""What a ServeCore tells of its calls and sessions: answers, reports, derived errors. Pure functions of its data."""

from __future__ import annotations

from typing import Final

from parrot.protocol.api import CallAnswer, CallReport, ParamInfo, SessionReport, TaskReport, Usage
from parrot.protocol.errors import ErrorInfo
from parrot.serve import events as ev
from parrot.serve.graph import Call
from parrot.serve.sessions import Session
from parrot.serve.variables import Variable

# By names of this module's own that never change: the compiled module need not look them up.
_INPUT: Final = ev.Input
_OUTPUT: Final = ev.Output
_CALL_ANSWER: Final = CallAnswer
_PARAM_INFO: Final = ParamInfo


def input_failed(variable: Variable, error: ErrorInfo) -> ErrorInfo:
    """Why a task fails that reads `variable`: the first cause is kept, unchanged, through any number of steps."""
    if error.code == "input_failed":
        return error
    details = {"cause": error.code, "variable": variable.id}
    return ErrorInfo("input_failed", f"input {variable.id!r} failed: {error.message}", details)


def call_answer(call: Call) -> CallAnswer:
    infos: list[ParamInfo] = []
    for place, variable in enumerate(call.variables):
        segment = call.segments[place]
        if variable is not None and (type(segment) is _INPUT or type(segment) is _OUTPUT):
            name = segment.name
            is_output = type(segment) is _OUTPUT
            infos.append(_PARAM_INFO(name, name, is_output, variable.name, variable.id, "", call.func_name))
    return _CALL_ANSWER(call.number, call.session.id, tuple(infos))


def session_report(session: Session, now: float, calls: bool, numbers: tuple[int, ...] | None = None) -> SessionReport:
    """`calls`: with reports of its calls, of those with these `numbers` when they are given (unknown ones are left out)."""
    reported = session.calls
    if numbers is not None:
        reported = [reported[number] for number in numbers if 0 <= number < len(reported)]
    call_states: dict[str, int] = {}
    for call in session.calls:
        state = call.state
        call_states[state] = call_states.get(state, 0) + 1
    variable_states: dict[str, int] = {}
    for variable in session.all_variables:
        variable_states[variable.state] = variable_states.get(variable.state, 0) + 1
    return SessionReport(
        session_id=session.id,
        state=session.state,
        calls=call_states,
        variables=variable_states,
        age_s=now - session.opened_s,
        idle_s=0.0 if session.busy else now - session.last_access_s,
        usage=_usage(session),
        reports=tuple(call_report(call) for call in reported) if calls else None,
    )


def _usage(session: Session) -> Usage:
    prompt_tokens = cached_tokens = output_tokens = 0
    cost = 0.0
    for call in session.calls:
        for task in call.tasks:
            prompt_tokens += task.prompt_tokens
            cached_tokens += task.cached_tokens
            output_tokens += task.output_tokens
            cost += task.cost
    return Usage(prompt_tokens, cached_tokens, output_tokens, cost)


def call_report(call: Call) -> CallReport:
    tasks = tuple(
        TaskReport(
            var_id=task.output.id,
            state=task.state,
            attempts=task.attempt,
            engine=task.engine_name,
            criteria=task.criteria.value if task.criteria is not None else None,
            depth=task.depth,
            deadline_s=task.deadline_s,
            ready_s=task.ready_s,
            dispatched_s=task.dispatched_s,
            started_s=task.started_s,
            first_token_s=task.first_token_s,
            finished_s=task.finished_s,
            prompt_tokens=task.prompt_tokens,
            cached_tokens=task.cached_tokens,
            output_tokens=task.output_tokens,
            decode_s=task.decode_s,
            max_gap_s=task.max_gap_s,
            cost=task.cost,
            reason=task.reason,
        )
        for task in call.tasks
    )
    return CallReport(call.number, call.func_name, call.state, call.submitted_s, tasks)
