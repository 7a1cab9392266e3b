"""The clients of a run: each program starts when it arrives, or when one before it has ended, and the run ends with the last.

Decides when a program starts and when a run is over or stuck; what a program sends and how that gets to the core is its
conversation's (`sim.conversation`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import msgspec

from parrot.serve.config import ServeCoreConfig
from sim.clients import Mode, new_player
from sim.cluster import Cluster
from sim.conversation import Access, Conversation, Host
from sim.engine_models import EngineModel, Observe
from sim.network import Network
from sim.recorder import Recorder
from sim.slots import Slots
from sim.timeline import Timeline
from sim.workloads.program import Program

STUCK_AFTER_S: Final = 24 * 3600.0  #: of simulated time in which every answer was a refusal

_next: Final = next  # by a name that never changes: the compiled module need not look it up


class StuckError(Exception):
    """The run cannot end. The message says which program waits for what."""


class Population(Host):
    """The clients of a run: starts each program when it arrives, reading the workload as it goes, and ends with the last.

    clients: None: programs arrive at their `arrival_s`. A number: a closed loop of so many clients, each of which starts the
    next program, whatever its `arrival_s`, in the instant in which its last one ended.
    """

    def __init__(
        self,
        cluster: Cluster,
        programs: Iterator[Program],
        mode: Mode,
        network: Network,
        recorder: Recorder,
        max_gen_length: int,
        on_ended: Callable[[], None] | None = None,
        clients: int | None = None,
    ) -> None:
        self._access = Access(cluster, network, recorder)
        self._calendar = cluster.calendar
        self._programs = programs
        self._mode = mode
        self._max_gen_length = max_gen_length
        self._on_ended = on_ended
        self._live = Slots()  # conversations
        self._serial = 0
        self._next: Program | None = next(self._programs, None)
        self._closed = clients is not None
        if clients is None:
            self._await_next()
        for _ in range(clients or 0):
            self._calendar.call_at(0.0, self._arrive)

    def ended(self, conversation: Conversation) -> None:
        """As `Host` has it."""
        self._access.recorder.program_ended(conversation.player)
        self._live.take(conversation.slot)
        if self._on_ended is not None:
            self._on_ended()
        if self.is_over():
            self._calendar.stop()
        elif self._closed:
            self._calendar.call_at(0.0, self._arrive)

    def is_over(self) -> bool:
        """Whether every program has arrived and ended."""
        return self._next is None and not len(self._live)

    def check_progress(self) -> None:
        """Raises StuckError when refusals are all that has come for a day."""
        if self._calendar.now - self._access.answered_s > STUCK_AFTER_S:
            raise StuckError(f"nothing but refusals for {STUCK_AFTER_S:g} simulated seconds; {self.waiting()}")

    def waiting(self) -> str:
        """Which programs wait for what; the first few of them."""
        first: list[Conversation] = sorted(self._live, key=lambda conversation: conversation.player.serial)[:5]
        lines = [f"program {c.player.program.id!r} waits for {c.player.waits_for()}{c.work()}" for c in first]
        more = f"; and {len(self._live) - 5} more" if len(self._live) > 5 else ""
        return "; ".join(lines) + more

    def _await_next(self) -> None:
        if self._next is not None:
            self._calendar.call_at(self._next.arrival_s, self._arrive)

    def _arrive(self) -> None:
        program = self._next
        calendar = self._calendar
        if program is None:  # more clients than programs
            return
        self._next = _next(self._programs, None)
        if self._closed:
            program = msgspec.structs.replace(program, arrival_s=calendar.now)
        serial = self._serial
        self._serial += 1
        far = not self._access.network.is_local
        player = new_player(program, self._mode, serial=serial, max_gen_length=self._max_gen_length, preallocate=far)
        if not len(self._live):
            self._access.answered_s = calendar.now
        conversation = Conversation(self, self._access, player)
        conversation.slot = self._live.put(conversation)
        if not self._closed:
            self._await_next()
        conversation.perform(player.start(calendar.now))


def simulate(
    programs: Iterable[Program],
    config: ServeCoreConfig,
    engines: Sequence[EngineModel],
    *,
    mode: Mode = Mode.SEMANTIC,
    network: Network,
    max_gen_length: int = 2048,
    jump: bool = True,
    engine_delay_s: float = 0.0,
    tables: bool = True,
    observe: Observe | None = None,
    on_ended: Callable[[], None] | None = None,
    clients: int | None = None,
    strict: bool = False,
) -> Recorder:
    """Runs `programs`, which arrive in order of `arrival_s`, to the end of the last. Raises StuckError when there is none.

    clients: a closed loop of so many clients (see `Population`). Raises ValueError when it is below 1.
    strict: an iteration outside the range that its engine's latency profile was fitted in raises parrot.latency.OutOfRange;
        without, `Recorder.outside` says how far it went.
    """
    if clients is not None and clients < 1:
        raise ValueError(f"clients is {clients}; a closed loop has at least 1")
    timeline = Timeline()
    cluster = Cluster(timeline, config, engines, engine_delay_s=engine_delay_s, jump=jump, observe=observe, strict=strict)
    recorder = Recorder(mode, tables, names=config.global_scheduler.explain_placements > 0)
    population = Population(cluster, iter(programs), mode, network, recorder, max_gen_length, on_ended, clients)
    try:
        if not population.is_over() and not timeline.calendar.run_to_stop():
            raise StuckError(f"nothing more can happen, but {population.waiting()}")
        recorder.outside = cluster.outside()
        cluster.explain(recorder)
    finally:
        cluster.dissolve()  # the process may have more runs before it
    return recorder
