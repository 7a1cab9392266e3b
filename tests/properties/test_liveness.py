"""Invariant 7 under every shipped policy: whatever engines did, once nothing more happens nothing is queued or running.

Engines come and go, reject, fail and evict as in `serve_machine`. Then whatever is in flight ends, some of it badly at
first, time goes on to the last deadline, and every get must have been answered.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from parrot.serve import events as ev
from parrot.serve import states
from tests.properties.serve_laws import ServeCoreMachine
from tests.properties.serve_machine import SHIPPED
from tests.serve.driver import content

#: More than any run needs; a policy that never places, or places for ever, gets here.
MOST_STEPS = 5000


class Drained(ServeCoreMachine):
    """A run that is brought to its end."""

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for session in list(self.core.sessions.values()):
            for variable in list(session.variables.values()):
                if variable.state == "empty":  # only the client could fill it
                    key = content(f"late:{variable.id}", 3)
                    self.send(self.request_for(ev.SetVariable, session.id, session.auth, variable.id, key))
        self.drain()
        found = self.core.counts()
        assert not any(found.get(state, 0) for state in {"queue", "queued", *states.IN_FLIGHT}), found
        assert self.asked == {}, "a get without an answer"
        self.close_everything()

    def drain(self) -> None:
        """Until no event and no deadline is pending."""
        for step in range(MOST_STEPS):
            if self.flying:
                self.end_of_an_attempt(step)
            elif (deadline := self.core.next_deadline()) is not None:
                self.now = max(self.now, deadline)
                self.send(ev.Tick())
            else:
                return
        raise AssertionError(f"not at its end after {MOST_STEPS} steps: {self.core.counts()}")

    def end_of_an_attempt(self, step: int) -> None:
        dispatch = self.flying.pop(min(self.flying, key=repr))
        name = (dispatch.epoch, dispatch.task, dispatch.attempt)
        if dispatch.attempt == 1 and step % 3 == 1:
            self.send(ev.TaskRejected(*name, "full"))
        elif dispatch.attempt <= 2 and step % 3 == 2:
            self.send(ev.TaskFailed(*name, "engine_failed", "again", True))
        else:
            self.send(ev.TaskFinished(*name, content(f"end{step}", 2), 2))


@pytest.mark.parametrize("policy", SHIPPED)
def test_when_nothing_is_pending_nothing_is_queued_or_running(policy: str) -> None:
    machine = type("DrainedUnderOnePolicy", (Drained,), {"policies": (policy,)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, int(os.environ.get("PARROT_EXAMPLES", "90")) // len(SHIPPED)),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
