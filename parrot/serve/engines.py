"""Live engines by the core's own count: what each has in flight, what it may still take, and who is least loaded.

A `Lane` is all that asks for the same models: its queued tasks wait for the same engines. Loads are the core's own
bookkeeping of what it dispatched, exact and fresh, never scraped from an engine.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from itertools import islice
from typing import TYPE_CHECKING, Final

from mypy_extensions import mypyc_attr

from parrot.protocol.engine import EngineDescription
from parrot.serve.engine_index import EngineIndex, Load
from parrot.serve.states import ENGINE

if TYPE_CHECKING:
    from parrot.serve.contexts import Context
    from parrot.serve.graph import Task

KEPT_LANES = 16
KEPT_OPENED = 32

_TASK_BITS: Final = 24  #: of a number of tasks on an engine
_TOKEN_BITS: Final = 48  #: of tokens reserved there
HARM_BITS = (_TASK_BITS, _TOKEN_BITS)  #: below the latency-bound tasks in `by_harm`


class Engine:
    """A registered engine. `version` changes whenever its capacity has changed in a way that could let in what it refused.
    `failures`: attempts that failed there in a row, those that failed together counted once; `suspected_s`: when it was last
    suspected for it.

    Its load, in tokens, by the core's own count and kept by addition, so that a policy may ask for it at no cost:

    - `reserved`: Σ(new prompt + max_gen_length) of its tasks in flight;
    - `prompt_tokens`: Σ whole prompt of its tasks in flight, what it holds of them already included;
    - `prefill_tokens`: Σ new prompt of those tasks in flight whose first token has not come: what it has yet to compute;
    - `cached_tokens`: Σ tokens of the contexts that the core believes there, those that are being computed included.

    `tasks`: those in flight there; `running`: how many these are. `latency_tasks`: how many of its tasks were
    latency-sensitive when they were placed, or have become so since.
    `reports_evictions`: whether it tells which contexts it gave up. If it does, the core's belief of what it holds is exact
    (but for what is on the way); if not, an estimate: that it keeps all it was given until the core lets go of it.
    `claimed`: the task that it is kept free for (`parrot.serve.claims`).

    `name`, `tokenizer`, `bos_tokens`, `max_seq_len`, `tasks_capacity` and `tokens_capacity` are its description's: every
    placement asks for them.
    """

    __slots__ = (
        "bos_tokens", "cached_tokens", "claimed", "contexts", "description", "failures", "id", "indexes", "lanes",
        "latency_tasks", "max_seq_len", "name", "next_context_id", "prefill_tokens", "prompt_tokens", "reports_evictions",
        "reserved", "running", "state", "suspected_s", "tasks", "tasks_capacity", "tokenizer", "tokens_capacity", "version",
    )  # fmt: skip

    def __init__(self, id: int, description: EngineDescription) -> None:
        # What every placement asks for stands together.
        self.id = id
        self.state = "live"
        self.claimed: Task | None = None
        self.running = 0
        self.reserved = 0
        self.tasks_capacity = description.tasks_capacity
        self.tokens_capacity = description.tokens_capacity
        self.max_seq_len = description.max_seq_len
        self.tokenizer = description.tokenizer
        self.bos_tokens = description.bos_tokens
        self.lanes: tuple[Lane, ...] = ()  # those that it serves
        self.indexes: tuple[EngineIndex, ...] = ()  # theirs
        self.prompt_tokens = 0
        self.prefill_tokens = 0
        self.cached_tokens = 0
        self.latency_tasks = 0
        self.version = 0
        self.failures = 0
        self.next_context_id = 0
        self.tasks: dict[Task, None] = {}
        self.contexts: dict[int, Context] = {}
        self.name = description.engine_name
        self.suspected_s = -1.0
        self.description = description
        self.reports_evictions = description.engine_type != "openai"  # a remote endpoint says nothing of its cache

    def new_context_id(self) -> int:
        self.next_context_id += 1
        return self.next_context_id


def by_load(engine: Engine) -> Load:
    """Fewest reserved tokens, then fewest tasks."""
    return engine.reserved << _TASK_BITS | engine.running


def by_harm(engine: Engine) -> Load:
    """Fewest latency-bound tasks, then fewest reserved tokens."""
    return (engine.latency_tasks << _TOKEN_BITS | engine.reserved) << _TASK_BITS | engine.running


def by_tasks(engine: Engine) -> Load:
    """Fewest tasks, then fewest reserved tokens."""
    return engine.running << _TOKEN_BITS | engine.reserved


def by_id(engine: Engine) -> Load:
    """In order of registration."""
    return engine.id


def by_room(engine: Engine) -> Load:
    """Most room first: idle engines, then those with the most tokens left (minus so many), last those with no place for one
    more task. `EngineIndex.up_to(-tokens)` counts those that take a task with so many tokens."""
    running = engine.running
    if not running:
        return -1 << _TOKEN_BITS  # one task alone always has room
    if running >= engine.tasks_capacity:
        return 1 << _TOKEN_BITS
    return engine.reserved - engine.tokens_capacity


@mypyc_attr(native_class=False)  # compiled classes know no weak references
class Lane:
    """All that asks for one of `models` (empty: any) of a model type, and the live engines that serve it."""

    __slots__ = ("__weakref__", "engines", "indexes", "model_type", "models", "opened", "users", "version")

    def __init__(self, models: tuple[str, ...], model_type: str) -> None:
        self.models = models
        self.model_type = model_type
        self.engines: dict[int, Engine] = {}
        self.version = 0  # how often one of its engines has had more room than before
        self.opened: deque[Engine] = deque(maxlen=KEPT_OPENED)  # those engines, the last ones
        self.users = 0  # calls of open sessions that asked for it
        self.indexes: dict[Callable[[Engine], Load], EngineIndex] = {}

    def serves(self, description: EngineDescription) -> bool:
        kind = "text" if description.engine_type == "openai" else "token_id"
        return kind == self.model_type and (not self.models or description.model in self.models)

    def opened_since(self, version: int) -> Collection[Engine]:
        """The engines that have had more room since that version; all of them, when that is long ago."""
        times = self.version - version
        if times > len(self.opened):
            return self.engines.values()
        return dict.fromkeys(islice(reversed(self.opened), times))

    def open(self, engine: Engine) -> None:
        """That engine has more room than before."""
        self.version += 1
        self.opened.append(engine)

    def ordered(self, key: Callable[[Engine], Load]) -> EngineIndex:
        """The engines of the lane sorted by `key`; the index is kept from the first time it is asked for. `key` may use any
        count of an `Engine`: all that changes one says so (`Engines.load_changed`)."""
        index = self.indexes.get(key)
        if index is None:
            index = self.indexes[key] = EngineIndex(key)
            for engine in self.engines.values():
                index.add(engine)
                engine.indexes = (*engine.indexes, index)
        return index

    def describe(self) -> str:
        models = " or ".join(self.models) if self.models else "any model"
        return f"{models} (model_type {self.model_type})"


class Engines:
    """All live engines, and the lanes that are asked for. Of lanes that no open session's calls need any more the last
    `KEPT_LANES` are kept: clients can name any models, and every change of a load visits every lane."""

    def __init__(self) -> None:
        self.live: dict[int, Engine] = {}
        self.lanes: dict[tuple[tuple[str, ...], str], Lane] = {}
        self._unused: OrderedDict[Lane, None] = OrderedDict()
        self._next_id = 0

    def lane(self, models: tuple[str, ...], model_type: str) -> Lane:
        """The lane of that requirement for one more call, which gives it back with `leave`."""
        lane = self.lanes.get((models, model_type))
        if lane is None:
            lane = self.lanes[models, model_type] = Lane(models, model_type)
            for engine in self.live.values():
                self._join(lane, engine)
        if not lane.users:
            self._unused.pop(lane, None)
        lane.users += 1
        return lane

    def leave(self, lane: Lane) -> None:
        """A call's session has ended."""
        lane.users -= 1
        if lane.users:
            return
        self._unused[lane] = None
        if len(self._unused) > KEPT_LANES:
            oldest, _ = self._unused.popitem(last=False)
            del self.lanes[oldest.models, oldest.model_type]
            for engine in oldest.engines.values():
                engine.lanes = tuple([lane for lane in engine.lanes if lane is not oldest])
                engine.indexes = tuple([index for lane in engine.lanes for index in lane.indexes.values()])

    def register(self, description: EngineDescription) -> Engine:
        self._next_id += 1
        engine = Engine(self._next_id, description)
        self.live[engine.id] = engine
        for lane in self.lanes.values():
            self._join(lane, engine)
        return engine

    def _join(self, lane: Lane, engine: Engine) -> None:
        if lane.serves(engine.description):
            lane.engines[engine.id] = engine
            lane.open(engine)
            for index in lane.indexes.values():
                index.add(engine)
            engine.lanes = (*engine.lanes, lane)
            engine.indexes = (*engine.indexes, *lane.indexes.values())

    def lose(self, engine: Engine) -> tuple[Lane, ...]:
        """Takes the engine out of everything; returns the lanes that it served."""
        engine.state = ENGINE[engine.state, "lose"]
        del self.live[engine.id]
        lanes, engine.lanes, engine.indexes = engine.lanes, (), ()
        for lane in lanes:
            del lane.engines[engine.id]
            for index in lane.indexes.values():
                index.remove(engine)
        return lanes

    def load_changed(self, engine: Engine, more_room: bool = False) -> None:
        """The engine's load is another one now: every index that holds it moves it. With `more_room`, whatever waits
        for room asks again."""
        for index in engine.indexes:
            index.update(engine)
        if more_room:
            engine.version += 1
            for lane in engine.lanes:
                lane.open(engine)
