"""When a core is to be called again though nothing happens: a bound that costs little to keep, and pauses after failures.

The first of all deadlines is known exactly (`ServeCore.next_deadline`), but to ask every part for its own after every instant
costs more than most instants do. So whoever sets a deadline that may come soon says so here: the bound may be too early, and
is never too late. It knows no clock, and nothing of what is done when the time has come.
"""

from __future__ import annotations

import math

#: After a failure in what time brings, or in placing, this long passes before the next try (seconds): its cause may stay.
FAULT_PAUSE_S = 1.0


class Alarm:
    """`at`: nothing is due before, in seconds of the core's clock."""

    def __init__(self) -> None:
        self.at = math.inf
        self._quiet_until = 0.0  # no deadline before, after a failure in what time brought
        self._place_again_at = math.inf  # placing failed

    def no_later(self, deadline_s: float | None) -> None:
        """Something is due at `deadline_s`; None: nothing is."""
        if deadline_s is not None and deadline_s < self.at:
            self.at = deadline_s

    def set(self, wanted_s: float | None) -> None:
        """All that was due is done, and the core is wanted at `wanted_s`; None: not before the next event."""
        self.at = math.inf if wanted_s is None else wanted_s

    def wanted_at(self, deadline_s: float) -> float | None:
        """When the core is wanted, for it to try again after a failure too, if `deadline_s` is the first of all deadlines (inf:
        there is none)."""
        wanted_s = min(max(deadline_s, self._quiet_until), self._place_again_at)
        return None if wanted_s == math.inf else wanted_s

    # ------------------------------------------------------------------------------------------- after a failure

    def pause(self, now: float) -> None:
        """Something that was due has failed: it is not tried again at once."""
        self._quiet_until = now + FAULT_PAUSE_S

    def place_later(self, now: float) -> None:
        """Placing has failed: it is tried again, though nothing new may have come."""
        self._place_again_at = now + FAULT_PAUSE_S
        self.no_later(self._place_again_at)

    def place_again(self, now: float) -> bool:
        """Whether it is time to try once more to place; said once."""
        if now < self._place_again_at:
            return False
        self._place_again_at = math.inf
        return True
