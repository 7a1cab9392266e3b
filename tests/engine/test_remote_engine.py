"""An endpoint that only passes time: when requests are sent, when their tokens come, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot.engine.batches import EngineTask, Link
from parrot.engine.emulated.events import EmulatedEvent
from parrot.engine.emulated.remote import RemoteEngine
from parrot.engine.rate_limits import RateLimits
from parrot.latency_profile import Hinge
from parrot.remote_latency import RemoteCoverage, RemoteModel
from parrot.remote_profile import RemoteProfile

LAW = RemoteProfile(
    name="law",
    model="m",
    endpoint="here",
    ttft_s=0.2,
    ttft_prompt=(Hinge(0, 0.001),),
    ttft_load=(Hinge(0, 0.05),),
    tpot_s=0.01,
    tpot_load=(Hinge(0, 0.01),),
    end_s=0.004,
)


def engine(
    profile: RemoteProfile = LAW, rates: tuple[int | None, int | None] = (None, None), capacity: int = 8, **more: object
) -> RemoteEngine:
    limits = RateLimits(*rates)
    return RemoteEngine(RemoteModel(profile), limits, tasks_capacity=capacity, largest_task=1000, **more)  # type: ignore[arg-type]


def task(key: int, prompt: int = 100, most: int = 50, forced: int = 0) -> EngineTask:
    return EngineTask(key, (Link(key, prompt),), 1000 + key, most, forced)


def run(emulated: RemoteEngine, until: float = float("inf")) -> list[EmulatedEvent]:
    """Everything that it tells up to `until`, an edge at a time."""
    events: list[EmulatedEvent] = []
    while (edge := emulated.next_edge()) is not None and edge <= until:
        events += emulated.advance(edge)
    return events


def times(events: Sequence[EmulatedEvent], kind: str) -> dict[object, float]:
    return {event.key: event.at for event in events if event.kind == kind}


def test_one_request_takes_what_the_profile_says() -> None:
    emulated = engine()
    emulated.submit(task(1), 11, 1.0)
    events = run(emulated)
    assert [event.kind for event in events] == ["started", "first_token", "finished"]
    ttft_s = 0.2 + 0.1 + 0.05
    assert [event.at for event in events] == pytest.approx([1.0, 1.0 + ttft_s, 1.0 + ttft_s + 10 * 0.02 + 0.004])
    assert (events[2].output_tokens, events[2].prompt_tokens, events[2].cached_tokens) == (11, 100, 0)
    assert (events[2].decode_s, events[2].max_gap_s) == pytest.approx((0.2, 0.02))
    assert emulated.next_edge() is None


def test_the_load_at_sending_sets_the_first_token_and_the_load_at_every_moment_the_others() -> None:
    emulated = engine()
    emulated.submit(task(1), 31, 0.0)
    emulated.submit(task(2), 6, 0.0)
    events = run(emulated)
    first, end = times(events, "first_token"), times(events, "finished")
    assert first == pytest.approx({1: 0.35, 2: 0.4})
    assert end[2] == pytest.approx(0.4 + 5 * 0.03 + 0.004)
    beside = (end[2] - 0.35) / 0.03  # tokens that the first has when it is alone
    assert end[1] == pytest.approx(end[2] + (30 - beside) * 0.02 + 0.004)
    assert next(event for event in events if event.key == 1 and event.kind == "finished").max_gap_s == pytest.approx(0.03)


def test_rate_limits_hold_in_every_minute() -> None:
    emulated = engine(rates=(12, None), capacity=100)
    for number in range(60):
        emulated.submit(task(number, most=5), 5, 0.0)
    sent = sorted(times(run(emulated), "started").values())
    assert max(sum(at <= other < at + 60.0 for other in sent) for at in sent) == 12
    assert sent[-1] == pytest.approx(290.0)  # five minutes of twelve


def test_tokens_a_minute_count_prompt_and_most_that_may_come() -> None:
    emulated = engine(rates=(None, 600), capacity=100)
    for number in range(12):
        emulated.submit(task(number, prompt=50, most=50), 5, 0.0)
    sent = sorted(times(run(emulated), "started").values())
    assert max(sum(at <= other < at + 60.0 for other in sent) for at in sent) == 6


def test_what_it_has_no_place_for_is_rejected_and_what_is_too_large_fails() -> None:
    emulated = engine(capacity=2)
    for key in (1, 2, 3):
        emulated.submit(task(key), 10, 0.0)
    emulated.submit(task(1), 10, 0.0)
    told = {event.kind: event for event in emulated.advance(0.0)}
    assert told["rejected"].key == 3
    assert "tasks_capacity is 2" in told["rejected"].message
    assert told["failed"].code == "conflict"
    run(emulated)
    emulated.submit(task(4, prompt=1000), 10, 100.0)
    (failed,) = run(emulated)
    assert (failed.kind, failed.code) == ("failed", "task_too_large")


def test_an_output_ends_where_the_model_s_window_does() -> None:
    emulated = engine()
    emulated.submit(task(1, prompt=990, most=500), 400, 0.0)
    assert run(emulated)[-1].output_tokens == 10


def test_a_task_that_only_fills_is_over_at_once_and_sends_nothing() -> None:
    emulated = engine(rates=(1, None))
    emulated.submit(EngineTask(1, (Link(1, 70),), None), 0, 2.0)
    started, finished = run(emulated)
    assert (started.kind, finished.kind, finished.at, finished.prompt_tokens) == ("started", "finished", 2.0, 70)
    emulated.submit(task(2), 1, 2.0)
    assert times(run(emulated), "started")[2] == 2.0  # the turn was not used up


def test_what_was_said_already_is_sent_along_and_not_generated_again() -> None:
    emulated = engine()
    emulated.submit(task(1, forced=10), 12, 0.0)
    events = run(emulated)
    assert events[1].at == pytest.approx(0.2 + 0.11 + 0.05)
    assert events[2].at == pytest.approx(events[1].at + 0.02 + 0.004)
    assert (events[2].output_tokens, events[2].prompt_tokens) == (12, 100)


def test_giving_up_a_request_makes_the_others_faster_and_tells_nothing_of_it() -> None:
    emulated = engine()
    emulated.submit(task(1), 101, 0.0)
    emulated.submit(task(2), 101, 0.0)
    before = emulated.advance(1.0)
    assert emulated.abort(2, 1.0)
    assert not emulated.abort(2, 1.0)
    after = run(emulated)
    assert {event.key for event in after} == {1}
    done = (1.0 - times(before, "first_token")[1]) / 0.03
    assert times(after, "finished")[1] == pytest.approx(1.0 + (49 - done) * 0.02 + 0.004)
    assert emulated.in_flight == 0


def test_giving_up_the_first_that_waits_gives_its_turn_to_the_next() -> None:
    emulated = engine(rates=(6, None))
    for key in (1, 2, 3):
        emulated.submit(task(key), 1, 0.0)
    emulated.advance(0.0)
    emulated.abort(2, 3.0)
    assert times(run(emulated), "started")[3] == pytest.approx(10.0)


def test_tokens_can_be_seen_as_they_come() -> None:
    emulated = engine()
    emulated.submit(task(1), 11, 0.0)
    assert [emulated.generated(1, at) for at in (0.3, 0.351, 0.371, 0.451, 0.552)] == [0, 1, 2, 6, 11]
    assert emulated.generated(9, 0.6) == 0


def test_coverage_tells_how_far_requests_went_beyond_the_profile() -> None:
    coverage = RemoteCoverage(RemoteProfile(**{**fields(), "seen": {"prompt_tokens": (50, 200), "load": (1, 2)}}))
    emulated = engine(coverage=coverage)
    for key, prompt in ((1, 100), (2, 10), (3, 500), (4, 400)):
        emulated.submit(task(key, prompt), 5, 0.0)
    run(emulated)
    assert coverage.outside == {"prompt_tokens": (500.0, 50, 200), "load": (4.0, 1, 2)}


def fields() -> dict[str, object]:
    return {name: getattr(LAW, name) for name in LAW.__struct_fields__}


def test_drawn_requests_deviate_as_the_residuals_do() -> None:
    profile = RemoteProfile(**{**fields(), "ttft_residuals": (-0.5, 0.0, 0.5), "tpot_residuals": (0.1, 0.1)})
    parts = iter((0.0, 0.5, 1.0, 0.5))
    emulated = engine(profile, draw=lambda: next(parts))
    for key in (1, 2):
        emulated.submit(task(key), 1 + key, 100.0 * key)
    events = run(emulated)
    e = 2.718281828459045
    assert times(events, "first_token") == pytest.approx({1: 100.0 + 0.35 * e**-0.5, 2: 200.0 + 0.35 * e**0.5})
    finished = [event for event in events if event.kind == "finished"]
    assert [event.decode_s for event in finished] == pytest.approx([0.02 * e**0.1, 0.04 * e**0.1])


operations = st.lists(
    st.tuples(st.floats(0.0, 2.0), st.integers(0, 11), st.integers(1, 300), st.integers(1, 40), st.booleans()), max_size=40
)


@settings(deadline=None)
@given(operations, st.sampled_from([(None, None), (20, None), (None, 3000)]))
def test_how_often_it_is_asked_changes_nothing_and_every_request_ends_once(
    ops: list[tuple[float, int, int, int, bool]], rates: tuple[int | None, int | None]
) -> None:
    def play(often: bool) -> list[tuple[object, ...]]:
        emulated = engine(rates=rates, capacity=6)
        told: list[EmulatedEvent] = []
        now, known = 0.0, 0
        given_up = set()
        for gap_s, key, prompt, output, abort in ops:
            if often:
                told += run(emulated, now + gap_s / 2)
                told += emulated.advance(now + gap_s / 2)
            now += gap_s
            told += [event for event in run(emulated, now) if event.key not in given_up]
            if abort:
                if emulated.abort(key % max(1, known), now):
                    given_up.add(key % max(1, known))
            else:
                emulated.submit(task(known, prompt, 40), output, now)
                known += 1
        told += run(emulated)
        ends = [event.key for event in told if event.kind in ("finished", "rejected", "failed")]
        assert sorted([*ends, *given_up]) == list(range(known))  # type: ignore[type-var]
        assert emulated.in_flight == 0
        return [(event.kind, event.key, round(event.at, 9), event.output_tokens, round(event.decode_s, 9)) for event in told]

    assert play(True) == play(False)
