"""`lmetric`: the least product of new prefill tokens and batch size (LMetric, arXiv 2603.15202).

    score = P × B

P: the tokens that the engine has yet to prefill if the task goes there: the new ones of this prompt and those of its tasks
whose first token has not come. B: its current batch, all tasks in flight there, as the core counts them. A product needs no
weight between cache and load: scaling either factor scales all scores. Load is a factor, so a hot prefix spreads.

Left open by the source, and chosen here: an idle engine's product is 0 whatever it holds, so idle engines come first; of
equal products the smaller P is taken, then the lower id: an idle engine that holds the prefix before one that does not. An
engine that is full is passed for the next product.

A placement costs O(log E + 16) where the least loaded engines stand out, O(E) at worst.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

from mypy_extensions import mypyc_attr

from parrot.serve.engine_index import Load
from parrot.serve.engines import Engine
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, Terms, best_of, open_first
from parrot.serve.policies.matching import by_score
from parrot.serve.queue import TaskQueue


def by_batch(engine: Engine) -> Load:
    """Fewest tasks, then fewest tokens to prefill."""
    return len(engine.tasks) << 48 | engine.prefill_tokens


def by_prefill(engine: Engine) -> Load:
    """Fewest tokens to prefill."""
    return engine.prefill_tokens


def product(engine: Engine, new: int) -> tuple[int, int]:
    """(P × B, P)"""
    prefill = engine.prefill_tokens + new
    return prefill * len(engine.tasks), prefill


@mypyc_attr(allow_interpreted_subclasses=True)
class LMetric(InOrder):
    """Tasks in order of readiness, each to the engine with the least product that has room for it."""

    name: ClassVar[str] = "lmetric"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        found = best_of(task, open_first(task, cluster, lambda ids: _ranked(task, ids)), cluster)
        return () if found is None else (found,)


def _ranked(task: Task, ids: list[int] | None) -> Iterator[tuple[Engine, Terms]]:
    lane = task.call.lane
    freest = lane.ordered(by_prefill).first()
    if freest is None:
        return
    least = freest.prefill_tokens

    def floor(engine: Engine, new: int) -> tuple[int, int]:
        # Behind it: a batch as large, with no less to prefill; or a larger batch.
        return min(product(engine, new), ((least + new) * (len(engine.tasks) + 1), least + new))

    for engine, cached, (score, prefill) in by_score(task, lane.ordered(by_batch), product, floor, ids):
        yield (
            engine,
            {
                "score": score,
                "prefill_tokens": prefill,
                "batch": len(engine.tasks),
                "cached_tokens": cached,
            },
        )
