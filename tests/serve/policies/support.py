"""What the policies' tests share: a task that is asked for, where tasks went, and why."""

from __future__ import annotations

from typing import Any

from parrot.serve.explanations import PlacementReport
from tests.serve.driver import Driver, out, text, value


def ask(d: Driver, session: int, *segments: Any, max_gen_length: int = 16) -> str:
    """A call with these segments and one output, fetched."""
    (x,) = d.outputs(d.submit(session, *segments, out("x", max_gen_length=max_gen_length)))
    d.get(session, x)
    return x


def hot(d: Driver, session: int, number: int, prefix: int = 100, own: int = 10) -> str:
    """A task whose prompt begins with what all of them share."""
    return ask(d, session, text("system", prefix), value("q", f"q{number}", own))


def engines_of(d: Driver) -> list[int]:
    """Where the tasks in flight are; the policy has not failed meanwhile, so that it is its choice."""
    assert d.faults == []
    return [dispatch.engine_id for dispatch in d.dispatches]


def reasons(d: Driver, most: int = 1 << 20) -> list[PlacementReport]:
    """Of all placements, the first one first; the policy has made them all."""
    assert d.faults == []
    assert d.core.scheduler.explanations is not None
    return d.core.scheduler.explanations.last(most)[::-1]


def rules(d: Driver) -> list[str]:
    return [report.rule for report in reasons(d)]
