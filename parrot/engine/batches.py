"""What EngineCore is told, and what it says: tasks; batches, and what they changed. Plain data (`parrot.engine.limits` has the
limits); slots and no tuples with names, for an iteration makes a few of each.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

from mypy_extensions import mypyc_attr

from parrot.engine.limits import EngineLimits
from parrot.latency import BatchShape

if TYPE_CHECKING:
    from parrot.engine.running import Task

__all__ = ["Batch", "EngineLimits", "EngineTask", "Link", "Progress", "Refused", "Row", "Span"]


class Refused(Exception):
    """A task that the engine does not take. `code` is one of parrot.protocol.errors.ERRORS."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@mypyc_attr(acyclic=True)
class Link:
    """A context of a chain and the tokens that it adds to its parent."""

    __slots__ = ("context_id", "tokens")

    def __init__(self, context_id: int, tokens: int) -> None:
        self.context_id = context_id
        self.tokens = tokens


@mypyc_attr(acyclic=True)
class EngineTask:
    """One task: fill a chain and generate behind it.

    `links`: the whole chain, head first; or, with `parent_context_id`, what goes on behind that context, which the engine
    must then hold. `generate_context_id` None: fill only. `forced_tokens`: tokens of the output that are known already;
    they are filled, and count in `max_gen_length`.
    """

    __slots__ = ("forced_tokens", "generate_context_id", "key", "links", "max_gen_length", "parent_context_id")

    def __init__(
        self,
        key: Hashable,
        links: tuple[Link, ...],
        generate_context_id: int | None,
        max_gen_length: int = 0,
        forced_tokens: int = 0,
        parent_context_id: int | None = None,
    ) -> None:
        self.key = key
        self.links = links
        self.generate_context_id = generate_context_id
        self.max_gen_length = max_gen_length
        self.forced_tokens = forced_tokens
        self.parent_context_id = parent_context_id

    def with_most(self, max_gen_length: int) -> EngineTask:
        """The same task, with another limit of its output."""
        return EngineTask(
            self.key, self.links, self.generate_context_id, max_gen_length, self.forced_tokens, self.parent_context_id
        )

    def fitted(self, largest: int) -> EngineTask:
        """The task, its max_gen_length cut to what is left behind its prompt of the `largest` tokens that a task may have: an
        output ends there as at any limit. A prompt that leaves no room for one token stays as it is, to be refused."""
        if self.parent_context_id is not None:
            return self
        room = largest
        for link in self.links:
            room -= link.tokens
        if not self.forced_tokens < room < self.max_gen_length:
            return self
        return self.with_most(room)


@mypyc_attr(acyclic=True)
class Row:
    """A task's part of an iteration: it computes the chain's positions [start, stop). `context_id` is the deepest context
    among them. `samples`: the last position's output is sampled. `decode`: it is one token, sampled before.
    `task` is the core's own."""

    __slots__ = ("context_id", "decode", "key", "samples", "start", "stop", "task")

    def __init__(self, task: Task, context_id: int, start: int, stop: int, samples: bool, decode: bool) -> None:
        self.key = task.key
        self.task = task
        self.context_id = context_id
        self.start = start
        self.stop = stop
        self.samples = samples
        self.decode = decode

    def __repr__(self) -> str:
        return f"Row({self.key!r}, {self.context_id}, {self.start}, {self.stop}, {self.samples}, {self.decode})"


@mypyc_attr(acyclic=True)
class Batch:
    """An iteration to compute: decode rows first, then chunks of fills.

    `copies`: (source block, destination block), whole blocks, made before anything is computed. `preempted`: tasks that lost
    their room and wait again. `decoders`, `fills` and `begun`, those that run from this iteration on, are the core's own
    tasks, or rows of theirs; `step` numbers the iterations that decode (0: this one does not).
    """

    __slots__ = (
        "_kv", "_kv_unique", "_pairs", "_prefill", "begun", "copies", "decoders", "fills", "number", "preempted", "step",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        step: int,
        decoders: tuple[Task, ...],
        fills: tuple[Row, ...],
        copies: tuple[tuple[int, int], ...],
        kv: int,
        kv_unique: int,
    ) -> None:
        """`kv`, `kv_unique`: as the shape's `decode_kv`."""
        self.number = number
        self.step = step
        self.decoders = decoders
        self.fills = fills
        self.copies = copies
        self.begun: tuple[Task, ...] = ()
        self.preempted: tuple[Hashable, ...] = ()
        self._kv = kv
        self._kv_unique = kv_unique
        self._prefill = self._pairs = 0
        for row in fills:
            count = row.stop - row.start
            self._prefill += count
            self._pairs += count * (row.stop + row.start + 1) // 2

    @property
    def shape(self) -> BatchShape:
        """What its duration depends on: an object of the caller's own."""
        return BatchShape(len(self.decoders), len(self.fills), self._prefill, self._pairs, self._kv, self._kv_unique)

    @property
    def admitted(self) -> tuple[tuple[Hashable, int], ...]:
        """The tasks that run from this iteration on, with the prompt tokens found in memory."""
        return tuple([(task.key, task.cached) for task in self.begun])

    @property
    def rows(self) -> tuple[Row, ...]:
        """A row a task. Those that decode are made when they are asked for: simulation never asks."""
        behind = self.step - 1
        rows = [
            Row(task, task.output_id, task.origin + behind, task.origin + self.step, True, True)  # type: ignore[arg-type]
            for task in self.decoders
        ]
        rows += self.fills
        return tuple(rows)

    @property
    def tasks(self) -> list[Task]:
        """The task of each row."""
        return [*self.decoders, *[row.task for row in self.fills]]

    def shift(self, k: int) -> None:
        """Becomes the batch that follows it after `k` iterations in which nothing but decoding happened."""
        self.number += k
        self.step += k
        self.copies = self.begun = self.preempted = ()
        more = k * len(self.decoders)
        self._kv += more
        self._kv_unique += more


@mypyc_attr(acyclic=True)
class Progress:
    """What a complete iteration changed: the core's own tasks whose first token came (`begun`) and those that ended (fill-only
    ones too); the keys of tasks that were preempted since the last complete iteration."""

    __slots__ = ("begun", "ended", "preempted")

    def __init__(self, begun: tuple[Task, ...], ended: tuple[Task, ...], preempted: tuple[Hashable, ...]) -> None:
        self.begun = begun
        self.ended = ended
        self.preempted = preempted

    @property
    def first_tokens(self) -> tuple[Hashable, ...]:
        """The keys of the tasks whose first token came."""
        return tuple([task.key for task in self.begun])

    @property
    def finished(self) -> tuple[Hashable, ...]:
        """The keys of the tasks that ended."""
        return tuple([task.key for task in self.ended])


class Span(NamedTuple):
    """Positions [start, stop) of a chain belong to this context."""

    context_id: int
    start: int
    stop: int
