"""Which runs are fitted and which are held out. Deterministic: it follows from the runs' loads and from nothing else.

Two engines of one cluster, or two repeats, have the same load: to hold one of them out while the other is fitted would
tell the error at a load that was fitted. So runs within `SAME_LOAD` of each other are one level, and levels go whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from sim.calibrate.logs import Iteration, Run

SAME_LOAD = 1.1  #: a run belongs to the level of a smaller load up to this factor
HOLD_OUT = 0.2  #: part of the levels that is held out, at least one; or of a run's end, when there is one level only
BLOCKS = 5  #: contiguous parts of a level that stand for runs, when there is one level only


class Loaded(Protocol):
    """What a run has, be it of iterations or of requests."""

    @property
    def load(self) -> float: ...

    @property
    def size(self) -> int: ...


R = TypeVar("R", bound=Loaded)


class Split(NamedTuple, Generic[R]):
    """Runs to fit and runs held out, disjoint."""

    fitted: list[R]
    held: list[R]


def levels(runs: Sequence[R]) -> list[list[R]]:
    """The runs by load, least first; those of one level have the same load."""
    found: list[list[R]] = []
    for run in sorted((r for r in runs if r.size), key=lambda r: r.load):
        if found and run.load <= found[-1][0].load * SAME_LOAD:
            found[-1].append(run)
        else:
            found.append([run])
    return found


def not_apart(fitted: Sequence[R], held: Sequence[R]) -> list[R]:
    """Those of `held` whose load was fitted too."""
    own = {id(run) for run in fitted}
    shared = [level for level in levels([*fitted, *held]) if any(id(run) in own for run in level)]
    seen = {id(run) for level in shared for run in level}
    return [run for run in held if id(run) in seen]


def hold_out_by_load(runs: Sequence[R]) -> Split[R]:
    """Holds out a fifth of the levels, evenly spread over the loads and away from their ends where that can be; of two, the
    lower. With one level nothing is held out."""
    by_load = levels(runs)
    count = max(1, round(HOLD_OUT * len(by_load))) if len(by_load) > 1 else 0
    chosen = {((2 * i + 1) * len(by_load) - 1) // (2 * count) for i in range(count)}
    held = [run for number, level in enumerate(by_load) if number in chosen for run in level]
    return Split([run for run in runs if not any(run is other for other in held)], held)


def tails(runs: Sequence[Run]) -> tuple[list[Iteration], list[Iteration]]:
    """The first iterations of every run, and the last HOLD_OUT of them."""
    first: list[Iteration] = []
    last: list[Iteration] = []
    for run in runs:
        cut = len(run.iterations) - int(len(run.iterations) * HOLD_OUT)
        first += run.iterations[:cut]
        last += run.iterations[cut:]
    return first, last


def folds(runs: Sequence[Run]) -> list[list[list[Iteration]]]:
    """For cross-validation: each fold is left out of a fit together, and its members are predicted one by one. A fold is a
    level and its members are runs; with one level, a fold is one of BLOCKS contiguous parts of all runs together."""
    by_load = levels(runs)
    if len(by_load) > 1:
        return [[run.iterations for run in level] for level in by_load]
    whole = list(itertools.chain.from_iterable(run.iterations for run in runs))
    bounds = [len(whole) * k // BLOCKS for k in range(BLOCKS + 1)]
    return [[whole[a:b]] for a, b in itertools.pairwise(bounds) if b > a]
