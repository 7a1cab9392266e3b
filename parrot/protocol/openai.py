"""OpenAI's API as far as this project speaks it: bodies of requests, answers, stream chunks and errors. Data, no decisions.

Field names are OpenAI's; `openai_checks.py` says which values are accepted, `openai_answers.py` makes answers. Requests are
read leniently (plain types), so that the checks can refuse in OpenAI's words; a field that is not here is refused by name.
Beside OpenAI's there are the fields that load generators send to vLLM and SGLang (`ignore_eos`, `min_tokens`, `top_k` …), and
`parrot`, this project's extension.
"""

from __future__ import annotations

from typing import Any

import msgspec

# ------------------------------------------------------------------------------------------------------------- requests


class ContentPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a message's content. Only `type` "text" is taken; the others are here to be refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an assistant called. `arguments`: JSON, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: str
    function: FunctionCall
    type: str = "function"


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a conversation, of any role. `annotations`, `audio`, `function_call` come back from clients that send an
    answer's message as it was; they are accepted empty."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None

    @property
    def text(self) -> str:
        """Its content as one text; parts are joined as they stand."""
        if isinstance(self.content, list):
            return "".join([part.text or part.refusal or "" for part in self.content])
        return self.content or ""


class FunctionSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function that the model may call. `parameters`: a JSON Schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    type: str
    function: FunctionSpec | None = None


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Extension(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body's field `parrot` (docs/openai-api.md): what the client knows of the program that this call belongs to.

    `inputs`: placeholder -> id of a variable of `session`; `output`: the variable's name; `deadline`: seconds from now;
    `wait` false: answered at once, with the variable's id. `cache_prefix` false: the leading message is shared with nobody.
    """

    session: int | None = None
    session_auth: str | None = None
    criteria: str | None = None
    inputs: dict[str, str] = {}
    output: str | None = None
    deadline: float | None = None
    wait: bool = True
    cache_prefix: bool = True
    func_name: str = ""


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of completion have."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # what vLLM, SGLang and this project's engines add
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    output_length: int | None = None  #: emulated and dummy-weight engines alone, as in SamplingConfig
    parrot: Extension | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a streamed answer ends with the tokens that were counted."""
        return bool(self.stream and self.stream_options is not None and self.stream_options.include_usage)


class ChatRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    service_tier: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    modalities: list[str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # refused by name when they are given
    audio: Any = None
    prediction: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None


class CompletionRequest(Request, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions. `prompt`: a text or token ids, or a list of them."""

    prompt: str | list[Any]
    return_token_ids: bool | None = None  #: as vLLM has it: the choice's `token_ids` too; engines alone
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


# -------------------------------------------------------------------------------------------------------------- answers


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class CompletionUsage(msgspec.Struct, frozen=True):
    """Tokens as the engine counted them. `cached_tokens`: of the prompt, those that the engine held already."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """The older form, of /v1/completions. `text_offset`: characters from the beginning of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class AnswerMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str
    content: str | None
    refusal: msgspec.UnsetType | None = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class OutputReference(msgspec.Struct, frozen=True):
    """A semantic variable that the answer is, too."""

    var_name: str
    var_id: str


class AnswerExtension(msgspec.Struct, frozen=True):
    """The answer's field `parrot`, where the request joined a session: `outputs` has one a choice."""

    session_id: int
    request_id: int
    outputs: list[OutputReference]


class ChatCompletion(msgspec.Struct, frozen=True):
    id: str
    created: int  #: Unix time, seconds
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage | None
    object: str = "chat.completion"
    parrot: AnswerExtension | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True):
    """An answer of /v1/completions, and each chunk of a streamed one."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "text_completion"
    parrot: AnswerExtension | msgspec.UnsetType = msgspec.UNSET


class ToolCallDelta(msgspec.Struct, frozen=True):
    index: int
    id: str
    function: FunctionCall
    type: str = "function"


class ChatDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    tool_calls: list[ToolCallDelta] | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: CompletionUsage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "chat.completion.chunk"
    parrot: AnswerExtension | msgspec.UnsetType = msgspec.UNSET


class ModelCard(msgspec.Struct, frozen=True):
    """An entry of GET /v1/models, and the answer of GET /v1/models/{id}."""

    id: str
    created: int
    object: str = "model"
    owned_by: str = "parrot"


class ModelList(msgspec.Struct, frozen=True):
    """GET /v1/models of both contracts: `data` is OpenAI's, `models` is Parrot's (parrot.protocol.api.ModelInfo)."""

    data: list[ModelCard]
    models: list[Any] = []
    object: str = "list"


class OpenAIError(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class OpenAIErrorBody(msgspec.Struct, frozen=True):
    """The body of every refusal on OpenAI's routes, and the event that ends a stream which fails."""

    error: OpenAIError
