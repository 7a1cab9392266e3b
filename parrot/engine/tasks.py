"""The core's tasks on this engine: requests become jobs, attempts are known by (epoch, task, attempt), lives end.

Checks what comes in and says whose contexts are whose; what runs when is the loop's affair.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable
from typing import TypeVar

import msgspec

from parrot.engine.batches import EngineTask, Link
from parrot.engine.context_ids import ContextIds
from parrot.engine.jobs import Job, Turn
from parrot.engine.loop import EngineLoop
from parrot.protocol.engine import CONTINUED, AbortRequest, FillSpec, TaskRequest
from parrot.protocol.errors import ParrotError
from parrot.tokenizer import Tokenizer

log = logging.getLogger(__name__)

T = TypeVar("T")

_TASK = msgspec.json.Decoder(TaskRequest)


class Tasks:
    """The attempts that run here, and the epoch of the core that they belong to."""

    def __init__(self, loop: EngineLoop, tokenizer: Tokenizer, context_ids: ContextIds, instance: str = "") -> None:
        """`instance`: what this process registers as."""
        self._loop = loop
        self._tokenizer = tokenizer
        self._ids = context_ids
        self._instance = instance
        self._running: dict[Hashable, Job] = {}
        self.epoch: int | None = None  #: None: of the first task or registration that comes
        self._engine_id = 0  # by which the core knows this engine in that epoch

    def start(self, body: bytes, arrived: float) -> Job:
        """The job of a POST /task whose body is `body`, handed to the loop. All but a malformed body is told as an event."""
        request = decode(_TASK, body)
        if request.instance and self._instance and request.instance != self._instance:
            job = self._job(request, arrived)
            job.fail("conflict", "the engine that this task is for is gone; another process has its address", retryable=True)
            return job
        self.meet(request.epoch, request.engine_id)
        job = self._job(request, arrived)
        if (request.epoch, request.engine_id) != (self.epoch, self._engine_id):
            given, known = f"{request.epoch}, engine id {request.engine_id},", f"{self.epoch}, engine id {self._engine_id}"
            message = f"epoch {given} is over; this engine is registered in epoch {known}"
            job.fail("conflict", message, retryable=True)
        elif job.key in self._running:
            job.fail("conflict", f"attempt {request.attempt} of task {job.label} is already running here")
        else:
            self._submit(job, request)
        return job

    def _submit(self, job: Job, request: TaskRequest) -> None:
        try:
            request.generate.sampling.check()
            if not job.link_ids:
                raise ParrotError("bad_request", "the task's chain has no tokens; a generate needs at least one before it")
        except ParrotError as error:
            job.fail(error.code, str(error))
            return
        generate = request.generate
        if len(generate.forced_ids) >= generate.sampling.max_gen_length:
            # An earlier attempt was cut off between its last token and its end: there is nothing left to generate.
            job.start(0)
            job.finish_timed(generate.forced_ids, generate.forced_text, "length", 0.0, 0.0)
            return
        self._running[job.key] = job
        self._loop.submit(job)

    def _job(self, request: TaskRequest, arrived: float) -> Job:
        generate = request.generate
        ids = [self._token_ids(fill, head=place == 0) for place, fill in enumerate(request.chain)]
        texts = [turn_of(fill) for fill in request.chain if fill.text]
        # A link without tokens (an empty input) needs no context of its own.
        links = tuple(Link(self._ids.of_core(f.context_id), len(i)) for f, i in zip(request.chain, ids, strict=True) if i)
        key = (request.epoch, request.task, request.attempt)
        task = EngineTask(
            key=key,
            links=links,
            generate_context_id=self._ids.of_core(generate.context_id),
            max_gen_length=generate.sampling.max_gen_length,
            forced_tokens=len(generate.forced_ids),
        )
        at = request.task
        label = f"{at.session_id}.{at.call}.{at.output}#{request.attempt}"
        link_ids = [i for i in ids if i]
        forced = (generate.forced_ids, generate.forced_text)
        return Job(key, label, task, link_ids, generate.sampling, arrived, self._ids, *forced, texts)

    def _token_ids(self, fill: FillSpec, head: bool) -> list[int]:
        if fill.token_ids is not None:
            return fill.token_ids
        if fill.text is None:
            raise ParrotError("bad_request", f"fill of context {fill.context_id} has neither token_ids nor text")
        return encode(self._tokenizer, fill.text, head)

    def done(self, job: Job) -> None:
        """The client has got the job's last event, or has gone away: what still runs is aborted."""
        if self._running.get(job.key) is job:
            del self._running[job.key]
            if not job.ended:
                self._loop.abort(job.key)

    def abort(self, request: AbortRequest) -> None:
        """Gives up one attempt; its stream ends with a failure. Unknown ones are ignored."""
        job = self._running.pop((request.epoch, request.task, request.attempt), None)
        if job is not None and not job.ended:
            self._loop.abort(job.key)
            job.fail("cancelled", f"attempt {request.attempt} of task {job.label} was aborted")

    def free(self, epoch: int, context_ids: Iterable[int]) -> int:
        """Frees contexts of the core; tokens that they added. Those of an earlier epoch are gone already."""
        if epoch != self.epoch:
            return 0
        return self._loop.free_contexts([self._ids.of_core(i) for i in context_ids])

    def meet(self, epoch: int, engine_id: int) -> None:
        """Takes notice of the core's `epoch`, and of the id that this engine has in it: a later one than known ends all that
        was of the earlier. (A registration that was delivered late gives an engine a new id, and context ids begin anew.)"""
        if self.epoch is not None and (epoch, engine_id) <= (self.epoch, self._engine_id):
            return
        if self.epoch is not None:
            self.forget(f"the core has begun epoch {epoch}, engine id {engine_id}")
        self.epoch, self._engine_id = epoch, engine_id

    def registered(self, epoch: int, engine_id: int) -> None:
        """The core has this engine under that id in `epoch`; tasks of it may have come before its answer did."""
        if self.epoch is not None and (self.epoch, self._engine_id) != (epoch, engine_id):
            self.forget(f"the core is in epoch {epoch}, where this engine's id is {engine_id}")
        self.epoch, self._engine_id = epoch, engine_id

    def forget(self, reason: str) -> None:
        """The core no longer knows this engine: its attempts end, its contexts go."""
        for job in list(self._running.values()):
            if not job.ended:
                self._loop.abort(job.key)
                job.fail("unavailable", reason, retryable=True)
        self._running.clear()
        if left := self._ids.of_this_life(self._loop.context_ids()):
            log.info("%s: freeing %d contexts of before", reason, len(left))
            self._loop.free_contexts(left)
        self._ids.next_life()
        self.epoch = None

    def note_evicted(self, internal_ids: Iterable[int]) -> None:
        """The loop has given up these contexts."""
        self._ids.note_evicted(internal_ids)


def turn_of(fill: FillSpec) -> Turn:
    """The fill as a part of a chat: what was generated is the assistant's, what says nothing else is the user's."""
    role = fill.role or ("assistant" if fill.output else "user")
    return Turn(role, fill.text or "", begins=fill.role not in ("", CONTINUED))


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """`body` decoded. Raises `bad_request`, which says where it is wrong."""
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise ParrotError("bad_request", f"the body is not what this path takes: {error}") from None
    except RecursionError:
        raise ParrotError("bad_request", "the body is nested too deeply") from None


def encode(tokenizer: Tokenizer, text: str, head: bool) -> list[int]:
    """The ids of `text`, after the tokenizer's beginning-of-sequence token at the `head` of a chain."""
    ids = tokenizer.encode(text)
    return [tokenizer.bos_id, *ids] if head and tokenizer.bos_id is not None else ids
