"""`session_hash`: consistent hashing of the session (Karger et al., STOC'97), so that its contexts stay on one engine.

Each engine has `points` places on a ring of 2^64, a session one; its home is the engine of the next place clockwise. When
an engine dies only its own sessions move, each to the engine behind that place; a new one takes its share from all.
160 points an engine are what the ketama library uses; the spread of the engines' shares is about 1/√points.

Left open by the source: a home that has no room. The task goes to the next engine clockwise that has, and the session keeps
its home for later tasks. The places are those of engine ids, which a core never gives twice: an engine that registers again
holds nothing of what it held, and is a new one. Hashes are BLAKE2b, the same in every process.

It knows neither loads nor prefixes: sessions that share a hot prefix are spread as evenly as any. A placement costs O(log(E ·
points)); where most engines are full, as many logarithms as there are engines that are not. An engine that comes or goes
costs O(E · points) once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from struct import unpack
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engines import Engine, Lane
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, Terms, best_of, load_terms, open_first
from parrot.serve.policies.parameters import Parameter
from parrot.serve.policies.roster import Roster
from parrot.serve.queue import TaskQueue

RING = 1 << 64
_ID_BITS = 32
_ID_MASK = (1 << _ID_BITS) - 1
_POINTS_A_DIGEST = 8


class Ring:
    """The points of a lane's engines, in order."""

    def __init__(self, points: int) -> None:
        self._each = points
        self._roster = Roster()
        self._of: dict[int, list[int]] = {}  # engine id -> its points, sorted
        self._places: list[int] = []  # point << _ID_BITS | engine id, sorted

    def follow(self, lane: Lane) -> None:
        """Takes in engines that came, and out those that went."""
        came, went = self._roster.changes(lane)
        if went:
            for engine in went:
                del self._of[engine.id]
            self._places = [place for place in self._places if place & _ID_MASK in self._of]
        if came:
            for engine in came:
                points = self._of[engine.id] = points_of(engine.id, self._each)
                self._places.extend([point << _ID_BITS | engine.id for point in points])
            self._places.sort()

    def clockwise(self, point: int) -> Iterator[int]:
        """Engine ids behind `point`, each once."""
        places = self._places
        start = bisect_left(places, point << _ID_BITS)
        seen: set[int] = set()
        for number in range(start - len(places), start):  # from `start` to the end, which counts from −len, and on from 0
            engine_id = places[number] & _ID_MASK
            if engine_id not in seen:
                seen.add(engine_id)
                yield engine_id

    def nearest(self, point: int, ids: list[int]) -> Iterator[int]:
        """These engine ids as they lie behind `point`, without a walk round the ring."""
        return iter(sorted(ids, key=lambda engine_id: (self._distance(point, engine_id), engine_id)))

    def _distance(self, point: int, engine_id: int) -> int:
        points = self._of[engine_id]
        place = bisect_left(points, point)
        return points[place] - point if place < len(points) else points[0] + RING - point


def points_of(engine_id: int, points: int) -> list[int]:
    """The places of an engine on the ring, sorted."""
    found: list[int] = []
    for number in range(-(-points // _POINTS_A_DIGEST)):
        found.extend(unpack("<8Q", blake2b(b"engine %d %d" % (engine_id, number), digest_size=64).digest()))
    return sorted(found[:points])


def point_of(session_id: int) -> int:
    """The place of a session on the ring."""
    return int.from_bytes(blake2b(b"session %d" % session_id, digest_size=8).digest(), "little")


@mypyc_attr(allow_interpreted_subclasses=True)
class SessionHash(InOrder):
    """Tasks in order of readiness, each to its session's home, or the next engine clockwise that has room for it."""

    name: ClassVar[str] = "session_hash"
    parameters: ClassVar[dict[str, Parameter]] = {
        "points": Parameter(int, 160, "places of an engine on the ring", at_least=1, at_most=4096),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._points = int(parameters["points"])
        self._rings: WeakKeyDictionary[Lane, Ring] = WeakKeyDictionary()

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        lane = task.call.lane
        ring = self._rings.get(lane)
        if ring is None:
            ring = self._rings[lane] = Ring(self._points)
        ring.follow(lane)
        place = point_of(task.session_id)
        home = next(ring.clockwise(place), 0)
        found = best_of(task, open_first(task, cluster, lambda ids: _clockwise(lane, ring, place, ids), blind=True), cluster)
        if found is None:
            return ()
        found.rule = "home" if found.engine.id == home else "next"
        return (found,)


def _clockwise(lane: Lane, ring: Ring, place: int, ids: list[int] | None) -> Iterator[tuple[Engine, Terms]]:
    """The engines of the lane (those with these `ids`) as they lie behind that place of the ring."""
    for engine_id in ring.clockwise(place) if ids is None else ring.nearest(place, ids):
        engine = lane.engines[engine_id]
        yield engine, load_terms(engine)
