"""Whether a workload fits a cluster: each call has an engine of its model, with room for its prompt and one token more.

Decides what is refused before a run starts; nothing is changed on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from parrot.configuration import ConfigurationError
from sim.cluster import EngineModel
from sim.workloads.program import Call, Program, Read, Text, Write


def check_programs(programs: Iterator[Program], engines: Sequence[EngineModel], workload: str) -> Iterator[Program]:
    """Passes `programs` on. Raises ConfigurationError for one that no engine can run: its model, or the longest prompt."""
    longest: dict[tuple[str, ...], int] = {}
    for program in programs:
        lengths = {source.var: source.tokens for source in program.sets}
        lengths |= {s.var: s.tokens for call in program.calls for s in call.segments if type(s) is Write}
        for number, call in enumerate(program.calls):
            room = longest.get(call.models)
            if room is None:
                room = longest[call.models] = _room(engines, call.models)
            where = f"{workload}: program {program.id!r}, call {number}"
            if room < 0:
                have = ", ".join(sorted({engine.description.model for engine in engines}))
                wanted = " or ".join(call.models)
                raise ConfigurationError(f"{where}: needs model {wanted}, which no engine has (they have: {have})")
            needed = _prompt_tokens(call, lengths, where)
            if needed + 1 > room:
                raise ConfigurationError(
                    f"{where}: its prompt has {needed} tokens; the largest engine takes {room} with at least one generated"
                )
        yield program


def _room(engines: Sequence[EngineModel], models: tuple[str, ...]) -> int:
    rooms = [e.limits.largest_task for e in engines if not models or e.description.model in models]
    return max(rooms, default=-1)


def _prompt_tokens(call: Call, lengths: dict[str, int], where: str) -> int:
    """Tokens in front of the call's last output."""
    total = last = 0
    written: set[str] = set()
    own = {s.var for s in call.segments if type(s) is Write}
    for segment in call.segments:
        if type(segment) is Text:
            total += segment.tokens
        elif type(segment) is Read:
            if segment.var in own and segment.var not in written:
                raise ConfigurationError(f"{where}: reads its own output {segment.var!r} before it is written")
            total += lengths[segment.var]
        elif type(segment) is Write:
            last = total
            total += segment.tokens
            written.add(segment.var)
    return last
