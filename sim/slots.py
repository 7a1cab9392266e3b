"""Things under way, each in a slot: a small number, given anew once it is free. It decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Slots:
    """As long as the most things that were ever under way at once, and dense: to put one in and to take it out touches one
    place, where a dict would touch several that are cold by then."""

    def __init__(self) -> None:
        self._things: list[Any] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._things) - len(self._free)

    def __iter__(self) -> Iterator[Any]:
        return iter([thing for thing in self._things if thing is not None])

    def put(self, thing: Any) -> int:
        """The slot in which `thing`, which is not None, is from now on."""
        if self._free:
            slot = self._free.pop()
            self._things[slot] = thing
            return slot
        self._things.append(thing)
        return len(self._things) - 1

    def take(self, slot: int) -> Any:
        """What is in the slot, which is free from now on; None when it is free already."""
        thing = self._things[slot]
        if thing is not None:
            self._things[slot] = None
            self._free.append(slot)
        return thing
