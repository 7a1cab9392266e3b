"""The calendar: one order of callbacks and alarms, whatever is set, moved and unset in between."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sim.calendar import ALARMS, NEVER, Alarm, Calendar

TIMES = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 7.0])


class Bell(Alarm):
    """Notes when it rings, and is set to the next of its times."""

    def __init__(self, clock: Calendar, name: str, told: list[tuple[float, str]], again: list[float]) -> None:
        super().__init__()
        self.clock, self.name, self.told, self.again = clock, name, told, again

    def ring(self) -> None:
        self.told.append((self.clock.now, self.name))
        self.clock.set_alarm(self, self.clock.now + self.again.pop() if self.again else NEVER)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(TIMES, max_size=3), min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(0, 8), TIMES | st.just(NEVER)), max_size=20),
    st.lists(st.tuples(TIMES, st.sampled_from([0, 1, 2, ALARMS, 3.5, 4])), max_size=8),
)
def test_alarms_ring_at_the_last_time_they_were_set_to_in_the_order_of_the_calendar(
    again: list[list[float]], moves: list[tuple[int, float]], calls: list[tuple[float, float]]
) -> None:
    clock = Calendar()
    told: list[tuple[float, str]] = []
    bells = [Bell(clock, f"bell {n}", told, list(times)) for n, times in enumerate(again)]
    for bell in bells:
        clock.add_alarm(bell)
    for number, at_s in moves:
        clock.set_alarm(bells[number % len(bells)], at_s)
    for n, (at_s, priority) in enumerate(calls):
        clock.call_at(at_s, lambda n=n: told.append((clock.now, f"call {n}")), priority)

    # The same by looking at everything, each time.
    expected: list[tuple[float, str]] = []
    times, left = [bell.at_s for bell in bells], [list(t) for t in again]
    waiting = [(at_s, priority, n) for n, (at_s, priority) in enumerate(calls)]
    assert len(clock) == len(waiting) + sum(at_s < NEVER for at_s in times)
    while True:
        first_s = min(times)
        number = times.index(first_s)
        if waiting and (min(waiting)[:2] < (first_s, ALARMS)):
            at_s, _, n = min(waiting)
            waiting.remove(min(waiting))
            expected.append((at_s, f"call {n}"))
        elif first_s < NEVER:
            expected.append((first_s, f"bell {number}"))
            times[number] = first_s + left[number].pop() if left[number] else NEVER
        else:
            break

    assert clock.peek() == (expected[0][0] if expected else NEVER)
    while clock.step():
        pass
    assert told == expected
    assert len(clock) == 0


def test_what_is_called_now_waits_for_all_that_has_no_greater_priority() -> None:
    clock = Calendar()
    told: list[tuple[float, str]] = []
    bell = Bell(clock, "bell", told, [])
    clock.add_alarm(bell)
    clock.set_alarm(bell, 0.0)
    clock.call_now(lambda: told.append((clock.now, "flush")), 2)
    clock.call_now(lambda: told.append((clock.now, "after the edges")), 3.5)
    clock.call_at(0.0, lambda: told.append((clock.now, "client")))
    while clock.step():
        pass
    assert [name for _, name in told] == ["client", "flush", "bell", "after the edges"]
