"""The five primitives, for an engine used alone: a client's contexts, each a chain of fills and generates.

The ids of the tokens are kept here, so that a context that the engine had to evict is computed again without the
client's notice. These contexts are never the core's, whatever their numbers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple

from parrot.engine.batches import EngineTask, Link
from parrot.engine.context_ids import ContextIds
from parrot.engine.jobs import Job, Turn
from parrot.engine.loop import EngineLoop
from parrot.engine.tasks import encode
from parrot.protocol.api import SamplingConfig
from parrot.protocol.engine import (
    Failed,
    FillAnswer,
    FillRequest,
    Finished,
    GenerateAnswer,
    GenerateRequest,
    PrimitiveRequest,
    Rejected,
    TaskEvent,
)
from parrot.protocol.errors import ParrotError
from parrot.tokenizer import Tokenizer


class Part(NamedTuple):
    """An EngineCore context and what it adds: tokens, and for an engine that takes text, that text with its role."""

    context_id: int
    ids: list[int]
    turn: Turn | None = None


@dataclass
class _Context:
    inherited: tuple[Part, ...]  # the parent's chain, as it was at the fork
    own: list[Part] = field(default_factory=list)
    busy: bool = False

    @property
    def chain(self) -> tuple[Part, ...]:
        return (*self.inherited, *self.own)


class Primitives:
    """Contexts of an engine used alone, by the number that the client gave."""

    def __init__(self, loop: EngineLoop, tokenizer: Tokenizer, context_ids: ContextIds, takes_text: bool = False) -> None:
        """`takes_text`: the engine knows texts alone."""
        self._takes_text = takes_text
        self._loop = loop
        self._tokenizer = tokenizer
        self._ids = context_ids
        self._contexts: dict[int, _Context] = {}
        self._count = 0

    async def fill(self, request: FillRequest) -> FillAnswer:
        """POST /fill: appends to the context, or makes it under its parent. Waits until its tokens are computed."""
        if (request.token_ids is None) == (request.text is None):
            raise ParrotError("bad_request", "a fill has exactly one of token_ids and text")
        if self._takes_text and request.text is None:
            raise ParrotError("bad_request", "this engine takes text: a fill with token_ids cannot be sent to its endpoint")
        context, is_new = self._open(request)
        ids = request.token_ids
        if ids is None:
            ids = encode(self._tokenizer, request.text or "", head=not context.chain)
        if not ids:
            self._close(request.context_id, context, keep=True)
            return FillAnswer(0)
        turn = Turn("user", request.text) if self._takes_text and request.text is not None else None
        part = Part(self._ids.new_primitive(), list(ids), turn)
        job = self._job(request, (*context.chain, part), None, None)
        done = False
        try:
            async with aclosing(self._events(job)) as events:
                async for event in events:
                    done = isinstance(event, Finished)
            context.own.append(part)
        finally:
            if not done:
                self._loop.free_contexts([part.context_id])
            self._close(request.context_id, context, keep=done or not is_new)
        return FillAnswer(len(ids))

    async def generate(self, request: GenerateRequest) -> GenerateAnswer:
        """POST /generate: the whole output at once."""
        async with aclosing(self.stream(request)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return GenerateAnswer(event.text, list(event.ids))
        raise ParrotError("internal", f"the generate in context {request.context_id} ended without a result")

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[TaskEvent, None]:
        """POST /generate_stream: the events of the generate, as they come. Raises ParrotError where it is refused."""
        request.sampling_config.check()
        context, is_new = self._open(request)
        done = False
        try:
            if not context.chain:
                raise ParrotError("bad_request", f"context {request.context_id} is empty; fill it before a generate")
            internal = self._ids.new_primitive()
            job = self._job(request, context.chain, internal, request.sampling_config)
            async with aclosing(self._events(job)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        done = True
                        if event.ids or (self._takes_text and event.text):
                            turn = Turn("assistant", event.text) if self._takes_text else None
                            ids = list(event.ids) or self._tokenizer.encode(event.text)
                            context.own.append(Part(internal, ids, turn))
                    yield event
        finally:
            self._close(request.context_id, context, keep=done or not is_new)

    def free(self, context_id: int) -> int:
        """Forgets a context and frees its memory; tokens that it added. Contexts under it keep what they inherited."""
        context = self._contexts.get(context_id)
        if context is None:
            raise ParrotError("not_found", f"context {context_id} is not on this engine", context_id=context_id)
        self._refuse_busy(context_id, context)
        del self._contexts[context_id]
        self._loop.free_contexts([part.context_id for part in context.own])
        return sum(len(part.ids) for part in context.own)

    def _open(self, request: PrimitiveRequest) -> tuple[_Context, bool]:
        context = self._contexts.get(request.context_id)
        is_new = context is None
        if context is None:
            context = _Context(self._parent_chain(request))
            self._contexts[request.context_id] = context
        self._refuse_busy(request.context_id, context)
        context.busy = True
        return context, is_new

    def _parent_chain(self, request: PrimitiveRequest) -> tuple[Part, ...]:
        if request.parent_context_id == -1:
            return ()
        parent = self._contexts.get(request.parent_context_id)
        if parent is None:
            raise ParrotError(
                "context_missing",
                f"parent_context_id {request.parent_context_id} is not on this engine; fill it first, or use -1 for none",
                context_id=request.parent_context_id,
            )
        self._refuse_busy(request.parent_context_id, parent)
        return parent.chain

    def _refuse_busy(self, context_id: int, context: _Context) -> None:
        if context.busy:
            raise ParrotError("conflict", f"context {context_id} has a fill or generate that still runs", context_id=context_id)

    def _close(self, context_id: int, context: _Context, keep: bool) -> None:
        context.busy = False
        if not keep:
            self._contexts.pop(context_id, None)

    def _job(
        self, request: PrimitiveRequest, chain: tuple[Part, ...], generate: int | None, sampling: SamplingConfig | None
    ) -> Job:
        self._count += 1
        key = ("primitive", self._count)
        task = EngineTask(
            key=key,
            links=tuple(Link(part.context_id, len(part.ids)) for part in chain),
            generate_context_id=generate,
            max_gen_length=sampling.max_gen_length if sampling else 0,
        )
        label = f"primitive.{self._count}"
        texts = [part.turn for part in chain if part.turn is not None]
        return Job(key, label, task, [part.ids for part in chain], sampling, self._loop.now(), texts=texts)

    async def _events(self, job: Job) -> AsyncGenerator[TaskEvent, None]:
        """The events of a job that is submitted here and aborted when nobody reads on. Raises for a failure."""
        self._loop.submit(job)
        try:
            while events := await job.stream.take():
                for event in events:
                    if isinstance(event, Failed | Rejected):
                        raise ParrotError(event.code, event.message)
                    yield event
        finally:
            if not job.ended:
                self._loop.abort(job.key)
