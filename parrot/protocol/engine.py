"""What ServeCore and an engine say to each other: registration, heartbeat, tasks and their event streams, primitives.

An engine is a server of its own (POST /task, /fill, /generate, /generate_stream, /free_context, /abort, /ping); it
registers with POST /register_engine at the core and sends POST /engine_heartbeat. A task is one request: all its fills
and its generate travel together, and its events come back as NDJSON, one `TaskEvent` a line.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from parrot.latency import LatencyProfile
from parrot.protocol.api import SamplingConfig

Name = Annotated[str, Meta(min_length=1)]
Positive = Annotated[int, Meta(ge=1)]


class TaskId(msgspec.Struct, frozen=True, array_like=True, order=True, gc=False):
    """A completion task: its session, the call in it (from 0) and the output in the call (from 0)."""

    session_id: int
    call: int
    output: int


class EngineDescription(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an engine tells of itself when it registers. Capacities in tokens unless the name says otherwise."""

    engine_name: Name
    model: Name
    tokenizer: Name  #: the tokenizer in use; "synthetic" where the model's own cannot be had
    host: str
    port: Annotated[int, Meta(ge=1, le=65535)]
    engine_type: Annotated[str, Meta(pattern="^(builtin|openai|emulated)$")]
    tasks_capacity: Positive
    tokens_capacity: Positive
    max_seq_len: Positive  #: longest prompt + output
    bos_tokens: int = 0  #: tokens that the engine puts at the head of a chain
    accepts_output_length: bool = False  #: emulated and dummy-weight engines honour SamplingConfig.output_length
    random_seed: int = 0
    attn_func: str = ""
    latency_profile: LatencyProfile | None = None
    tls: bool = False  #: it shows a certificate
    takes_token_ids: bool = False  #: of an engine that takes text: it passes the ids of its prompt's tokens on


class RegisterRequest(msgspec.Struct, frozen=True):
    """POST /register_engine. `instance` is drawn once a process: the same one again is a repeat, not a second engine."""

    engine_config: EngineDescription
    instance: str = ""
    secret: str | None = None


class RegisterAnswer(msgspec.Struct, frozen=True):
    """`epoch` counts the core's lives: an engine drops the contexts that it holds of an earlier one."""

    engine_id: int
    epoch: int


class RuntimeInfo(msgspec.Struct, frozen=True):
    """An engine's state as it measures it. Memory in bytes, times in seconds. `stalled_s`: for how long the engine's loop has
    ended no iteration although it has work; 0 while it has none."""

    num_cached_tokens: int = 0
    num_max_blocks: int = 0
    num_running_jobs: int = 0
    num_total_jobs: int = 0
    cache_mem: float = 0.0
    model_mem: float = 0.0
    profiled_cpu_mem: float = 0.0
    profiled_gpu_tensor_mem: float = 0.0
    profiled_gpu_allocate_mem: float = 0.0
    recent_average_latency: float = 0.0
    stalled_s: float = 0.0


class HeartbeatRequest(msgspec.Struct, frozen=True):
    """POST /engine_heartbeat. `evicted`: contexts given up since the last message that carried any.

    `instance` as in the registration: an id that another engine holds by now is answered 404, as an unknown one is.
    """

    engine_id: int
    engine_name: str
    runtime_info: RuntimeInfo = RuntimeInfo()
    evicted: tuple[int, ...] = ()
    secret: str | None = None
    instance: str = ""


# ---------------------------------------------------------------------------------------------------- one task


CONTINUED, WHOLE_MESSAGE = "continued", "message"  #: roles of fills that are no role's


class FillSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One link of a chain: a context and the tokens (or, for text engines, the text) that it adds to its parent.

    `output` says that this text was generated (its role in a chat is the assistant's). `role`: of a chat, the role of the
    message that begins with it; "" for none, which is the user's; CONTINUED: it goes on with the message before;
    WHOLE_MESSAGE: its text is a whole message as JSON, of more than a role and a text.
    """

    context_id: int
    token_ids: list[int] | None = None
    text: str | None = None
    output: bool = False
    role: str = ""


class GenerateSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """The generate that ends a task. `forced_ids`/`forced_text`: what an earlier attempt already streamed to a getter;
    the engine fills it and goes on behind it. It counts in `max_gen_length` and is not streamed again."""

    context_id: int
    sampling: SamplingConfig
    forced_ids: tuple[int, ...] = ()
    forced_text: str = ""


class TaskRequest(msgspec.Struct, frozen=True):
    """POST /task: the whole chain from its head, so that an engine can compute again what it no longer holds.

    `parent` is the core's hint: the deepest context of the chain that it believes to be on the engine (-1: none).
    `instance`: the process that it is for, as that registered: another at the same address may serve another model.
    """

    engine_id: int
    epoch: int
    task: TaskId
    attempt: int
    chain: tuple[FillSpec, ...]
    generate: GenerateSpec
    parent: int = -1
    instance: str = ""


class Started(msgspec.Struct, frozen=True, tag="started", tag_field="event", omit_defaults=True):
    """The task was admitted to a batch. `cached_tokens`: prompt tokens that it found in memory."""

    cached_tokens: int = 0
    evicted: tuple[int, ...] = ()


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A generated token's text and natural log-probability, before temperature and penalties; `top`: those of the most probable
    tokens at its place, the first the most probable."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class Tokens(msgspec.Struct, frozen=True, tag="tokens", tag_field="event", omit_defaults=True):
    """New tokens, in order. `text` is what they add to the decoded output (empty while a character is incomplete).
    `logprobs`: one a token, where the task asked for them."""

    ids: tuple[int, ...]
    text: str = ""
    evicted: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Finished(msgspec.Struct, frozen=True, tag="finished", tag_field="event", omit_defaults=True):
    """The end of a task: the whole output, forced part included. `ids` and `text` are cut at the stop.

    An engine that knows no ids leaves them empty and gives their number as `output_tokens`. `cost`: what a remote endpoint
    charges for the attempt, in the currency of its configuration. Times are the engine's: `decode_s` from the first to the
    last token, `max_gap_s` the largest between two.
    """

    ids: tuple[int, ...]
    text: str
    reason: str  #: eos | stop_token | stop_str | length | tool_calls
    prompt_tokens: int = 0
    cached_tokens: int = 0
    decode_s: float = 0.0
    max_gap_s: float = 0.0
    output_tokens: int = 0
    cost: float = 0.0
    evicted: tuple[int, ...] = ()


class Failed(msgspec.Struct, frozen=True, tag="failed", tag_field="event", omit_defaults=True):
    """The attempt failed; `retryable` says whether another attempt may succeed."""

    code: str
    message: str
    retryable: bool = False
    evicted: tuple[int, ...] = ()


class Rejected(msgspec.Struct, frozen=True, tag="rejected", tag_field="event", omit_defaults=True):
    """The engine did not take the task: it has no room for it now."""

    code: str
    message: str
    evicted: tuple[int, ...] = ()


TaskEvent = Started | Tokens | Finished | Failed | Rejected


class AbortRequest(msgspec.Struct, frozen=True):
    """POST /abort: give up an attempt; unknown ones are ignored."""

    epoch: int
    task: TaskId
    attempt: int


# -------------------------------------------------------------------------- the five primitives, engines used alone


class PrimitiveRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields that every primitive has. `parent_context_id` -1: none."""

    context_id: int
    session_id: int = 0
    task_id: int = 0
    parent_context_id: int = -1
    end_flag: bool = False


class FillRequest(PrimitiveRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /fill: exactly one of the two."""

    token_ids: list[Annotated[int, Meta(ge=0)]] | None = None
    text: str | None = None


class FillAnswer(msgspec.Struct, frozen=True):
    filled_len: int


class GenerateRequest(PrimitiveRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /generate and /generate_stream"""

    sampling_config: SamplingConfig = SamplingConfig()


class GenerateAnswer(msgspec.Struct, frozen=True):
    generated_text: str
    generated_ids: list[int]


class FreeContextRequest(msgspec.Struct, frozen=True):
    """POST /free_context: one context, as old clients send, or several at once, as the core does."""

    context_id: int | None = None
    context_ids: tuple[int, ...] = ()
    epoch: int | None = None
    session_id: int = 0
    task_id: int = 0


class FreeContextAnswer(msgspec.Struct, frozen=True):
    """Tokens that the freed contexts added."""

    context_len: int


class PingAnswer(msgspec.Struct, frozen=True):
    runtime_info: RuntimeInfo
