"""The machines: the core's, the engines', the clients'. On each a process lives that dies, comes back and stands still.

They put the real servers together as the commands do, on the loop of a new process, and give them the simulated network
and disk. They decide nothing about when anything goes wrong.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from parrot.configuration import ConfigurationError
from parrot.engine.context_ids import ContextIds
from parrot.engine.core_link import CoreLink
from parrot.engine.emulated.engine import EmulatedEngine
from parrot.engine.emulated.loop import EmulatedLoop
from parrot.engine.primitives import Primitives
from parrot.engine.server import EngineServer, _refuse
from parrot.engine.tasks import Tasks
from parrot.latency import LatencyModel
from parrot.protocol.engine import EngineDescription
from parrot.serve import events as ev
from parrot.serve.server import Server
from sim.faults import stand_ins, tokenizers
from sim.faults.dice import Dice
from sim.faults.disk import SimDisk, SimJournal
from sim.faults.invariants import CoreWatch
from sim.faults.loops import ProcessLoop
from sim.faults.network import Connection, Request
from sim.faults.nonsense import Nonsense
from sim.faults.plan import EngineSpec, Wire

if TYPE_CHECKING:
    from sim.faults.world import World

_ENDS = (ev.TaskFinished, ev.TaskFailed, ev.TaskRejected)
_DOUBLED = (ev.TaskStarted, ev.FirstToken, *_ENDS)


class Machine:
    """A place where a process may live. `loop`: the process that takes requests now."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.loop: ProcessLoop | None = None
        self.dice = Dice(world.plan.seed, name)
        self._life: ProcessLoop | None = None  # the process that is there, be it ready or not

    @property
    def lives(self) -> bool:
        return self._life is not None

    def new_life(self, step: Callable[[], None] | None = None) -> ProcessLoop:
        """A process begins."""
        world = self.world
        report = world.witness.report
        late_s = self._late_s if world.plan.turn_s else None
        loop = ProcessLoop(  # type: ignore[abstract]  # files, sockets and signals have no place in it
            world.timeline, self.name, lambda message: report("no exceptions", message), late_s, step
        )
        loop.host = self
        self._life = loop
        return loop

    def _late_s(self) -> float:
        if self.world.network.calm or not self.dice.chance(0.2):
            return 0.0
        return self.dice.between(0.0, self.world.plan.turn_s)

    def kill(self) -> None:
        """The process that is there dies with all that it had in memory."""
        loop, self._life, self.loop = self._life, None, None
        if loop is not None:
            self.world.note(f"{self.name} dies")
            loop.kill()
            for connection in list(loop.connections):
                connection.process_died(loop)
            loop.connections.clear()

    def stop(self) -> None:
        """The run is over: what is under way is given up."""
        if self._life is not None:
            self._life.kill()

    def hang(self, seconds: float) -> None:
        if self._life is not None:
            self.world.note(f"{self.name} hangs for {seconds:.3f} s")
            self._life.hang(seconds)

    def thaw(self) -> None:
        if self._life is not None:
            self._life.thaw()

    def connect(self, address: str, request: Request, may_double: bool) -> Connection:
        """A request of this machine's process."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ProcessLoop)
        return self.world.network.request(loop, self.wire, address, request, may_double)

    @property
    def wire(self) -> Wire:
        return self.world.plan.inner


class ClientMachine(Machine):
    """Where all clients run; it never dies."""

    @property
    def wire(self) -> Wire:
        return self.world.plan.outer


class CoreMachine(Machine):
    """The core's. `disk` is what is left of it when it dies."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "core")
        self.disk = SimDisk()
        self.server: Server | None = None
        self.watch: CoreWatch | None = None
        self.kills = 0
        self._journal: SimJournal | None = None
        self._belated: list[Any] = []  # events that come a second time when another life has begun
        self._sessions = Dice(world.plan.seed, "sessions")

    def start(self) -> None:
        """A new life, which recovers what the disk holds."""
        loop = self.new_life(self._step if self.world.plan.core_crash else None)
        self.world.timeline.call_at(
            self.world.timeline.now + self.world.plan.core_boot_s, lambda: loop.call_soon(self._boot, loop)
        )

    def kill(self) -> None:
        self.kills += self.lives
        journal, self._journal = self._journal, None
        if self.watch is not None:
            self.world.add_life(self.watch)
            self._leave_word(self.watch)
        self.server = self.watch = None
        super().kill()
        if journal is not None:
            journal.process_died()

    def _leave_word(self, watch: CoreWatch) -> None:
        """What became of the attempts under way may still be told, to a core that knows nothing of them."""
        for task, attempt in watch.under_way():
            if not self.world.network.calm and self.dice.chance(self.world.plan.doubled_events):
                message = "nobody took its answer"
                self._belated.append(ev.TaskFailed(watch.epoch, task, attempt, "engine_failed", message, retryable=True))

    def _step(self) -> None:
        if not self.world.network.calm and self.dice.chance(self.world.plan.core_crash):
            self.world.core_dies()

    def _boot(self, loop: ProcessLoop) -> None:
        world = self.world
        try:
            server = Server(world.plan.config, load=tokenizers.load)
        except ConfigurationError as error:
            world.witness.report("recovery", str(error))
            return
        self.server, self.loop = server, loop
        self.watch = CoreWatch(server.core, world.witness, world.saw_instant)
        world.note(f"core lives, epoch {server.core.epoch}")
        world.witness.check(server)
        if world.plan.doubled_events:
            self._double_events(server)

    def _double_events(self, server: Server) -> None:
        """An engine's event comes a second time, later, to whoever lives here then."""
        shell: Any = server.shell
        post = shell.post

        def twice(event: Any) -> None:
            post(event)
            if isinstance(event, _DOUBLED) and not self.world.network.calm and self.dice.chance(self.world.plan.doubled_events):
                self.world.count("events doubled")
                if isinstance(event, _ENDS) and self.dice.chance(0.5):
                    self._belated.append(event)
                else:
                    self.world.later(self.dice.spread(0.001, 4.0), lambda: self._again(event))

        shell.post = twice
        belated, self._belated = self._belated[-20:], []
        for event in belated:  # of the life before
            self.world.later(self.dice.between(0.0, 2.0), lambda event=event: self._again(event))  # type: ignore[misc]

    def _again(self, event: Any) -> None:
        if self.loop is not None and self.server is not None:
            shell: Any = self.server.shell
            self.loop.call_soon(type(shell).post, shell, event)

    def open_journal(self) -> tuple[Any, Any]:
        """What `parrot.serve.server` opens."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ProcessLoop)
        self._journal = SimJournal(self.disk, loop, self.dice, self.world.plan.commit_s, self.world.count)
        return self._journal, self.disk.past()

    def new_session_id(self) -> int:
        return 1 + math.floor(self._sessions.uniform() * 2**40)

    def serve(self, connection: Connection) -> None:
        assert self.server is not None
        assert self.loop is not None
        connection.task = self.loop.create_task(stand_ins.serve(connection, self.server._handle))


class EngineMachine(Machine):
    """One engine's. It may come back with another model."""

    def __init__(self, world: World, spec: EngineSpec) -> None:
        super().__init__(world, spec.name)
        self.spec = spec
        self.kills = 0
        self.engine: EmulatedEngine | None = None
        self.link: CoreLink | None = None
        self.ids = ContextIds()
        self._server: EngineServer | None = None
        self._handlers: dict[str, Callable[..., Any]] = {}

    def start(self, model: str | None = None) -> None:
        """A new process, serving `model` (None: the one of its plan)."""
        loop = self.new_life()
        loop.call_soon(self._boot, loop, model or self.spec.model)

    def kill(self) -> None:
        self.kills += self.lives
        self.engine = self.link = None
        super().kill()

    def _boot(self, loop: ProcessLoop, model: str) -> None:
        spec = self.spec
        tokenizer = tokenizers.load(spec.tokenizer(model))
        self.engine = EmulatedEngine(spec.limits, LatencyModel(spec.profile))
        driver = EmulatedLoop(self.engine, tokenizer, stream_interval_s=spec.stream_interval_s)
        self.ids = ContextIds()
        instance = f"{spec.name}-{self.kills}"
        tasks = Tasks(driver, tokenizer, self.ids, instance)
        driver.on_evicted = tasks.note_evicted
        server = EngineServer(driver, tasks, Primitives(driver, tokenizer, self.ids))
        self._handlers = {
            "/task": server._task,
            "/abort": server._abort,
            "/free_context": server._free_context,
            "/ping": server._ping,
        }
        self.link = CoreLink(
            "http://core:9000", self.describe(model), instance, tasks, self.ids, driver.runtime_info,
            heartbeat_interval_s=spec.heartbeat_s,
        )  # fmt: skip
        loop.create_task(self.link.run())
        self.loop = loop
        self.world.note(f"{self.name} lives, model {model}")

    def describe(self, model: str) -> EngineDescription:
        """What it registers as."""
        limits = self.spec.limits
        return EngineDescription(
            engine_name=self.spec.name,
            model=model,
            tokenizer=self.spec.tokenizer(model),
            host=self.spec.name,
            port=9001,
            engine_type="emulated",
            tasks_capacity=limits.tasks_capacity,
            tokens_capacity=limits.max_total_tokens,
            max_seq_len=limits.largest_task,
            bos_tokens=0 if tokenizers.load(self.spec.tokenizer(model)).bos_id is None else 1,
            accepts_output_length=True,
        )

    def serve(self, connection: Connection) -> None:
        assert self.loop is not None
        handler = self._handlers[connection.request.path]
        connection.task = self.loop.create_task(stand_ins.serve(connection, lambda request: _refuse(request, handler)))
        if connection.request.path == "/task" and self.dice.chance(self._nonsense):
            self.world.count("nonsense")
            task = msgspec.json.decode(connection.request.body)
            connection.alter = Nonsense(self.world, self.dice, task).alter

    @property
    def _nonsense(self) -> float:
        return 0.0 if self.world.network.calm else self.world.plan.nonsense
