"""What a program's client can do, as data: the requests of `sim.clients`, and the pieces of the prompts in them.

Each action says in its first line what is asked for and which answer its player wants. Nothing here decides anything.
"""

from __future__ import annotations

from mypy_extensions import mypyc_attr

from parrot.protocol.api import Criteria
from sim.workloads.program import Call, Text


@mypyc_attr(acyclic=True)
class Value:
    """A text at the client: its key and tokens, and the text itself where there is one (over HTTP)."""

    __slots__ = ("key", "text", "tokens")

    def __init__(self, key: str, tokens: int, text: str | None = None) -> None:
        self.key = key
        self.tokens = tokens
        self.text = text


# --------------------------------------------------------------------------------------------------------- pieces of a prompt


@mypyc_attr(acyclic=True)
class Given:
    """A value that the client fills in."""

    __slots__ = ("name", "value")

    def __init__(self, name: str, value: Value) -> None:
        self.name = name
        self.value = value


@mypyc_attr(acyclic=True)
class Reference:
    """The content of a variable that the core knows."""

    __slots__ = ("name", "var_id")

    def __init__(self, name: str, var_id: str) -> None:
        self.name = name
        self.var_id = var_id


@mypyc_attr(acyclic=True)
class Into:
    """An output, into a preallocated variable or (`var_id` None) a new one. Lengths are tokens."""

    __slots__ = ("max_gen_length", "name", "output_length", "var_id")

    def __init__(self, name: str, output_length: int, max_gen_length: int, var_id: str | None = None) -> None:
        self.name = name
        self.output_length = output_length
        self.max_gen_length = max_gen_length
        self.var_id = var_id


Piece = Text | Given | Reference | Into

# ------------------------------------------------------------------------------------------------- actions, and their answers


@mypyc_attr(acyclic=True)
class Open:
    """Open the session. Answer: None."""

    __slots__ = ("tenant",)

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant


@mypyc_attr(acyclic=True)
class Create:
    """Create a variable. Answer: its id."""

    __slots__ = ("var",)

    def __init__(self, var: str) -> None:
        self.var = var


@mypyc_attr(acyclic=True)
class Assign:
    """Give the variable `var_id` a content. Answer: None."""

    __slots__ = ("value", "var_id")

    def __init__(self, var_id: str, value: Value) -> None:
        self.var_id = var_id
        self.value = value


@mypyc_attr(acyclic=True)
class Submit:
    """Submit call number `call` of the program. Answer: the ids of its outputs, in order."""

    __slots__ = ("call", "pieces", "spec")

    def __init__(self, call: int, spec: Call, pieces: tuple[Piece, ...]) -> None:
        self.call = call
        self.spec = spec
        self.pieces = pieces


@mypyc_attr(acyclic=True)
class Fetch:
    """Wait for a variable's content. `deadline_s`: seconds from now. Answer: its Value."""

    __slots__ = ("criteria", "deadline_s", "get", "var_id")

    def __init__(self, get: int, var_id: str, criteria: Criteria, deadline_s: float | None = None) -> None:
        self.get = get
        self.var_id = var_id
        self.criteria = criteria
        self.deadline_s = deadline_s


@mypyc_attr(acyclic=True)
class Complete:
    """One request of the baseline: open a session, submit, get, close; one round trip in all. Answer: the Value.

    `output`: which output of call number `call` it is. `deadline_s`: seconds from now.
    """

    __slots__ = ("call", "criteria", "deadline_s", "output", "pieces", "spec", "tenant")

    def __init__(
        self,
        call: int,
        output: int,
        spec: Call,
        tenant: str,
        pieces: tuple[Piece, ...],
        criteria: Criteria,
        deadline_s: float | None = None,
    ) -> None:
        self.call = call
        self.output = output
        self.spec = spec
        self.tenant = tenant
        self.pieces = pieces
        self.criteria = criteria
        self.deadline_s = deadline_s


@mypyc_attr(acyclic=True)
class Close:
    """Close the session. Answer: None."""

    __slots__ = ()


@mypyc_attr(acyclic=True)
class Wait:
    """Let `delay_s` pass. Answer: None. Then `then` is tried again, or the steps `nodes` lose one of their edges."""

    __slots__ = ("delay_s", "nodes", "then")

    def __init__(self, delay_s: float, then: Action | None = None, nodes: tuple[int, ...] = ()) -> None:
        self.delay_s = delay_s
        self.then = then
        self.nodes = nodes


Action = Open | Create | Assign | Submit | Fetch | Complete | Close | Wait
