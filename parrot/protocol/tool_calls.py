"""Tool calls inside a text: how an output that is one carries them, and how a model without an endpoint of its own writes them.

A semantic variable is a text. An output that calls tools is what was said, the separator, and the calls as JSON; engines
finish it with the reason `tool_calls`. Models behind token engines write calls as JSON in <tool_call> tags (the form of the
Hermes function-calling data set, which many open models were trained on).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from parrot.protocol.openai import FunctionCall, ToolCall

#: Between what was said and the calls: ASCII's record separator, which JSON has only escaped.
SEPARATOR = "\x1e"
TAG = "<tool_call>"

_CALLS = msgspec.json.Decoder(list[ToolCall])
_TAGGED = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


class _Written(msgspec.Struct):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


def with_calls(text: str, calls: Sequence[ToolCall]) -> str:
    """An output that said `text` and calls tools."""
    return f"{text}{SEPARATOR}{msgspec.json.encode(list(calls)).decode()}"


def split_calls(output: str) -> tuple[str, list[ToolCall]]:
    """What an output said, and the tools that it calls. Raises ValueError when it is not of `with_calls`."""
    text, found, calls = output.rpartition(SEPARATOR)
    if not found:
        raise ValueError("the output has no tool calls")
    return text, _CALLS.decode(calls.encode())


def read_tagged(output: str, id_prefix: str) -> tuple[str, list[ToolCall]]:
    """What a model said, and its calls in tags; their ids are `id_prefix` and a number. If one is no JSON with a name, all
    of it is text and there are none."""
    calls: list[ToolCall] = []
    for match in _TAGGED.finditer(output):
        try:
            written = msgspec.json.decode(match[1], type=_Written)
        except msgspec.MsgspecError:
            return output, []
        arguments = bytes(written.arguments).decode()
        if arguments.startswith('"'):  # some models write the arguments as a string of JSON
            arguments = msgspec.json.decode(arguments, type=str)
        calls.append(ToolCall(f"{id_prefix}{len(calls)}", FunctionCall(written.name, arguments)))
    if not calls:
        return output, []
    return output[: output.index(TAG)].rstrip(), calls


def safe_length(text: str) -> int:
    """How many characters of an output that may call tools can be shown before it is whole: up to a tag, or to what may be the
    beginning of one, with the white space before it."""
    found = text.find(TAG)
    if found < 0:
        found = len(text)
        held = min(len(TAG) - 1, len(text))
        while held and not TAG.startswith(text[len(text) - held :]):
            held -= 1
        found -= held
    return len(text[:found].rstrip())
