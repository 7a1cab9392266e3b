"""What one engine can hold and compute. Plain data; `parrot.engine.core` has the rules."""

from __future__ import annotations

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
