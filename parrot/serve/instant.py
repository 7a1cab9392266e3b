"""What one instant brings about: the effects so far, and which of its events they come from.

All parts of a core write to the same one. It decides nothing.
"""

from __future__ import annotations

from parrot.serve.effects import AnyEffect


class Instant:
    """`effects`: what is to be done, in order. `event`: the place, among the events of the instant, of the one that is being
    handled; their number when it is time's turn."""

    __slots__ = ("effects", "event")

    def __init__(self) -> None:
        self.effects: list[AnyEffect] = []
        self.event = 0

    def take(self) -> list[AnyEffect]:
        """What is to be done; the next instant begins with nothing."""
        effects, self.effects = self.effects, []
        return effects
