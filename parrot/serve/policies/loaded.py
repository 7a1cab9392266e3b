"""Engines from the least to the most loaded, at no more cost in a full cluster than in an idle one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from parrot.serve.engine_index import EngineIndex
from parrot.serve.engines import Engine, by_load
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, Terms, open_first


def least_loaded_first(task: Task, cluster: Cluster, terms: Callable[[Engine], Terms]) -> Iterator[tuple[Engine, Terms]]:
    """Engines of the task's lane with what `terms` says of each. O(log E) to the first that admits the task."""
    index = task.call.lane.ordered(by_load)
    return open_first(task, cluster, lambda ids: _loaded(index, terms, ids))


def _loaded(index: EngineIndex, terms: Callable[[Engine], Terms], ids: list[int] | None) -> Iterator[tuple[Engine, Terms]]:
    for engine in index if ids is None else index.among(ids):
        yield engine, terms(engine)
