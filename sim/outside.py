"""How far the engines of several runs went beyond what their latency profiles were fitted to. It judges nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Seen = tuple[float, float, float]  #: what was asked for, the least and the most that the profile was fitted to
OfRun = Mapping[str, Mapping[str, Seen]]  #: as `Summary.outside`: profile -> feature -> what was seen


def farthest(runs: Iterable[OfRun]) -> list[tuple[str, str, Seen]]:
    """(profile, feature, the farthest of all runs), sorted by profile and feature."""
    found: dict[tuple[str, str], Seen] = {}
    for outside in runs:
        for profile, features in outside.items():
            for feature, seen in features.items():
                key = profile, feature
                found[key] = max(found.get(key, seen), seen, key=_beyond)
    return [(profile, feature, seen) for (profile, feature), seen in sorted(found.items())]


def _beyond(seen: Seen) -> float:
    """How far it lies from the range, in either direction."""
    value, least, most = seen
    return max(least - value, value - most)
