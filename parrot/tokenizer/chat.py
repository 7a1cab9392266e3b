"""A conversation as the segments of a prompt: the model's own chat template, cut where conversations may part.

The joined segments are what the template renders, whatever it does; only where it is cut is decided here. It is cut behind each
message's content, and before an assistant's too, so that

- two conversations share the contexts of all messages up to where they first differ, a system prompt above all;
- a conversation that grows begins with the segments of its last prompt, where the template renders it so (all it needs is that
  what was said before is rendered as before: render(m1 … mk) is the beginning of render(m1 … mk+1));
- an answer that comes back as a message is a segment of its own, the text that was generated.

Where a template changes the contents (trims them, rewrites them), the cut goes around what it keeps; where that cannot be found
either, behind the system message; else there is one segment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from parrot.protocol.engine import WHOLE_MESSAGE
from parrot.protocol.errors import ParrotError
from parrot.protocol.openai import ChatRequest, Message, ToolCall
from parrot.protocol.openai_checks import chat_options_of, refusal
from parrot.tokenizer.base import Tokenizer

# Marks around contents while a template is rendered: characters of the private use area, which no template treats specially.
_BEGIN, _END, _CLOSE = "\ue0b0", "\ue0b1", "\ue0b2"
_MARK = re.compile(f"([{_BEGIN}{_END}])([0-9]+){_CLOSE}")
_ANY_MARK = re.compile(f"[{_BEGIN}{_END}{_CLOSE}]")


class Conversation(NamedTuple):
    """`segments`: their texts, none of them empty. `shareable`: the first is the template's and a system message's alone, so
    that strangers may share it."""

    segments: list[str]
    shareable: bool


def conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> Conversation:
    """The prompt that asks for the next answer. Raises ParrotError `bad_request`: there is no template, it refuses the
    conversation, or it knows no tools."""
    if tools and tool_format(tokenizer) is None:
        raise ParrotError(
            "bad_request",
            f"the chat template of {tokenizer.name!r} has no tools that are understood here (it must write calls as "
            "<tool_call>…</tool_call>); leave `tools` out, or use a model behind a chat endpoint",
            param="tools",
            openai_code="unsupported_parameter",
        )
    turns = [turn_of(message) for message in messages]
    whole = _render(tokenizer, turns, tools)
    cuts = _cuts(tokenizer, turns, tools, whole)
    segments = [whole[a:b] for a, b in pairwise([0, *(at for at, _ in cuts), len(whole)]) if a < b]
    return Conversation(segments, bool(cuts) and cuts[0][1] == 0 and turns[0]["role"] == "system")


def asked_conversation(request: ChatRequest, tokenizer: Tokenizer) -> Conversation:
    """The prompt of a checked request for a model that samples freely. Raises ParrotError `bad_request`, also for what nothing
    but an endpoint of its own could hold the model to."""
    for name in chat_options_of(request):
        if name not in ("tools", "tool_choice", "parallel_tool_calls"):
            told = f"the model '{request.model}' samples freely here; only models behind a chat endpoint take it"
            raise refusal(f"Unsupported parameter: '{name}': {told}.", name, "unsupported_parameter")
    if request.tool_choice not in (None, "auto", "none"):
        told = f"the model '{request.model}' cannot be made to call a tool; 'auto' and 'none' are supported"
        raise refusal(f"Unsupported value: 'tool_choice': {told}.", "tool_choice", "unsupported_value")
    tools = msgspec.to_builtins(request.tools) if request.tools and request.tool_choice != "none" else None
    if request.parallel_tool_calls is False and tools:
        told = f"the model '{request.model}' cannot be kept from calling several tools"
        raise refusal(f"Unsupported value: 'parallel_tool_calls': {told}.", "parallel_tool_calls", "unsupported_value")
    return conversation(tokenizer, request.messages, tools)


def fill_of(message: Message) -> tuple[str, str]:
    """The message for engines that take text: its role, and its text. What has no text, or more than a role and a text, is a
    whole message as JSON (`parrot.protocol.engine.FillSpec`)."""
    text = message.text
    if text and not (message.tool_calls or message.tool_call_id or message.name or message.refusal):
        return message.role, text
    whole = {name: value for name, value in msgspec.to_builtins(message).items() if value is not None}
    whole.setdefault("content", None)
    return WHOLE_MESSAGE, msgspec.json.encode(whole).decode()


def tool_format(tokenizer: Tokenizer) -> str | None:
    """How the model writes tool calls, as far as its template tells: "tool_call" for JSON in <tool_call> tags; None: it does
    not, or in a form that is not read here."""
    template = tokenizer.chat_template
    return "tool_call" if template is not None and "tools" in template and "<tool_call>" in template else None


def turn_of(message: Message) -> dict[str, Any]:
    """The message as templates read it: text contents, arguments as objects, a developer's message as the system's."""
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [_call_of(call) for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            turn[name] = value
    return turn


def _call_of(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments)
    except msgspec.DecodeError:
        arguments = call.function.arguments
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}


def _render(tokenizer: Tokenizer, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
    return tokenizer.apply_chat_template(turns, True, tools)


def _cuts(
    tokenizer: Tokenizer, turns: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None, whole: str
) -> list[tuple[int, int]]:
    """Where `whole` is cut, in ascending order, and the number of the message that begins or ends there."""
    if not _ANY_MARK.search(whole):
        for keep_space in (True, False):
            marked = [_marked(turn, place, keep_space) for place, turn in enumerate(turns)]
            try:
                found = _render(tokenizer, marked, tools)
            except ParrotError:
                continue
            if _MARK.sub("", found) == whole:
                return _places(found, turns)
    return _behind_system(tokenizer, turns, tools, whole)


def _marked(turn: dict[str, Any], place: int, keep_space: bool) -> dict[str, Any]:
    """The turn with marks around its content; `keep_space`: around the white space at its ends too."""
    content = turn["content"]
    core = content if keep_space else content.strip()
    if not core:
        return turn
    begin = content.index(core)
    marked = f"{_BEGIN}{place}{_CLOSE}{core}{_END}{place}{_CLOSE}"
    return {**turn, "content": content[:begin] + marked + content[begin + len(core) :]}


def _places(marked: str, turns: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """The cuts in the text without the marks: those of messages that were rendered in their turn."""
    cuts: list[tuple[int, int]] = []
    removed = 0
    last = -1
    for mark in _MARK.finditer(marked):
        at, place = mark.start() - removed, int(mark[2])
        removed += len(mark[0])
        if place < last or (mark[1] == _BEGIN and turns[place]["role"] != "assistant"):
            continue
        last = place
        if at > (cuts[-1][0] if cuts else 0):
            cuts.append((at, place))
    return cuts


def _behind_system(
    tokenizer: Tokenizer, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, whole: str
) -> list[tuple[int, int]]:
    if turns[0]["role"] != "system":
        return []
    try:
        head = tokenizer.apply_chat_template(turns[:1], False, tools)
    except ParrotError:
        return []
    return [(len(head), 0)] if head and len(head) < len(whole) and whole.startswith(head) else []
