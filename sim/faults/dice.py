"""Random draws of one run: a named stream of its seed, so that one concern's draws never shift another's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from sim.network import stream

T = TypeVar("T")
_DRAWN_AT_ONCE = 256  # a draw at a time would cost more than what is simulated with it


class Dice:
    """Draws of the stream `name` of `seed`."""

    def __init__(self, seed: int, name: str) -> None:
        self._generator = stream(seed, name)
        self._drawn: list[float] = []

    def uniform(self) -> float:
        """In [0, 1)."""
        if not self._drawn:
            self._drawn = self._generator.random(_DRAWN_AT_ONCE).tolist()
        return self._drawn.pop()

    def chance(self, probability: float) -> bool:
        """True with that probability; an impossible one draws nothing."""
        return probability > 0.0 and self.uniform() < probability

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.uniform()

    def spread(self, low: float, high: float) -> float:
        """Between two positive numbers, each order of magnitude alike."""
        return math.exp(self.between(math.log(low), math.log(high)))

    def exponential(self, mean: float) -> float:
        return -mean * math.log(1.0 - self.uniform())

    def number(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self.uniform() * (high - low + 1))

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self.uniform() * len(choices))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        keyed = [(self.uniform(), place) for place in range(len(items))]
        return [items[place] for _, place in sorted(keyed)]
