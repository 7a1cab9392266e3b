"""Engines with room for a task, found by an index: for policies that do not go by load, so that a full cluster costs them
no scan. What is found has still to pass `Cluster.fits`, which knows what an engine has refused and that it is suspect."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from parrot.serve.engines import Engine, EngineIndex, Lane, by_room
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, prompt_tokens

TRIES = 8  #: draws an engine wanted, before all engines are looked at: only suspect ones and refusals make one fail


def with_room(task: Task, lane: Lane) -> tuple[EngineIndex, int]:
    """An index of the lane's engines of which the first so many have room for the whole task, as if nothing of its prompt were
    cached; its length is taken under one engine's tokenizer. O(log E)."""
    index = lane.ordered(by_room)
    first = index.first()
    if first is None:
        return index, 0
    return index, index.up_to(-prompt_tokens(task, first) - task.sampling.max_gen_length)


def roomy(task: Task, lane: Lane) -> Iterator[Engine]:
    """Those engines."""
    index, count = with_room(task, lane)
    return map(index.at, range(count))


def draw(task: Task, lane: Lane, cluster: Cluster, generator: np.random.Generator, most: int) -> list[Engine]:
    """Up to `most` different engines on which the task fits, drawn at random, each as likely as any other; none only when it
    fits on none. O(log E), and O(E) when there is room nowhere but where its prompt is cached."""
    index, count = with_room(task, lane)
    found: list[Engine] = []
    for _ in range(TRIES * most if count else 0):
        engine = index.at(int(generator.random() * count))
        if engine not in found and cluster.fits(task, engine):
            found.append(engine)
        if len(found) == most or len(found) == count:
            return found
    if not found:
        fitting = [engine for engine in lane.engines.values() if cluster.fits(task, engine)]
        while fitting and len(found) < most:
            found.append(fitting.pop(int(generator.random() * len(fitting))))
    return found
