"""Many instances of a program against simulated engines, in virtual time.

Decides when an instance begins and what its end means for the run. The program is run as it is (`source`), its requests go
through the server's own code to the core (`door`), and it waits in a strand of its own (`strands`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from parrot.frontend.link import CARRIERS, Carriers
from parrot.frontend.pfunc import environment
from parrot.serve.config import ServeCoreConfig
from parrot.serve.graph import Call
from sim.clients import Mode
from sim.cluster import Cluster
from sim.engine_models import EngineModel
from sim.network import Network
from sim.population import StuckError
from sim.programs.accounts import Account, RecordedBlocking, RecordedLooped
from sim.programs.door import Door
from sim.programs.instances import Failures, check_source, starts_at
from sim.programs.outputs import Outputs
from sim.programs.sessions import Sessions
from sim.programs.source import Arguments, Source, play
from sim.programs.strands import Stopped, Strand, Strands
from sim.programs.surroundings import virtual_surroundings
from sim.programs.tokenizers import with_tokenizers
from sim.programs.transports import BlockingTransport, Client, LoopedTransport
from sim.recorder import Recorder
from sim.timeline import Timeline

ADDRESS = "http://simulated"  #: any address is the simulated core's


class Instances:
    """The instances of a run. `clients`: how many are under way at any time, where they do not arrive by themselves."""

    def __init__(
        self,
        source: Source,
        inputs: Sequence[Arguments],
        count: int,
        starts: Iterator[float],
        door: Door,
        network: Network,
        strands: Strands,
        recorder: Recorder,
        clients: int | None = None,
        on_ended: Callable[[], None] | None = None,
    ) -> None:
        self.failures = Failures()
        self._source = source
        self._inputs = inputs
        self._count = count
        self._starts = starts
        self._door = door
        self._network = network
        self._strands = strands
        self._recorder = recorder
        self._clients = clients
        self._on_ended = on_ended
        self._begun = 0
        self._ended = 0
        for _ in range(1 if clients is None else min(clients, count)):
            self._await_next()

    def is_over(self) -> bool:
        return self._ended == self._count

    def _await_next(self) -> None:
        if self._begun < self._count:
            serial, self._begun = self._begun, self._begun + 1
            timeline = self._strands.timeline
            arrival_s = next(self._starts) if self._clients is None else timeline.now
            timeline.call_at(arrival_s, lambda: self._begin(serial, arrival_s))

    def _begin(self, serial: int, arrival_s: float) -> None:
        if self._clients is None:
            self._await_next()
        account = Account(serial, f"{self._source.name}-{serial}", self._source.name, arrival_s)
        strand = Strand(self._strands, f"instance {serial}", lambda: self._play(account, strand), rank=serial)
        strand.begin()

    def _play(self, account: Account, strand: Strand) -> None:
        """An instance's whole life, in its strand."""
        client = Client(self._door, self._network, strand)

        def opened(session_id: int) -> None:
            self._door.opened(session_id, account)

        def clock() -> float:
            return strand.now

        environment.isolate()
        CARRIERS.set(
            Carriers(
                lambda _: RecordedBlocking(BlockingTransport(client), account, clock, opened),
                lambda _: RecordedLooped(LoopedTransport(client), account, clock, opened),
            )
        )
        error = None
        try:
            with self._source.loaded() as function:
                play(function, ADDRESS, self._inputs[account.serial % len(self._inputs)])
        except SystemExit as left:
            error = self.failures.add(account, left) if left.code else None
        except Exception as raised:
            error = self.failures.add(account, raised)
        strand.is_program = False  # what follows is the simulator's own code, and finds the real surroundings
        account.end(strand.now, error)
        self._door.close_sessions(account)
        self._recorder.program_ended(account)
        self._ended += 1
        if self._on_ended is not None:
            self._on_ended()
        if self._clients is not None:
            self._await_next()


def simulate_instances(
    source: Source,
    inputs: Sequence[Arguments],
    count: int,
    config: ServeCoreConfig,
    engines: Sequence[EngineModel],
    *,
    outputs: Outputs,
    network: Network,
    rate: float | None = None,
    arrivals: str | None = None,
    clients: int | None = None,
    seed: int = 0,
    jump: bool = True,
    engine_delay_s: float = 0.0,
    tables: bool = True,
    on_ended: Callable[[], None] | None = None,
    strict: bool = False,
) -> Recorder:
    """Runs `count` instances to the end of the last, and tells on standard error what those raised that failed.

    Raises ConfigurationError for a program that cannot be run, StuckError for a run that cannot end, OutputError, and (strict)
    OutOfRange.
    """
    timeline = Timeline()
    strands = Strands(timeline)
    fitted, tokenizers = with_tokenizers(engines)
    cluster = Cluster(timeline, config, fitted, engine_delay_s=engine_delay_s, jump=jump, strict=strict)
    recorder = Recorder(Mode.SEMANTIC, tables, names=config.global_scheduler.explain_placements > 0)

    def closed(account: Account, calls: Sequence[Call], known: Mapping[str, tuple[int, int]]) -> None:
        firsts = [known.get(call.tasks[0].output.id, (-1, 0)) if call.tasks else (-1, 0) for call in calls]
        recorder.calls_ended(account.serial, calls, [number for number, _ in firsts])

    door = Door(cluster, Sessions(cluster, fitted, tokenizers, outputs, closed), strands)
    try:
        with virtual_surroundings(strands, seed), source.importable():
            check_source(source, inputs)
            door.open()
            starts = starts_at(rate, seed, arrivals)
            instances = Instances(source, inputs, count, starts, door, network, strands, recorder, clients, on_ended)
            if not timeline.run_until(instances.is_over):
                raise StuckError(f"nothing more can happen, but {_waiting(strands)}")
            recorder.outside = cluster.outside()
            cluster.explain(recorder)
    except Stopped as stopped:
        raise StuckError(str(stopped)) from None
    finally:
        strands.kill_programs()
        door.close()
        cluster.dissolve()
    if instances.failures:
        print(instances.failures.tell(source.spec, count), file=sys.stderr)
    return recorder


def _waiting(strands: Strands) -> str:
    """Which instances wait, and where; the first few of them."""
    waiting = [strand for strand in strands.alive if strand.is_program]
    shown = [f"{strand.name} waits here:\n{strand.stack()}" for strand in waiting[:3]]
    return "".join(shown) + (f"and {len(waiting) - 3} more" if len(waiting) > 3 else "")
