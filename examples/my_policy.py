"""A policy of one's own: each task goes where the least work stands before its first token. docs/policies.md explains it.

Run: python -m sim.check_policy examples.my_policy:LeastWork
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import merge
from typing import Any, ClassVar

import numpy as np

from parrot.serve.engines import Engine, by_load
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, Terms, best_of
from parrot.serve.policies.parameters import Parameter
from parrot.serve.queue import TaskQueue


class LeastWork(InOrder):
    """Tasks in order of readiness, each to the engine with the fewest tokens to get through: those that it has reserved for
    others, and `prompt_weight` times those of the prompt that it does not hold. Ties go to the engine registered first."""

    name: ClassVar[str] = "least_work"
    parameters: ClassVar[dict[str, Parameter]] = {
        "prompt_weight": Parameter(float, 1.0, "reserved tokens that a prompt token to be computed weighs", at_least=0),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._prompt_weight: float = parameters["prompt_weight"]

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        def weighed(engine: Engine) -> tuple[Engine, Terms]:
            missing = cluster.prompt_tokens(task, engine) - cluster.cached_tokens(task, engine)
            score = engine.reserved + self._prompt_weight * missing
            return engine, {"score": score, "reserved_tokens": engine.reserved, "missing_tokens": missing}

        def score(candidate: tuple[Engine, Terms]) -> tuple[float, int]:
            return candidate[1]["score"], candidate[0].id

        # Only engines that hold a part of the prompt can come before the least loaded one, so that few need be weighed.
        holders = {engine.id: engine for _, engines in cluster.longest_matches(task) for engine in engines}
        others = (engine for engine in task.call.lane.ordered(by_load) if engine.id not in holders)
        ranked = merge(sorted(map(weighed, holders.values()), key=score), map(weighed, others), key=score)
        found = best_of(task, ranked, cluster)
        return () if found is None else (found,)
