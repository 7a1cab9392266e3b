"""The interface of a global-scheduler policy: what it is given, what it answers, and a base for those that go in order.

A policy decides and does nothing. It is built with (parameters, generator) and asked to `place` once after all events
of an instant, if the queue or a capacity has changed. Each placement that it yields is carried out before it is asked
for the next, so the views always show the present. It must not keep tasks or engines beyond a call, except as keys
that it drops again, and must not change anything that it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar, Protocol

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engine_index import EngineIndex
from parrot.serve.engines import Engine, Engines, Lane, by_room
from parrot.serve.graph import Task
from parrot.serve.policies.parameters import Parameter
from parrot.serve.prefixes import cached_links, longest_matches
from parrot.serve.queue import TaskQueue
from parrot.serve.service import Service
from parrot.serve.tenants import Tenants

Terms = dict[str, float]  #: what a score was made of, by name; a larger `score` need not be better: the policy's file says

PROBES = 8  #: engines that a policy asks in its order, before it looks up which have room at all
FEW_OPEN = 16  #: engines that have room, up to which they alone are looked at
MOST_CANDIDATES = 8  #: engines whose terms a placement keeps, for policies that would look at all of them


@mypyc_attr(acyclic=True)
class Candidate:
    """An engine that was considered for a task. `fits`: whether it had room."""

    __slots__ = ("engine", "fits", "terms")

    def __init__(self, engine: Engine, terms: Terms, fits: bool) -> None:
        self.engine = engine
        self.terms = terms
        self.fits = fits


@mypyc_attr(acyclic=True)
class Placement:
    """Run `task` on `engine`. `terms`: the score that led there; `candidates`: the engines that were weighed, best first,
    the chosen one among them (kept only while `Cluster.explaining`); `rule`: which of the policy's rules decided."""

    __slots__ = ("candidates", "engine", "rule", "task", "terms")

    def __init__(
        self,
        task: Task,
        engine: Engine,
        terms: Terms | None = None,
        candidates: list[Candidate] | None = None,
        rule: str = "",
    ) -> None:
        self.task = task
        self.engine = engine
        self.terms = terms
        self.candidates = candidates
        self.rule = rule


class Cluster:
    """The read-only view of live engines and of what they hold."""

    def __init__(self, engines: Engines, tenants: Tenants, service: Service | None = None) -> None:
        self._engines = engines
        self._tenants = tenants
        self._service = service
        self.explaining = False  #: whether placements shall carry their candidates
        self._fitting: tuple[Task, Engine] | None = None  # the last pair that was found to fit
        self._roomy: Engine | None = None  # the last that was found to have room, to be asked first
        self._with_room: tuple[Task, EngineIndex, int] | None = None  # what `with_room` has said since loads changed

    def weight_of(self, tenant: str) -> float:
        """The tenant's configured share beside others', above 0; 1.0 unless it has one."""
        return self._tenants.weight_of(tenant)

    def engines(self, lane: Lane) -> list[Engine]:
        """The lane's live engines in the order of their registration."""
        return list(lane.engines.values())

    @property
    def service(self) -> Service:
        """What programs and tenants were served, engines' work, expected lengths: for policies with `uses_service`."""
        if self._service is None:
            raise RuntimeError("no accounts of service are kept: the policy's class must say uses_service = True")
        return self._service

    @staticmethod
    def prompt_tokens(task: Task, engine: Engine) -> int:
        """The length of the task's whole prompt under the engine's tokenizer."""
        return prompt_tokens(task, engine)

    @staticmethod
    def cached_links(task: Task, engine: Engine) -> int:
        """How many leading links of the task's chain the engine holds."""
        return cached_links(task.path or [], engine)

    @staticmethod
    def cached_tokens(task: Task, engine: Engine) -> int:
        """How many leading tokens of the task's prompt the engine holds."""
        return cached_tokens(task, engine)

    @staticmethod
    def exact(engine: Engine) -> bool:
        """Whether what is said of that engine's cached prefixes is so; an estimate where it reports no evictions."""
        return engine.reports_evictions

    def longest_matches(self, task: Task) -> Iterator[tuple[int, list[Engine]]]:
        """(matched links, engines of the task's lane), longest match first, each engine once."""
        lane = task.call.lane.engines
        for links, ids in longest_matches(task.path or []):
            engines = [lane[engine_id] for engine_id in ids if engine_id in lane]
            if engines:
                yield links, engines

    @staticmethod
    def need(task: Task, engine: Engine) -> int:
        """Tokens that the task would reserve there: its prompt less what is cached, and all that it may generate."""
        return reservation(task, engine)

    def fits(self, task: Task, engine: Engine, bound: int | None = None) -> bool:
        """Whether the task may be placed there now. `bound`: a limit on the engine's tokens below its capacity."""
        if admits(engine, task, bound):
            self._fitting = (task, engine)
            return True
        return False

    def with_room(self, task: Task) -> tuple[EngineIndex, int]:
        """An index of the task's lane of which the first so many engines have room for all of it, whatever is cached: but for
        suspect ones and those that have refused it, they are those that admit it, and some where its prompt is cached. It
        counts the shortest length that the prompt has under any tokenizer. O(log E)."""
        known = self._with_room
        if known is not None and known[0] is task:
            return known[1], known[2]
        index = task.call.lane.ordered(by_room)
        count = index.up_to(-least_prompt(task) - task.max_gen_length)
        self._with_room = (task, index, count)
        return index, count

    def anywhere(self, task: Task) -> bool:
        """Whether any engine admits the task: without a look at each of them, when all are full."""
        roomy = self._roomy
        if roomy is not None and roomy.id in task.call.lane.engines and admits(roomy, task):
            return True
        index, count = self.with_room(task)
        for engine in islice(index, count):
            if admits(engine, task):
                self._roomy = engine
                return True
        holders = task.path[0].contexts if task.path else None
        if holders:  # there it may need less
            for engine in islice(index, count, index.up_to(-task.max_gen_length)):
                if engine.id in holders and admits(engine, task):
                    return True
        return False

    def open_to(self, task: Task) -> list[int] | None:
        """The ids of all engines that may admit the task, when they are few; None when they are more. O(log E)."""
        index, count = self.with_room(task)
        if count > FEW_OPEN:
            return None
        found = [engine.id for engine in islice(index, count)]
        holders = task.path[0].contexts if task.path else None
        if holders:
            end = index.up_to(-task.max_gen_length)
            if end - count > 4 * FEW_OPEN:
                return None
            found += [engine.id for engine in islice(index, count, end) if engine.id in holders]
        return found

    def forget(self) -> None:
        """For the core: loads have changed since anybody asked."""
        self._fitting = self._with_room = None

    def still_fits(self, task: Task, engine: Engine) -> bool:
        """For the core, which checks every placement: as `fits`, but what `fits` has just said is not computed again."""
        fitting = self._fitting
        return (fitting is not None and fitting[0] is task and fitting[1] is engine) or admits(engine, task)


def prompt_tokens(task: Task, engine: Engine) -> int:
    """Tokens of the prompt under the engine's tokenizer, BOS included; computed once a tokenizer."""
    tokenizer = engine.tokenizer
    found = counted_tokens(task, tokenizer)
    if found < 0:
        found = 0
        for link in task.links or ():
            for content in link.contents:
                found += length_of(content.lengths, tokenizer)
        _keep_count(task, tokenizer, found)
    return found + engine.bos_tokens


def least_prompt(task: Task) -> int:
    """Tokens of the prompt under the tokenizer that makes it shortest, without BOS; computed once."""
    found = counted_tokens(task, "")
    if found < 0:
        found = 0
        for link in task.links or ():
            for content in link.contents:
                found += min(content.lengths.values(), default=0)
        _keep_count(task, "", found)
    return found


def counted_tokens(task: Task, tokenizer: str) -> int:
    """The length of its prompt under that tokenizer, without BOS, if it has been counted; else -1."""
    if task.counted_under is not None and task.counted_under == tokenizer:
        return task.counted
    return -1 if task.tokens is None else task.tokens.get(tokenizer, -1)


def _keep_count(task: Task, tokenizer: str, tokens: int) -> None:
    if task.counted_under is None:
        task.counted_under, task.counted = tokenizer, tokens
    elif task.tokens is None:
        task.tokens = {tokenizer: tokens}
    else:
        task.tokens[tokenizer] = tokens


def length_of(lengths: dict[str, int], tokenizer: str) -> int:
    """A content's tokens under a tokenizer; the longest that is known when that one is not."""
    found = lengths.get(tokenizer)
    return found if found is not None else max(lengths.values(), default=0)


def cached_tokens(task: Task, engine: Engine) -> int:
    total = 0
    for node in task.path or ():
        context = node.context_on(engine)
        if context is None:
            break
        total += context.tokens
    return total


def reservation(task: Task, engine: Engine) -> int:
    return max(0, prompt_tokens(task, engine) - cached_tokens(task, engine)) + task.max_gen_length


def too_large(task: Task, engine: Engine) -> bool:
    """Whether that engine can never take the task: its prompt leaves no room for one token, or it has said so."""
    return (task.refusals is not None and task.refusals.get(engine.id) == -1) or (
        prompt_tokens(task, engine) >= engine.max_seq_len
    )


def admits(engine: Engine, task: Task, bound: int | None = None) -> bool:
    if engine.state != "live":
        return False  # a suspect engine gets nothing, so that no policy need know of it
    if engine.claimed is not None and engine.claimed is not task:
        return False  # kept free for one that has waited for too long
    if task.refusals is not None:
        refused = task.refusals.get(engine.id)
        if refused is not None and (refused == -1 or refused == engine.version):
            return False
    tokens = prompt_tokens(task, engine)
    if tokens >= engine.max_seq_len:
        return False
    running = engine.running
    if running == 0:
        return True  # one task alone always has room
    if running >= engine.tasks_capacity:
        return False
    capacity = engine.tokens_capacity if bound is None else min(bound, engine.tokens_capacity)
    room = capacity - engine.reserved - task.max_gen_length
    # What is cached is counted only where it decides: most tasks fit with their whole prompt.
    return tokens <= room or tokens - cached_tokens(task, engine) <= room


class Policy(Protocol):
    """What the core asks of a policy. `name`: as in the configuration. `parameters`: by name, checked before it is built.

    What it needs of the views, which costs something to keep: `uses_prefix_groups`: the queue indexes tasks by prefix
    (`TaskQueue.sharing`); `share_by`: "program" or "tenant": the queue keeps a line for each of them (`TaskQueue.owners`), ""
    for none; `uses_service` (False where a class does not say): accounts of what was served are kept (`Cluster.service`), and
    `attach` is called with the cluster before anything is queued. `clairvoyant`: it reads output lengths, which only a
    simulation knows (`SamplingConfig.output_length`): a server refuses to run it.

    It may also have a method `first(queue, lane)`: the task that it would place next in that lane, whether or not it fits
    now; the head in `order` where there is none. Once that task has waited for `global_scheduler.patience`, an engine is kept
    free for it (`parrot.serve.claims`), and the core places it there if the policy does not. `in_order`: it promises that
    nothing else of its lane goes before that task.

    `work_conserving`: it claims that after each instant no lane with queued tasks has a live engine that admits the first of
    them in `order` (`Cluster.fits` without a bound; a suspect engine admits nothing, one that is kept free only whom it is
    kept for, and one that has rejected a task is full until its capacity changes). What stands behind a first task that
    no engine admits may wait, and so may tasks that a bound of the policy's own parameters holds back."""

    name: ClassVar[str]
    work_conserving: ClassVar[bool]
    clairvoyant: ClassVar[bool]
    share_by: ClassVar[str]
    uses_prefix_groups: bool
    parameters: ClassVar[dict[str, Parameter]]

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None: ...

    def order(self, task: Task) -> Any:
        """The key by which queued tasks of a lane are sorted; ties go by readiness."""

    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterable[Placement]:
        """Placements, in order."""


@mypyc_attr(allow_interpreted_subclasses=True)
class InOrder:
    """A policy that takes the queue strictly in its order: a task that finds no engine holds those behind it back, so
    that none starves. A subclass says where one task (or the tasks that go with it) shall run."""

    work_conserving: ClassVar[bool] = True
    in_order: ClassVar[bool] = True
    clairvoyant: ClassVar[bool] = False
    share_by: ClassVar[str] = ""
    uses_prefix_groups: bool = False
    uses_service: bool = False
    parameters: ClassVar[dict[str, Parameter]] = {}

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        # The head of a lane that found no engine: asking again is of no use, but for engines that have more room since.
        self._stalled: dict[Lane, tuple[Task, int]] = {}

    def attach(self, cluster: Cluster) -> None:
        """Told the view before anything is queued, when it `uses_service`."""

    def order(self, task: Task) -> Any:
        return task.sequence

    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
        if self._stalled:
            for lane in [lane for lane in self._stalled if not queue.waiting(lane)]:
                del self._stalled[lane]
        for lane in queue.lanes():
            stalled, version = self._stalled.pop(lane, (None, 0))
            while (task := queue.head(lane)) is not None:
                placed = False
                if self.admitted(task, cluster, version if task is stalled else None):
                    for placement in self.choose(task, queue, cluster):
                        placed = True
                        yield placement
                    stalled = None  # what was placed may have brought the prefix of a task that waited
                if not placed:
                    self._stalled[lane] = (task, lane.version)
                    break

    def admitted(self, task: Task, cluster: Cluster, version: int | None) -> bool:
        """Whether any engine admits the task. version: none did when its lane had that version (`Lane.version`), and nothing of
        it was placed since: only engines that have had more room are asked."""
        if version is None:
            return cluster.anywhere(task)
        return any(cluster.fits(task, engine) for engine in task.call.lane.opened_since(version))

    def conserves_work(self) -> bool:
        """Whether it claims to be work conserving with the parameters that it was built with."""
        return self.work_conserving

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        """Placements of `task`, first, and of tasks that shall go with it; none when it must wait."""
        raise NotImplementedError


def claims_conservation(policy: Policy) -> bool:
    """Whether the policy claims to be work conserving: by its method `conserves_work`, else by its class."""
    claim = getattr(policy, "conserves_work", None)
    return bool(policy.work_conserving if claim is None else claim())


def first_fit(
    task: Task, engines: Iterable[Engine], cluster: Cluster, bound: int | None = None, rule: str = ""
) -> Placement | None:
    """The task on the first of `engines` on which it fits, with their loads as the reason; None when it fits on none."""
    if cluster.explaining:
        return best_of(task, _with_loads(engines), cluster, bound, rule)
    for engine in engines:
        if cluster.fits(task, engine, bound):
            return Placement(task, engine, None, None, rule)
    return None


def best_of(
    task: Task, ranked: Iterable[tuple[Engine, Terms]], cluster: Cluster, bound: int | None = None, rule: str = ""
) -> Placement | None:
    """The task on the first engine of `ranked` (best first, each with what its score was made of) on which it fits; None when
    it fits on none. While the cluster explains, all before it and the next ones are kept as candidates."""
    if not cluster.explaining:
        for engine, terms in ranked:
            if cluster.fits(task, engine, bound):
                return Placement(task, engine, terms, None, rule)
        return None
    seen: list[Candidate] = []
    chosen: Candidate | None = None
    for engine, terms in ranked:
        if chosen is not None and len(seen) >= MOST_CANDIDATES:
            break
        candidate = Candidate(engine, terms, admits(engine, task, bound))
        if len(seen) < MOST_CANDIDATES or candidate.fits:
            seen.append(candidate)
        if chosen is None and candidate.fits:
            chosen = candidate
    if chosen is None:
        return None
    return Placement(task, chosen.engine, chosen.terms, seen, rule)


def open_first(
    task: Task, cluster: Cluster, rank: Callable[[list[int] | None], Iterator[tuple[Engine, Terms]]], blind: bool = False
) -> Iterator[tuple[Engine, Terms]]:
    """Engines in the order of `rank`, at no more cost in a full cluster than in an idle one: when the first few are full and
    not many have room, only these follow, in that order. `rank(ids)`: engines with these ids, or all; the best first. blind:
    that order knows nothing of room, so that the first few are as full as any: they are asked only to be shown as candidates,
    while the cluster explains. (`rank(ids)` must have the order of `rank(None)` exactly then.)"""
    if blind and not cluster.explaining and (open_ones := cluster.open_to(task)) is not None:
        yield from rank(open_ones)
        return
    ranked = rank(None)
    asked: list[Engine] = []
    for engine, terms in islice(ranked, PROBES):
        asked.append(engine)
        yield engine, terms
    few = cluster.open_to(task) if len(asked) == PROBES else None
    if few is None:
        yield from ranked
    else:
        for engine, terms in rank(few):
            if engine not in asked:
                yield engine, terms


def _with_loads(engines: Iterable[Engine]) -> Iterator[tuple[Engine, Terms]]:
    for engine in engines:
        yield engine, load_terms(engine)


def load_terms(engine: Engine) -> Terms:
    """The engine's load by the core's own count."""
    return {"reserved_tokens": engine.reserved, "tasks": len(engine.tasks)}
