"""One task inside an engine's shell: what was asked, the events on their way to its client, and when its tokens came.

A job turns what a loop reports (admitted, tokens, ended) into the `TaskEvent`s of the protocol, in the right order and
each at most once. It schedules nothing and knows no sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from parrot.engine.batches import EngineTask
from parrot.engine.context_ids import ContextIds
from parrot.protocol.api import SamplingConfig
from parrot.protocol.engine import Failed, Finished, Rejected, Started, TaskEvent, TokenLogprob, Tokens
from parrot.protocol.errors import ERRORS


class Turn(NamedTuple):
    """A part of a prompt as text. `role`: in a chat: system, user, assistant …, or as `protocol.engine.FillSpec` has them.
    `begins`: a message begins with it, whatever role the one before had."""

    role: str
    text: str
    begins: bool = False


class TaskStream:
    """Events of one task, from a loop to the one client that reads them. `closed` after the last event was put."""

    __slots__ = ("_events", "_waiter", "closed")

    def __init__(self) -> None:
        self._events: list[TaskEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self.closed = False

    def put(self, event: TaskEvent, last: bool = False) -> None:
        """Adds an event; ignored after the last one."""
        if self.closed:
            return
        self._events.append(event)
        self.closed = last
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[TaskEvent]:
        """All events that have come; waits for the first. Empty only when the stream is closed and was read to its end."""
        if not self._events and not self.closed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None
        events, self._events = self._events, []
        return events


class Job:
    """A task between its request and its last event. Times are the engine's clock, in seconds."""

    __slots__ = (
        "_chars",
        "_context_ids",
        "_first_at",
        "_ids",
        "_last_at",
        "_max_gap_s",
        "_started",
        "arrived",
        "cached_tokens",
        "forced_ids",
        "forced_text",
        "key",
        "label",
        "link_ids",
        "sampling",
        "stream",
        "task",
        "texts",
    )  # fmt: skip

    def __init__(
        self,
        key: Hashable,
        label: str,
        task: EngineTask,
        link_ids: Sequence[Sequence[int]],
        sampling: SamplingConfig | None,
        arrived: float,
        context_ids: ContextIds | None = None,
        forced_ids: tuple[int, ...] = (),
        forced_text: str = "",
        texts: Sequence[Turn] = (),
    ) -> None:
        """`sampling` None: only fills. `context_ids`: whose evictions its events carry (None: they carry none). `texts`: what
        `link_ids` stand for, of an engine that takes text."""
        self.key = key
        self.label = label
        self.task = task
        self.link_ids = link_ids
        self.sampling = sampling
        self.arrived = arrived
        self.forced_ids = forced_ids
        self.forced_text = forced_text
        self.texts = texts
        self.stream = TaskStream()
        self.cached_tokens = 0
        self._context_ids = context_ids
        self._started = False
        self._ids = 0  # tokens put on the stream, without the forced ones
        self._chars = 0
        self._first_at = self._last_at = -1.0
        self._max_gap_s = 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.link_ids))

    @property
    def ended(self) -> bool:
        return self.stream.closed

    def start(self, cached_tokens: int) -> None:
        """It was admitted to a batch; later times (after a preemption) say nothing new."""
        if not self._started:
            self._started = True
            self.cached_tokens = cached_tokens
            self.stream.put(Started(cached_tokens, self._evicted()))

    def tokens(self, ids: tuple[int, ...], text: str, now: float, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """New tokens, sampled at `now`."""
        self._note_time(now)
        self._put_tokens(ids, text, logprobs)

    def _put_tokens(self, ids: tuple[int, ...], text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        self._ids += len(ids)
        self._chars += len(text)
        self.stream.put(Tokens(ids, text, self._evicted(), logprobs))

    def _note_time(self, now: float) -> None:
        if self._first_at < 0.0:
            self._first_at = now
        else:
            self._max_gap_s = max(self._max_gap_s, now - self._last_at)
        self._last_at = now

    def finish(self, ids: tuple[int, ...], text: str, reason: str, now: float, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """It ended with the whole output `ids`, `text` (forced part included); its last token came at `now`. `logprobs`: those
        of the tokens that were not told yet, if the output keeps them."""
        if len(ids) > len(self.forced_ids) + self._ids:
            self._note_time(now)
            self.show(ids, text, logprobs)
        self.finish_timed(ids, text, reason, max(0.0, self._last_at - self._first_at), self._max_gap_s)

    def finish_timed(self, ids: tuple[int, ...], text: str, reason: str, decode_s: float, max_gap_s: float) -> None:
        """The same with times that somebody else has measured. What was not streamed yet is streamed first."""
        self.show(ids, text)
        counts = (self.prompt_tokens, self.cached_tokens)
        self.stream.put(Finished(ids, text, reason, *counts, decode_s, max_gap_s, evicted=self._evicted()), last=True)

    def finish_text(
        self,
        text: str,
        reason: str,
        prompt_tokens: int,
        output_tokens: int,
        cost: float,
        ids: tuple[int, ...] = (),
        times: tuple[float, float] | None = None,
    ) -> None:
        """It ended with the whole output `text`, whose `ids` nobody knows unless they are given; the counts are another's.
        `times`: from its first token to its last, and the largest gap between, where somebody else has measured them."""
        self.show((), text)
        decode_s, max_gap_s = times or (max(0.0, self._last_at - self._first_at), self._max_gap_s)
        counts = (prompt_tokens, self.cached_tokens, decode_s, max_gap_s, output_tokens, cost)
        self.stream.put(Finished(ids, text, reason, *counts, self._evicted()), last=True)

    @property
    def max_gap_s(self) -> float:
        """The longest wait between two of its tokens so far."""
        return self._max_gap_s

    @property
    def first_token_at(self) -> float | None:
        """When its first token came, of what this attempt generated; None before."""
        return None if self._first_at < 0.0 else self._first_at

    def show(self, ids: tuple[int, ...], text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        """The output so far, forced part included: what of it was not streamed yet goes out."""
        rest_ids = ids[len(self.forced_ids) + self._ids :]
        rest_text = text[len(self.forced_text) + self._chars :]
        if rest_ids or rest_text:
            self._put_tokens(rest_ids, rest_text, logprobs)

    def reject(self, code: str, message: str) -> None:
        """The engine has no room for it now."""
        self.stream.put(Rejected(code, message, self._evicted()), last=True)

    def fail(self, code: str, message: str, retryable: bool | None = None) -> None:
        """It failed; whether another attempt can help is the error table's word unless it is given."""
        if retryable is None:
            retryable = ERRORS[code].retryable
        self.stream.put(Failed(code, message, retryable, self._evicted()), last=True)

    def refuse(self, code: str, message: str) -> None:
        """EngineCore's refusal: no room now is a rejection, the rest a failure."""
        if code == "engine_rejected":
            self.reject(code, message)
        else:
            self.fail(code, message)

    def _evicted(self) -> tuple[int, ...]:
        return () if self._context_ids is None or self.stream.closed else self._context_ids.take_evicted()
