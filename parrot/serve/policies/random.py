"""`random`: any engine that has room, each as likely as any other; the floor of floors.

Blind to load, prefixes and sessions, it spreads a hot prefix evenly and keeps no affinity. A placement costs O(log E).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, load_terms
from parrot.serve.policies.room import draw
from parrot.serve.queue import TaskQueue


@mypyc_attr(allow_interpreted_subclasses=True)
class Random(InOrder):
    """Tasks in order of readiness, each to an engine drawn from those that have room for it."""

    name: ClassVar[str] = "random"

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._generator = generator

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        found = draw(task, cluster, self._generator, 1)
        return [Placement(task, engine, load_terms(engine) if cluster.explaining else None) for engine in found]
