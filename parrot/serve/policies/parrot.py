"""`parrot`: Algorithm 1 of the paper (OSDI'24, section 5.4), with its four switches.

The whole queue is gone through in order; a task that finds no room is passed over (`passing.py`).

- `app_fifo`: programs in the order of their arrival; in a program, the task farthest along its DAG first. Off: by readiness.
- `graph_group`: the queued members of a task group go to an engine as a whole, since their completion as a whole is what
  counts; over as few as can hold them, when none can hold all. Unless `spread_groups` is off, the group is spread over as many
  engines as the knee of its speed-up, by their latency profiles and what they run (`expected.knee`): where their batch costs
  about the sum of its tasks, or where engines are busy anyway. How long outputs will be is learnt from those of the same
  function.
- `ctx_group`: queued tasks that share a prefix with the first one go with it.
- `ctx_aware`: prefer an engine that holds the prefix. As with `ctx_group`, a prefix is followed while its tokens, times
  `ctx_weight`, outweigh the harm beyond the least harmed engine's: a hot prefix must not pile all work on one engine. (The
  paper follows it always; a large weight does so too. The default: a token of a prompt that is computed anew takes some
  5 to 20 times as long as one that is reserved adds to the iterations of those in flight, on the shipped profiles.)
- Always last, and alone when all are off: the feasible engine with the least harm.

Harm, in tokens, of what is placed together (a task; a part of a group) with n tokens in all (prompts and all that may be
generated) on an engine that has R reserved and runs L latency-bound tasks: R, for which it waits, a group as one, since only
its end counts; and L · n, for which each of those L waits longer; and, for the first latency-bound task of an engine, the
capacity that it takes away: all beyond `latency_capacity`. So latency-bound tasks gather on few engines up to that bound,
throughput tasks keep away from them as far as balance allows, and among engines with none of them load alone decides.
Feasible: with a latency-bound task, of its own or there, an engine holds `latency_capacity` tokens at most (null: no fewer
than without; docs/paper.md says why that is the default).

To find an engine takes O(log E), times the different numbers of latency-bound tasks that engines have; a prefix held by many
engines is looked for among the least loaded of them. A group is offered to engines until one holds it whole: O(E) at worst.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from heapq import heapify, heappop, heapreplace
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engine_index import EngineIndex, Load
from parrot.serve.engines import HARM_BITS, Engine, by_harm, by_load, by_room
from parrot.serve.graph import Task
from parrot.serve.policies.base import MOST_CANDIDATES, Candidate, Cluster, Placement, Terms
from parrot.serve.policies.expected import ExpectedTimes, knee
from parrot.serve.policies.parameters import Parameter
from parrot.serve.policies.passing import Passing
from parrot.serve.queue import TaskQueue

MOST_HOLDERS = 32  #: engines holding a prefix that are all looked at; of more, the first FEW_HOLDERS in order of harm
FEW_HOLDERS = 4
MOST_PROBED = 64  #: engines, the least harmed, that are asked for room for a whole group


def harm_with(latency_capacity: int, engine: Engine) -> Load:
    """As `by_harm`, for a latency-bound task: on an engine without one, the capacity that it would take away comes on top."""
    if engine.latency_tasks:
        return by_harm(engine)
    lost = max(0, engine.description.tokens_capacity - latency_capacity)
    return by_load(engine) + (lost << HARM_BITS[0])


@mypyc_attr(allow_interpreted_subclasses=True)
class Parrot(Passing):
    """Tasks in order; a task takes those with it that belong together."""

    name: ClassVar[str] = "parrot"
    parameters: ClassVar[dict[str, Parameter]] = {
        "app_fifo": Parameter(bool, False, "programs in order of arrival, the task farthest along its DAG first"),
        "graph_group": Parameter(bool, False, "a task group goes to an engine as a whole"),
        "ctx_group": Parameter(bool, False, "queued tasks that share a prefix go together"),
        "ctx_aware": Parameter(bool, False, "prefer an engine that holds the prefix"),
        "ctx_weight": Parameter(
            float, 8.0, "tokens of harm beyond the least harmed engine's that a token of a shared prefix outweighs", at_least=0
        ),
        "latency_capacity": Parameter(
            int, None, "tokens that an engine with a latency-bound task may hold; null: its capacity", at_least=1
        ),
        "spread_groups": Parameter(
            bool, True, "a group that one engine would batch at the cost of its sum is spread (needs profiles); false: never"
        ),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._app_fifo = bool(parameters["app_fifo"])
        self._graph_group = bool(parameters["graph_group"])
        self._ctx_group = bool(parameters["ctx_group"])
        self._ctx_aware = bool(parameters["ctx_aware"])
        self._ctx_weight = float(parameters["ctx_weight"])
        self._latency_capacity: int | None = parameters["latency_capacity"]
        self._spread_groups = bool(parameters["spread_groups"])
        self.uses_prefix_groups = self._ctx_group
        self.uses_service = self._graph_group and self._spread_groups  # for how long outputs are likely to be
        self._times = ExpectedTimes()
        self._latency_key: Callable[[Engine], Load] = by_harm
        if self._latency_capacity is not None:
            self.bounded = True
            self._latency_key = partial(harm_with, self._latency_capacity)

    def order(self, task: Task) -> Any:
        super().order(task)
        return (task.program_sequence, task.depth) if self._app_fifo else task.sequence

    def bound(self, engine: Engine, urgent: bool) -> int | None:
        return self._latency_capacity if urgent or engine.latency_tasks else None

    def conserves_work(self) -> bool:
        return self._latency_capacity is None  # which holds tasks back on engines that have room

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterator[Placement]:
        if self._graph_group and task.group is not None:
            members = queue.group_of(task)
            if len(members) > 1:
                yield from self._place_group(task, members, cluster)
                return
        if self._ctx_group:
            _, sharing = queue.sharing(task)
            if len(sharing) > 1:
                yield from self._place_sharing(task, sharing, cluster)
                return
        found = self._best(task, self._ranked(task, cluster, None), cluster, "")
        if found is not None:
            yield found

    # ------------------------------------------------------------------------------------------- a task group

    def _place_group(self, task: Task, members: list[Task], cluster: Cluster) -> Iterator[Placement]:
        """`task` and the others of its group, in as few parts as need be, each whole on an engine if one can hold it; what
        no engine has room for is left."""
        waiting = [task, *[member for member in members if member is not task]]
        share = self._share(waiting, cluster)
        while waiting:
            first, part = waiting[0], waiting[:share]
            found = self._whole(part, cluster) if len(part) > 1 else None
            if found is None:
                found = self._best(first, self._ranked(first, cluster, None), cluster, "task_group")
                if found is None:
                    return
            engine, terms = found.engine, found.terms
            yield found
            del waiting[0]
            for member in part[1:]:
                if not cluster.fits(member, engine, self.bound(engine, member.latency_sensitive)):
                    break
                yield Placement(member, engine, terms, None, "task_group")
                waiting.remove(member)

    def _share(self, members: list[Task], cluster: Cluster) -> int:
        """How many of the group go to one engine: all, or so many that it is spread over as many as the knee says."""
        index = members[0].call.lane.ordered(by_load)
        engine = index.first()
        if engine is None or not self._spread_groups or engine.description.latency_profile is None:
            return len(members)
        prompt = sum([cluster.prompt_tokens(member, engine) for member in members]) / len(members)
        outputs = max([cluster.service.expected_output(member) for member in members])
        return -(-len(members) // knee(self._times.model(engine), len(members), prompt, outputs, index))

    def _whole(self, part: list[Task], cluster: Cluster) -> Placement | None:
        """The first of `part` on the best engine that has room for all of it, a prefix that they share counted once a member
        (so that the answer errs to the safe side); None when no engine has."""
        index = part[0].call.lane.ordered(by_room)
        roomiest = index.first()
        if roomiest is None:
            return None
        tokens = sum([cluster.prompt_tokens(member, roomiest) + member.max_gen_length for member in part])
        if not self._ctx_aware and not index.up_to(-tokens):
            return None
        others = tokens - cluster.prompt_tokens(part[0], roomiest) - part[0].max_gen_length
        ranked = islice(self._ranked(part[0], cluster, None, others), MOST_PROBED)
        found = self._best(part[0], ranked, cluster, "task_group", lambda e: self._has_room(part, tokens, e, cluster))
        if found is not None and found.terms is not None:
            found.terms["group"] = len(part)
        return found

    def _has_room(self, part: list[Task], tokens: int, engine: Engine, cluster: Cluster) -> bool:
        """Whether all of `part`, of so many `tokens` with nothing cached, fit on the engine at once."""
        if engine.running + len(part) > engine.description.tasks_capacity:
            return False
        room = engine.description.tokens_capacity - engine.reserved
        bound = self.bound(engine, part[0].latency_sensitive)
        if bound is not None:
            room = min(room, bound - engine.reserved)
        if tokens <= room:
            return True
        if not cluster.cached_links(part[0], engine):
            return False
        return sum([cluster.need(member, engine) for member in part]) <= room

    # ------------------------------------------------------------------------------------------- a shared prefix

    def _place_sharing(self, task: Task, sharing: list[Task], cluster: Cluster) -> Iterator[Placement]:
        """`task`, then the others of `sharing` after it while that is worth it, up to one that finds no room."""
        engine: Engine | None = None
        for member in [task, *sharing]:
            if not member.in_queue:
                continue
            found = self._best(member, self._ranked(member, cluster, engine), cluster, "shared_prefix")
            if found is None:
                return
            engine = found.engine
            yield found

    # ------------------------------------------------------------------------------------------- an engine for a task

    def _best(
        self,
        task: Task,
        ranked: Iterator[tuple[Engine, Terms]],
        cluster: Cluster,
        rule: str,
        also: Callable[[Engine], bool] | None = None,
    ) -> Placement | None:
        """The task on the first engine of `ranked` that may take it, and of which `also` holds; while the cluster explains,
        with its rivals."""
        seen: list[Candidate] | None = [] if cluster.explaining else None
        chosen: Engine | None = None
        terms: Terms = {}
        for engine, costs in ranked:
            fits = (also is None or also(engine)) and cluster.fits(task, engine, self.bound(engine, task.latency_sensitive))
            if fits and chosen is None:
                chosen, terms = engine, costs
            if seen is None:
                if fits:
                    break
            else:
                if len(seen) < MOST_CANDIDATES or engine is chosen:
                    seen.append(Candidate(engine, costs, fits))
                if chosen is not None and len(seen) >= MOST_CANDIDATES:
                    break
        if chosen is None:
            return None
        return Placement(task, chosen, terms, seen, rule or ("prefix" if "cached_tokens" in terms else "least_harm"))

    def _ranked(self, task: Task, cluster: Cluster, leader: Engine | None, others: int = 0) -> Iterator[tuple[Engine, Terms]]:
        """Engines in order of their harm, less what a prefix there is worth. leader: an engine whose prefix counts even when
        the policy is not aware of contexts. others: tokens of those that go with the task."""
        lane = task.call.lane
        urgent = task.latency_sensitive
        index = lane.ordered(self._latency_key if urgent else by_harm)
        least = index.first()
        if least is None:
            return
        tokens = cluster.prompt_tokens(task, least) + task.max_gen_length + others
        few = None if cluster.fits(task, least, self.bound(least, urgent)) else cluster.open_to(task)
        holders: list[tuple[float, int, Engine, int, int]] = []  # cost, id, engine, harm, cached tokens
        if few is not None:
            candidates = [lane.engines[engine_id] for engine_id in few]
        elif self._ctx_aware:
            candidates = self._holders(task, index)
        else:
            candidates = [leader] if leader is not None and leader.state == "live" else []
        for engine in candidates:
            cached = cluster.cached_tokens(task, engine) if self._ctx_aware or engine is leader else 0
            if cached or few is not None:
                harm = self._harm(engine, tokens, urgent)
                holders.append((harm - self._ctx_weight * cached, engine.id, engine, harm, cached))
        holders.sort(key=_cost_and_id)
        if few is not None:  # the others are full
            for cost, _, engine, harm, cached in holders:
                yield engine, _terms(engine, harm, cached, cost)
            return
        shown = {engine.id for _, _, engine, _, _ in holders}
        waiting = 0
        for harm, engine in self._by_harm(index, tokens, urgent):
            while waiting < len(holders) and holders[waiting][0] <= harm:
                cost, _, holder, its_harm, cached = holders[waiting]
                waiting += 1
                yield holder, _terms(holder, its_harm, cached, cost)
            if engine.id not in shown:
                yield engine, _terms(engine, harm)
        for cost, _, holder, its_harm, cached in holders[waiting:]:
            yield holder, _terms(holder, its_harm, cached, cost)

    def _harm(self, engine: Engine, tokens: int, urgent: bool) -> int:
        harm = engine.reserved + engine.latency_tasks * tokens
        if urgent and self._latency_capacity is not None and not engine.latency_tasks:
            harm += max(0, engine.description.tokens_capacity - self._latency_capacity)
        return harm

    def _by_harm(self, index: EngineIndex, tokens: int, urgent: bool) -> Iterator[tuple[int, Engine]]:
        """Engines by harm. The index has them by their latency-bound tasks, then by what they have reserved: the first of
        each such number that is left is the best of it."""
        heads: list[tuple[int, int]] = []  # harm of the first that is left, its position
        position = 0
        while position < len(index):
            engine = index.at(position)
            heads.append((self._harm(engine, tokens, urgent), position))
            position = index.up_to(((engine.latency_tasks + 1) << sum(HARM_BITS)) - 1)
        heapify(heads)
        while heads:
            harm, position = heads[0]
            engine = index.at(position)
            yield harm, engine
            after = index.at(position + 1) if position + 1 < len(index) else engine
            if after is engine or after.latency_tasks != engine.latency_tasks:
                heappop(heads)
            else:
                heapreplace(heads, (self._harm(after, tokens, urgent), position + 1))

    def _holders(self, task: Task, index: EngineIndex) -> list[Engine]:
        """Engines of the task's lane that hold a prefix of it: all, or of a prefix that many hold the least loaded."""
        levels = []
        for node in task.path or ():
            contexts = node.contexts
            if not contexts:
                break
            levels.append(contexts)
        lane = task.call.lane.engines
        found: dict[int, Engine] = {}
        for contexts in reversed(levels):
            if len(contexts) <= MOST_HOLDERS:
                for engine_id in contexts:
                    if engine_id in lane:
                        found[engine_id] = lane[engine_id]
            else:
                few = len(found) + FEW_HOLDERS
                for engine in index:
                    if engine.id in contexts and engine.id not in found:
                        found[engine.id] = engine
                        if len(found) == few:
                            break
        return list(found.values())


def _cost_and_id(holder: tuple[float, int, Engine, int, int]) -> tuple[float, int]:
    return holder[0], holder[1]


def _terms(engine: Engine, harm: int, cached: int = 0, cost: float = 0.0) -> Terms:
    terms: Terms = {"harm": harm, "reserved_tokens": engine.reserved, "latency_tasks": engine.latency_tasks}
    if cached:
        terms["cached_tokens"], terms["cost"] = cached, cost
    return terms
