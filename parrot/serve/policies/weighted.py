"""`weighted`: the highest weighted sum of scores between 0 and 1 (llm-d inference scheduler, its default scorers and weights).

- prefix (weight 3): the part of the prompt that the engine holds;
- queue (2): (max − q) / (max − min) with q the tasks on the engine, over the engines of the lane; 1 where all have as many;
- KV utilisation (2): 1 − the part of the engine's token capacity that is taken.

llm-d scrapes q (requests that wait) and utilisation from the engines. Here both are the core's own counts: q is the tasks in
flight there, whether they run or wait, since the core hands an engine no more than it takes; utilisation is its reserved
tokens over `tokens_capacity`. Of equal sums llm-d draws one; here the lower id is taken. Left open there: an engine that is
full; the next highest sum is taken. Load has a weight against the prefix's, so a hot prefix spreads when its engines fill.

A placement costs O(log E) and a few dozen engines where the sums of the least loaded engines stand out, O(E) at worst: the
queue's scale moves with the most and least loaded engine, so that no index has the order of the sums itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engine_index import Load
from parrot.serve.engines import Engine
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, Terms, best_of, open_first
from parrot.serve.policies.matching import by_score
from parrot.serve.policies.parameters import Parameter
from parrot.serve.queue import TaskQueue


def utilisation(engine: Engine) -> float:
    """The part of its tokens that is reserved; 1 where a task alone exceeds it."""
    return min(engine.reserved / engine.description.tokens_capacity, 1.0)


def by_utilisation(engine: Engine) -> Load:
    """Least utilised first, in parts of 2^40."""
    return min((engine.reserved << 40) // engine.description.tokens_capacity, 1 << 40)


def by_queue(engine: Engine) -> Load:
    """Fewest tasks, then least utilised."""
    return len(engine.tasks) << 48 | by_utilisation(engine)


@mypyc_attr(allow_interpreted_subclasses=True)
class Weighted(InOrder):
    """Tasks in order of readiness, each to the engine with the highest sum that has room for it."""

    name: ClassVar[str] = "weighted"
    parameters: ClassVar[dict[str, Parameter]] = {
        "prefix": Parameter(float, 3.0, "weight of the cached part of the prompt", at_least=0),
        "queue": Parameter(float, 2.0, "weight of a short queue", at_least=0),
        "kv_utilisation": Parameter(float, 2.0, "weight of free KV memory", at_least=0),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._prefix = float(parameters["prefix"])
        self._queue = float(parameters["queue"])
        self._kv = float(parameters["kv_utilisation"])

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        found = best_of(task, open_first(task, cluster, lambda ids: self._ranked(task, ids)), cluster)
        return () if found is None else (found,)

    def _ranked(self, task: Task, ids: list[int] | None) -> Iterator[tuple[Engine, Terms]]:
        lane = task.call.lane
        queues = lane.ordered(by_queue)
        shortest, longest, emptiest = queues.first(), queues.last(), lane.ordered(by_utilisation).first()
        if shortest is None or longest is None or emptiest is None:
            return
        least, most = len(shortest.tasks), len(longest.tasks)
        least_used = utilisation(emptiest)

        def cost(engine: Engine, new: int, tasks: int, used: float) -> float:
            prompt = Cluster.prompt_tokens(task, engine)
            prefix = 1.0 - new / prompt if prompt else 0.0
            short = (most - tasks) / (most - least) if most > least else 1.0
            return -(self._prefix * prefix + self._queue * short + self._kv * (1.0 - used))

        def score(engine: Engine, new: int) -> float:
            return cost(engine, new, len(engine.tasks), utilisation(engine))

        def floor(engine: Engine, new: int) -> float:
            # Behind it: as many tasks, but no less used; or more tasks.
            tasks = len(engine.tasks)
            same = cost(engine, new, tasks, utilisation(engine))
            return min(same, cost(engine, new, tasks + 1, least_used)) if most > tasks else same

        for engine, cached, negative in by_score(task, queues, score, floor, ids):
            prompt = Cluster.prompt_tokens(task, engine)
            tasks = len(engine.tasks)
            yield (
                engine,
                {
                    "score": -negative,
                    "prefix": min(1.0, cached / prompt) if prompt else 0.0,
                    "queue": (most - tasks) / (most - least) if most > least else 1.0,
                    "kv_utilisation": 1.0 - utilisation(engine),
                },
            )
