"""What shells in virtual and in real time ask of an engine that only passes time. Two kinds answer: `EmulatedEngine`, an
EngineCore over the latency of iterations, and `RemoteEngine`, requests to an endpoint over the latency of requests.

Neither has a clock: the shell says what time it is, and asks when to come again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Final

from parrot.engine.batches import EngineTask
from parrot.engine.emulated.events import EmulatedEvent

NEVER: Final = math.inf


class TimedEngine:
    """Times are absolute seconds and never decrease between calls. `jumps`: whether quiet edges are passed over."""

    def __init__(self, jumps: bool) -> None:
        self.jumps = jumps

    def submit(self, task: EngineTask, output_tokens: int, now: float) -> None:
        """A task, and how many tokens it would generate if max_gen_length allowed (ignored for one that only fills).
        Whether it is taken is told by an event."""
        raise NotImplementedError

    def abort(self, key: Hashable, now: float) -> bool:
        """Gives a task up; no event of it comes any more. False: there is no such task."""
        raise NotImplementedError

    def free_contexts(self, ids: Iterable[int], now: float) -> int:
        """Nobody will ask for these again; the tokens that they added. Those in use go later."""
        raise NotImplementedError

    def next_edge(self) -> float | None:
        """When `advance` must be called; None while nothing is under way."""
        edge = self.edge_s
        return edge if edge < NEVER else None

    @property
    def edge_s(self) -> float:
        """As `next_edge`; infinite while nothing is under way."""
        raise NotImplementedError

    @property
    def quiet(self) -> bool:
        """The next edge is one that jumping passes over: nothing can change there. A shell that steps serves it after
        everything else of its instant."""
        raise NotImplementedError

    def advance(self, now: float) -> list[EmulatedEvent]:
        """Everything up to `now`, in order."""
        raise NotImplementedError

    def generated(self, key: Hashable, now: float) -> int:
        """Tokens of the output that exist at `now` (forced ones included); 0 for an unknown task."""
        raise NotImplementedError
