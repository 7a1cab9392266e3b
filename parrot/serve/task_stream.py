"""One attempt of a task on its engine: the request that is sent, and the NDJSON events that come back, as the core's events.

It decides nothing: a stream that ends without an end of the task is a failed attempt that may be tried again.
"""

from __future__ import annotations

from collections.abc import Callable

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
from parrot.protocol.errors import ErrorBody, ErrorInfo
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


class TaskStream:
    """`post` takes the events. `ended`: the core has been told how the attempt ended."""

    def __init__(
        self,
        effect: Dispatch,
        engine: EngineDescription,
        texts: Texts,
        tokenization: Tokenization,
        streams: OutputStreams,
        post: Callable[[AnyEvent], None],
    ) -> None:
        self._effect = effect
        self._engine = engine
        self._texts = texts
        self._tokenization = tokenization
        self._streams = streams
        self._post = post
        self._output = streams.begin(effect.task.session_id, effect.output_var)
        self._rest = b""
        self._has_token = False
        self.ended = False

    # -------------------------------------------------------------------------------------------------- the request

    def request_body(self) -> bytes:
        """The task as JSON. Raises KeyError when a text of its chain is gone."""
        effect = self._effect
        generate = continued(GenerateSpec(effect.generate_context_id, effect.sampling), self._output)
        chain = tuple(self._fill(link, index == 0) for index, link in enumerate(effect.chain))
        request = TaskRequest(effect.engine_id, effect.epoch, effect.task, effect.attempt, chain, generate, effect.parent)
        return _ENCODER.encode(request)

    def _fill(self, link: ChainLink, is_head: bool) -> FillSpec:
        if self._engine.engine_type == "openai":
            text = "".join(map(self._texts.text, link.keys))
            return FillSpec(link.context_id, text=text, output=link.output)
        name = self._engine.tokenizer
        head = self._tokenization.bos_id(name) if is_head and self._engine.bos_tokens else None
        ids = self._texts.ids(link.keys, name, head)
        return FillSpec(link.context_id, ids, output=link.output)  # type: ignore[arg-type]  # encoded already

    # --------------------------------------------------------------------------------------------------- the answer

    async def feed(self, chunk: bytes) -> None:
        """Takes in a part of the stream, cut anywhere. Raises msgspec.DecodeError for what is no TaskEvent."""
        lines = (self._rest + chunk).split(b"\n") if self._rest else chunk.split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line and not self.ended:
                await self._take(_DECODER.decode(line))

    def refused(self, status: int, body: bytes) -> None:
        """The engine answered with an error instead of a stream."""
        try:
            error = _ERROR.decode(body).error
        except msgspec.MsgspecError:
            shown = body[:200].decode("utf-8", "replace")
            error = ErrorInfo("engine_failed", f"engine {self._engine.engine_name!r} answered status {status}: {shown}")
        if error.code == "engine_rejected":
            self._end(TaskRejected(*self._attempt, error.message))
        else:
            self._end(TaskFailed(*self._attempt, error.code, error.message, error.retryable))

    def broken(self, reason: str) -> None:
        """The stream ended, and the task had not."""
        message = f"the stream from engine {self._engine.engine_name!r} broke: {reason}"
        self._end(TaskFailed(*self._attempt, "engine_failed", message, True))

    async def _take(self, event: TaskEvent) -> None:
        if event.evicted:
            self._post(ContextsEvicted(self._effect.engine_id, event.evicted))
        if isinstance(event, Tokens):
            self._first_token()
            self._output.add(event.ids, event.text)
        elif isinstance(event, Started):
            self._post(TaskStarted(*self._attempt, event.cached_tokens))
        elif isinstance(event, Finished):
            await self._finish(event)
        elif isinstance(event, Failed):
            self._end(TaskFailed(*self._attempt, event.code, event.message, event.retryable))
        elif isinstance(event, Rejected):
            self._end(TaskRejected(*self._attempt, event.message))

    async def _finish(self, event: Finished) -> None:
        if event.ids:
            self._first_token()
        session_id = self._effect.task.session_id
        piece = await self._tokenization.output(self._engine.tokenizer, event.text, event.ids)
        self._texts.hold(session_id, (piece,))
        self._post(
            TaskFinished(
                *self._attempt,
                piece.content(),
                len(event.ids),
                event.prompt_tokens,
                event.cached_tokens,
                event.decode_s,
                event.max_gap_s,
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
