"""Engines drawn at random from those that have room for a task, without a look at each of them."""

from __future__ import annotations

import numpy as np

from parrot.serve.engines import Engine
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster

TRIES = 8  #: draws an engine wanted, before all engines are looked at: only suspect ones and refusals make one fail


def draw(task: Task, cluster: Cluster, generator: np.random.Generator, most: int) -> list[Engine]:
    """Up to `most` different engines on which the task fits, drawn at random, each as likely as any other; none only when it
    fits on none. O(log E), and O(E) when there is room nowhere but where its prompt is cached."""
    index, count = cluster.with_room(task)
    found: list[Engine] = []
    for _ in range(TRIES * most if count else 0):
        engine = index.at(int(generator.random() * count))
        if engine not in found and cluster.fits(task, engine):
            found.append(engine)
        if len(found) == most or len(found) == count:
            return found
    if not found:
        fitting = [engine for engine in task.call.lane.engines.values() if cluster.fits(task, engine)]
        while fitting and len(found) < most:
            found.append(fitting.pop(int(generator.random() * len(fitting))))
    return found
