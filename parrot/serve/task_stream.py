"""One attempt of a task on its engine: the request that is sent, and the NDJSON events that come back, as the core's events.

It decides what an engine may say. A stream that ends without an end of the task, and one that says what cannot be
(`Nonsense`), is a failed attempt that may be tried again; what is nonsense never reaches the core as a result, nor a getter
that was shown something else. What comes behind the end of a task is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import msgspec

from parrot.protocol.engine import (
    EngineDescription,
    Failed,
    FillSpec,
    Finished,
    GenerateSpec,
    Rejected,
    Started,
    TaskEvent,
    TaskId,
    TaskRequest,
    Tokens,
)
from parrot.protocol.errors import ERRORS, ErrorBody, ErrorInfo
from parrot.serve.effects import ChainLink, Dispatch
from parrot.serve.events import (
    AnyEvent,
    ContextsEvicted,
    FirstToken,
    TaskFailed,
    TaskFinished,
    TaskRejected,
    TaskStarted,
)
from parrot.serve.streams import OutputStreams, continued
from parrot.serve.texts import Texts
from parrot.serve.tokenization import Tokenization

_DECODER = msgspec.json.Decoder(TaskEvent)
_ENCODER = msgspec.json.Encoder()
_ERROR = msgspec.json.Decoder(ErrorBody)
#: What an engine says of itself. Of an output that failed for good it would say something else: that it is worth asking
#: again, or that the getter's request is at odds with another.
_OF_THE_ENGINE = ("unavailable", "conflict", "cancelled")

#: The longest line that is taken in. A million tokens with their text are some 20 MB.
MAX_LINE_BYTES = 64 * 1024 * 1024
_MAX_REASON = 100  # characters
_MAX_MESSAGE = 2000  # characters of an engine's error message


class Nonsense(Exception):
    """An engine said what cannot be. The message says what."""


class TaskStream:
    """`post` takes the events. `ended`: the core has been told how the attempt ended; `spoilt`: with nonsense."""

    def __init__(
        self,
        effect: Dispatch,
        engine: EngineDescription,
        texts: Texts,
        tokenization: Tokenization,
        streams: OutputStreams,
        post: Callable[[AnyEvent], None],
        instance: str = "",
    ) -> None:
        self._effect = effect
        self._engine = engine
        self._instance = instance
        self._texts = texts
        self._tokenization = tokenization
        self._streams = streams
        self._post = post
        self._output = streams.begin(effect.task.session_id, effect.output_var)
        self._parts: list[bytes] = []  # of a line whose end has not come
        self._parts_bytes = 0
        self._forced: tuple[int, ...] = ()  # ids that the output must begin with
        self._most_tokens = effect.sampling.max_gen_length
        self._has_token = False
        self.ended = False
        self.spoilt = False

    # -------------------------------------------------------------------------------------------------- the request

    def request_body(self) -> bytes:
        """The task as JSON. Raises KeyError when a text of its chain is gone."""
        effect = self._effect
        if self._takes_text:
            self._output.ids.clear()  # no ids go there, and none come back
            self._output.tokenizer = self._engine.tokenizer
        else:
            self._translate_shown()
        generate = continued(GenerateSpec(effect.generate_context_id, effect.sampling), self._output)
        self._forced = generate.forced_ids
        # What was shown may be more tokens here than where it was generated.
        self._most_tokens = max(self._most_tokens, len(self._forced))
        roles = effect.roles or ("",) * len(effect.chain)
        chain = tuple(self._fill(link, roles[index], index == 0) for index, link in enumerate(effect.chain))
        task = (effect.engine_id, effect.epoch, effect.task, effect.attempt)
        return _ENCODER.encode(TaskRequest(*task, chain, generate, effect.parent, self._instance))

    def _translate_shown(self) -> None:
        """What an engine with another tokenizer has streamed is gone on from as text: its ids mean nothing here."""
        output, name = self._output, self._engine.tokenizer
        if output.text and output.tokenizer not in (None, name):
            output.ids[:] = self._tokenization.encode(name, output.text)
            output.stored_ids = len(output.ids)
        output.tokenizer = name

    def _fill(self, link: ChainLink, role: str, is_head: bool) -> FillSpec:
        text = "".join(map(self._texts.text, link.keys)) if self._takes_text else None
        if self._takes_text and not self._engine.takes_token_ids:
            return FillSpec(link.context_id, text=text, output=link.output, role=role)
        name = self._engine.tokenizer
        head = self._tokenization.bos_id(name) if is_head and self._engine.bos_tokens else None
        ids: Any = self._texts.ids(link.keys, name, head)  # encoded already
        return FillSpec(link.context_id, ids, text, link.output, role if self._takes_text else "")

    # --------------------------------------------------------------------------------------------------- the answer

    async def feed(self, chunk: bytes) -> None:
        """Takes in a part of the stream, cut anywhere. Nonsense in it ends the attempt."""
        try:
            for line in self._lines(chunk):
                if line and not self.ended:
                    await self._take(_decoded(line))
        except Nonsense as error:
            self.spoilt = True
            self._parts.clear()
            message = f"engine {self._engine.engine_name!r} sent nonsense: {error}"
            self._end(TaskFailed(*self._attempt, "engine_failed", message, True))

    def _lines(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` ends. Raises Nonsense for one that does not end."""
        lines = chunk.split(b"\n")
        if len(lines) > 1 and self._parts:
            lines[0] = b"".join((*self._parts, lines[0]))
            self._parts, self._parts_bytes = [], 0
        if rest := lines.pop():
            self._parts.append(rest)
            self._parts_bytes += len(rest)
            if self._parts_bytes > MAX_LINE_BYTES:
                raise Nonsense(f"a line of more than {MAX_LINE_BYTES} bytes")
        return lines

    def refused(self, status: int, body: bytes) -> None:
        """The engine answered with an error instead of a stream."""
        try:
            error = _ERROR.decode(body).error
        except msgspec.MsgspecError:
            shown = body[:200].decode("utf-8", "replace")
            error = ErrorInfo("engine_failed", f"engine {self._engine.engine_name!r} answered status {status}: {shown}")
        if error.code == "engine_rejected":
            self._end(TaskRejected(*self._attempt, error.message[:_MAX_MESSAGE]))
        else:
            self._failed(error.code, error.message, error.retryable)

    def broken(self, reason: str) -> None:
        """The stream ended, and the task had not."""
        message = f"the stream from engine {self._engine.engine_name!r} broke: {reason}"
        self._end(TaskFailed(*self._attempt, "engine_failed", message, True))

    async def _take(self, event: TaskEvent) -> None:
        if event.evicted:
            self._post(ContextsEvicted(self._effect.engine_id, event.evicted))
        if isinstance(event, Tokens):
            self._check_tokens(event)
            self._first_token()
            self._output.add(event.ids, event.text, event.logprobs)
        elif isinstance(event, Started):
            if event.cached_tokens < 0:
                raise Nonsense(f"{event.cached_tokens} cached tokens")
            self._post(TaskStarted(*self._attempt, event.cached_tokens))
        elif isinstance(event, Finished):
            await self._finish(event)
        elif isinstance(event, Failed):
            self._failed(event.code, event.message, event.retryable)
        elif isinstance(event, Rejected):
            self._end(TaskRejected(*self._attempt, event.message[:_MAX_MESSAGE]))

    def _failed(self, code: str, message: str, retryable: bool) -> None:
        if code not in ERRORS:
            message = f"engine {self._engine.engine_name!r} failed with the unknown code {code[:100]!r}: {message}"
            code, retryable = "engine_failed", True
        elif retryable and code in _OF_THE_ENGINE:
            code = "engine_failed"
        self._end(TaskFailed(*self._attempt, code, message[:_MAX_MESSAGE], retryable))

    @property
    def _takes_text(self) -> bool:
        """Whether this engine knows texts alone, and no ids."""
        return self._engine.engine_type == "openai"

    def _check_tokens(self, event: Tokens) -> None:
        most, count = self._most_tokens, len(self._output.ids) + len(event.ids)
        if count > most:
            raise Nonsense(f"{count} tokens, where max_gen_length is {most}")
        if event.ids and min(event.ids) < 0:
            raise Nonsense(f"token id {min(event.ids)}")
        if event.logprobs and len(event.logprobs) != len(event.ids) and not self._takes_text:
            raise Nonsense(f"{len(event.logprobs)} log-probabilities of {len(event.ids)} tokens")
        if len(self._output.logprobs) + len(event.logprobs) > most:
            raise Nonsense(f"more than {most} log-probabilities, where max_gen_length is {most}")
        if len(self._output.text) + len(event.text) > MAX_LINE_BYTES:
            raise Nonsense(f"a text of more than {MAX_LINE_BYTES} characters")

    def _check_finished(self, event: Finished) -> None:
        """Raises Nonsense for a result that cannot be, or that contradicts what a getter was shown."""
        ids, most = event.ids, self._most_tokens
        if len(ids) > most:
            raise Nonsense(f"an output of {len(ids)} tokens, where max_gen_length is {most}")
        if ids and min(ids) < 0:
            raise Nonsense(f"token id {min(ids)} in an output")
        if event.text and not ids and not self._takes_text:
            raise Nonsense("an output with text and without tokens")
        counts = (event.prompt_tokens, event.cached_tokens, event.decode_s, event.max_gap_s, event.output_tokens, event.cost)
        if min(counts) < 0 or not isfinite(event.decode_s + event.max_gap_s + event.cost):
            names = "prompt_tokens {}, cached_tokens {}, decode_s {}, max_gap_s {}, output_tokens {}, cost {}"
            raise Nonsense(names.format(*counts))
        # A stop string may begin in tokens that were sent with their text held back: then the cut takes them away.
        forced = self._forced[: len(ids)] if event.reason == "stop_str" else self._forced
        if ids[: len(forced)] != forced:
            raise Nonsense("an output that does not begin with the tokens that it was to go on from")
        if not event.text.startswith(self._output.text):
            if self._output.shown:
                raise Nonsense("an output that does not begin with the text that was streamed")
            # Nobody saw what it said before; from here on nobody will.
            self._output.text = event.text
            self._output.ids[:] = ids

    async def _finish(self, event: Finished) -> None:
        self._check_finished(event)
        if event.ids:
            self._first_token()
        session_id = self._effect.task.session_id
        if not self._takes_text:
            del self._output.logprobs[len(event.ids) :]  # of tokens that the stop took away
        self._output.told_logprobs = len(self._output.logprobs)
        if self._takes_text and not event.ids:
            (piece,) = await self._tokenization.pieces([event.text])
        else:
            piece = await self._tokenization.output(self._engine.tokenizer, event.text, event.ids)
        self._texts.hold(session_id, (piece,))
        self._post(
            TaskFinished(
                *self._attempt,
                piece.content(),
                event.output_tokens if self._takes_text else len(event.ids),
                event.prompt_tokens,
                event.cached_tokens,
                event.decode_s,
                event.max_gap_s,
                event.cost,
                event.reason[:_MAX_REASON],
            )
        )
        self.ended = True
        self._streams.finish(session_id, self._effect.output_var)

    def _first_token(self) -> None:
        if not self._has_token:
            self._has_token = True
            self._post(FirstToken(*self._attempt))

    def _end(self, event: TaskFailed | TaskRejected) -> None:
        self._post(event)
        self.ended = True
        self._streams.fail(self._effect.task.session_id, self._effect.output_var)

    @property
    def _attempt(self) -> tuple[int, TaskId, int]:
        effect = self._effect
        return effect.epoch, effect.task, effect.attempt


def _decoded(line: bytes) -> TaskEvent:
    try:
        event: TaskEvent = _DECODER.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        shown = line[:100].decode("utf-8", "replace")
        raise Nonsense(f"{shown!r} is no event: {error}") from error
    return event
