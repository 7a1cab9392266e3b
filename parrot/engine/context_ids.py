"""Keeps three kinds of context ids apart: the core's of this life, the core's of earlier lives, and the primitives'.

EngineCore knows contexts by one int. The core's ids start anew with every registration, and an engine used alone names
contexts as its clients please; here each gets an int of its own. Holds no tokens, frees nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

_BITS = 48
_MASK = (1 << _BITS) - 1
_PRIMITIVES = 0


class ContextIds:
    """Ids as EngineCore sees them. A core's ids are below 2**48; each of its lives has a number above 0."""

    def __init__(self) -> None:
        self._life = 1
        self._primitives = 0
        self._evicted: list[int] = []

    def of_core(self, context_id: int) -> int:
        """The core's `context_id` of the present life."""
        return (self._life << _BITS) | (context_id & _MASK)

    def new_primitive(self) -> int:
        """An id for one more context of an engine used alone."""
        self._primitives += 1
        return (_PRIMITIVES << _BITS) | self._primitives

    def of_this_life(self, ids: Iterable[int]) -> list[int]:
        """Those of `ids` that the core has named in its present life."""
        return [i for i in ids if i >> _BITS == self._life]

    def next_life(self) -> None:
        """The core has forgotten all its contexts here: none of its old ids is ever given again."""
        self._life += 1
        self._evicted.clear()

    def note_evicted(self, ids: Iterable[int]) -> None:
        """Remembers, for the core, which of `ids` it knows."""
        self._evicted += [i & _MASK for i in ids if i >> _BITS == self._life]

    def take_evicted(self) -> tuple[int, ...]:
        """The core's ids of the contexts that were evicted since this was last asked."""
        if not self._evicted:
            return ()
        evicted = tuple(self._evicted)
        self._evicted.clear()
        return evicted

    def keep_evicted(self, ids: tuple[int, ...]) -> None:
        """The message that was to carry `ids`, taken above, was not delivered: the next one does."""
        self._evicted[:0] = ids
