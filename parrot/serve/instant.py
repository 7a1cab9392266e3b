"""What one instant brings about: the effects so far, and which of its events they come from.

All parts of a scheduler write to the same one. It decides nothing: whoever hands the events in begins it and takes
what is there.
"""

from __future__ import annotations

from parrot.serve.effects import AnyEffect


class Instant:
    """`effects`: what is to be done, in order. `event`: the place, among the events of the instant, of the one that is being
    handled; their number when it is time's turn."""

    __slots__ = ("effects", "event")

    def __init__(self, effects: list[AnyEffect]) -> None:
        self.effects = effects
        self.event = 0
