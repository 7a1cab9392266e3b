"""From what a client of OpenAI's routes sends to a call's segments: messages, prompts, references to variables.

It decides where a prompt is cut, which is what can be shared, and which part of it strangers may share. On engines that take
token ids a conversation is the model's own chat template; on engines that take text each message keeps its role.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from parrot.protocol.engine import CONTINUED, WHOLE_MESSAGE
from parrot.protocol.openai import ChatRequest
from parrot.protocol.openai_checks import chat_options_of, refusal
from parrot.serve.events import Constant, Input, Segment
from parrot.serve.served_models import TEXT, ServedModel
from parrot.serve.texts import Piece
from parrot.serve.tokenization import Tokenization
from parrot.tokenizer.chat import asked_conversation, fill_of


class Part(NamedTuple):
    """A piece of a prompt. `role`: a message begins with it (engines that take text). `ids`: the client gave these. `var_id`:
    it is that variable, which the placeholder `text` stands for."""

    text: str
    role: str = ""
    ids: list[int] | None = None
    var_id: str | None = None


class Prompt(NamedTuple):
    """`shareable`: its first part is a system message, which strangers may share. `options`: what the endpoint behind a text
    engine is to honour. `calls_tools`: its output may call tools."""

    parts: list[Part]
    shareable: bool = False
    options: Mapping[str, Any] = MappingProxyType({})
    calls_tools: bool = False

    @property
    def text(self) -> str:
        return "".join([part.text for part in self.parts])


def chat_prompt(request: ChatRequest, model: ServedModel) -> Prompt:
    """The prompt of a checked request. Raises `bad_request` for what the model cannot do."""
    tools = bool(request.tools) and request.tool_choice != "none"
    inputs = request.parrot.inputs if request.parrot is not None else {}
    if model.kind == TEXT:
        shareable = request.messages[0].role in ("system", "developer")
        parts = [Part(text, role) for role, text in map(fill_of, request.messages)]
        return Prompt(_with_inputs(parts, inputs, "messages"), shareable, chat_options_of(request), tools)
    found = asked_conversation(request, model.tokenizer)
    parts = [Part(segment) for segment in _without_bos(found.segments, model.bos_text)]
    return Prompt(_with_inputs(parts, inputs, "messages"), found.shareable, {}, tools)


def completion_prompt(prompt: str | list[int], model: ServedModel, inputs: Mapping[str, str]) -> Prompt:
    """One prompt of a checked request for a completion. Raises `bad_request`."""
    if isinstance(prompt, str):
        return Prompt(_with_inputs([Part(text) for text in _without_bos([prompt], model.bos_text)], inputs, "prompt"))
    if model.kind == TEXT:
        raise refusal(f"The model '{model.name}' is behind an endpoint that is sent texts, and no token ids.", "prompt")
    if model.bos_text and prompt[0] == model.tokenizer.bos_id:
        prompt = prompt[1:]  # the engine puts it there
    try:
        text = model.tokenizer.decode(prompt)
    except Exception as error:  # each library raises something else
        raise refusal(f"Invalid 'prompt': not all of these are token ids of '{model.name}'.", "prompt") from error
    return Prompt([Part(text, ids=prompt)])


def _without_bos(segments: Sequence[str], bos_text: str) -> list[str]:
    """Templates write the token with which a text begins, and so do engines: one of them is enough."""
    if bos_text and segments[0].startswith(bos_text):
        return [text for text in (segments[0].removeprefix(bos_text), *segments[1:]) if text]
    return list(segments)


def _with_inputs(parts: Sequence[Part], inputs: Mapping[str, str], param: str) -> list[Part]:
    """The parts cut at the placeholders of `inputs`. Raises `bad_request` for one that does not occur."""
    if not inputs:
        return list(parts)
    placeholder = re.compile("|".join(r"\{\{" + re.escape(name) + r"\}\}" for name in inputs))
    seen: set[str] = set()
    found: list[Part] = []
    for part in parts:
        if part.role == WHOLE_MESSAGE:
            found.append(part)
            continue
        role, at = part.role, 0
        rest = CONTINUED if role else ""
        for match in placeholder.finditer(part.text):
            if match.start() > at:
                found.append(Part(part.text[at : match.start()], role))
                role = rest
            name = match[0][2:-2]
            seen.add(name)
            found.append(Part(name, role, var_id=inputs[name]))
            role, at = rest, match.end()
        if at < len(part.text):
            found.append(Part(part.text[at:], role))
    missing = [name for name in inputs if name not in seen]
    if missing:
        message = f"Invalid 'parrot.inputs': no text of '{param}' has the placeholder {{{{{missing[0]}}}}}."
        raise refusal(message, "parrot.inputs")
    return found


async def pieces_of(prompts: Sequence[Prompt], tokenization: Tokenization, tokenizer: str) -> list[Piece]:
    """The texts of all prompts with their ids, in order, those of variables left out. `tokenizer`: whose ids clients give."""
    parts = [part for prompt in prompts for part in prompt.parts if part.var_id is None]
    given = {place: (tokenizer, part.ids) for place, part in enumerate(parts) if part.ids is not None}
    return await tokenization.pieces([part.text for part in parts], given)


def segments_of(prompt: Prompt, pieces: Sequence[Piece]) -> tuple[Segment, ...]:
    """The prompt as the core takes it; `pieces`: those of its own texts."""
    brought = iter(pieces)
    return tuple(
        [
            Input(part.text, part.var_id, role=part.role)
            if part.var_id is not None
            else Constant(next(brought).content(), part.role)
            for part in prompt.parts
        ]
    )


def known_tokens(pieces: Sequence[Piece], tokenizer: str) -> int:
    """Tokens of a prompt, as far as they are known before its variables are."""
    return sum(piece.ids[tokenizer].tokens for piece in pieces if tokenizer in piece.ids)
