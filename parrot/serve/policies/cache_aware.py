"""`cache_aware`: follow the prefix while loads are balanced, the shortest queue while they are not (SGLang Model Gateway).

1. If the largest number of tasks in flight on an engine exceeds the smallest by more than `balance_abs_threshold` and by more
   than `balance_rel_threshold` times, the engine with the fewest (rule `shortest_queue`): so a hot prefix spreads, and who
   computed it there offers it from then on.
2. Else the engine with the longest cached part of the prompt, if that is more than `cache_threshold` of it
   (`longest_prefix`).
3. Else the engine with the smallest cache (`smallest_cache`).

Parameters and defaults are the gateway's. It matches characters of earlier requests in a tree that it keeps for each engine;
here the core's prefix store says what engines hold, in tokens, and forgets what they evict. Left open there: engines that are
full. The next one by the same rule is taken, for rule 2 the next longest match above the threshold and then rule 3, and
affinity is back once there is room. Of equal matches the engine with the fewest tasks is taken; ties go to fewer tokens (in
rule 3 fewer tasks), then to the lower id.

A placement costs O(log E) and, for each part of the prompt that is cached by k engines, O(min(k, E / k)).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engine_index import EngineIndex, Load
from parrot.serve.engines import Engine, by_tasks
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, Terms, best_of, cached_tokens, open_first, prompt_tokens
from parrot.serve.policies.matching import by_match
from parrot.serve.policies.parameters import Parameter
from parrot.serve.queue import TaskQueue


def by_cache(engine: Engine) -> Load:
    """Fewest cached tokens, then fewest tasks."""
    return engine.cached_tokens << 24 | len(engine.tasks)


@mypyc_attr(allow_interpreted_subclasses=True)
class CacheAware(InOrder):
    """Tasks in order of readiness."""

    name: ClassVar[str] = "cache_aware"
    parameters: ClassVar[dict[str, Parameter]] = {
        "cache_threshold": Parameter(
            float, 0.3, "part of the prompt that must be cached for an engine to be followed", at_least=0, at_most=1
        ),
        "balance_abs_threshold": Parameter(int, 64, "tasks by which loads may differ", at_least=0),
        "balance_rel_threshold": Parameter(float, 1.5, "times by which loads may differ", at_least=1),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._cached = float(parameters["cache_threshold"])
        self._more = int(parameters["balance_abs_threshold"])
        self._times = float(parameters["balance_rel_threshold"])

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        loads = task.call.lane.ordered(by_tasks)
        if self._unbalanced(loads):
            ranked = open_first(task, cluster, lambda ids: _shortest(task, loads, ids))
            found = best_of(task, ranked, cluster, None, "shortest_queue")
        else:
            ranked = open_first(task, cluster, lambda ids: self._by_prefix(task, loads, ids))
            found = best_of(task, ranked, cluster, None, "smallest_cache")
            if found is not None and self._follows(cached_tokens(task, found.engine), task, found.engine):
                found.rule = "longest_prefix"
        return () if found is None else (found,)

    def _unbalanced(self, loads: EngineIndex) -> bool:
        lightest, heaviest = loads.first(), loads.last()
        if lightest is None or heaviest is None:
            return False
        least, most = len(lightest.tasks), len(heaviest.tasks)
        return most - least > self._more and most > self._times * least

    def _follows(self, cached: int, task: Task, engine: Engine) -> bool:
        return cached > self._cached * prompt_tokens(task, engine)

    def _by_prefix(self, task: Task, loads: EngineIndex, ids: list[int] | None) -> Iterator[tuple[Engine, Terms]]:
        followed: set[int] = set()
        for engine, cached in by_match(task, loads, ids):
            if not self._follows(cached, task, engine):
                break
            followed.add(engine.id)
            yield engine, _terms(engine, task)
        caches = task.call.lane.ordered(by_cache)
        for engine in caches if ids is None else caches.among(ids):
            if engine.id not in followed:
                yield engine, _terms(engine, task)


def _shortest(task: Task, loads: EngineIndex, ids: list[int] | None) -> Iterator[tuple[Engine, Terms]]:
    for engine in loads if ids is None else loads.among(ids):
        yield engine, _terms(engine, task)


def _terms(engine: Engine, task: Task) -> Terms:
    return {
        "tasks": len(engine.tasks),
        "cached_tokens": cached_tokens(task, engine),
        "cache_size_tokens": engine.cached_tokens,
    }
