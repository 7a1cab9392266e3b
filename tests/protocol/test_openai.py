"""What OpenAI's routes take and refuse, the words of it, and the answers that are made."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from parrot.protocol.engine import TokenLogprob
from parrot.protocol.errors import ERRORS, ErrorInfo, ParrotError
from parrot.protocol.openai import ChatRequest, CompletionRequest, FunctionCall, ToolCall
from parrot.protocol.openai_answers import ChatAnswers, CompletionAnswers, Outcome, event, finish_reason, usage_of
from parrot.protocol.openai_checks import (
    chat_logprobs,
    chat_options_of,
    check_chat,
    check_completion,
    decode,
    sampling_of,
)
from parrot.protocol.openai_errors import refusal_of

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}


def chat(**fields: Any) -> ChatRequest:
    request = decode(msgspec.json.encode({"model": "m", "messages": HELLO, **fields}), ChatRequest)
    check_chat(request)
    return request


def completion(**fields: Any) -> list[Any]:
    return check_completion(decode(msgspec.json.encode({"model": "m", "prompt": "hello", **fields}), CompletionRequest))


def said(content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content, **more}]}


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


ACCEPTED: list[dict[str, Any]] = [
    {"max_completion_tokens": 5, "user": "u", "service_tier": "auto", "metadata": {"a": "b"}, "store": False},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"n": 3, "seed": -1, "stop": ["a", "b", "c", "d"], "logit_bias": {"12": -100}, "logprobs": True, "top_logprobs": 20},
    {"ignore_eos": True, "min_tokens": 5, "max_tokens": 5, "top_k": 40, "repetition_penalty": 1.1},
    {"stop_token_ids": [1, 2], "output_length": 4},
    {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
    {"tools": [{"type": "function", "function": {"name": "now"}}]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}},
    {"modalities": ["text"], "stop": None, "temperature": 0, "n": None},
    said([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]),
    said("be brief", "developer"),
    {"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                  {"role": "tool", "tool_call_id": "c1", "content": "12 °C"}]},
    {"messages": [*HELLO, {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "audio": None,
                           "function_call": None, "tool_calls": None}, *HELLO]},
    {"parrot": {"session": 1, "session_auth": "x", "criteria": "TTFT", "inputs": {"a": "v0"}, "output": "b", "wait": False}},
]  # fmt: skip

REFUSED: list[tuple[str, str, dict[str, Any]]] = [
    ("messages", "empty_array", {"messages": []}),
    ("messages[0].role", "invalid_value", said("x", "wizard")),
    ("messages[0].role", "invalid_value", said("x", "tool", tool_call_id="c9")),
    ("messages[0].content", "invalid_type", said(None)),
    ("messages[0].content", "empty_array", said([])),
    ("messages[0].content[0].type", "invalid_value", said([{"type": "image_url", "image_url": {"url": "data:,"}}])),
    ("messages[0].content[0].type", "invalid_value", said([{"type": "input_audio", "input_audio": {}}])),
    ("messages[0].content[0].type", "invalid_value", said([{"type": "smell"}])),
    ("messages[0].content[0].text", "missing_required_parameter", said([{"type": "text"}])),
    ("messages[0].tool_calls", "invalid_value", said("x", tool_calls=[CALL])),
    ("messages[0].mood", "unknown_parameter", said("x", mood="good")),
    ("messages", "invalid_value", said(None, "assistant", tool_calls=[CALL])),
    ("messages[0].tool_call_id", "missing_required_parameter", said("x", "tool")),
    ("temperature", "decimal_above_max_value", {"temperature": 2.5}),
    ("temperature", "decimal_below_min_value", {"temperature": -1}),
    ("temperature", "invalid_type", {"temperature": "hot"}),
    ("top_p", "decimal_above_max_value", {"top_p": 1.1}),
    ("top_p", "invalid_value", {"top_p": 0}),
    ("n", "integer_below_min_value", {"n": 0}),
    ("n", "integer_above_max_value", {"n": 129}),
    ("n", "invalid_type", {"n": 1.5}),
    ("max_tokens", "integer_below_min_value", {"max_tokens": 0}),
    ("max_tokens", "integer_below_min_value", {"max_tokens": -5}),
    ("max_completion_tokens", "integer_below_min_value", {"max_completion_tokens": 0}),
    ("max_tokens", "invalid_parameter_combination", {"max_tokens": 5, "max_completion_tokens": 5}),
    ("stop", "array_above_max_length", {"stop": list("abcde")}),
    ("stop", "invalid_value", {"stop": ""}),
    ("presence_penalty", "decimal_above_max_value", {"presence_penalty": 3}),
    ("logit_bias", "invalid_value", {"logit_bias": {"hello": 1}}),
    ("logit_bias.1", "decimal_above_max_value", {"logit_bias": {"1": 101}}),
    ("seed", "integer_above_max_value", {"seed": 2**63}),
    ("seed", "integer_below_min_value", {"seed": -(2**70)}),
    ("top_logprobs", "invalid_value", {"top_logprobs": 2}),
    ("top_logprobs", "integer_above_max_value", {"logprobs": True, "top_logprobs": 21}),
    ("stream_options", "invalid_value", {"stream_options": {"include_usage": True}}),
    ("stream_options.x", "unknown_parameter", {"stream": True, "stream_options": {"x": 1}}),
    ("mystery", "unknown_parameter", {"mystery": 1}),
    ("tools", "empty_array", {"tools": []}),
    ("tools[0].type", "invalid_value", {"tools": [{"type": "custom"}]}),
    ("tools[0].function", "missing_required_parameter", {"tools": [{"type": "function"}]}),
    ("tools[0].function.name", "invalid_value", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
    ("tools[0].function.parameters", "invalid_function_parameters", tool(parameters={"type": "string"})),
    ("tools[0].function.parameters", "invalid_function_parameters", tool(parameters={"type": "objekt"})),
    ("tools[0].function.parameters", "invalid_function_parameters", tool(parameters={"properties": {"a": "string"}})),
    ("tools[0].function.parameters", "invalid_function_parameters", tool(parameters={"required": "a"})),
    ("tools[0].function.parameters", "invalid_type", tool(parameters="a string")),
    ("tool_choice", "invalid_value", {"tool_choice": "auto"}),
    ("tool_choice", "invalid_value", {"tools": [TOOL], "tool_choice": "sometimes"}),
    ("tool_choice.function.name", "invalid_value",
     {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}),
    ("response_format.type", "invalid_value", {"response_format": {"type": "xml"}}),
    ("response_format.json_schema.name", "missing_required_parameter", {"response_format": {"type": "json_schema"}}),
    ("functions", "unsupported_parameter", {"functions": [{"name": "f"}]}),
    ("modalities", "unsupported_parameter", {"modalities": ["text", "audio"]}),
    ("store", "unsupported_parameter", {"store": True}),
    ("service_tier", "unsupported_parameter", {"service_tier": "flex"}),
    ("model", "missing_required_parameter", {"model": ""}),
    ("parrot.output", "invalid_value", {"parrot": {"output": "x"}}),
    ("parrot.output", "invalid_value", {"parrot": {"session": 1, "output": "a b"}}),
    ("parrot.deadline", "invalid_value", {"parrot": {"deadline": -1}}),
    ("parrot.colour", "unknown_parameter", {"parrot": {"colour": 1}}),
]  # fmt: skip


@pytest.mark.parametrize("fields", ACCEPTED)
def test_what_clients_send_is_accepted(fields: dict[str, Any]) -> None:
    request = chat(**fields)
    sampling_of(request, request.max_tokens or 16, chat_logprobs(request), chat_options_of(request)).check()


@pytest.mark.parametrize(("param", "code", "fields"), REFUSED)
def test_what_openai_would_refuse_is_refused_with_the_place_and_openais_code(
    param: str, code: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(ParrotError) as caught:
        chat(**fields)
    refused = refusal_of(caught.value.info)
    assert (refused.status, refused.error.type) == (400, "invalid_request_error")
    assert (refused.error.param, refused.error.code) == (param, code)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"x"', b"\xff", b'{"model": "m"}'])
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(ParrotError):
        decode(body, ChatRequest)


def test_an_unknown_criteria_names_the_four() -> None:
    with pytest.raises(ParrotError, match="latency, throughput, TTFT, TPOT"):
        chat(parrot={"criteria": "speed"})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([[1], "b"], [[1], "b"]),
    ],
)
def test_a_prompt_is_a_text_or_token_ids_or_a_list_of_them(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt) == prompts


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt[1]", {"prompt": ["a", ""]}),
        ("prompt[0]", {"prompt": [1.5]}),
        ("prompt[0]", {"prompt": [[-1]]}),
        ("prompt[0]", {"prompt": [True]}),
        ("prompt", {"prompt": ["a"] * 1025}),
        ("suffix", {"suffix": "end"}),
        ("best_of", {"best_of": 3}),
        ("echo", {"echo": True, "logprobs": 1}),
        ("logprobs", {"logprobs": 6}),
        ("messages", {"messages": HELLO}),
    ],
)
def test_what_a_completion_cannot_be_is_refused(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ParrotError) as caught:
        completion(**fields)
    assert caught.value.info.details["param"] == param


@pytest.mark.parametrize("fields", [{}, {"ignore_eos": True, "stop": "x"}, {"ignore_eos": True, "min_tokens": 9}])
def test_a_least_length_that_nothing_can_hold_to_is_refused(fields: dict[str, Any]) -> None:
    request = chat(**{"min_tokens": 5, "max_tokens": 8, **fields})
    with pytest.raises(ParrotError, match="min_tokens"):
        sampling_of(request, 8, None, None)


def test_sampling_values_become_those_of_the_engines() -> None:
    request = chat(temperature=0, stop=["a", "b", "a"], seed=3, ignore_eos=True, logprobs=True, top_logprobs=2, tools=[TOOL])
    sampling = sampling_of(request, 7, chat_logprobs(request), chat_options_of(request))
    assert (sampling.temperature, sampling.stops, sampling.seed, sampling.max_gen_length) == (0.0, ("a", "b"), 3, 7)
    assert (sampling.ignore_tokenizer_eos, sampling.logprobs) == (True, 2)
    assert sampling.chat_options == {"tools": [{"type": "function", "function": TOOL["function"]}]}
    assert sampling_of(chat(stop="a"), 7, None, {}).stop_str == "a"


def test_a_whole_chat_answer_has_openais_form() -> None:
    calls = [msgspec.convert(CALL, ToolCall)]
    logprobs = [TokenLogprob("hé", -0.5, (("hé", -0.5), ("\N{REPLACEMENT CHARACTER}", -2.0)))]
    outcomes = [Outcome("hé", "length", logprobs=logprobs), Outcome("", "tool_calls", calls)]
    answer = msgspec.to_builtins(ChatAnswers("chatcmpl-1", 5, "m").whole(outcomes, usage_of(10, 2, 8)))
    assert answer["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "hé", "refusal": None},
        "finish_reason": "length",
        "logprobs": {
            "content": [
                {
                    "token": "hé",
                    "logprob": -0.5,
                    "bytes": list("hé".encode()),
                    "top_logprobs": [
                        {"token": "hé", "logprob": -0.5, "bytes": list("hé".encode())},
                        {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -2.0, "bytes": None},
                    ],
                }
            ],
            "refusal": None,
        },
    }
    assert answer["choices"][1]["message"] == {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]}
    assert answer["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    assert (answer["object"], "parrot" in answer) == ("chat.completion", False)


def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_reason_and_the_usage() -> None:
    answers = ChatAnswers("chatcmpl-1", 5, "m", with_usage=True)
    calls = [ToolCall("c1", FunctionCall("f", "{}"))]
    chunks = [answers.first(0), answers.delta(0, "hi"), *answers.end(0, "tool_calls", calls), answers.usage(usage_of(1, 1, 0))]
    deltas = [msgspec.json.decode(event(chunk).removeprefix(b"data: ")) for chunk in chunks]
    assert [d["choices"][0]["delta"] for d in deltas[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "hi"},
        {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": "{}"}, "type": "function"}]},
        {},
    ]
    assert [d["choices"][0]["finish_reason"] for d in deltas[:-1]] == [None, None, None, "tool_calls"]
    assert [d["usage"] for d in deltas[:-1]] == [None] * 4
    assert (deltas[-1]["choices"], deltas[-1]["usage"]["total_tokens"]) == ([], 2)
    assert "usage" not in msgspec.to_builtins(ChatAnswers("i", 5, "m").first(0))


def test_offsets_of_a_streamed_completions_log_probabilities_go_on() -> None:
    answers = CompletionAnswers("cmpl-1", 5, "m", echoes=["Say "])
    first = answers.delta(0, "ab", [TokenLogprob("a", -1.0), TokenLogprob("b", -1.0)])
    second = answers.delta(0, "c", [TokenLogprob("c", -1.0)])
    assert [chunk.choices[0].logprobs.text_offset for chunk in (first, second)] == [[0, 1], [2]]
    echoed = answers.first(0)
    assert echoed is not None
    assert echoed.choices[0].text == "Say "
    assert answers.whole([Outcome("it", "stop")], usage_of(1, 1, 0)).choices[0].text == "Say it"


def test_reasons_of_engines_become_openais() -> None:
    reasons = ("eos", "stop_token", "stop_str", "length", "tool_calls", "content_filter", "")
    assert [finish_reason(r) for r in reasons] == ["stop", "stop", "stop", "length", "tool_calls", "content_filter", "stop"]


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_has_openais_form_and_says_whether_to_try_again(code: str) -> None:
    info = ErrorInfo(code, "what happened", {"retry_after_s": 2.5})
    refused = refusal_of(info)
    assert 400 <= refused.status < 600
    assert refused.error.message.startswith("what happened")
    assert refused.error.type in ("invalid_request_error", "rate_limit_error", "server_error", "timeout_error")
    retried_by_clients = refused.status in (408, 409, 429) or refused.status >= 500
    if not info.retryable and retried_by_clients:
        assert refused.headers["x-should-retry"] == "false"
    if refused.status in (429, 503) and info.retryable:
        assert refused.headers["Retry-After"] == "3"


def test_codes_have_openais_names_where_it_has_one() -> None:
    found = {code: (refusal_of(ErrorInfo(code, "")).status, refusal_of(ErrorInfo(code, "")).error.code) for code in ERRORS}
    assert found["task_too_large"] == (400, "context_length_exceeded")
    assert found["content_filtered"] == (400, "content_filter")
    assert found["queue_full"] == (429, "rate_limit_exceeded")
    assert found["no_engine"] == (503, "no_engine")
