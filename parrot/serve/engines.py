"""Live engines by the core's own count: what each has in flight, what it may still take, and who is least loaded.

A `Lane` is all that asks for the same models: its queued tasks wait for the same engines. Loads are the core's own
bookkeeping of what it dispatched, exact and fresh, never scraped from an engine.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from mypy_extensions import mypyc_attr

from parrot.protocol.engine import EngineDescription
from parrot.serve.states import ENGINE

if TYPE_CHECKING:
    from parrot.serve.contexts import Context
    from parrot.serve.graph import Task

Load = Any  #: whatever sorts engines; those of this file are one number, of which an index compares a dozen at each change

KEPT_LANES = 16
KEPT_OPENED = 32
LEAST_NOTED = 64  #: changes of loads that an index takes note of before it is sorted anew, or as many as it has engines

# By names of this module's own that never change: the compiled module need not look them up.
_bisect_left: Final[Callable[..., int]] = bisect_left
_bisect_right: Final[Callable[..., int]] = bisect_right

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


class EngineIndex:
    """Engines sorted by a key of their load, ties by id: O(log n) to find a place.

    A change of a load is taken note of, and takes effect when somebody asks: so an engine moves once, however often its load
    has changed, and an index that nobody asks costs nothing but a note. After more notes than it has engines, it is sorted
    anew.
    """

    def __init__(self, key: Callable[[Engine], Load]) -> None:
        self._key = key
        self._loads: list[Load] = []  # sorted
        self._whole = True  # whether all of them have been whole numbers, among which a place is found without Python's help
        self._engines: list[Engine] = []  # whose loads these are, side by side: a search looks at numbers alone
        self._load_of: dict[int, Load] = {}  # engine id -> the load by which it stands there
        self._by_id: dict[int, Engine] = {}
        self._noted: list[Engine] = []  # whose load may be another one since anybody asked
        self._outdated = False  # too many to take note of

    def add(self, engine: Engine) -> None:
        self._by_id[engine.id] = engine
        self._insert(engine, self._key(engine))

    def remove(self, engine: Engine) -> None:
        if self._by_id.pop(engine.id, None) is not None:
            self._take_out(engine, self._load_of.pop(engine.id))

    def update(self, engine: Engine) -> None:
        """Its load may be another one now."""
        if not self._outdated:
            noted = self._noted
            if noted and noted[-1] is engine:
                return
            noted.append(engine)
            if len(noted) > LEAST_NOTED and len(noted) > len(self._engines):
                noted.clear()
                self._outdated = True

    def _settle(self) -> None:
        """Sorts by the loads of now."""
        if self._noted:
            for engine in self._noted:
                known = self._load_of.get(engine.id)
                if known is not None and (load := self._key(engine)) != known:
                    self._take_out(engine, known)
                    self._insert(engine, load)
            self._noted.clear()
        elif self._outdated:
            key, engines = self._key, self._engines
            found = sorted([(key(engine), engine.id, engine) for engine in engines])
            self._load_of = {engine_id: load for load, engine_id, _ in found}
            engines[:] = [engine for _, _, engine in found]
            self._loads = [load for load, _, _ in found]
            for load in self._loads:
                self._whole = self._whole and isinstance(load, int)
            self._outdated = False

    def _insert(self, engine: Engine, load: Load) -> None:
        if self._whole and not isinstance(load, int):
            self._whole = False
        place = self._first_from(load)
        if place < len(self._loads) and self._loads[place] == load:
            place = self._place_among_equals(load, place, engine.id)
        self._loads.insert(place, load)
        self._engines.insert(place, engine)
        self._load_of[engine.id] = load

    def _take_out(self, engine: Engine, load: Load) -> None:
        place = self._first_from(load)
        if self._engines[place] is not engine:
            place = self._place_among_equals(load, place, engine.id)
        del self._loads[place]
        del self._engines[place]

    def _first_from(self, load: Load) -> int:
        """The place of the first with at least that load."""
        return _lowest_from(self._loads, load) if self._whole else _bisect_left(self._loads, load)

    def _place_among_equals(self, load: Load, first: int, engine_id: int) -> int:
        """Where the engine of that id stands, or would, among those of one load. `first`: where these begin."""
        engines, end = self._engines, _bisect_right(self._loads, load, first)
        while first < end:
            middle = (first + end) // 2
            if engines[middle].id < engine_id:
                first = middle + 1
            else:
                end = middle
        return first

    def __iter__(self) -> Iterator[Engine]:
        """From the least to the most loaded. Do not change a load while iterating; place, then ask again."""
        self._settle()
        return iter(self._engines)

    def first(self) -> Engine | None:
        """The least loaded one."""
        self._settle()
        return self._engines[0] if self._engines else None

    def last(self) -> Engine | None:
        """The most loaded one."""
        self._settle()
        return self._engines[-1] if self._engines else None

    def at(self, place: int) -> Engine:
        """The one at that place, from 0, the least loaded."""
        self._settle()
        return self._engines[place]

    def among(self, ids: Collection[int]) -> Iterator[Engine]:
        """Those with these ids, from the least to the most loaded. Few are looked up, many are met on the way: O(ids), O(n)."""
        self._settle()
        if 16 * len(ids) <= len(self._engines):
            load_of, by_id = self._load_of, self._by_id
            found = sorted([(load_of[engine_id], engine_id) for engine_id in ids if engine_id in by_id])
            return iter([by_id[engine_id] for _, engine_id in found])
        return _met(self._engines, ids)

    def without(self, ids: Collection[int]) -> Iterator[Engine]:
        """Those with other ids, from the least to the most loaded."""
        self._settle()
        for engine in self._engines:
            if engine.id not in ids:
                yield engine

    def up_to(self, load: Load) -> int:
        """How many have at most that load."""
        self._settle()
        return _bisect_right(self._loads, load)

    def after(self, load: Load) -> Iterator[Engine]:
        """All of them, first those with more than that load; then, from the beginning, the others."""
        place = self.up_to(load)
        engines = self._engines
        for number in range(place - len(engines), place):  # which counts from −len, then from 0
            yield engines[number]

    def __len__(self) -> int:
        return len(self._engines)


def _lowest_from(loads: list[int], load: int) -> int:
    """As bisect_left, on whole numbers."""
    low, high = 0, len(loads)
    while low < high:
        middle = (low + high) >> 1
        if loads[middle] < load:
            low = middle + 1
        else:
            high = middle
    return low


def _met(engines: list[Engine], ids: Collection[int]) -> Iterator[Engine]:
    for engine in engines:
        if engine.id in ids:
            yield engine


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
