"""`power_of_two`: the less loaded of two random engines (Mitzenmacher, IEEE TPDS 12(10), 2001).

Two draws instead of one shorten the longest queue exponentially, and no index of loads is needed. Load is what `least_loaded`
goes by: tokens reserved there by tasks that run or wait, then tasks; a tie goes to the lower id. Left open by the source,
whose servers are never full: both engines are drawn from those that have room; where only one has, it is taken. Blind to
prefixes, so a hot one spreads by load alone. A placement costs O(log E).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engines import by_load
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, first_fit
from parrot.serve.policies.room import draw
from parrot.serve.queue import TaskQueue


@mypyc_attr(allow_interpreted_subclasses=True)
class PowerOfTwo(InOrder):
    """Tasks in order of readiness, each to the better of two engines drawn from those that have room for it."""

    name: ClassVar[str] = "power_of_two"

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._generator = generator

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        drawn = draw(task, cluster, self._generator, 2)
        found = first_fit(task, sorted(drawn, key=lambda engine: (by_load(engine), engine.id)), cluster)
        return () if found is None else (found,)
