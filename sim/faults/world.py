"""One run: the whole system put together from a seed, what goes wrong and when, and what must be so in the end.

First everything that the seed has switched on goes wrong while clients work; then nothing does any more, and all of them
must come to their end; then all sessions close or expire, and nothing may be left. The first violation ends the run.
"""

from __future__ import annotations

import gc
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from sim.faults import stand_ins
from sim.faults.clients import Client
from sim.faults.dice import Dice
from sim.faults.hosts import ClientMachine, CoreMachine, EngineMachine, Machine
from sim.faults.invariants import CoreWatch, check_agreement, check_blocks, check_empty, check_epoch, check_idle_engine
from sim.faults.network import Network
from sim.faults.plan import MODELS, Deaths, Plan, draw_plan
from sim.faults.programs import draw_program
from sim.faults.witness import Witness
from sim.timeline import Timeline

_encode = msgspec.msgpack.Encoder().encode

_LIVELY_S = 600.0  # within which all must be done once nothing goes wrong any more
_CHECK_EVERY_S = 0.5
_QUIET_S = 0.5  # for what is under way in an undisturbed network
_GHOSTS_S = 8.0  # after which no doubled message is under way any more
_SETTLE_S = 15.0  # for messages under way, ghosts of connections, and engines to register
LAST_EVENTS = 40


class Result(msgspec.Struct):
    """What a run was. `counts`: of faults and of what was done; `trace`: the hash of all that happened."""

    seed: int
    trace: str
    counts: dict[str, int]
    violation: tuple[str, str] | None = None
    last: list[str] = []


class World:
    """The run of `plan`. `tell`: sees every line of the trace."""

    def __init__(self, plan: Plan, tell: Callable[[str], None] | None = None) -> None:
        self.plan = plan
        self.timeline = Timeline()
        self.counts: dict[str, int] = {}
        self.witness = Witness(may_fail=plan.engines_fail or plan.config.global_scheduler.engine_wait_timeout < 30.0)
        self.network = Network(self.timeline, Dice(plan.seed, "network"), self.count, self.note)
        self.core = CoreMachine(self)
        self.engines = [EngineMachine(self, spec) for spec in plan.engines]
        self._clients_machine = ClientMachine(self, "clients")
        self._dice = Dice(plan.seed, "faults")
        self._hash = hashlib.blake2b(digest_size=16)
        self._last: deque[str] = deque(maxlen=LAST_EVENTS)
        self._tell = tell
        self.network.hosts["core:9000"] = self.core
        for engine in self.engines:
            self.network.hosts[f"{engine.name}:9001"] = engine
        dice = Dice(plan.seed, "programs")
        models = list(dict.fromkeys(spec.model for spec in plan.engines))
        halves = plan.engines[0].halves
        programs = [draw_program(dice, number, models, halves, plan.chaos_s) for number in range(plan.programs)]
        self.clients = [Client(p, self.witness, Dice(plan.seed, p.name)) for p in programs]

    # --------------------------------------------------------------------------------------------------- what happened

    def count(self, what: str, by: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + by

    def note(self, line: str) -> None:
        """One more line of the trace."""
        line = f"{self.timeline.now:.6f} {line}"
        self._hash.update(line.encode())
        self._last.append(line)
        if self._tell is not None:
            self._tell(line)

    def saw_instant(self, now: float, events: Any, effects: Any) -> None:
        """An instant of the core: all of it goes into the hash."""
        self._hash.update(_encode((events, effects)))
        names = ", ".join(map(_named, events))
        self.note(f"core {now:.6f}: {names} -> {', '.join(map(_named, effects))}")

    def add_life(self, watch: CoreWatch) -> None:
        """A core's life is over: what it did counts."""
        self.count("instants", watch.instants)
        self.count("events", watch.events)
        self.count("attempts", watch.attempts)

    def shows(self, session_id: int, task: dict[str, Any]) -> bool:
        """Whether a getter has seen something of the output of that task (as a TaskRequest's JSON has it)."""
        server: Any = self.core.server
        session = server.core.sessions.get(session_id) if server is not None else None
        if session is None:
            return False
        _, call, output = task["task"]
        stream = server.links._streams._find(session_id, session.calls[call].tasks[output].output.id)
        return stream is not None and stream.shown and bool(stream.text)

    # ------------------------------------------------------------------------------------------------- what goes wrong

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.timeline.call_at(self.timeline.now + seconds, callback)

    def core_dies(self) -> None:
        """And is started again after a while."""
        if self.core.lives:
            self.count("core kills")
            self.core.kill()
            longest_s = self.plan.core_kills.longest_s or 0.2
            self.later(0.0 if self.network.calm else self._dice.between(0.0, longest_s), self._core_comes_back)

    def _core_comes_back(self) -> None:
        if not self.core.lives:
            self.core.start()

    def _engine_dies(self, engine: EngineMachine) -> None:
        if engine.lives:
            self.count("engine kills")
            engine.kill()
            self.later(self._dice.between(0.0, self.plan.engine_kills.longest_s), lambda: self._engine_comes_back(engine))

    def _engine_comes_back(self, engine: EngineMachine) -> None:
        if not engine.lives:
            changed = not self.network.calm and self._dice.chance(self.plan.engine_changes)
            engine.start(self._dice.pick(MODELS) if changed else None)

    def _hangs(self, machine: Machine, longest_s: float) -> None:
        self.count(f"{'core' if machine is self.core else 'engine'} hangs")
        machine.hang(self._dice.spread(0.01, longest_s + 0.01))

    def _disk_fills(self) -> None:
        self.count("full disks")
        self.core.disk.full = True
        self.later(self._dice.spread(0.01, self.plan.disk_full.longest_s), self._disk_empties)

    def _disk_empties(self) -> None:
        self.core.disk.full = False

    def _repeat(self, deaths: Deaths, strike: Callable[[], None]) -> None:
        """Strikes again and again, as long as things go wrong."""
        if not deaths.every_s:
            return

        def again() -> None:
            if not self.network.calm:
                strike()
                self.later(self._dice.exponential(deaths.every_s), again)

        self.later(self._dice.exponential(deaths.every_s), again)

    def _let_go_wrong(self) -> None:
        plan = self.plan
        self._repeat(plan.core_kills, self.core_dies)
        self._repeat(plan.core_hangs, lambda: self._hangs(self.core, plan.core_hangs.longest_s))
        self._repeat(plan.disk_full, self._disk_fills)
        for engine in self.engines:
            self._repeat(plan.engine_kills, lambda e=engine: self._engine_dies(e))  # type: ignore[misc]
            self._repeat(plan.engine_hangs, lambda e=engine: self._hangs(e, plan.engine_hangs.longest_s))  # type: ignore[misc]

    def _calm_down(self) -> None:
        """Nothing goes wrong from now on; every engine serves its own model."""
        self.note("calm")
        self.network.calm = True
        self.core.disk.full = False
        for machine in (self.core, *self.engines):
            machine.thaw()
        self._core_comes_back()
        for engine in self.engines:
            description = engine.link._description if engine.link is not None else None
            if not engine.lives or (description is not None and description.model != engine.spec.model):
                engine.kill()
                engine.start()

    # --------------------------------------------------------------------------------------------------------- the run

    def run(self) -> Result:
        """The whole of it."""
        loop = self._clients_machine.new_life()
        for client in self.clients:
            loop.call_soon(loop.create_task, client.run())
        self.core.start()
        for engine in self.engines:
            engine.start()
        self._let_go_wrong()
        self.later(self.plan.chaos_s, self._calm_down)
        self.later(_CHECK_EVERY_S, self._look)
        if self._goes_on(lambda: self.network.calm, self.plan.chaos_s + 1.0, "the time of faults never ends"):
            wait_s = _LIVELY_S + self.timeline.now
            if self._goes_on(lambda: all(c.done for c in self.clients), wait_s, "not every program comes to its end"):
                self._finish()
        if self.core.watch is not None:
            self.add_life(self.core.watch)
        for machine in (self._clients_machine, self.core, *self.engines):
            machine.stop()
        self.count("outputs checked", self.witness.outputs_checked)
        self.count("streams checked", self.witness.streams_checked)
        self.count("failures told", self.witness.failures_told)
        found = self.witness.found
        violation = (found.invariant, str(found)) if found is not None else None
        return Result(self.plan.seed, self._hash.hexdigest(), self.counts, violation, list(self._last) if violation else [])

    def _finish(self) -> None:
        """All lifetimes pass; then nothing is left."""
        until_s = self.timeline.now + _SETTLE_S
        if not self._goes_on(lambda: self.core.server is not None, until_s, "the core does not come back"):
            return
        server: Any = self.core.server
        self.witness.check(server)
        if self.plan.undisturbed:
            self.later(_QUIET_S, self._compare_contexts)
        config = self.plan.config
        span_s = config.constant_prefix_var_timeout + _SETTLE_S

        def nothing_open() -> bool:
            return self.core.server is not None and not self.core.server.core.counts()["sessions"]

        until_s = self.timeline.now + _GHOSTS_S  # an old request for a session may come again, to a core that has forgotten it
        self._goes_on(lambda: self.timeline.now >= until_s, until_s + 1.0, "")
        if not self._goes_on(nothing_open, self.timeline.now + config.session_life_span + _SETTLE_S, "sessions do not expire"):
            return
        until_s = self.timeline.now + span_s
        self._goes_on(lambda: self.timeline.now >= until_s, until_s + 1.0, "")
        server = self.core.server
        check_empty(self.witness, server, self.core.disk)
        for engine in self.engines:
            assert engine.engine is not None
            check_idle_engine(self.witness, engine.name, engine.engine.core, self.plan.undisturbed)
        self.witness.expect("liveness", len(server.links) == len(self.engines), f"{len(server.links)} engines are registered")

    def _compare_contexts(self) -> None:
        """All that was said has arrived: the core believes of each engine what is so."""
        assert self.core.server is not None
        engines = {engine.name: engine for engine in self.engines}
        for known in self.core.server.core.engines.values():
            engine = engines[known.name]
            assert engine.engine is not None
            check_agreement(self.witness, known, engine.engine, engine.ids)
            self.count("engines compared")

    def _goes_on(self, until: Callable[[], bool], latest_s: float, otherwise: str) -> bool:
        """Lets time pass until that is so. False: something does not hold, or it is not so in time."""
        witness, timeline = self.witness, self.timeline
        timeline.run_until(lambda: witness.found is not None or timeline.now > latest_s or until())
        if witness.found is None and not until():
            open_programs = [client.program.name for client in self.clients if not client.done]
            counts = self.core.server.core.counts() if self.core.server is not None else None
            self.witness.report("liveness", f"{otherwise}: programs {open_programs} are open, the core has {counts}")
        return witness.found is None

    def _look(self) -> None:
        """At the engines, every now and then."""
        for engine in self.engines:
            if engine.loop is not None and engine.engine is not None and engine.link is not None:
                check_blocks(self.witness, engine.name, engine.engine.core)
                if engine.link.registered.is_set():
                    check_epoch(self.witness, engine.name, engine.engine.core, engine.ids._life)
        self.later(_CHECK_EVERY_S, self._look)


def _named(message: Any) -> str:
    """An event or effect in a few words."""
    name = type(message).__name__
    task, request = getattr(message, "task", None), getattr(message, "request", None)
    if task is not None:
        return f"{name}({task.session_id}.{task.call}.{task.output}#{getattr(message, 'attempt', '')})"
    if request is not None:
        error = getattr(message, "error", None)
        return f"{name}({request}{'' if error is None else ' ' + error.code})"
    engine_id = getattr(message, "engine_id", None)
    return name if engine_id is None else f"{name}(engine {engine_id})"


class _Alarm(logging.Handler):
    """An error in the log of a server is a violation: it says so where it has caught an exception of its own."""

    def __init__(self, witness: Witness) -> None:
        super().__init__(logging.ERROR)
        self._witness = witness

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._witness.report("no exceptions", f"{record.name} logged: {record.getMessage()} {error!r}")


@contextmanager
def _listening(witness: Witness) -> Iterator[None]:
    log, alarm = logging.getLogger("parrot"), _Alarm(witness)
    level, propagate = log.level, log.propagate
    log.addHandler(alarm)
    log.setLevel(logging.ERROR)
    log.propagate = False
    collecting = gc.isenabled()
    gc.disable()  # when a dead process's objects go must be nobody's business but ours
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        log.removeHandler(alarm)
        log.setLevel(level)
        log.propagate = propagate


def run_seed(seed: int, tell: Callable[[str], None] | None = None, policy: str | None = None) -> Result:
    """The run of a seed; `tell` sees its trace as it comes. `policy`: in the place of the one that the seed draws."""
    with stand_ins.in_place():
        world = World(draw_plan(seed, policy), tell)
        with _listening(world.witness):
            try:
                return world.run()
            except Exception as error:
                raise RuntimeError(f"seed {seed} cannot be run to its end") from error
