"""`vtc`: the tenant that has been served the fewest weighted tokens first (Virtual Token Counter, OSDI'24).

A tenant's counter: (`prompt_weight` · prompt tokens + `output_weight` · output tokens) / its weight; 1 and 2 are the source's.
A tenant that comes while others wait is lifted to the least counter among them, and one that comes to an empty queue to the
counter of the tenant that left it last: what it did not ask for is not owed to it. Engines: the least loaded.

Chosen here: the source counts output tokens as they are generated; the core hears of them when a task ends. A task is charged
with its prompt and its expected output (the mean of its function's outputs, then of all, then its limit) when it is placed,
and the true length replaces the expected one when it ends. Prompt tokens are those to be computed: what the engine holds of
the prompt is free. An attempt that comes to nothing is not charged; a task that its client cancels stays charged as expected.
Without API keys all sessions are one tenant.

A task that finds no room holds back everybody, as in the source. O(log tenants) a task, O(log E) an engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, Placement, best_of, load_terms
from parrot.serve.policies.loaded import least_loaded_first
from parrot.serve.policies.parameters import Parameter
from parrot.serve.policies.share import ByShare
from parrot.serve.queue import Owner, TaskQueue


@mypyc_attr(allow_interpreted_subclasses=True)
class Vtc(ByShare):
    """Tenants by least counter, a tenant's tasks by readiness, each to the least loaded engine."""

    name: ClassVar[str] = "vtc"
    share_by: ClassVar[str] = "tenant"
    uses_service: bool = True
    parameters: ClassVar[dict[str, Parameter]] = {
        "prompt_weight": Parameter(float, 1.0, "what a prompt token counts", at_least=0),
        "output_weight": Parameter(float, 2.0, "what an output token counts", at_least=0),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._prompt_weight = float(parameters["prompt_weight"])
        self._output_weight = float(parameters["output_weight"])
        self._lift: dict[Owner, float] = {}
        self._last_left: Owner | None = None
        self._lowerings = 0

    def attach(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def counter(self, owner: Owner, head: Task | None) -> float:
        account = self._cluster.service.tenant(str(owner))
        outputs = account.output_tokens + account.expected_tokens
        served = self._prompt_weight * account.prompt_tokens + self._output_weight * outputs
        return served / self._cluster.weight_of(str(owner)) + self._lift.get(owner, 0.0)

    def lowered(self) -> Iterable[Owner] | None:
        service = self._cluster.service
        found = service.lowered_since(self._lowerings)
        self._lowerings = service.lowerings
        return () if found is not None and not found else found

    def arrived(self, owner: Owner, active: Iterable[Owner]) -> None:
        floors = [self.counter(other, None) for other in active]
        if not floors and self._last_left is not None:
            floors = [self.counter(self._last_left, None)]
        behind = min(floors, default=0.0) - self.counter(owner, None)
        if behind > 0:
            self._lift[owner] = self._lift.get(owner, 0.0) + behind

    def drained(self, owner: Owner) -> None:
        self._last_left = owner

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        counter = self.counter(task.tenant, task)
        ranked = least_loaded_first(task, cluster, lambda engine: {**load_terms(engine), "counter": counter})
        found = best_of(task, ranked, cluster, rule="least_served")
        return () if found is None else (found,)
