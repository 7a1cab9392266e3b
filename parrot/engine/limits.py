"""What an engine is told: its limits, and tasks. Plain data; `parrot.engine.core` has the rules."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import msgspec


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
