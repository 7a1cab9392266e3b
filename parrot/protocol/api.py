"""The public HTTP API v1 of ServeCore: bodies of its requests and answers, and the values that they share.

Field names and defaults are the contract with existing clients. Decoding validates: an unknown field, a wrong type or
a value out of range never gets past `msgspec`.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from parrot.protocol.errors import ParrotError

PLACEHOLDER_NAME = r"[a-zA-Z_][a-zA-Z0-9_]*"
MOST_STOPS = 4  #: stop strings of an output
#: A get that may take longer leaves its timeout out; "inf" in a query is no number of seconds.
MAX_TIMEOUT_S = 1e9
Wait = Annotated[float, Meta(ge=0.0, le=MAX_TIMEOUT_S)]  #: seconds


class Criteria(enum.StrEnum):
    """What a `get` wants its value optimised for (Parrot, OSDI'24, section 4.2)."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"
    TTFT = "TTFT"
    TPOT = "TPOT"


def parse_criteria(value: str | None) -> Criteria | None:
    """The criteria named `value`; None stays None. Raises `bad_criteria`, which names the four."""
    if value is None:
        return None
    try:
        return Criteria(value)
    except ValueError:
        known = ", ".join(c.value for c in Criteria)
        raise ParrotError("bad_criteria", f"criteria {value!r} is none of {known}", criteria=value) from None


class SamplingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """How an output is sampled. Lengths are tokens; a null seed is drawn by the core's shell.

    `output_length` forces the exact number of generated tokens; only emulated and dummy-weight engines accept it. `stop_str`:
    one stop string, or up to `MOST_STOPS`. `logprobs`: report each token's log-probability, and those of so many most
    probable tokens beside it. `chat_options`: fields of a chat request that the endpoint behind a text engine is to honour, as
    OpenAI names them (`tools`, `response_format` …); every other engine refuses them.
    """

    temperature: Annotated[float, Meta(ge=0.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    max_gen_length: Annotated[int, Meta(ge=1)] = 512
    output_length: Annotated[int, Meta(ge=1)] | None = None
    ignore_tokenizer_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    stop_str: str | tuple[str, ...] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    n: int = 1
    best_of: int = 1
    length_penalty: float = 1.0
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_options: dict[str, Any] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Its stop strings, () for none."""
        stop = self.stop_str
        return () if stop is None else (stop,) if isinstance(stop, str) else stop

    def check(self) -> None:
        """Raises `bad_sampling` for what is well formed but has no meaning for a variable with one content."""
        for name, default in (("n", 1), ("best_of", 1), ("length_penalty", 1.0)):
            value = getattr(self, name)
            if value != default:
                raise ParrotError(
                    "bad_sampling",
                    f"sampling_config.{name} is {value}; a semantic variable has one content, so only {default} is accepted",
                    field=name,
                )
        if self.top_k == 0:
            raise ParrotError("bad_sampling", "sampling_config.top_k is 0; use -1 for no limit, or 1 and above", field="top_k")
        if "" in self.stops:
            raise ParrotError("bad_sampling", "sampling_config.stop_str is empty; leave it null for none", field="stop_str")
        if len(self.stops) > MOST_STOPS:
            message = f"sampling_config.stop_str has {len(self.stops)} strings; at most {MOST_STOPS} are accepted"
            raise ParrotError("bad_sampling", message, field="stop_str")
        if self.output_length is not None and self.output_length > self.max_gen_length:
            raise ParrotError(
                "bad_sampling",
                f"sampling_config.output_length {self.output_length} is above max_gen_length {self.max_gen_length}",
                field="output_length",
            )


def refuse_chat_options(sampling: SamplingConfig) -> None:
    """For engines that are no chat endpoint. Raises `bad_sampling`, which names what is asked for."""
    if sampling.chat_options:
        names = ", ".join(sampling.chat_options)
        message = f"{names}: only an engine behind a remote chat endpoint (engine_type openai) can honour this"
        raise ParrotError("bad_sampling", message, field=next(iter(sampling.chat_options)))


class OpenSessionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /v1/session"""

    api_key: str | None = None
    apps: Any = None


class SessionAnswer(msgspec.Struct, frozen=True):
    session_id: int
    session_auth: str


class SessionReference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The arguments that every call inside a session carries."""

    session_id: int
    session_auth: str | None = None


class ParameterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One parameter of a semantic call. An input has exactly one of `var_id`, `value`."""

    name: Annotated[str, Meta(pattern=f"^{PLACEHOLDER_NAME}$")]
    is_output: bool = False
    var_id: str | None = None
    value: str | None = None
    sampling_config: SamplingConfig | None = None


class SemanticCallRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /v1/semantic_call. `deadline`: seconds from now after which its outputs are worthless."""

    session_id: int
    template: str
    parameters: list[ParameterSpec]
    session_auth: str | None = None
    func_name: str | None = None
    models: list[str] = []
    model_type: str = "token_id"
    remove_pure_fill: bool = True
    cache_prefix: bool = True
    output_criteria: str | None = None
    fuse_fill: bool = False
    deadline: Wait | None = None


class ParamInfo(msgspec.Struct, frozen=True):
    """One placeholder occurrence of a submitted call, in template order."""

    parameter_name: str
    placeholder_name: str
    is_output: bool
    var_name: str
    var_id: str
    var_desc: str
    var_scope: str


class CallAnswer(msgspec.Struct, frozen=True):
    request_id: int
    session_id: int
    param_info: tuple[ParamInfo, ...]


class CreateVariableRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /v1/semantic_var"""

    session_id: int
    session_auth: str | None = None
    var_name: str = ""


class SetVariableRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """POST /v1/semantic_var/{var_id}"""

    session_id: int
    content: str
    session_auth: str | None = None


class GetVariableRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GET /v1/semantic_var/{var_id}: body or query. `timeout` (cancels nothing) and `deadline` (after which the value is
    worthless) in seconds from now; `stream_from` in characters already had."""

    session_id: int
    session_auth: str | None = None
    criteria: str | None = None
    timeout: Wait | None = None
    stream: bool = False
    stream_from: Annotated[int, Meta(ge=0)] = 0
    deadline: Wait | None = None


class VariableInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entry of GET /v1/semantic_var."""

    var_id: str
    var_name: str
    state: str
    content: str | None = None
    error: str | None = None


class ModelInfo(msgspec.Struct, frozen=True):
    model_name: str
    tokenizer_name: str


class TaskReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """The life of a completion task. Times are the core's clock in seconds, null while they have not come. `reason`: why the
    output ended, in the engine's word (`protocol.engine.Finished`)."""

    var_id: str
    state: str
    attempts: int = 0
    engine: str | None = None
    criteria: str | None = None
    depth: int = 0
    deadline_s: float | None = None
    ready_s: float | None = None
    dispatched_s: float | None = None
    started_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    decode_s: float = 0.0
    max_gap_s: float = 0.0
    cost: float = 0.0
    reason: str = ""


class CallReport(msgspec.Struct, frozen=True):
    """One call of a session: when it was submitted, and its tasks, one an output."""

    request_id: int
    func_name: str
    state: str
    submitted_s: float
    tasks: tuple[TaskReport, ...]


class Usage(msgspec.Struct, frozen=True):
    """Tokens as the engines counted them, and what remote endpoints charged, in the currency of the engines' files."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


class SessionReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """GET /v1/session/{id}. `reports` only when asked for (`calls=true`). `usage`: of its finished tasks."""

    session_id: int
    state: str
    calls: dict[str, int]
    variables: dict[str, int]
    age_s: float
    idle_s: float
    reports: tuple[CallReport, ...] | None = None
    usage: Usage = Usage()
