"""Engines sorted by a load: who is the least loaded, who comes after, how many have at most so much. It decides nothing."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from mypy_extensions import mypyc_attr

if TYPE_CHECKING:
    from parrot.serve.engines import Engine

Load = Any  #: whatever sorts engines; one whole number is compared fastest

LEAST_NOTED = 64  #: changes of loads that an index takes note of before it is sorted anew, or as many as it has engines
SHELF: Final = 64  #: engines on a shelf, at most

# By names of this module's own that never change: the compiled module need not look them up.
_all_of: Final = chain.from_iterable
_bisect_left: Final[Callable[..., int]] = bisect_left
_bisect_right: Final[Callable[..., int]] = bisect_right


@mypyc_attr(acyclic=True)
class _Shelf:
    """A part of the order, never empty: loads, and the engines whose they are, side by side, so that a search looks at numbers
    alone."""

    __slots__ = ("engines", "loads")

    def __init__(self, loads: list[Load], engines: list[Engine]) -> None:
        self.loads = loads
        self.engines = engines


class EngineIndex:
    """Engines sorted by a key of their load, ties by id.

    They stand on shelves, one behind the other, so that one that moves shifts those on its shelf and no others: of a thousand
    engines, a few dozen. To find a place costs O(log n); what counts engines passes the shelves.

    A change of a load is taken note of, and takes effect when somebody asks: so an engine moves once, however often its load
    has changed, and an index that nobody asks costs nothing but a note. After more notes than it has engines, it is sorted
    anew.
    """

    def __init__(self, key: Callable[[Engine], Load]) -> None:
        self._key = key
        self._shelves: list[_Shelf] = []
        self._lasts: list[Load] = []  # of each shelf
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
            if len(noted) > LEAST_NOTED and len(noted) > len(self._by_id):
                noted.clear()
                self._outdated = True

    # ------------------------------------------------------------------------------------------------- the order

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
            self._sort()

    def _sort(self) -> None:
        """All of them anew."""
        key = self._key
        found = sorted([(key(engine), engine_id) for engine_id, engine in self._by_id.items()])
        self._load_of = {engine_id: load for load, engine_id in found}
        self._shelves = []
        for first in range(0, len(found), SHELF // 2):
            some = found[first : first + SHELF // 2]
            self._shelves.append(_Shelf([load for load, _ in some], [self._by_id[engine_id] for _, engine_id in some]))
        self._lasts = [shelf.loads[-1] for shelf in self._shelves]
        self._outdated = False

    def _insert(self, engine: Engine, load: Load) -> None:
        self._load_of[engine.id] = load
        shelves, lasts = self._shelves, self._lasts
        if not shelves:
            shelves.append(_Shelf([load], [engine]))
            lasts.append(load)
            return
        number = self._shelf_of(load, engine.id)
        shelf = shelves[number]
        place = _place_of(shelf, load, engine.id)
        shelf.loads.insert(place, load)
        shelf.engines.insert(place, engine)
        if place == len(shelf.loads) - 1:
            lasts[number] = load
        if len(shelf.loads) > SHELF:
            half = SHELF // 2
            shelves.insert(number + 1, _Shelf(shelf.loads[half:], shelf.engines[half:]))
            del shelf.loads[half:]
            del shelf.engines[half:]
            lasts.insert(number, shelf.loads[-1])

    def _take_out(self, engine: Engine, load: Load) -> None:
        shelves, lasts = self._shelves, self._lasts
        number = self._shelf_of(load, engine.id)
        shelf, place = shelves[number], 0
        engines = shelf.engines
        while engines[place] is not engine:  # which costs less than to compare loads
            place += 1
        del shelf.loads[place]
        del engines[place]
        left = len(engines)
        if left < SHELF // 4 and number + 1 < len(shelves) and left + len(shelves[number + 1].loads) <= SHELF // 2:
            after = shelves[number + 1]
            after.loads[:0] = shelf.loads
            after.engines[:0] = engines
            left = 0
        if not left:
            del shelves[number]
            del lasts[number]
        elif place == left:
            lasts[number] = shelf.loads[-1]

    def _shelf_of(self, load: Load, engine_id: int) -> int:
        """The shelf for the engine of that id with that load: the first that does not end before it, or the last."""
        lasts = self._lasts
        if len(lasts) == 1:
            return 0
        number = _bisect_left(lasts, load)
        if number < len(lasts) and lasts[number] == load:
            shelves, end = self._shelves, _bisect_right(lasts, load, number)
            while number < end:
                middle = (number + end) >> 1
                if shelves[middle].engines[-1].id < engine_id:
                    number = middle + 1
                else:
                    end = middle
        return number if number < len(lasts) else number - 1

    # -------------------------------------------------------------------------------------------------- questions

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Engine]:
        """From the least to the most loaded. Do not change a load while iterating; place, then ask again."""
        self._settle()
        shelves = self._shelves
        if len(shelves) == 1:
            return iter(shelves[0].engines)
        return _all_of([shelf.engines for shelf in shelves])

    def first(self) -> Engine | None:
        """The least loaded one."""
        self._settle()
        return self._shelves[0].engines[0] if self._shelves else None

    def last(self) -> Engine | None:
        """The most loaded one."""
        self._settle()
        return self._shelves[-1].engines[-1] if self._shelves else None

    def at(self, place: int) -> Engine:
        """The one at that place, from 0, the least loaded. Raises IndexError."""
        self._settle()
        for shelf in self._shelves:
            count = len(shelf.engines)
            if place < count:
                return shelf.engines[place]
            place -= count
        raise IndexError("there are fewer engines")

    def among(self, ids: Collection[int]) -> Iterator[Engine]:
        """Those with these ids, from the least to the most loaded. Few are looked up, many are met on the way: O(ids), O(n)."""
        self._settle()
        if 16 * len(ids) <= len(self._by_id):
            load_of, by_id = self._load_of, self._by_id
            found = sorted([(load_of[engine_id], engine_id) for engine_id in ids if engine_id in by_id])
            return iter([by_id[engine_id] for _, engine_id in found])
        return _met(self, ids)

    def without(self, ids: Collection[int]) -> Iterator[Engine]:
        """Those with other ids, from the least to the most loaded."""
        for engine in self:
            if engine.id not in ids:
                yield engine

    def up_to(self, load: Load) -> int:
        """How many have at most that load."""
        self._settle()
        shelves = self._shelves
        number = _bisect_right(self._lasts, load)
        count = 0
        for place in range(number):
            count += len(shelves[place].loads)
        return count + _bisect_right(shelves[number].loads, load) if number < len(shelves) else count

    def after(self, load: Load) -> Iterator[Engine]:
        """All of them, first those with more than that load; then, from the beginning, the others."""
        self._settle()
        shelves = self._shelves
        number = _bisect_right(self._lasts, load)
        if number == len(shelves):
            return iter(self)
        engines = shelves[number].engines
        place = _bisect_right(shelves[number].loads, load)
        parts = [shelf.engines for shelf in (*shelves[number + 1 :], *shelves[:number])]
        return _all_of([engines[place:], *parts, engines[:place]])


def _place_of(shelf: _Shelf, load: Load, engine_id: int) -> int:
    """The first place on the shelf that is not before the engine of that id with that load."""
    loads, engines = shelf.loads, shelf.engines
    place = _bisect_left(loads, load)
    if place < len(loads) and engines[place].id < engine_id and loads[place] == load:
        end = _bisect_right(loads, load, place)
        while place < end:
            middle = (place + end) >> 1
            if engines[middle].id < engine_id:
                place = middle + 1
            else:
                end = middle
    return place


def _met(engines: EngineIndex, ids: Collection[int]) -> Iterator[Engine]:
    for engine in engines:
        if engine.id in ids:
            yield engine
