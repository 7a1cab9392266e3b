"""Makes OpenAI's answers of what was generated: whole ones, and the chunks of a stream. Pure: time and ids are given.

`ChatAnswers` and `CompletionAnswers` have the same methods, so that who serves them need not know which it has:
a stream is `first`, `delta`s, `end` for each choice, `usage`; a whole answer is `whole`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from parrot.protocol.engine import TokenLogprob
from parrot.protocol.openai import (
    AnswerExtension,
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionUsage,
    PromptTokensDetails,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
)

_ENCODER = msgspec.json.Encoder()
DONE = b"data: [DONE]\n\n"

#: How an engine says that an output ended -> OpenAI's finish_reason.
_REASONS = {
    "eos": "stop",
    "stop_token": "stop",
    "stop_str": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "content_filter": "content_filter",
}


class Outcome(NamedTuple):
    """What became of one choice. `logprobs`: None where none were asked for."""

    text: str
    finish_reason: str
    tool_calls: Sequence[ToolCall] = ()
    logprobs: Sequence[TokenLogprob] | None = None


class Answers(Protocol):
    """The answers to one request."""

    def whole(self, outcomes: Sequence[Outcome], usage: CompletionUsage, parrot: AnswerExtension | None = None) -> Any: ...

    def first(self, index: int, parrot: AnswerExtension | None = None) -> Any | None: ...

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None = None) -> Any: ...

    def end(self, index: int, finish_reason: str, tool_calls: Sequence[ToolCall] = ()) -> list[Any]: ...

    def usage(self, usage: CompletionUsage) -> Any: ...


def event(payload: Any) -> bytes:
    """One server-sent event (HTML Standard, section 9.2) with `payload` as its JSON data."""
    return b"data: " + _ENCODER.encode(payload) + b"\n\n"


def finish_reason(reason: str) -> str:
    """OpenAI's word for an engine's; what an engine of an older version does not say is "stop"."""
    return _REASONS.get(reason, "stop")


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> CompletionUsage:
    total = prompt_tokens + completion_tokens
    return CompletionUsage(prompt_tokens, completion_tokens, total, PromptTokensDetails(cached_tokens))


class ChatAnswers:
    """Of POST /v1/chat/completions. `created`: Unix time in seconds; `with_usage`: the stream ends with its usage, which every
    chunk before has as null."""

    def __init__(self, id: str, created: int, model: str, with_usage: bool = False) -> None:
        self._head = (id, created, model)
        self._no_usage: msgspec.UnsetType | None = None if with_usage else msgspec.UNSET

    def whole(
        self, outcomes: Sequence[Outcome], usage: CompletionUsage, parrot: AnswerExtension | None = None
    ) -> ChatCompletion:
        choices = [
            ChatChoice(
                index,
                AnswerMessage(
                    "assistant",
                    outcome.text if outcome.text or not outcome.tool_calls else None,
                    None,
                    list(outcome.tool_calls) or msgspec.UNSET,
                ),
                outcome.finish_reason,
                None if outcome.logprobs is None else chat_logprobs(outcome.logprobs),
            )
            for index, outcome in enumerate(outcomes)
        ]
        return ChatCompletion(*self._head, choices, usage, parrot=msgspec.UNSET if parrot is None else parrot)

    def first(self, index: int, parrot: AnswerExtension | None = None) -> ChatCompletionChunk:
        """Says the role."""
        return self._chunk(ChunkChoice(index, ChatDelta(role="assistant", content="")), parrot)

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None = None) -> ChatCompletionChunk:
        shown = None if logprobs is None else chat_logprobs(logprobs)
        return self._chunk(ChunkChoice(index, ChatDelta(content=text), None, shown))

    def end(self, index: int, finish_reason: str, tool_calls: Sequence[ToolCall] = ()) -> list[Any]:
        chunks = []
        if tool_calls:
            deltas = [ToolCallDelta(place, call.id, call.function) for place, call in enumerate(tool_calls)]
            chunks.append(self._chunk(ChunkChoice(index, ChatDelta(tool_calls=deltas))))
        chunks.append(self._chunk(ChunkChoice(index, ChatDelta(), finish_reason)))
        return chunks

    def usage(self, usage: CompletionUsage) -> ChatCompletionChunk:
        return ChatCompletionChunk(*self._head, [], usage)

    def _chunk(self, choice: ChunkChoice, parrot: AnswerExtension | None = None) -> ChatCompletionChunk:
        extension = msgspec.UNSET if parrot is None else parrot
        return ChatCompletionChunk(*self._head, [choice], self._no_usage, parrot=extension)


class CompletionAnswers:
    """Of POST /v1/completions. `echoes`: for each choice the prompt that its text begins with; () for none."""

    def __init__(self, id: str, created: int, model: str, with_usage: bool = False, echoes: Sequence[str] = ()) -> None:
        self._head = (id, created, model)
        self._no_usage: msgspec.UnsetType | None = None if with_usage else msgspec.UNSET
        self._echoes = echoes
        self._lengths: dict[int, int] = {}  # characters of log-probabilities' tokens so far, by choice

    def whole(self, outcomes: Sequence[Outcome], usage: CompletionUsage, parrot: AnswerExtension | None = None) -> Completion:
        choices = [
            CompletionChoice(
                index,
                self._echo(index) + outcome.text,
                outcome.finish_reason,
                None if outcome.logprobs is None else completion_logprobs(outcome.logprobs),
            )
            for index, outcome in enumerate(outcomes)
        ]
        return Completion(*self._head, choices, usage, parrot=msgspec.UNSET if parrot is None else parrot)

    def first(self, index: int, parrot: AnswerExtension | None = None) -> Completion | None:
        """The echoed prompt, and what belongs to no text; None when there is neither."""
        echo = self._echo(index)
        return None if parrot is None and not echo else self._chunk(CompletionChoice(index, echo), parrot)

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None = None) -> Completion:
        shown = None
        if logprobs is not None:
            begin = self._lengths.get(index, 0)
            shown = completion_logprobs(logprobs, begin)
            self._lengths[index] = begin + sum(len(each.token) for each in logprobs)
        return self._chunk(CompletionChoice(index, text, None, shown))

    def end(self, index: int, finish_reason: str, tool_calls: Sequence[ToolCall] = ()) -> list[Any]:
        return [self._chunk(CompletionChoice(index, "", finish_reason))]

    def usage(self, usage: CompletionUsage) -> Completion:
        return Completion(*self._head, [], usage)

    def _echo(self, index: int) -> str:
        return self._echoes[index] if self._echoes else ""

    def _chunk(self, choice: CompletionChoice, parrot: AnswerExtension | None = None) -> Completion:
        return Completion(*self._head, [choice], self._no_usage, parrot=msgspec.UNSET if parrot is None else parrot)


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> ChatLogprobs:
    """In the form of /v1/chat/completions."""
    return ChatLogprobs(
        [
            ChatLogprob(
                each.token, each.logprob, _bytes(each.token), [TopLogprob(t, value, _bytes(t)) for t, value in each.top]
            )
            for each in logprobs
        ]
    )


def completion_logprobs(logprobs: Sequence[TokenLogprob], begin: int = 0) -> CompletionLogprobs:
    """In the form of /v1/completions. `begin`: characters of the choice's text before these tokens."""
    offsets: list[int] = []
    for each in logprobs:
        offsets.append(begin)
        begin += len(each.token)
    top = [dict(each.top) for each in logprobs] if any(each.top for each in logprobs) else None
    return CompletionLogprobs([each.token for each in logprobs], [each.logprob for each in logprobs], top, offsets)


def _bytes(token: str) -> list[int] | None:
    """Its UTF-8; None for a token that is only a part of a character, whose text does not say which."""
    return None if "\N{REPLACEMENT CHARACTER}" in token else list(token.encode("utf-8", "surrogatepass"))
