"""Why tasks went where they went: the last placements with the terms of every engine that was weighed."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import msgspec

from parrot.protocol.engine import TaskId
from parrot.serve.engines import Engine
from parrot.serve.policies.base import Placement, Terms

Numbers = dict[str, float | None]  #: terms by name; None where a policy gave no finite number


class CandidateReport(msgspec.Struct, frozen=True):
    """An engine that was considered. `terms`: what its score was made of, by name; `fits`: whether it had room."""

    engine_id: int
    engine_name: str
    fits: bool
    terms: Numbers


class PlacementReport(msgspec.Struct, frozen=True):
    """One placement. `time_s`: the core's clock; `waited_s`: since the task was ready; `queued`: tasks that waited then, itself
    included. `rule`: which of the policy's rules decided; `fallback`: the policy failed, and `least_loaded` placed it.
    `candidates`: best first, the chosen engine among them; of a large cluster only the best ones."""

    task: TaskId
    attempt: int
    time_s: float
    waited_s: float
    queued: int
    policy: str
    rule: str
    fallback: bool
    engine_id: int
    engine_name: str
    terms: Numbers
    candidates: tuple[CandidateReport, ...]


class PlacementsAnswer(msgspec.Struct, frozen=True):
    """What GET /v1/debug/placements answers. `policy_errors`: what the policy did wrong -> how often. `kept`: how many
    placements the core keeps at most (`global_scheduler.explain_placements`). `placements`: the newest first."""

    policy: str
    policy_errors: dict[str, int]
    kept: int
    placements: tuple[PlacementReport, ...]


class Explanations:
    """The last `most` placements. `take` hands them over and forgets them, for who keeps all of them elsewhere."""

    def __init__(self, most: int, policy: str) -> None:
        self._policy = policy
        self._placements: deque[PlacementReport] = deque(maxlen=most)

    def add(self, placement: Placement, attempt: int, now: float, queued: int, fallback: bool) -> None:
        """To be called before the placement is carried out, so that loads are those that the policy saw."""
        task, engine = placement.task, placement.engine
        terms = placement.terms or {}
        candidates = tuple([_report(c.engine, c.fits, c.terms) for c in placement.candidates or ()])
        if not candidates:
            candidates = (_report(engine, True, terms),)
        self._placements.append(
            PlacementReport(
                task=task.id,
                attempt=attempt,
                time_s=now,
                waited_s=now - (task.ready_s if task.ready_s is not None else now),
                queued=queued,
                policy="least_loaded" if fallback else self._policy,
                rule=placement.rule,
                fallback=fallback,
                engine_id=engine.id,
                engine_name=engine.name,
                terms=_numbers(terms),
                candidates=candidates,
            )
        )

    def last(self, most: int, session_id: int | None = None) -> list[PlacementReport]:
        """The last ones, the newest first; with `session_id`, of that session."""
        found: list[PlacementReport] = []
        for placement in reversed(self._placements):
            if len(found) == most:
                break
            if session_id is None or placement.task.session_id == session_id:
                found.append(placement)
        return found

    def take(self) -> list[PlacementReport]:
        """All that are kept, the oldest first; they are kept no longer."""
        taken = list(self._placements)
        self._placements.clear()
        return taken


def _report(engine: Engine, fits: bool, terms: Terms) -> CandidateReport:
    return CandidateReport(engine.id, engine.name, fits, _numbers(terms))


def _numbers(terms: Terms) -> Numbers:
    """A policy may put in anything, such as numpy's numbers; what is kept must go into JSON."""
    return {str(name): _number(value) for name, value in terms.items()}


def _number(value: Any) -> float | None:
    if type(value) is int or type(value) is float:
        return value if math.isfinite(value) else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
