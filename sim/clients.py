"""What the client of a program does: a state machine from a program and a mode to requests, fed with their answers.

It decides which request goes out when; it never sends one, waits or reads a clock: two shells do, SimPy's in
`sim.conversation` and asyncio's over HTTP in `sim.http_client`. A shell calls `start`, carries out the actions that it gets,
and hands each of them back with its answer, which gives the next actions; `ended` says when there are no more.

semantic (`sim.semantic_player`): one session, whose variables the core keeps.
request (`sim.request_player`): the baseline, a client that knows no semantic variables.
"""

from __future__ import annotations

import enum

from sim.player import Player
from sim.request_player import RequestPlayer
from sim.semantic_player import SemanticPlayer
from sim.workloads.program import Program


class Mode(enum.StrEnum):
    SEMANTIC = "semantic"
    REQUEST = "request"


def new_player(program: Program, mode: Mode, *, serial: int, max_gen_length: int, preallocate: bool) -> Player:
    """The player of `program` in `mode`. `preallocate`: the core is a network away (see the module's text)."""
    if mode is Mode.SEMANTIC:
        return SemanticPlayer(program, serial, max_gen_length, preallocate)
    return RequestPlayer(program, serial, max_gen_length)
