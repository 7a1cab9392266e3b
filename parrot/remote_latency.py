"""How long a request to a remote endpoint takes: a `RemoteProfile` made ready to evaluate. Pure.

Load is the number of this engine's own requests in flight, the one that is asked about included. What others send to the same
endpoint is not seen; it is part of the spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from parrot.latency import Outside
from parrot.remote_profile import RemoteProfile


class RemoteModel:
    """Pure: the same request at the same load takes the same seconds. `factor` multiplies every duration: one engine's
    deviation from the profile in one run (drawn from `spread`), 1 without."""

    def __init__(self, profile: RemoteProfile, factor: float = 1.0) -> None:
        self.profile = profile
        self.end_s = profile.end_s * factor
        self._ttft_s = profile.ttft_s * factor
        self._prompt = [(hinge.knot, hinge.slope * factor) for hinge in profile.ttft_prompt]
        self._load = [(hinge.knot, hinge.slope * factor) for hinge in profile.ttft_load]
        self._tpot_s = profile.tpot_s * factor
        self._tpot_load = [(hinge.knot, hinge.slope * factor) for hinge in profile.tpot_load]
        self._tpot_of: list[float] = []  # by load: as far as was asked for

    def ttft(self, prompt_tokens: int, load: int) -> float:
        """Seconds from the sending of a request to its first token; `load`: requests in flight then, itself included."""
        return self._ttft_s + _sum(self._prompt, prompt_tokens) + _sum(self._load, load)

    def tpot(self, load: int) -> float:
        """Seconds a token after the first, while `load` requests are in flight."""
        known = self._tpot_of
        while load >= len(known):
            known.append(self._tpot_s + _sum(self._tpot_load, len(known)))
        return known[load]


def _sum(hinges: Sequence[tuple[float, float]], value: float) -> float:
    seconds = 0.0
    for knot, slope in hinges:
        if value > knot:
            seconds += slope * (value - knot)
    return seconds


class RemoteCoverage(Outside):
    """How far requests went beyond the range that a remote profile was fitted in. One for all engines of a profile."""

    def __init__(self, profile: RemoteProfile, strict: bool = False) -> None:
        super().__init__(profile.name, "requests", strict)
        unknown = (0.0, math.inf)
        self._least_prompt, self._most_prompt = profile.seen.get("prompt_tokens", unknown)
        self._least_load, self._most_load = profile.seen.get("load", unknown)

    def note(self, prompt_tokens: int, load: int) -> None:
        """A request is sent. Raises OutOfRange (strict)."""
        if not self._least_prompt <= prompt_tokens <= self._most_prompt:
            self.beyond("prompt_tokens", prompt_tokens, self._least_prompt, self._most_prompt)
        if not self._least_load <= load <= self._most_load:
            self.beyond("load", load, self._least_load, self._most_load)


def quantile(levels: Sequence[float], part: float) -> float:
    """The value at `part` (0 to 1) of a distribution that is given by its quantiles at evenly spaced levels; 0 without any."""
    if not levels:
        return 0.0
    place = part * (len(levels) - 1)
    below = min(int(place), len(levels) - 2)
    if below < 0:
        return levels[0]
    return levels[below] + (place - below) * (levels[below + 1] - levels[below])
