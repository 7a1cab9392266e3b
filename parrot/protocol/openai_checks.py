"""What a request on OpenAI's routes must be, in OpenAI's words. Refuses, with `bad_request`; changes nothing.

A refusal carries `param`, the place in the body, and `openai_code` in its details; `openai_errors.py` makes the answer of it.
What is not here is engines' business: one that cannot honour a value says so itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from parrot.protocol.api import MAX_TIMEOUT_S, MOST_STOPS, PLACEHOLDER_NAME, SamplingConfig, parse_criteria
from parrot.protocol.errors import ParrotError
from parrot.protocol.json_schema import NoSchema, check_schema
from parrot.protocol.openai import ChatRequest, CompletionRequest, Extension, Message, Request, Tool

R = TypeVar("R", ChatRequest, CompletionRequest)

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_CHOICES = 128  #: choices of one prompt (`n`)
MOST_PROMPTS = 1024  #: choices of all prompts of one request
MOST_TOOLS = 128
MOST_CHAT_LOGPROBS = 20
MOST_COMPLETION_LOGPROBS = 5
CHAT_MAX_TOKENS = 2048  #: of an answer whose request names no limit, if the model's context has room for so many
COMPLETION_MAX_TOKENS = 16  #: OpenAI's default for /v1/completions

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {}
_INT64 = 2**63


def refusal(message: str, param: str | None, code: str = "invalid_value") -> ParrotError:
    """A `bad_request` in OpenAI's terms."""
    return ParrotError("bad_request", message, param=param, openai_code=code)


# ------------------------------------------------------------------------------------------------------------- the form


def decode(body: bytes, kind: type[R]) -> R:
    """The JSON `body` as a `kind`, its form checked and nothing else. Raises `bad_request`."""
    decoder = _DECODERS.get(kind)
    if decoder is None:
        decoder = _DECODERS[kind] = msgspec.json.Decoder(kind)
    try:
        decoded: R = decoder.decode(body)
        return decoded
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise refusal(f"We could not parse the JSON body of your request: {error}", None, "invalid_json") from None
    except RecursionError:
        raise refusal("The JSON body of your request is nested too deeply.", None, "invalid_json") from None


def _invalid(message: str) -> ParrotError:
    """msgspec's complaint in OpenAI's terms."""
    param = ""
    if match := re.search(r" - at `\$\.?(.*)`$", message):
        param, message = match[1], message[: match.start()]
    if match := re.match(r"Object contains unknown field `(.*)`", message):
        where = f"{param}.{match[1]}" if param else match[1]
        return refusal(f"Unrecognized request argument supplied: {where}", where, "unknown_parameter")
    if match := re.match(r"Object missing required field `(.*)`", message):
        where = f"{param}.{match[1]}" if param else match[1]
        return refusal(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
    told = f"{message[:1].lower()}{message[1:]}".replace("`", "'")
    return refusal(f"Invalid type for '{param or 'the body'}': {told}.", param or None, "invalid_type")


# ----------------------------------------------------------------------------------------------------------- both kinds


def _check_common(request: Request) -> None:
    if not request.model:
        raise refusal("you must provide a model parameter", "model", "missing_required_parameter")
    _range("temperature", request.temperature, 0, 2)
    _range("top_p", request.top_p, 0, 1)
    if request.top_p == 0:
        raise refusal("Invalid 'top_p': 0 leaves no token to choose; use temperature 0 for the most probable one.", "top_p")
    _range("presence_penalty", request.presence_penalty, -2, 2)
    _range("frequency_penalty", request.frequency_penalty, -2, 2)
    _range("n", request.n, 1, MOST_CHOICES)
    _range("seed", request.seed, -_INT64, _INT64 - 1)
    _range("max_tokens", request.max_tokens, 1, 2**31 - 1)
    _check_stop(request.stop)
    for key, value in (request.logit_bias or {}).items():
        if not (key.isascii() and key.isdigit()):
            raise refusal(f"Invalid key in 'logit_bias': {key!r}. You should only be submitting token ids.", "logit_bias")
        _range(f"logit_bias.{key}", value, -100, 100)
    if request.stream_options is not None:
        if not request.stream:
            raise refusal("The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options")
        if request.stream_options.include_obfuscation:
            raise _unsupported("stream_options.include_obfuscation", "streams are not padded here")
    if request.top_k is not None and (request.top_k < -1 or request.top_k == 0):
        raise refusal(f"Invalid 'top_k': {request.top_k}. Use -1 for no limit, or 1 and above.", "top_k")
    if request.repetition_penalty is not None and not 0 < request.repetition_penalty < 1e6:
        raise refusal(f"Invalid 'repetition_penalty': {request.repetition_penalty:g} is not above 0.", "repetition_penalty")
    _range("output_length", request.output_length, 1, 2**31 - 1)
    _range("min_tokens", request.min_tokens, 0, 2**31 - 1)
    if request.parrot is not None:
        _check_extension(request.parrot)


def _check_stop(stop: str | list[str] | None) -> None:
    strings = [stop] if isinstance(stop, str) else stop or []
    if len(strings) > MOST_STOPS:
        message = f"Invalid 'stop': array too long. Expected an array with maximum length {MOST_STOPS}, but got {len(strings)}."
        raise refusal(message, "stop", "array_above_max_length")
    if "" in strings:
        raise refusal("Invalid 'stop': an empty string stops nothing; leave it out.", "stop")


def _check_extension(extension: Extension) -> None:
    parse_criteria(extension.criteria)
    if extension.deadline is not None and not 0 <= extension.deadline <= MAX_TIMEOUT_S:
        raise refusal(f"Invalid 'parrot.deadline': {extension.deadline:g} is no number of seconds from now.", "parrot.deadline")
    if extension.session is None:
        for name, given in (
            ("session_auth", extension.session_auth),
            ("inputs", extension.inputs),
            ("output", extension.output),
            ("wait", not extension.wait),
        ):
            if given:
                raise refusal(f"'parrot.{name}' needs 'parrot.session', a session of POST /v1/session.", f"parrot.{name}")
    for name in (*extension.inputs, *(() if extension.output is None else (extension.output,))):
        if not re.fullmatch(PLACEHOLDER_NAME, name):
            where = "parrot.inputs" if name in extension.inputs else "parrot.output"
            raise refusal(f"Invalid '{where}': {name!r} is no name; expected {PLACEHOLDER_NAME}.", where)


def sampling_of(request: Request, max_tokens: int, logprobs: int | None, options: dict[str, Any] | None) -> SamplingConfig:
    """How its outputs are sampled. `max_tokens`: what it names, or what holds where it names none; `logprobs`: None for none;
    `options`: `chat_options_of` it. Raises `bad_request`: a least length that nothing here can hold to."""
    stops = (request.stop,) if isinstance(request.stop, str) else tuple(dict.fromkeys(request.stop or ()))
    if request.min_tokens and not (
        request.ignore_eos and not stops and not request.stop_token_ids and request.min_tokens <= max_tokens
    ):
        raise _unsupported(
            "min_tokens",
            "an output has a least length only where nothing can end it sooner: with 'ignore_eos' true, no 'stop', and "
            "'min_tokens' at most the maximum, which then is its length",
        )
    return SamplingConfig(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=-1 if request.top_k is None else request.top_k,
        seed=request.seed,
        max_gen_length=max_tokens,
        output_length=request.output_length,
        ignore_tokenizer_eos=bool(request.ignore_eos),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        stop_str=stops[0] if len(stops) == 1 else stops or None,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias or None,
        logprobs=logprobs,
        chat_options=options or None,
    )


def seeded(sampling: SamplingConfig, choice: int, drawn: int) -> SamplingConfig:
    """The sampling of one of several choices, each of which draws differently: counted from the client's seed, or `drawn`, for
    every attempt of it alike."""
    if sampling.seed is None:
        return msgspec.structs.replace(sampling, seed=drawn)
    return sampling if choice == 0 else msgspec.structs.replace(sampling, seed=(sampling.seed + choice) % 2**63)


# ------------------------------------------------------------------------------------------------------------- a chat


def check_chat(request: ChatRequest) -> None:
    """Raises `bad_request` for what OpenAI would refuse, and for what no engine here can do."""
    _check_common(request)
    _range("max_completion_tokens", request.max_completion_tokens, 1, 2**31 - 1)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        message = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."
        raise refusal(message, "max_tokens", "invalid_parameter_combination")
    _range("top_logprobs", request.top_logprobs, 0, MOST_CHAT_LOGPROBS)
    if request.top_logprobs is not None and not request.logprobs:
        raise refusal("The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.", "top_logprobs")
    check_messages(request.messages)
    _check_tools(request)
    _check_format(request.response_format)
    for name in ("audio", "prediction", "web_search_options"):
        if getattr(request, name) is not None:
            raise _unsupported(name, "the models here do not have it")
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        if getattr(request, name) is not None:
            raise _unsupported(name, f"it is deprecated; use '{instead}'")
    if request.modalities not in (None, ["text"]):
        raise _unsupported("modalities", "the models here write text")
    if request.store:
        raise _unsupported("store", "this server keeps no completions")
    if request.service_tier not in (None, "auto", "default"):
        raise _unsupported("service_tier", "there is one tier here, 'default'; limits and shares go by API key")


def check_messages(messages: Sequence[Message]) -> None:
    """Raises `bad_request` for a conversation that cannot be."""
    if not messages:
        told = "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array instead."
        raise refusal(told, "messages", "empty_array")
    open_calls: dict[str, None] = {}  # ids of tool calls that have no answer yet
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        _check_message(message, where)
        if message.role == "tool":
            assert message.tool_call_id is not None
            if message.tool_call_id not in open_calls:
                told = "messages with role 'tool' must be a response to a preceding message with 'tool_calls'"
                raise refusal(f"Invalid parameter: {told}; no such call has the id {message.tool_call_id!r}.", f"{where}.role")
            del open_calls[message.tool_call_id]
        elif open_calls:
            raise _unanswered(open_calls, where)
        if message.tool_calls:
            open_calls = dict.fromkeys(call.id for call in message.tool_calls)
    if open_calls:
        raise _unanswered(open_calls, "messages")


def _unanswered(calls: dict[str, None], where: str) -> ParrotError:
    told = "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'."
    return refusal(f"{told} Without a response: {', '.join(calls)}", where)


def _check_message(message: Message, where: str) -> None:
    role = message.role
    if role not in ROLES:
        known = ", ".join(f"'{known}'" for known in ROLES)
        raise refusal(f"Invalid value: '{role}'. Supported values are: {known}.", f"{where}.role")
    if isinstance(message.content, list):
        _check_parts(message, where)
    elif message.content is None and not (role == "assistant" and (message.tool_calls or message.refusal)):
        raise refusal(f"Invalid value for '{where}.content': expected a string, got null.", f"{where}.content", "invalid_type")
    if message.audio is not None or message.function_call is not None or message.annotations:
        name = next(n for n in ("audio", "function_call", "annotations") if getattr(message, n))
        raise _unsupported(f"{where}.{name}", "the models here take text")
    if (message.tool_calls or message.refusal) and role != "assistant":
        name = "tool_calls" if message.tool_calls else "refusal"
        raise refusal(f"'{where}.{name}' is the assistant's alone.", f"{where}.{name}")
    if message.tool_calls is not None:
        if not message.tool_calls:
            raise refusal(f"Invalid '{where}.tool_calls': empty array.", f"{where}.tool_calls", "empty_array")
        for number, call in enumerate(message.tool_calls):
            if call.type != "function":
                raise refusal(f"Invalid value: '{call.type}'. Supported is 'function'.", f"{where}.tool_calls[{number}].type")
    if (message.tool_call_id is None) == (role == "tool"):
        if role == "tool":
            name = f"{where}.tool_call_id"
            raise refusal(f"Missing required parameter: '{name}'.", name, "missing_required_parameter")
        raise refusal(f"'{where}.tool_call_id' is for messages of role 'tool'.", f"{where}.tool_call_id")


def _check_parts(message: Message, where: str) -> None:
    assert isinstance(message.content, list)
    if not message.content:
        raise refusal(f"Invalid '{where}.content': empty array.", f"{where}.content", "empty_array")
    for number, part in enumerate(message.content):
        at = f"{where}.content[{number}]"
        if part.type == "text" and part.text is not None:
            continue
        if part.type == "refusal" and part.refusal is not None and message.role == "assistant":
            continue
        if part.type in ("image_url", "input_audio", "file"):
            raise refusal(f"Invalid content type. The models here take text, and no '{part.type}'.", f"{at}.type")
        if part.type == "text":
            raise refusal(f"Missing required parameter: '{at}.text'.", f"{at}.text", "missing_required_parameter")
        raise refusal(f"Invalid value: '{part.type}'. Supported value is: 'text'.", f"{at}.type")


def _check_tools(request: ChatRequest) -> None:
    tools = request.tools
    if tools is None:
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(request, name) is not None:
                raise refusal(f"Invalid value for '{name}': '{name}' is only allowed when 'tools' are specified.", name)
        return
    if not tools:
        raise refusal("Invalid 'tools': empty array. Expected an array with minimum length 1.", "tools", "empty_array")
    if len(tools) > MOST_TOOLS:
        message = f"Invalid 'tools': array too long. Expected at most {MOST_TOOLS}, but got {len(tools)}."
        raise refusal(message, "tools", "array_above_max_length")
    for place, tool in enumerate(tools):
        _check_tool(tool, f"tools[{place}]")
    choice = request.tool_choice
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            message = f"Invalid value: '{choice}'. Supported values are: 'none', 'auto', and 'required'."
            raise refusal(message, "tool_choice")
    elif choice is not None:
        function = choice.get("function")
        if choice.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            message = 'Invalid \'tool_choice\': expected {"type": "function", "function": {"name": …}}.'
            raise refusal(message, "tool_choice")
        if function["name"] not in [tool.function.name for tool in tools if tool.function is not None]:
            message = f"Invalid value for 'tool_choice': no tool is called {function['name']!r}."
            raise refusal(message, "tool_choice.function.name")


def _check_tool(tool: Tool, where: str) -> None:
    if tool.type != "function":
        raise refusal(f"Invalid value: '{tool.type}'. Supported value is: 'function'.", f"{where}.type")
    function = tool.function
    if function is None:
        raise refusal(f"Missing required parameter: '{where}.function'.", f"{where}.function", "missing_required_parameter")
    if not _NAME.fullmatch(function.name):
        message = f"Invalid '{where}.function.name': {function.name!r} does not match '^[a-zA-Z0-9_-]{{1,64}}$'."
        raise refusal(message, f"{where}.function.name")
    if function.parameters:
        _check_schema(function.parameters, f"{where}.function.parameters", f"function '{function.name}'")
        kind = function.parameters.get("type", "object")
        if kind != "object":
            told = f"schema must be a JSON Schema of 'type: \"object\"', got 'type: {kind!r}'"
            message = f"Invalid schema for function '{function.name}': {told}."
            raise refusal(message, f"{where}.function.parameters", "invalid_function_parameters")


def _check_schema(schema: Any, where: str, what: str) -> None:
    try:
        check_schema(schema)
    except NoSchema as error:
        raise refusal(f"Invalid schema for {what}: {error}.", where, "invalid_function_parameters") from None


def _check_format(wanted: dict[str, Any] | None) -> None:
    if wanted is None:
        return
    kind = wanted.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        message = f"Invalid value: {kind!r}. Supported values are: 'text', 'json_object', and 'json_schema'."
        raise refusal(message, "response_format.type")
    if kind == "json_schema":
        inner = wanted.get("json_schema")
        name = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or not isinstance(name, str) or not _NAME.fullmatch(name):
            message = "Missing required parameter: 'response_format.json_schema.name', of letters, digits, _ and -."
            raise refusal(message, "response_format.json_schema.name", "missing_required_parameter")
        if inner.get("schema") is not None:
            _check_schema(inner["schema"], "response_format.json_schema.schema", f"response_format '{name}'")


def chat_options_of(request: ChatRequest) -> dict[str, Any]:
    """What of a checked request only the endpoint behind a text engine can honour, as it is sent there; {} for nothing."""
    found: dict[str, Any] = {}
    if request.response_format is not None and request.response_format["type"] != "text":
        found["response_format"] = request.response_format
    if request.tools is not None:
        found["tools"] = msgspec.to_builtins(request.tools)
    for name in ("tool_choice", "parallel_tool_calls", "reasoning_effort", "verbosity"):
        value = getattr(request, name)
        if value is not None:
            found[name] = value
    return found


def chat_logprobs(request: ChatRequest) -> int | None:
    """How many alternatives it wants beside each token's log-probability; None: no log-probabilities."""
    return (request.top_logprobs or 0) if request.logprobs else None


# -------------------------------------------------------------------------------------------------------- a completion


def check_completion(request: CompletionRequest) -> list[str | list[int]]:
    """Its prompts, each a text or token ids. Raises `bad_request`."""
    _check_common(request)
    _range("logprobs", request.logprobs, 0, MOST_COMPLETION_LOGPROBS)
    n = request.n or 1
    if request.best_of is not None and request.best_of != n:
        raise _unsupported("best_of", f"all choices that are made are answered; leave it out, or at n, which is {n}")
    if request.suffix:
        raise _unsupported("suffix", "the models here continue a text, they do not fill a gap")
    if request.echo and request.logprobs is not None:
        raise _unsupported("echo", "together with 'logprobs': those of a prompt's own tokens are not computed")
    prompts = _prompts(request.prompt)
    if n * len(prompts) > MOST_PROMPTS:
        message = f"{len(prompts)} prompts with n {n} are more than {MOST_PROMPTS} choices in one request."
        raise refusal(message, "prompt", "array_above_max_length")
    return prompts


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    if isinstance(prompt, str) or (prompt and all(_is_id(item) for item in prompt)):
        found: list[Any] = [prompt]
    else:
        found = prompt
    if not found:
        raise refusal("Invalid 'prompt': empty array.", "prompt", "empty_array")
    for place, each in enumerate(found):
        where = "prompt" if found is not prompt else f"prompt[{place}]"
        if isinstance(each, list):
            if not all(_is_id(item) for item in each):
                raise refusal(f"Invalid '{where}': expected a text or a list of token ids.", where, "invalid_type")
        elif not isinstance(each, str):
            raise refusal(f"Invalid '{where}': expected a text or a list of token ids.", where, "invalid_type")
        if not each:
            raise refusal(f"Invalid '{where}': it is empty, and the models here need something to continue.", where)
    return found


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31


# --------------------------------------------------------------------------------------------------------------- shared


def _range(name: str, value: float | None, least: int, most: int) -> None:
    if value is None or least <= value <= most:
        return
    kind = "integer" if isinstance(value, int) else "decimal"
    if value < least:
        message = f"Invalid '{name}': {kind} below minimum value. Expected a value >= {least}, but got {value:g} instead."
        raise refusal(message, name, f"{kind}_below_min_value")
    message = f"Invalid '{name}': {kind} above maximum value. Expected a value <= {most}, but got {value:g} instead."
    raise refusal(message, name, f"{kind}_above_max_value")


def _unsupported(name: str, reason: str) -> ParrotError:
    return refusal(f"Unsupported parameter: '{name}': {reason}.", name, "unsupported_parameter")
