"""The clock of a core's shell."""

from __future__ import annotations

import pytest

from parrot.serve import clock


async def test_the_clock_counts_no_standstill_and_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = 100.0
    monkeypatch.setattr(clock, "monotonic", lambda: real)
    c = clock.Clock(7.0)
    assert c.now() == 7.0
    real += clock.BEAT_S + clock.TOLERANCE_S
    ordinary = c.now()
    assert ordinary == 7.0 + clock.BEAT_S + clock.TOLERANCE_S
    c._beat()
    real += 3600.0
    after = c.now()
    assert ordinary <= after <= ordinary + clock.BEAT_S
    real += 0.25
    assert c.now() == pytest.approx(after + 0.25)
    real -= 50.0
    assert c.now() == pytest.approx(after + 0.25)
    c.close()
