"""Limits a minute hold in any minute, whatever comes, and nobody waits longer than they ask for."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot.engine.openai.pace import Pace
from parrot.engine.rate_limits import RateLimits

requests = st.lists(st.tuples(st.floats(0.0, 90.0), st.integers(1, 500)), min_size=1, max_size=60)


def send(limits: RateLimits, arrivals: list[tuple[float, int]]) -> list[float]:
    """When requests are sent that arrive (gap after the one before, tokens), first come, first served."""
    sent, arrived, now = [], 0.0, 0.0
    for gap_s, tokens in arrivals:
        arrived += gap_s
        now = limits.ready_at(tokens, max(now, arrived))
        limits.take(tokens, now)
        sent.append(now)
    return sent


@given(st.integers(1, 40), requests)
def test_no_minute_has_more_requests_than_its_limit(most: int, arrivals: list[tuple[float, int]]) -> None:
    sent = send(RateLimits(most, None), arrivals)
    for first in sent:
        assert sum(first <= at < first + 60.0 for at in sent) <= most


@given(st.integers(500, 3000), requests)
def test_no_minute_has_more_tokens_than_its_limit(most: int, arrivals: list[tuple[float, int]]) -> None:
    sent = send(RateLimits(None, most), arrivals)
    for first in sent:
        assert sum(tokens for at, (_, tokens) in zip(sent, arrivals, strict=True) if first <= at < first + 60.0) <= most


def test_a_backlog_goes_out_at_the_limit() -> None:
    sent = send(RateLimits(60, None), [(0.0, 1)] * 300)
    assert sent[:10] == [0.0] * 10  # ten seconds' worth at once
    assert sent[20] == pytest.approx(11.0)
    assert sent[299] == pytest.approx(290.0)  # five minutes' worth


def test_a_request_larger_than_the_limit_goes_alone() -> None:
    sent = send(RateLimits(None, 600), [(0.0, 1), (0.0, 5000), (0.0, 1)])
    assert sent[0] == 0.0
    assert sent[1] == pytest.approx(60.0)
    assert sent[2] >= 120.0


def test_without_limits_nobody_waits_and_a_pause_holds_all() -> None:
    limits = RateLimits(None, None)
    assert send(limits, [(0.0, 10_000)] * 3) == [0.0, 0.0, 0.0]
    limits.hold(5.0)
    assert limits.ready_at(1, 1.0) == 5.0


async def test_the_engine_of_an_endpoint_keeps_to_the_same_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    sent: list[float] = []

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    pace = Pace(30, 4000, lambda: now)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    arrivals = [(0.0, 50 + 7 * number) for number in range(100)]
    for _, tokens in arrivals:
        await pace.turn(tokens)
        sent.append(now)
    assert sent == pytest.approx(send(RateLimits(30, 4000), arrivals))
