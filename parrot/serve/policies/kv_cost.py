"""`kv_cost`: the least weighted sum of prefill and decode blocks, or a draw by it (NVIDIA Dynamo, KV router).

    cost = overlap_weight × prefill blocks + decode blocks

Prefill blocks: what the engine has yet to prefill if the task goes there, the new tokens of this prompt and those of its
tasks whose first token has not come, over `block_size`. Decode blocks: the whole prompts of its tasks in flight and this one,
over `block_size`. With `temperature` 0 the least cost wins, ties go to the lower id. Above 0 an engine is drawn with
probability ∝ exp(−cost / (spread × temperature)), where spread is the difference of the largest and the least cost; all alike
where it is 0.

Defaults are Dynamo's (weight 1, temperature 0) and vLLM's block size 16, on which only the unit of the terms depends. Chosen
here: blocks are not rounded, since the store counts tokens; a prefix that several tasks on an engine share counts once a
task, where Dynamo counts its blocks once; as by its default, tokens that a task has generated are not counted. Only engines
that have room take part in a draw, where prompts and cached prefixes count as long on all as on one; without a draw, one that
is full is passed for the next least cost. Decode blocks grow with every task, so a hot prefix spreads.

A placement costs O(log E + 16) at temperature 0, and above it O(engines that have room or hold the prefix): a draw needs the
cost of each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engine_index import Load
from parrot.serve.engines import Engine
from parrot.serve.graph import Task
from parrot.serve.policies.base import MOST_CANDIDATES, Candidate, Cluster, InOrder, Placement, Terms, best_of, open_first
from parrot.serve.policies.matching import by_score, levels_of
from parrot.serve.policies.parameters import Parameter
from parrot.serve.queue import TaskQueue

Costs = np.ndarray[Any, np.dtype[np.float64]]


@mypyc_attr(allow_interpreted_subclasses=True)
class KVCost(InOrder):
    """Tasks in order of readiness."""

    name: ClassVar[str] = "kv_cost"
    parameters: ClassVar[dict[str, Parameter]] = {
        "overlap_weight": Parameter(float, 1.0, "weight of prefill blocks", at_least=0),
        "temperature": Parameter(float, 0.0, "0: the least cost; the more, the more evenly engines are drawn", at_least=0),
        "block_size": Parameter(int, 16, "tokens a block", at_least=1),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        weight = float(parameters["overlap_weight"])
        self._temperature = float(parameters["temperature"])
        self._block = int(parameters["block_size"])
        self._generator = generator

        def load(engine: Engine) -> Load:
            """What an engine's own tasks cost, in tokens."""
            return weight * engine.prefill_tokens + engine.prompt_tokens

        self._weight = weight
        self._load = load  # one object, by which a lane knows its index

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        if self._temperature:
            found = self._draw(task, cluster)
        else:
            found = best_of(task, open_first(task, cluster, lambda ids: self._ranked(task, ids)), cluster)
        return () if found is None else (found,)

    def _cost(self, task: Task, engine: Engine, new: int) -> float:
        return float(self._load(engine) + self._weight * new + Cluster.prompt_tokens(task, engine)) / self._block

    def _ranked(self, task: Task, ids: list[int] | None) -> Iterator[tuple[Engine, Terms]]:
        def score(engine: Engine, new: int) -> float:
            return self._cost(task, engine, new)

        for engine, cached, cost in by_score(task, task.call.lane.ordered(self._load), score, score, ids):
            yield engine, self._terms(task, engine, cached, cost)

    def _terms(self, task: Task, engine: Engine, cached: int, cost: float) -> Terms:
        prompt = Cluster.prompt_tokens(task, engine)
        return {
            "cost": cost,
            "prefill_blocks": (engine.prefill_tokens + max(0, prompt - cached)) / self._block,
            "decode_blocks": (engine.prompt_tokens + prompt) / self._block,
            "cached_tokens": cached,
        }

    def _draw(self, task: Task, cluster: Cluster) -> Placement | None:
        engines = _with_room(task, cluster)
        costs = self._costs(task, engines)
        while engines:
            shares = odds(costs, self._temperature)
            reached: np.ndarray = np.cumsum(shares)
            drawn = min(int(np.searchsorted(reached, self._generator.random() * reached[-1], side="right")), len(engines) - 1)
            if cluster.fits(task, engines[drawn]):
                return self._drawn(task, cluster, engines, costs, shares, drawn)
            del engines[drawn]
            costs = np.delete(costs, drawn)
        return None

    def _costs(self, task: Task, engines: list[Engine]) -> Costs:
        """As `_cost` has them, in one pass: prompts and prefixes taken for as long on all engines as on one."""
        held: dict[int, int] = {}  # engine id -> cached tokens
        levels = levels_of(task)
        for depth, holders in enumerate(levels):
            some = next(iter(holders))
            cached = sum(level[some].tokens for level in levels[depth:])
            for engine_id in holders:
                held.setdefault(engine_id, cached)
        weight, get = self._weight, held.get
        loads = [
            weight * (engine.prefill_tokens - get(engine.id, 0)) + engine.prompt_tokens
            for engine in engines
        ]  # fmt: skip
        prompt = Cluster.prompt_tokens(task, engines[0]) if engines else 0
        return (np.array(loads, dtype=np.float64) + (weight + 1.0) * prompt) / self._block

    def _drawn(self, task: Task, cluster: Cluster, engines: list[Engine], costs: Costs, shares: Costs, drawn: int) -> Placement:
        """The placement, with the cheapest engines beside the drawn one while the cluster explains."""
        places = [drawn]
        if cluster.explaining:
            cheapest = np.argsort(costs, kind="stable")[:MOST_CANDIDATES].tolist()
            places = sorted({*cheapest[: MOST_CANDIDATES - 1], drawn}, key=lambda place: (costs[place], engines[place].id))
        candidates = []
        for place in places:
            engine = engines[place]
            terms = self._terms(task, engine, cluster.cached_tokens(task, engine), float(costs[place]))
            terms["probability"] = float(shares[place])
            candidates.append(Candidate(engine, terms, True))
        chosen = candidates[places.index(drawn)]
        return Placement(task, chosen.engine, chosen.terms, candidates if cluster.explaining else None)


def _with_room(task: Task, cluster: Cluster) -> list[Engine]:
    """Engines that have room for the task, some of which may still refuse it."""
    index, count = cluster.with_room(task)
    found = [engine for engine in islice(index, count) if engine.state == "live"]
    holders = task.path[0].contexts if task.path else None
    if holders:  # there it may need less
        known = {engine.id for engine in found}
        found += [engine for engine in index.among(holders) if engine.id not in known and cluster.fits(task, engine)]
    return found


def odds(costs: Costs, temperature: float) -> Costs:
    """The probabilities with which engines of these costs are drawn."""
    least, spread = float(costs.min()), float(np.ptp(costs))
    if not spread:
        return np.full(len(costs), 1.0 / len(costs))
    shares = np.exp((least - costs) / (spread * temperature))
    return np.asarray(shares / shares.sum())
