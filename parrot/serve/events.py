"""What can happen to a ServeCore. A shell hands these to `ServeCore.handle`, all of one instant together.

Events are frozen data in one tagged union: any of them can be recorded, sent, or built in a test in one line. They name
text by content key and give its length in tokens under each tokenizer; text itself never enters the core. `request` is
the shell's own number for a request that waits for a `Reply`.
"""

from __future__ import annotations

from typing import final

import msgspec

from parrot.protocol.api import Criteria, SamplingConfig
from parrot.protocol.engine import EngineDescription, TaskId
from parrot.protocol.errors import ErrorInfo


class Event(msgspec.Struct, frozen=True, tag=True, tag_field="type", omit_defaults=True, gc=False):
    """Base of all events."""


class Content(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A piece of text by its hash. `lengths`: tokenizer name -> tokens (no BOS counted)."""

    key: str
    lengths: dict[str, int]


# ------------------------------------------------------------------------------------------------ from clients


class OpenSession(Event, frozen=True, gc=False):
    """`session_id` and the auth were drawn by the shell; only the auth's hash comes here. `tenant`: whose API key it
    is ("": none, the session shares contexts with no other). `ephemeral`: it lives no longer than its client's connection, and
    so ends with the core's life."""

    request: int
    session_id: int
    auth: str
    tenant: str = ""
    idempotency_key: str | None = None
    ephemeral: bool = False


class CloseSession(Event, frozen=True, gc=False):
    request: int
    session_id: int
    auth: str | None


class DescribeSession(Event, frozen=True, gc=False):
    """Answered with the session's state and, with `calls`, a report of each of its calls (of those with these `numbers`, when
    they are given); counts as an access."""

    request: int
    session_id: int
    auth: str | None
    calls: bool = False
    numbers: tuple[int, ...] | None = None


class ListVariables(Event, frozen=True, gc=False):
    request: int
    session_id: int
    auth: str | None


@final
class Constant(msgspec.Struct, frozen=True, tag="constant", omit_defaults=True, gc=False):
    """A piece of the template's text. `role`: a message of a chat begins with it, and whose message that is; "": none does."""

    content: Content
    role: str = ""


@final
class Input(msgspec.Struct, frozen=True, tag="input", omit_defaults=True, gc=False):
    """A placeholder that reads: an existing variable, or a value given with the call (then the core makes a variable).
    `role`: as a constant's."""

    name: str
    var_id: str | None = None
    value: Content | None = None
    role: str = ""


@final
class Output(msgspec.Struct, frozen=True, tag="output", omit_defaults=True, gc=False):
    """A placeholder that writes: a preallocated variable, or a new one. The sampling seed is drawn already."""

    name: str
    sampling: SamplingConfig
    var_id: str | None = None


Segment = Constant | Input | Output


class SubmitCall(Event, frozen=True, gc=False):
    """A call whose template and parameters were found to fit together.

    `models` (): any. An input's name occurs in as many segments as its placeholder does; its value is given in each.
    `deadline`: after so many seconds its outputs are worthless, and those that are not ready fail.
    """

    request: int
    session_id: int
    auth: str | None
    segments: tuple[Segment, ...]
    func_name: str = ""
    models: tuple[str, ...] = ()
    model_type: str = "token_id"
    cache_prefix: bool = True
    output_criteria: Criteria | None = None
    fuse_fill: bool = False
    idempotency_key: str | None = None
    deadline: float | None = None


class CancelCall(Event, frozen=True, gc=False):
    """Whoever wanted this call's outputs is gone, and nobody else can: its tasks that have not ended fail (`cancelled`).
    `call`: its number, the request_id that it was answered with."""

    request: int
    session_id: int
    auth: str | None
    call: int


class CreateVariable(Event, frozen=True, gc=False):
    request: int
    session_id: int
    auth: str | None
    name: str = ""
    idempotency_key: str | None = None


class SetVariable(Event, frozen=True, gc=False):
    request: int
    session_id: int
    auth: str | None
    var_id: str
    content: Content
    idempotency_key: str | None = None


class GetVariable(Event, frozen=True, gc=False):
    """Answered when the variable is ready or failed, or after `timeout` seconds (which cancels nothing), or after `deadline`
    seconds, when the value is worthless to this client: what nobody else wants then is given up.

    `criteria` None: THROUGHPUT, and it never tightens what an earlier get said.
    """

    request: int
    session_id: int
    auth: str | None
    var_id: str
    criteria: Criteria | None = None
    timeout: float | None = None
    stream: bool = False
    deadline: float | None = None


class CancelGet(Event, frozen=True, gc=False):
    """The client of that get went away."""

    request: int


# ------------------------------------------------------------------------------------------------ from engines


class RegisterEngine(Event, frozen=True, gc=False):
    """`lengths`: content key -> tokens under this engine's tokenizer, for contents that came before it was known."""

    request: int
    engine: EngineDescription
    lengths: dict[str, int] = {}


class EngineLost(Event, frozen=True, gc=False):
    engine_id: int
    reason: str = ""


class TaskStarted(Event, frozen=True, gc=False):
    epoch: int
    task: TaskId
    attempt: int
    cached_tokens: int = 0


class FirstToken(Event, frozen=True, gc=False):
    epoch: int
    task: TaskId
    attempt: int


class TaskFinished(Event, frozen=True, gc=False):
    """`content`: the output. `prompt_tokens`, `cached_tokens`: as the engine counted. Times are seconds, the engine's. `cost`:
    what a remote endpoint charged. `reason`: why it ended, in the engine's word (`protocol.engine.Finished`)."""

    epoch: int
    task: TaskId
    attempt: int
    content: Content
    output_tokens: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    decode_s: float = 0.0
    max_gap_s: float = 0.0
    cost: float = 0.0
    reason: str = ""


class TaskFailed(Event, frozen=True, gc=False):
    epoch: int
    task: TaskId
    attempt: int
    code: str
    message: str
    retryable: bool = False


class TaskRejected(Event, frozen=True, gc=False):
    """The engine had no room; it gets this task again only after its capacity has changed."""

    epoch: int
    task: TaskId
    attempt: int
    message: str = ""


class ContextsEvicted(Event, frozen=True, gc=False):
    engine_id: int
    context_ids: tuple[int, ...]


# ------------------------------------------------------------------------------------------------ from the shell


class Tick(Event, frozen=True, gc=False):
    """`next_deadline` has come."""


class Restarted(Event, frozen=True, gc=False):
    """The core lives again after a recovery: engines and pending gets are gone, what was in flight is queued again."""

    epoch: int


class TaskGivenUp(Event, frozen=True, gc=False):
    """Only in a journal: this task failed for good. Whether it did depends on engines, which a recovery does not know."""

    task: TaskId
    error: ErrorInfo


AnyEvent = (
    OpenSession
    | CloseSession
    | DescribeSession
    | ListVariables
    | SubmitCall
    | CancelCall
    | CreateVariable
    | SetVariable
    | GetVariable
    | CancelGet
    | RegisterEngine
    | EngineLost
    | TaskStarted
    | FirstToken
    | TaskFinished
    | TaskFailed
    | TaskRejected
    | ContextsEvicted
    | Tick
    | Restarted
    | TaskGivenUp
)
