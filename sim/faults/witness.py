"""What clients were told, and whether the core still stands by it. A promise that was heard once holds for ever: after any
restart the session is there with its variables, calls and values, a value is the same value, a failure the same failure,
and what was streamed is the beginning of what comes. The first thing that does not hold ends the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from parrot.serve.server import Server


class Violation(Exception):
    """An invariant does not hold. `invariant`: its name."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(message)
        self.invariant = invariant


@dataclass
class Told:
    """What the clients of one session have heard."""

    variables: dict[str, None] = field(default_factory=dict)
    calls: int = 0
    values: dict[str, str] = field(default_factory=dict)
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)


class Witness:
    """`may_fail`: an output may fail for good in this run. `found`: the first violation."""

    def __init__(self, may_fail: bool) -> None:
        self.found: Violation | None = None
        self.sessions: dict[int, Told] = {}
        self.outputs_checked = 0
        self.streams_checked = 0
        self.failures_told = 0
        self._may_fail = may_fail
        self._over: set[int] = set()  # only asked whether something is in it

    def report(self, invariant: str, message: str) -> None:
        """Something does not hold."""
        if self.found is None:
            self.found = Violation(invariant, message)

    def expect(self, invariant: str, holds: bool, message: str) -> None:
        if not holds:
            self.report(invariant, message)

    # ------------------------------------------------------------------------------------------- heard by clients

    def session(self, session_id: int) -> None:
        self.sessions.setdefault(session_id, Told())

    def variable(self, session_id: int, var_id: str) -> None:
        self.sessions[session_id].variables[var_id] = None

    def call(self, session_id: int, number: int) -> None:
        told = self.sessions[session_id]
        told.calls = max(told.calls, number + 1)

    def value(self, session_id: int, var_id: str, text: str) -> None:
        told = self.sessions[session_id]
        self.outputs_checked += 1
        self.expect("lasting", told.values.setdefault(var_id, text) == text, f"{var_id} has another value: {text!r}")
        self.expect("lasting", var_id not in told.failures, f"{var_id} had failed and has a value now")
        self.expect("streams", text.startswith(told.shown.get(var_id, "")), f"{var_id} is not what was streamed: {text!r}")

    def failure(self, session_id: int, var_id: str, error: dict[str, Any], must: bool) -> None:
        """`must`: it could not be otherwise."""
        told, failed = self.sessions[session_id], (error["code"], error["message"])
        self.failures_told += 1
        self.expect("failures", must or self._may_fail, f"{var_id} failed where nothing could fail it: {failed}")
        self.expect("lasting", told.failures.setdefault(var_id, failed) == failed, f"{var_id} failed otherwise: {failed}")
        self.expect("lasting", var_id not in told.values, f"{var_id} had a value and has failed now: {failed}")

    def shown(self, session_id: int, var_id: str, text: str) -> None:
        """A streaming getter has all of `text` by now."""
        self.streams_checked += 1
        told = self.sessions[session_id]
        if len(text) > len(told.shown.get(var_id, "")):
            told.shown[var_id] = text

    def ended(self, session_id: int) -> None:
        """The session is over, by its client's wish or its own age: nothing of it need be there any more."""
        self._over.add(session_id)

    # --------------------------------------------------------------------------------------------- held to the core

    def check(self, server: Server) -> None:
        """The core, as it was recovered or as it is in the end, stands by all that was told."""
        core: Any = server.core
        for session_id, told in self.sessions.items():
            session = core.sessions.get(session_id)
            if session is None:
                self.expect("lasting", session_id in self._over, f"session {session_id} is gone")
                continue
            calls = len(session.calls)
            self.expect("lasting", calls >= told.calls, f"session {session_id} has {calls} calls, {told.calls} were accepted")
            for var_id in told.variables:
                self.expect("lasting", var_id in session.variables, f"variable {var_id} of session {session_id} is gone")
            if self.found is None:
                self._check_outputs(server, session, told)

    def _check_outputs(self, server: Server, session: Any, told: Told) -> None:
        shell: Any = server.links
        for var_id, text in told.values.items():
            variable = session.variables[var_id]
            held = variable.state == "ready" and shell._texts.text(variable.content.key) == text
            self.expect("lasting", held, f"variable {var_id}, told as {text!r}, is {variable.state}")
        for var_id, failed in told.failures.items():
            error = session.variables[var_id].error
            self.expect("lasting", error is not None and (error.code, error.message) == failed, f"{var_id} failed, is {error}")
        for var_id, text in told.shown.items():
            variable = session.variables[var_id]
            if variable.state == "ready":
                there = shell._texts.text(variable.content.key)
            else:
                stream = shell._streams._find(session.id, var_id)
                there = stream.text if stream is not None else ""
            if variable.state != "failed":
                self.expect("streams", there.startswith(text), f"{var_id}: {text!r} was shown, {there!r} is known of it")
