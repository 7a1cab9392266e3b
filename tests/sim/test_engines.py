"""Emulated engines in SimPy: the same events stepped or jumped, several engines and feedback between them included."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from parrot.engine.core import EngineLimits, EngineTask, Link
from parrot.engine.emulated.engine import EmulatedEngine, EmulatedEvent
from parrot.latency import FixedCost, LatencyModel, LatencyProfile
from sim.calendar import Calendar
from sim.cluster import FLUSH
from sim.engines import EDGE, SimEngine
from sim.timeline import Timeline

PROFILE = LatencyProfile(
    name="t", model="m", device="d", attn_func="a", fixed=(FixedCost(9, 0.25),), hinges=(), pair_s=0.0, kv_s=0.0
)


class Heard(SimEngine):
    """Tells its relay."""

    def __init__(self, relay: Relay, number: int, clock: Calendar, engine: EmulatedEngine) -> None:
        super().__init__(clock, engine)
        self._relay = relay
        self._number = number

    def deliver(self, events: list[EmulatedEvent]) -> None:
        self._relay.hear(self._number, events)


class Relay:
    """Two engines; what one finishes goes to the other at the same instant, through a flush as the cluster has it."""

    def __init__(self, jump: bool, depth: int) -> None:
        self.timeline = Timeline()
        clock = self.timeline.calendar
        limits = EngineLimits(32, 4, 4, 32, 100, 20, 64, pipeline_depth=depth)
        self.told: list[tuple[int, EmulatedEvent]] = []
        self.tasks = 0
        self.engines = [Heard(self, i, clock, EmulatedEngine(limits, LatencyModel(PROFILE), jump=jump)) for i in range(2)]

    def hear(self, engine: int, events: list[EmulatedEvent]) -> None:
        assert all(event.at == self.timeline.now for event in events)
        self.told += [(engine, event) for event in events]
        for event in events:
            if event.kind == "finished" and event.output_tokens > 1:
                relay = lambda n=event.output_tokens: self.submit(1 - engine, n - 1)  # noqa: E731
                self.timeline.call_at(self.timeline.now, relay, FLUSH)

    def submit(self, engine: int, output_tokens: int) -> None:
        self.tasks += 1
        task = EngineTask(self.tasks, (Link(2 * self.tasks, 5),), 2 * self.tasks + 1, 20)
        self.engines[engine].submit(task, output_tokens)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.6, 3.0]), st.integers(0, 1), st.integers(1, 6)), max_size=6),
    st.integers(0, 1),
)
def test_stepping_and_jumping_agree_across_engines(arrivals: list[tuple[float, int, int]], depth: int) -> None:
    told = []
    for jump in (True, False):
        relay = Relay(jump, depth)
        for at, engine, output_tokens in arrivals:
            relay.timeline.call_at(at, lambda r=relay, e=engine, n=output_tokens: r.submit(e, n))
        relay.timeline.run()
        assert not any(engine.engine.core.has_work for engine in relay.engines)
        told.append(relay.told)
    assert told[0] == told[1]


def test_an_idle_engine_leaves_nothing_in_the_calendar() -> None:
    relay = Relay(jump=True, depth=0)
    relay.submit(0, 1)
    relay.timeline.run()
    assert relay.timeline.peek() == float("inf")
    assert relay.timeline.now == 0.25
    assert EDGE > FLUSH
