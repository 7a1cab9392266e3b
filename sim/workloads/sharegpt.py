"""Reads ShareGPT-style conversations: {"id": …, "conversations": [{"from": …, "value": …}, …]}, as a JSON list or JSONL.

A conversation becomes a chat program: each answer is a call whose prompt is everything before it, and the user thinks
between an answer and the next question. Equal texts have equal keys. Answers in front of the first question, and system
messages, are part of the prompt; what follows the last answer is dropped; a conversation without an answer asks nothing of a
model and is left out. Lengths are those of a tokenizer, or estimated from the number of characters: the application is then
called `sharegpt-estimated`. Nothing is recorded of arrivals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from parrot.configuration import ConfigurationError
from parrot.protocol.api import Criteria
from parrot.tokenizer import load_tokenizer
from sim.workloads.arrivals import stream
from sim.workloads.program import After, Call, Get, Program, Read, Segment, Text, WorkloadError, Write
from sim.workloads.source import Row, Source
from sim.workloads.traces import json_elements

QUESTIONS = frozenset({"human", "user"})
ANSWERS = frozenset({"gpt", "assistant", "chatgpt", "bing", "bard"})
SYSTEM = frozenset({"system"})


class ShareGPTParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Conversations in the form of ShareGPT's."""

    tokenizer: Annotated[str | None, Meta(description="whose lengths to use; none: an estimate")] = None
    characters_per_token: Annotated[float, Meta(gt=0, description="of the estimate")] = 4.0
    think_s: Annotated[float, Meta(ge=0, description="mean time between an answer and the next question (exponential)")] = 5.0
    max_tokens: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Meta(description="a conversation ends before the turn with which it would be longer; none: never"),
    ] = None


class _Message(msgspec.Struct, frozen=True):
    speaker: str = msgspec.field(name="from")
    value: str


class _Conversation(msgspec.Struct, frozen=True):
    conversations: tuple[_Message, ...]


class _Turn(NamedTuple):
    """What comes before an answer, and the answer's tokens."""

    texts: tuple[Text, ...]
    answer_tokens: int


def sharegpt_source(path: str, p: ShareGPTParameters, *, max_gen_length: int, seed: int, label: str = "") -> Source:
    """The conversations in `path`. Reading raises WorkloadError with file, line and reason.

    Raises WorkloadError at once for a tokenizer that cannot be had.
    """
    reader = _Reader(path, p, label)
    name = label + Path(path).stem
    application = "sharegpt" if p.tokenizer else "sharegpt-estimated"
    times = stream(seed, f"{label}sharegpt.times")

    def build(index: int, arrival_s: float, row: Row) -> Program:
        history: list[Segment] = []
        calls, gets = [], []
        for number, turn in enumerate(row[1]):
            history += turn.texts
            after = (After(f"turn{number - 1}", float(times.exponential(p.think_s))),) if number else ()
            answer = Write(f"answer{number}", turn.answer_tokens, max(max_gen_length, turn.answer_tokens))
            calls.append(Call((*history, answer), name="turn", after=after))
            gets.append(Get(f"turn{number}", f"answer{number}", Criteria.LATENCY, after))
            history.append(Read(f"answer{number}"))
        return Program(f"{name}/{index}", arrival_s, tuple(calls), tuple(gets), application=application)

    return Source(path, reader.rows, build, recorded=False, notes=reader.notes)


class _Reader:
    """Reads conversations and counts those that are left out or cut."""

    def __init__(self, path: str, parameters: ShareGPTParameters, label: str) -> None:
        self._path = path
        self._parameters = parameters
        self._label = label
        self._length = _length_of(parameters)
        self._empty = self._cut = 0

    def notes(self) -> Sequence[str]:
        p, notes = self._parameters, []
        if p.tokenizer is None:
            notes.append(f"{self._path}: lengths are estimates, a token for {p.characters_per_token:g} characters (tokenizer)")
        if self._empty:
            notes.append(f"{self._path}: {self._empty} conversations ask nothing of a model and are left out")
        if self._cut:
            notes.append(f"{self._path}: {self._cut} conversations were cut to {p.max_tokens} tokens (max_tokens)")
        return notes

    def rows(self) -> Iterator[tuple[float, list[_Turn]]]:
        """(0, turns), one conversation at a time."""
        self._empty = self._cut = 0
        decode = msgspec.json.Decoder(_Conversation).decode
        found = False
        for number, element in json_elements(self._path):
            found = True
            where = f"{self._path}:{number}"
            try:
                conversation = decode(element)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise WorkloadError(f"{where}: not a conversation, truncated or mixed: {error}") from None
            turns = self._turns(conversation, where)
            if turns:
                yield 0.0, turns
            else:
                self._empty += 1
        if not found:
            raise WorkloadError(f"{self._path}: no conversations in it")

    def _turns(self, conversation: _Conversation, where: str) -> list[_Turn]:
        turns: list[_Turn] = []
        texts: list[Text] = []
        asked, total = False, 0
        for message in conversation.conversations:
            speaker, tokens = message.speaker, self._length(message.value)
            if speaker in ANSWERS and asked:
                answer_tokens = max(1, tokens)  # an empty answer: the model said end at once
                total += sum(text.tokens for text in texts) + answer_tokens
                if self._parameters.max_tokens is not None and total > self._parameters.max_tokens:
                    self._cut += 1
                    break
                turns.append(_Turn(tuple(texts), answer_tokens))
                texts = []
                continue
            if speaker not in ANSWERS and speaker not in QUESTIONS and speaker not in SYSTEM:
                known = ", ".join(sorted(ANSWERS | QUESTIONS | SYSTEM))
                raise WorkloadError(f"{where}: {speaker!r} speaks in it; known are {known}")
            asked = asked or (speaker in QUESTIONS and tokens > 0)
            if tokens:
                texts.append(Text(self._label + _key(message.value), tokens))
        return turns


def _key(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _length_of(p: ShareGPTParameters) -> Callable[[str], int]:
    if p.tokenizer is None:
        return lambda text: -int(-len(text) // p.characters_per_token)
    try:
        tokenizer = load_tokenizer(p.tokenizer)
    except ConfigurationError as error:
        raise WorkloadError(str(error)) from error
    return lambda text: len(tokenizer.encode(text))
