"""Whether a workload fits a cluster: each call has an engine of its model, with room for its prompt and one token more, and a
session has room for what its program submits before anything in it is wanted.

Decides what is refused before a run starts; nothing is changed on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from parrot.configuration import ConfigurationError
from sim.engine_models import EngineModel
from sim.model_types import ModelTypes, serves
from sim.workloads.kinds import place_of
from sim.workloads.program import Call, Program, Read, Text, Write


def check_programs(
    programs: Iterator[Program], engines: Sequence[EngineModel], workload: str, most_tasks: int | None = None
) -> Iterator[Program]:
    """Passes `programs` on. Raises ConfigurationError for one that cannot run: its model, its longest prompt, its tasks.

    workload: what `programs` are, from its first one, for messages.
    most_tasks: unfinished tasks that a session may have; None: no program is one session (mode `request`), or it is not known.
    """
    longest: dict[tuple[tuple[str, ...], str | None], int] = {}
    types = ModelTypes(engine.description for engine in engines)
    for place, program in enumerate(programs):
        lengths: dict[str, int] | None = None
        try:
            for number, call in enumerate(program.calls):
                room = longest.get((call.models, call.model_type))
                if room is None:
                    room = longest[call.models, call.model_type] = _room(engines, call.models, types.of(call))
                if len(call.segments) == 2:  # a prompt and its answer, as in most of a large trace: nothing to add up
                    prompt, answer = call.segments
                    if type(prompt) is Text and type(answer) is Write and prompt.tokens < room:
                        continue
                if room < 0:
                    raise _Misfit(f", call {number}: {_no_engine_for(call, engines)}")
                if lengths is None:
                    lengths = {source.var: source.tokens for source in program.sets}
                    lengths |= {s.var: s.tokens for c in program.calls for s in c.segments if type(s) is Write}
                needed = _prompt_tokens(call, number, lengths)
                if needed + 1 > room:
                    most = f"the largest engine takes {room} with at least one generated"
                    raise _Misfit(f", call {number}: its prompt has {needed} tokens; {most}")
            if most_tasks is not None and (len(program.calls) > 1 or lengths is not None):
                _check_tasks(program, most_tasks)
        except _Misfit as misfit:
            raise ConfigurationError(f"{place_of(workload, place)}: program {program.id!r}{misfit}") from None
        yield program


class _Misfit(Exception):
    """Why a program cannot run. The message goes on behind the program's name."""


def _no_engine_for(call: Call, engines: Sequence[EngineModel]) -> str:
    kinds = {"token_id": "an engine of this project", "text": "an engine behind a remote endpoint"}
    have = ", ".join(sorted({engine.description.model for engine in engines}))
    kind = "" if call.model_type is None else f" of model_type {call.model_type} ({kinds[call.model_type]})"
    return f"needs model {' or '.join(call.models) or 'any'}{kind}, which no engine has (they have: {have})"


def _check_tasks(program: Program, most: int) -> None:
    """Raises _Misfit for a call that no session has room for, and for a program whose session is full before one of
    its gets has a variable: nothing in it is wanted then, so that nothing runs and nothing ends. Calls are submitted in the
    order of the file; those that wait for a get are not yet, and of those that wait for a time nothing is said."""
    if sum(len(call.segments) for call in program.calls) <= most:
        return
    written = [[segment.var for segment in call.segments if type(segment) is Write] for call in program.calls]
    for number, outputs in enumerate(written):
        if len(outputs) > most:
            raise _Misfit(f", call {number}: has {len(outputs)} outputs; max_tasks_per_session is {most}")
    fetched = {get.var for get in program.gets if all(edge.get is None for edge in get.after)}
    tasks = 0
    for call, outputs in zip(program.calls, written, strict=True):
        if any(edge.get is not None for edge in call.after):
            continue
        if call.after:
            return
        tasks += len(outputs)
        if tasks > most:
            raise _Misfit(f": submits more than {most} tasks, which is max_tasks_per_session, before the first that is fetched")
        if not fetched.isdisjoint(outputs):
            return


def _room(engines: Sequence[EngineModel], models: tuple[str, ...], model_type: str) -> int:
    rooms = [e.limits.largest_task for e in engines if serves(e.description, models, model_type)]
    return max(rooms, default=-1)


def _prompt_tokens(call: Call, number: int, lengths: dict[str, int]) -> int:
    """Tokens in front of the last output of `call`, which has that number. Raises _Misfit."""
    total = last = 0
    written: set[str] = set()
    own = {s.var for s in call.segments if type(s) is Write}
    for segment in call.segments:
        if type(segment) is Text:
            total += segment.tokens
        elif type(segment) is Read:
            if segment.var in own and segment.var not in written:
                raise _Misfit(f", call {number}: reads its own output {segment.var!r} before it is written")
            total += lengths[segment.var]
        elif type(segment) is Write:
            last = total
            total += segment.tokens
            written.add(segment.var)
    return last
