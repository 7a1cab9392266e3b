"""What an engine's limits come to, in a form that is read quickly: EngineCore asks a dozen times an iteration. Plain data."""

from __future__ import annotations

from functools import lru_cache

from mypy_extensions import mypyc_attr

from parrot.engine.limits import EngineLimits


@mypyc_attr(acyclic=True)
class Bounds:
    """Tokens, but for `running` and `tasks`, which count tasks, and `depth`: batches issued ahead of the one that runs."""

    __slots__ = ("batched", "chunk", "depth", "held", "running", "task_tokens", "tasks")

    def __init__(self, limits: EngineLimits) -> None:
        self.running = min(limits.max_batch_size, limits.max_num_batched_tokens)
        self.depth = limits.pipeline_depth
        self.held = limits.max_total_tokens
        self.batched = limits.max_num_batched_tokens
        self.chunk = limits.fill_chunk_size
        self.tasks = limits.tasks_capacity
        self.task_tokens = limits.largest_task


@lru_cache(maxsize=64)
def bounds_of(limits: EngineLimits) -> Bounds:
    """Engines with the same limits share them: of a thousand, none would find its own at hand."""
    return Bounds(limits)
