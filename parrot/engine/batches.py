"""What EngineCore says: batches and what they changed; and, by the same names, what it is told (`parrot.engine.limits`)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

from parrot.engine.limits import EngineLimits, EngineTask, Link
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
            rows, fills, tokens, pairs, kv, kv_unique, graph = shape
            return BatchShape(rows, fills, tokens, pairs, kv + more, kv_unique + more, graph)
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
