"""What a program's client can do, as data: the requests of `sim.clients`, and the pieces of the prompts in them.

Each action says in its first line what is asked for and which answer its player wants. Nothing here decides anything.
"""

from __future__ import annotations

from typing import Any

import msgspec

from parrot.protocol.api import Criteria
from sim.workloads.program import Call, Text


class Value(msgspec.Struct, frozen=True, gc=False):
    """A text at the client: its key and tokens, and the text itself where there is one (over HTTP)."""

    key: str
    tokens: int
    text: str | None = None


# ---------------------------------------------------------------------------------------------- pieces of a prompt


class Given(msgspec.Struct, frozen=True, gc=False):
    """A value that the client fills in."""

    name: str
    value: Value


class Reference(msgspec.Struct, frozen=True, gc=False):
    """The content of a variable that the core knows."""

    name: str
    var_id: str


class Into(msgspec.Struct, frozen=True, gc=False):
    """An output, into a preallocated variable or (`var_id` None) a new one. Lengths are tokens."""

    name: str
    key: str
    output_length: int
    max_gen_length: int
    var_id: str | None = None


Piece = Text | Given | Reference | Into


# --------------------------------------------------------------------------------------- actions, and their answers


class Open(msgspec.Struct, frozen=True, gc=False):
    """Open the session. Answer: None."""

    tenant: str


class Create(msgspec.Struct, frozen=True, gc=False):
    """Create a variable. Answer: its id."""

    var: str


class Assign(msgspec.Struct, frozen=True, gc=False):
    """Give the variable `var_id` a content. Answer: None."""

    var_id: str
    value: Value


class Submit(msgspec.Struct, frozen=True, gc=False):
    """Submit call number `call` of the program. Answer: the ids of its outputs, in order."""

    call: int
    spec: Call
    pieces: tuple[Piece, ...]


class Fetch(msgspec.Struct, frozen=True, gc=False):
    """Wait for a variable's content. `deadline_s`: seconds from now. Answer: its Value."""

    get: int
    var_id: str
    criteria: Criteria
    deadline_s: float | None = None


class Complete(msgspec.Struct, frozen=True, gc=False):
    """One request of the baseline: open a session, submit, get, close; one round trip in all. Answer: the Value.

    `output`: which output of call number `call` it is. `deadline_s`: seconds from now."""

    call: int
    output: int
    spec: Call
    tenant: str
    pieces: tuple[Piece, ...]
    criteria: Criteria
    deadline_s: float | None = None


class Close(msgspec.Struct, frozen=True, gc=False):
    """Close the session. Answer: None."""


class Wait(msgspec.Struct, frozen=True, gc=False):
    """Let `delay_s` pass. Answer: None. Then `then` is tried again, or the steps `nodes` lose one of their edges."""

    delay_s: float
    then: Any = None
    nodes: tuple[int, ...] = ()


Action = Open | Create | Assign | Submit | Fetch | Complete | Close | Wait
