"""`preble_e2`: exploit a cached prefix or explore for a light engine (Preble's E2 algorithm, ICLR'25, sections 3.2 and 3.3).

1. Exploit, if the longest cached part of the prompt is longer than the rest of it: of the engines that hold it, the one with
   the least load (rule `exploit`).
2. But if that engine's load exceeds `balance_ratio` times the lightest engine's, and the window holds `balance_requests`, the
   lightest one (`rebalance`). It has the prefix from then on, so that a hot one is copied until its engines balance.
3. Else explore: the least load + eviction cost + recompute cost (`explore`).

Load: the time that requests placed there in the last `window_s` seconds take to prefill what was new of their prompts and to
decode. Eviction cost: what must be evicted to make room for the task, longest unused first, each context's time to prefill
times the part of the window's requests that used it. Recompute cost: the time to prefill the new tokens of the prompt.

Times are those of the engine's latency profile: a task alone in its batch. An engine without one takes `prefill_token_s` and
`decode_token_s` for a token: the slope of the artifact's fit for a 7B model on an A6000, and its first guess of a decoding
step. The window is the paper's; ratio and requests are the artifact's.

Left open, and chosen here: output lengths are taken as `max_gen_length`, as the artifact does before it has seen any; an
engine that is full is passed for the next one by the same rule, of the exploited ones the next longest match that is longer
than its rest, and then rule 3; ties go to the lower id. Not here: the local scheduler of the paper, and its placing of
requests by phase.

The window is fed by this policy's own placements. Times are kept in whole nanoseconds, so that what leaves it is exactly what
came in. A placement costs O(log E + links) and a few engines where light ones stand out, O(E) at worst: an eviction cost has
no order that an index could keep, so engines are looked at by load until no other can cost less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.latency import BatchShape, LatencyModel
from parrot.serve.contexts import Context
from parrot.serve.engine_index import EngineIndex
from parrot.serve.engines import Engine, Lane
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, Terms, best_of, open_first
from parrot.serve.policies.matching import by_match, by_score
from parrot.serve.policies.parameters import Parameter
from parrot.serve.policies.roster import Roster
from parrot.serve.prefixes import PrefixNode
from parrot.serve.queue import TaskQueue

_NS = 1e9


class Times:
    """How long an engine takes, in nanoseconds."""

    def __init__(self, engine: Engine, prefill_token_s: float, decode_token_s: float) -> None:
        profile = engine.description.latency_profile
        self._model = LatencyModel(profile) if profile is not None else None
        self._prefill_token_s = prefill_token_s
        self._decode_token_s = decode_token_s

    def prefill(self, new: int, cached: int = 0) -> int:
        """To compute `new` tokens behind `cached` ones."""
        if not new:
            return 0
        if self._model is None:
            return round(new * self._prefill_token_s * _NS)
        pairs = new * cached + new * (new + 1) // 2
        return round(self._model.duration(BatchShape(prefill_rows=1, prefill_tokens=new, prefill_pairs=pairs)) * _NS)

    def decode(self, tokens: int, behind: int) -> int:
        """To generate `tokens` behind a prompt of `behind`."""
        if self._model is None:
            return round(tokens * self._decode_token_s * _NS)
        shape = BatchShape(decode_rows=1, decode_kv=behind, decode_kv_unique=behind)
        return round(self._model.decode_run(shape).at(tokens) * _NS)


class Window:
    """Requests placed in the last so many seconds: what they cost each engine, and how many used each prefix."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._requests: deque[tuple[float, Engine, int, tuple[PrefixNode, ...]]] = deque()
        self._load: dict[Engine, int] = {}
        self._uses: dict[PrefixNode, int] = {}

    def load(self, engine: Engine) -> int:
        """Nanoseconds."""
        return self._load.get(engine, 0)

    def share(self, node: PrefixNode) -> float:
        """The part of the requests that used it."""
        return self._uses.get(node, 0) / len(self._requests) if self._requests else 0.0

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, now: float, engine: Engine, cost: int, path: tuple[PrefixNode, ...]) -> None:
        self._requests.append((now, engine, cost, path))
        self._load[engine] = self._load.get(engine, 0) + cost
        for node in path:
            self._uses[node] = self._uses.get(node, 0) + 1

    def forget(self, now: float) -> dict[Engine, None]:
        """Drops what is too old; returns the engines whose load has changed."""
        changed: dict[Engine, None] = {}
        while self._requests and self._requests[0][0] < now - self._seconds:
            _, engine, cost, path = self._requests.popleft()
            changed[engine] = None
            self._load[engine] -= cost
            if not self._load[engine]:
                del self._load[engine]
            for node in path:
                self._uses[node] -= 1
                if not self._uses[node]:
                    del self._uses[node]
        return changed


class Unused:
    """An engine's contexts that no task uses, the longest unused first, read off it only when the last reading is used up.

    What came to be unused after a reading belongs behind all of it, and what is used again is skipped, so that a reading stays
    in order while it lasts. One reading a `call` of the policy is enough: nothing comes to be unused in it.
    """

    def __init__(self) -> None:
        self._line: deque[tuple[float, int, Context]] = deque()
        self._round = 0  # of the last reading

    def first(self, engine: Engine, tokens: int, call: int) -> Iterator[Context]:
        """Contexts with at least so many tokens altogether; fewer, when there are not so many."""
        line = self._line
        while line and not _still(line[0]):
            line.popleft()
        found = list(self._until(tokens))
        if sum(entry[2].tokens for entry in found) < tokens and self._round != call:
            self._round = call
            retained = [c for c in engine.contexts.values() if c.state == "retained" and c.node is not None]
            retained.sort(key=lambda c: (c.last_use_s, -_depth(c), c.id))
            self._line = deque([(c.last_use_s, c.id, c) for c in retained])
            found = list(self._until(tokens))
        return iter([entry[2] for entry in found])

    def _until(self, tokens: int) -> Iterator[tuple[float, int, Context]]:
        for entry in self._line:
            if tokens <= 0:
                return
            if _still(entry):
                tokens -= entry[2].tokens
                yield entry


def _still(entry: tuple[float, int, Context]) -> bool:
    """Whether the context is there, and was not used since."""
    return entry[2].state == "retained" and entry[2].last_use_s == entry[0]


def _depth(context: Context) -> int:
    return context.node.depth if context.node is not None else 0


class Loads:
    """A lane's engines by their load in the window."""

    def __init__(self, window: Window) -> None:
        self._roster = Roster()
        self.index = EngineIndex(window.load)

    def follow(self, lane: Lane) -> list[Engine]:
        """Takes in engines that came and out those that went; returns these."""
        came, went = self._roster.changes(lane)
        for engine in went:
            self.index.remove(engine)
        for engine in came:
            self.index.add(engine)
        return went


@mypyc_attr(allow_interpreted_subclasses=True)
class PrebleE2(InOrder):
    """Tasks in order of readiness."""

    name: ClassVar[str] = "preble_e2"
    parameters: ClassVar[dict[str, Parameter]] = {
        "window_s": Parameter(float, 180.0, "seconds of history that make an engine's load", at_least=0),
        "balance_ratio": Parameter(float, 15.0, "times by which the loads may differ", at_least=1),
        "balance_requests": Parameter(int, 50, "requests in the window before loads are balanced", at_least=1),
        "prefill_token_s": Parameter(float, 0.00012, "seconds to prefill a token, without a latency profile", at_least=0),
        "decode_token_s": Parameter(float, 0.15, "seconds to decode a token, without a latency profile", at_least=0),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._ratio = float(parameters["balance_ratio"])
        self._requests = int(parameters["balance_requests"])
        self._prefill_token_s = float(parameters["prefill_token_s"])
        self._decode_token_s = float(parameters["decode_token_s"])
        self._window = Window(float(parameters["window_s"]))
        self._loads: WeakKeyDictionary[Lane, Loads] = WeakKeyDictionary()
        self._times: dict[Engine, Times] = {}
        self._unused: dict[Engine, Unused] = {}
        self._now = 0.0
        self._round = 0

    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
        self._now = now
        self._round += 1
        for engine in self._window.forget(now):
            self._moved(engine)
        yield from super().place(queue, cluster, now)

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        index = self._follow(task.call.lane)
        found = self._exploit(task, index, cluster)
        if found is None:
            found = self._best(task, cluster, "explore", lambda ids: self._explored(task, index, ids))
        if found is None:
            return ()
        self._count(task, found.engine)
        return (found,)

    def _exploit(self, task: Task, index: EngineIndex, cluster: Cluster) -> Placement | None:
        found = self._best(task, cluster, "exploit", lambda ids: self._exploited(task, index, ids))
        lightest = index.first()
        if found is None or lightest is None or len(self._window) < self._requests:
            return found
        if self._window.load(found.engine) <= self._ratio * self._window.load(lightest):
            return found
        return self._best(task, cluster, "rebalance", lambda ids: iter(index) if ids is None else index.among(ids))

    def _best(
        self, task: Task, cluster: Cluster, rule: str, rank: Callable[[list[int] | None], Iterator[Engine]]
    ) -> Placement | None:
        ranked = open_first(task, cluster, lambda ids: self._with_terms(task, rank(ids), cluster.explaining))
        found = best_of(task, ranked, cluster, None, rule)
        if found is not None and not found.terms:
            found.terms = self._terms(task, found.engine)
        return found

    def _with_terms(self, task: Task, engines: Iterator[Engine], explaining: bool) -> Iterator[tuple[Engine, Terms]]:
        for engine in engines:
            yield engine, self._terms(task, engine) if explaining else {}

    def _exploited(self, task: Task, index: EngineIndex, ids: list[int] | None) -> Iterator[Engine]:
        for engine, cached in by_match(task, index, ids):
            if cached <= Cluster.prompt_tokens(task, engine) - cached:
                return
            yield engine

    def _explored(self, task: Task, index: EngineIndex, ids: list[int] | None) -> Iterator[Engine]:
        window = self._window

        def score(engine: Engine, new: int) -> int:
            return window.load(engine) + self._evicted(task, engine, new) + self._recompute(task, engine, new)

        def floor(engine: Engine, new: int) -> int:
            return window.load(engine) + self._recompute(task, engine, new)

        for engine, _, _ in by_score(task, index, score, floor, ids):
            yield engine

    def _terms(self, task: Task, engine: Engine) -> Terms:
        cached = Cluster.cached_tokens(task, engine)
        new = max(0, Cluster.prompt_tokens(task, engine) - cached)
        load = self._window.load(engine)
        eviction, recompute = self._evicted(task, engine, new), self._recompute(task, engine, new)
        return {
            "cost_s": (load + eviction + recompute) / _NS,
            "load_s": load / _NS,
            "eviction_s": eviction / _NS,
            "recompute_s": recompute / _NS,
            "cached_tokens": cached,
        }

    def _recompute(self, task: Task, engine: Engine, new: int) -> int:
        return self._times_of(engine).prefill(new, Cluster.prompt_tokens(task, engine) - new)

    def _evicted(self, task: Task, engine: Engine, new: int) -> int:
        """What it costs to have again what the engine must give up for the task."""
        room = engine.description.tokens_capacity - engine.cached_tokens
        wanted = new + task.sampling.max_gen_length - room
        if wanted <= 0:
            return 0
        unused = self._unused.get(engine)
        if unused is None:
            unused = self._unused[engine] = Unused()
        times, cost = self._times_of(engine), 0.0
        for context in unused.first(engine, wanted, self._round):
            if context.node is not None:
                cost += times.prefill(context.tokens) * self._window.share(context.node)
        return round(cost)

    def _count(self, task: Task, engine: Engine) -> None:
        """The task is placed there."""
        times, prompt = self._times_of(engine), Cluster.prompt_tokens(task, engine)
        cached = Cluster.cached_tokens(task, engine)
        cost = times.prefill(max(0, prompt - cached), cached) + times.decode(task.sampling.max_gen_length, prompt)
        self._window.add(self._now, engine, cost, tuple(task.path or ()))
        self._moved(engine)

    def _moved(self, engine: Engine) -> None:
        """Its load is another one now."""
        for lane in engine.lanes:
            loads = self._loads.get(lane)
            if loads is not None:
                loads.index.update(engine)

    def _follow(self, lane: Lane) -> EngineIndex:
        loads = self._loads.get(lane)
        if loads is None:
            loads = self._loads[lane] = Loads(self._window)
        for engine in loads.follow(lane):
            self._times.pop(engine, None)
            self._unused.pop(engine, None)
        return loads.index

    def _times_of(self, engine: Engine) -> Times:
        times = self._times.get(engine)
        if times is None:
            times = self._times[engine] = Times(engine, self._prefill_token_s, self._decode_token_s)
        return times
