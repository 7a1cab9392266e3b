"""Engines that only pass time: what the simulator knows of one before it runs, and the model that is made of it.

Engines of one profile share its evaluation, as far as they are alike, and what notes how far beyond its range they went. When
anything happens is the engine's (`parrot.engine.emulated`), who drives it `sim.engines`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from parrot.engine.core import EngineLimits
from parrot.engine.emulated.engine import EmulatedEngine
from parrot.engine.emulated.remote import RemoteEngine
from parrot.engine.emulated.timed import TimedEngine
from parrot.engine.rate_limits import RateLimits
from parrot.latency import Coverage, LatencyModel, LatencyProfile, Outside
from parrot.protocol.engine import EngineDescription
from parrot.remote_latency import RemoteCoverage, RemoteModel
from parrot.remote_profile import RemoteProfile

Observe = Callable[[str, Any], None]  #: engine name, what the engine shows of each iteration or run of iterations


class EngineModel(NamedTuple):
    """An engine as the simulator needs it. `factor` multiplies every duration that its profile says.

    With a remote profile: `rates`, the requests and the tokens a minute that it keeps to; `draw`, uniform numbers from 0 to 1
    for what single requests deviate by (null: by nothing).
    """

    description: EngineDescription
    limits: EngineLimits
    profile: LatencyProfile | RemoteProfile
    factor: float = 1.0
    rates: tuple[int | None, int | None] = (None, None)
    draw: Callable[[], float] | None = None


class EngineProfiles:
    """The latency profiles of a cluster's engines.

    jump: over iterations that are alike. observe: told what engines do. strict: what lies outside the range that a profile was
    fitted in raises parrot.latency.OutOfRange.
    """

    def __init__(self, jump: bool, observe: Observe | None, strict: bool) -> None:
        self._jump = jump
        self._observe = observe
        self._strict = strict
        self._coverages: dict[str, Coverage] = {}
        self._remote_coverages: dict[str, RemoteCoverage] = {}
        self._latencies: dict[tuple[str, float], LatencyModel] = {}

    def engine_of(self, model: EngineModel) -> TimedEngine:
        """A new engine, idle."""
        if isinstance(model.profile, RemoteProfile):
            return self._remote(model, model.profile)
        return self._emulated(model, model.profile)

    def outside(self) -> dict[str, dict[str, tuple[float, float, float]]]:
        """For each latency profile that was asked for more than it was fitted to: `Coverage.outside`."""
        coverages: dict[str, Outside] = {**self._coverages, **self._remote_coverages}
        return {name: coverage.outside for name, coverage in coverages.items() if coverage.outside}

    def _emulated(self, model: EngineModel, profile: LatencyProfile) -> TimedEngine:
        """An engine over the latency of iterations."""
        watch = functools.partial(self._observe, model.description.engine_name) if self._observe else None
        coverage = None
        if profile.seen:
            coverage = self._coverages.get(profile.name)
            if coverage is None:
                coverage = self._coverages[profile.name] = Coverage(profile, self._strict)
        latency = self._latencies.get((profile.name, model.factor))
        if latency is None or latency.profile is not profile:
            latency = self._latencies[profile.name, model.factor] = LatencyModel(profile, model.factor)
        return EmulatedEngine(model.limits, latency, jump=self._jump, observe=watch, coverage=coverage)

    def _remote(self, model: EngineModel, profile: RemoteProfile) -> TimedEngine:
        """An engine behind a remote endpoint."""
        coverage = self._remote_coverages.get(profile.name)
        if coverage is None:
            coverage = self._remote_coverages[profile.name] = RemoteCoverage(profile, self._strict)
        requests, tokens = model.rates
        return RemoteEngine(
            RemoteModel(profile, model.factor),
            RateLimits(requests, tokens),
            tasks_capacity=model.limits.tasks_capacity,
            largest_task=model.limits.largest_task,
            coverage=coverage,
            draw=model.draw,
        )
