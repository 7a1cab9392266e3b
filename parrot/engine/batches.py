"""What EngineCore is told and what it says: limits, tasks, batches. Plain data; `parrot.engine.core` has the rules."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from parrot.latency import BatchShape

if TYPE_CHECKING:
    from parrot.engine.running import Task


class EngineLimits(msgspec.Struct, frozen=True):
    """What one engine can hold and compute. Counts are tokens unless the name says otherwise.

    `fill_chunk_size` -1: a fill is never cut. `pipeline_depth`: batches that may be issued before the one that runs is
    complete.
    """

    num_blocks: int
    block_size: int
    max_batch_size: int
    max_num_batched_tokens: int
    max_total_tokens: int
    tasks_capacity: int
    max_seq_len: int
    fill_chunk_size: int = -1
    pipeline_depth: int = 0

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_batch_size", "max_num_batched_tokens", "max_total_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.fill_chunk_size != -1 and self.fill_chunk_size < 1:
            raise ValueError(f"fill_chunk_size is {self.fill_chunk_size}; use -1 for no chunking, or 1 and above")
        if self.pipeline_depth < 0:
            raise ValueError(f"pipeline_depth is {self.pipeline_depth}; it must be at least 0")

    @property
    def largest_task(self) -> int:
        """The most that a task's prompt and output may be together, in tokens."""
        return min(self.max_seq_len, self.max_total_tokens, self.num_blocks * self.block_size)

    def fit(self, task: EngineTask) -> EngineTask:
        """The task, its max_gen_length cut to what is left behind its prompt: an output ends there as at any limit. A
        prompt that leaves no room for one token stays as it is, to be refused."""
        if task.parent_context_id is not None:
            return task
        room = self.largest_task
        for link in task.links:
            room -= link.tokens
        if not task.forced_tokens < room < task.max_gen_length:
            return task
        return msgspec.structs.replace(task, max_gen_length=room)


class Link(NamedTuple):
    """A context of a chain and the tokens that it adds to its parent."""

    context_id: int
    tokens: int


class EngineTask(msgspec.Struct):
    """One task: fill a chain and generate behind it.

    `links`: the whole chain, head first; or, with `parent_context_id`, what goes on behind that context, which the engine
    must then hold. `generate_context_id` None: fill only. `forced_tokens`: tokens of the output that are known already;
    they are filled, and count in `max_gen_length`.
    """

    key: Hashable
    links: tuple[Link, ...]
    generate_context_id: int | None
    max_gen_length: int = 0
    forced_tokens: int = 0
    parent_context_id: int | None = None


class Refused(Exception):
    """A task that the engine does not take. `code` is one of parrot.protocol.errors.ERRORS."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Row(NamedTuple):
    """A task's part of an iteration: it computes the chain's positions [start, stop). `context_id` is the deepest context
    among them. `samples`: the last position's output is sampled. `decode`: it is one token, sampled before."""

    key: Hashable
    context_id: int
    start: int
    stop: int
    samples: bool
    decode: bool


class Batch:
    """An iteration to compute: decode rows first, then chunks of fills.

    `copies`: (source block, destination block), whole blocks, made before anything is computed. `admitted`: tasks that run
    from this iteration on, with the prompt tokens found in memory. `preempted`: tasks that lost their room and wait again.
    `decoders` and `fills` are the core's own tasks; `step` numbers the iterations that decode (0: this one does not).
    """

    __slots__ = ("_shape", "_shifted", "admitted", "copies", "decoders", "fills", "number", "preempted", "step")

    def __init__(
        self,
        number: int,
        step: int,
        decoders: tuple[Task, ...],
        fills: list[tuple[Task, Row]],
        copies: tuple[tuple[int, int], ...],
        admitted: tuple[tuple[Hashable, int], ...],
        preempted: tuple[Hashable, ...],
        shape: BatchShape,
    ) -> None:
        self.number = number
        self.step = step
        self.decoders = decoders
        self.fills = fills
        self.copies = copies
        self.admitted = admitted
        self.preempted = preempted
        self._shape = shape
        self._shifted = 0  # iterations since it had that shape

    @property
    def shape(self) -> BatchShape:
        """What its duration depends on."""
        shape = self._shape
        if self._shifted:
            more = self._shifted * shape.decode_rows
            shape = shape._replace(decode_kv=shape.decode_kv + more, decode_kv_unique=shape.decode_kv_unique + more)
        return shape

    @property
    def rows(self) -> tuple[Row, ...]:
        """A row a task. They are made when they are asked for: simulation never asks."""
        behind = self.step - 1
        rows = [
            Row(task.key, task.output_id, task.origin + behind, task.origin + self.step, True, True)  # type: ignore[arg-type]
            for task in self.decoders
        ]
        rows += [row for _, row in self.fills]
        return tuple(rows)

    @property
    def tasks(self) -> list[Task]:
        """The task of each row."""
        return [*self.decoders, *(task for task, _ in self.fills)]

    def shift(self, k: int) -> None:
        """Becomes the batch that follows it after `k` iterations in which nothing but decoding happened."""
        self.number += k
        self.step += k
        self.copies = self.admitted = self.preempted = ()
        self._shifted += k


class Progress(NamedTuple):
    """What a complete iteration changed: tasks whose first token came, tasks that ended (fill-only ones too), and those
    preempted since the last complete iteration."""

    first_tokens: tuple[Hashable, ...]
    finished: tuple[Hashable, ...]
    preempted: tuple[Hashable, ...]


class Span(NamedTuple):
    """Positions [start, stop) of a chain belong to this context."""

    context_id: int
    start: int
    stop: int
