"""Whether a core that runs for long holds on to anything: simulated hours, or minutes of real load.

    python benchmarks/soak.py --simulated-hours 1
    python benchmarks/soak.py --minutes 5

The simulated hour runs chains, map-reduces and chats through one ServeCore in virtual time and looks every five minutes at
what it holds; every request carries an Idempotency-Key, and some programs leave without closing their session. After the
last lifetime is over everything has to be as it was at the start: containers, and live objects by type.

The real minutes load a core (journal on) and two emulated engines, started with the documented commands, and look at the
processes from outside: memory, file descriptors, TCP connections, threads. They did not grow when, after all sessions are
closed, descriptors, connections and threads are no more than at the start, and the memory of the second half of the load grew
by no more than MEMORY_SLACK. Exit status 1: something grew.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import heapq
import itertools
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]  # in which `sim` is a benchmark
from experiments.chaos_cluster import CORE, PROFILE, ChaosCluster  # noqa: E402
from experiments.chaos_load import applications  # noqa: E402
from parrot.configuration import load  # noqa: E402
from parrot.engine.core import EngineLimits  # noqa: E402
from parrot.protocol.engine import EngineDescription  # noqa: E402
from parrot.serve import events  # noqa: E402
from parrot.serve.config import ServeCoreConfig  # noqa: E402
from parrot.serve.core import ServeCore  # noqa: E402
from sim.clients import Mode  # noqa: E402
from sim.cluster import AUTH, Cluster  # noqa: E402
from sim.engine_models import EngineModel  # noqa: E402
from sim.network import open_network  # noqa: E402
from sim.population import Population  # noqa: E402
from sim.timeline import Timeline  # noqa: E402
from sim.workloads.generators import generate  # noqa: E402
from sim.workloads.program import Program  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "sample_configs/core/localhost_serve_core_all_switches.json"
SAMPLE_EVERY_S = 300.0
ABANDONED = 0.05  #: part of the simulated sessions that are never closed: they expire
MEMORY_SLACK = (0.03, 2 << 20)  #: a part of it, and bytes
SETTLE_S = 130.0  #: the core looks every 60 s which of its connections to engines have been idle for 60 s
MIB = 1 << 20
#: Gone from the tree, but still in the heap by which an engine evicts, which is cleared of them when it is next pushed to;
#: it holds no more than twice the tree and 64.
DROPPED_LATER = ("parrot.engine.contexts.Context",)


def memory_bytes(process_id: int | str = "self") -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{process_id}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [list(head), *([f"{cell}" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


# --------------------------------------------------------------------------------------------------- simulated operation


def held(core: ServeCore) -> dict[str, int]:
    """What a core holds, by name; all of it should come and go with sessions. (Ended sessions it remembers, up to a bound.)"""
    scheduler = core.scheduler
    sessions = list(core.sessions.values())
    nodes = list(scheduler.prefixes._roots.values())
    for node in nodes:  # it grows while it is read
        nodes.extend((node.children or {}).values())
    engines = list(core.engines.values())
    return {
        "sessions": len(sessions),
        "tasks": sum(len(call.tasks) for session in sessions for call in session.calls),
        "variables": sum(len(session.variables) for session in sessions),
        "gets": len(core.dataflow.gets),
        "timeouts": len(core.dataflow.gets._timeouts),
        "keys": len(core.registry._opened) + sum(len(session.answers or ()) for session in sessions),
        "queue": len(scheduler.queue),
        "in flight": sum(engine.running for engine in engines),
        "reserved": sum(engine.reserved for engine in engines),
        "contexts": sum(len(engine.contexts) for engine in engines),
        "shared": len(list(scheduler.contexts._shared)),
        "nodes": len(nodes),
        "lanes": len(scheduler.engines.lanes),
        "waits": len(scheduler._backlog._stranded) + len(scheduler._pauses._full) + len(scheduler._pauses._suspects),
        "tenants": len(scheduler.tenants._present),
        "deadlines": len(core.dataflow.deadlines._heap),
    }


def live_objects() -> Counter[str]:
    """Objects of the core, the simulated cluster and its clients that the collector knows, by type."""
    gc.collect()
    packages = ("parrot.", "sim.")
    types = Counter(type(thing) for thing in gc.get_objects())
    named = {f"{kind.__module__}.{kind.__qualname__}": count for kind, count in types.items()}
    return Counter({name: count for name, count in named.items() if name.startswith(packages)})


class _NoRecorder:
    """Measures nothing: what a run has measured grows with it, and would hide what should not."""

    def program_ended(self, player: Any) -> None: ...

    def calls_ended(self, serial: int, calls: Any, numbers: Any, first: int = 0) -> None: ...


class _KeyedCluster(Cluster):
    """Gives every request an Idempotency-Key, as `P` does, and loses some of the closes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._key = itertools.count()
        self._rng = random.Random(0)
        super().__init__(*arguments, **options)

    def post(self, event: events.AnyEvent, *priority: float) -> None:
        if isinstance(event, events.OpenSession | events.SubmitCall | events.CreateVariable | events.SetVariable):
            event = msgspec.structs.replace(event, idempotency_key=f"key{next(self._key)}")
        elif isinstance(event, events.CloseSession) and self._rng.random() < ABANDONED:
            asker = self.taken(event.request)
            self.timeline.call_at(self.timeline.now, functools.partial(asker.replied, None, None))
            return
        super().post(event, *priority)

    def open_and_close(self) -> None:
        """A session without a call. Opening it is when the core forgets old keys."""
        super().post(events.OpenSession(self.expect(lambda *_: None), 10**9, AUTH, "", idempotency_key="soak"))
        super().post(events.CloseSession(self.expect(lambda *_: None), 10**9, AUTH))


def engine_models(count: int) -> list[EngineModel]:
    limits = EngineLimits(4096, 16, 32, 512, 65536, 64, 8192, fill_chunk_size=256)
    return [
        EngineModel(
            EngineDescription(
                engine_name=f"engine{number}",
                model="soak",
                tokenizer="synthetic",
                host="simulated",
                port=number,
                engine_type="emulated",
                tasks_capacity=64,
                tokens_capacity=65536,
                max_seq_len=8192,
                accepts_output_length=True,
            ),
            limits,
            PROFILE,
        )
        for number in range(count)
    ]


def workload(until_s: float, rate: float) -> Iterator[Program]:
    """Three kinds of programs together, `rate` a second each."""
    kinds = [generate(name, {}, rate=rate, seed=1, count=10**9) for name in ("chain", "map_reduce", "chat")]
    merged = heapq.merge(*kinds, key=lambda program: program.arrival_s)
    return itertools.takewhile(lambda program: program.arrival_s < until_s, merged)


class _Hours:
    """One simulated cluster, and what was seen of it."""

    def __init__(self) -> None:
        self.rows: list[list[object]] = []
        self.memory: list[int] = []
        config = load(CONFIG, ServeCoreConfig)
        section = msgspec.structs.replace(config.global_scheduler, explain_placements=0)  # the last ones are kept on purpose
        self._config = msgspec.structs.replace(config, global_scheduler=section)
        self._timeline = Timeline()
        self._cluster = _KeyedCluster(self._timeline, self._config, engine_models(4))
        self._done = 0

    def held(self) -> dict[str, int]:
        engines = (engine.engine.core.contexts for engine in self._cluster.engines)
        return {**held(self._cluster.core), "on engines": sum(len(tree._index) for tree in engines)}

    def play(self, programs: Iterator[Program], sample_s: float) -> None:
        """Runs the programs with a sample every `sample_s` seconds, then waits until all lifetimes are over."""
        timeline, config = self._timeline, self._config
        self._begin_s, self._done, self._playing = timeline.now, 0, True

        def ended() -> None:
            self._done += 1

        def every() -> None:
            if self._playing:
                self.sample()
                timeline.call_at(timeline.now + sample_s, every)

        every()
        late = (msgspec.structs.replace(p, arrival_s=p.arrival_s + self._begin_s) for p in programs)
        recorder: Any = _NoRecorder()
        population = Population(self._cluster, late, Mode.SEMANTIC, open_network(0.0, 0), recorder, 2048, ended)
        timeline.run_until(population.is_over)
        self._playing = False
        over_s = timeline.now + config.session_life_span + config.constant_prefix_var_timeout + 1.0
        timeline.call_at(over_s, self._cluster.open_and_close)
        timeline.run_until(lambda: False)

    def sample(self) -> None:
        now_s, objects = self._timeline.now, sum(live_objects().values())
        self.memory.append(memory_bytes())
        counts = [*self.held().values(), len(self._timeline.calendar), objects]
        self.rows.append([f"{(now_s - self._begin_s) / 60:.0f}", self._done, *counts, f"{self.memory[-1] / MIB:.1f}"])


def simulated(hours: float, rate: float) -> bool:
    """Runs simulated hours; whether nothing was left behind."""
    begun_s = time.monotonic()
    run = _Hours()
    run.play(itertools.islice(workload(3600.0, rate), 10), SAMPLE_EVERY_S)  # what is made once is made
    run.rows.clear()
    run.memory.clear()
    start, objects = run.held(), live_objects()
    run.play(workload(hours * 3600.0, rate), SAMPLE_EVERY_S)
    run.sample()
    print_table(["minute", "programs", *start, "events", "objects", "MiB"], run.rows)
    print(f"{hours:g} simulated hours took {time.monotonic() - begun_s:.0f} s")
    left = {name: (start[name], value) for name, value in run.held().items() if value != start[name]}
    more = {n: (objects[n], count) for n, count in live_objects().items() if count > objects[n] and n not in DROPPED_LATER}
    found = [f"{name}: {before} at the start, {after} at the end" for name, (before, after) in (left | more).items()]
    loaded = run.memory[:-1]
    found += _memory_growth("this process", loaded[len(loaded) // 2], loaded[-1])
    return _verdict(found)


def _memory_growth(name: str, halfway: int, end: int) -> list[str]:
    part, slack = MEMORY_SLACK
    if end <= halfway * (1 + part) + slack:
        return []
    return [f"{name}: memory: {halfway / MIB:.1f} MiB halfway, {end / MIB:.1f} MiB when the load ended"]


def _verdict(found: Sequence[str]) -> bool:
    for line in found:
        print(f"grew: {line}")
    if not found:
        print("did not grow")
    return not found


# --------------------------------------------------------------------------------------------------------- real processes


class Usage(NamedTuple):
    """What a process takes."""

    memory_bytes: int
    descriptors: int
    connections: int
    threads: int

    @classmethod
    def of(cls, process_id: int) -> Usage:
        folder = Path(f"/proc/{process_id}")
        targets = []
        for descriptor in (folder / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed since
                targets.append(os.readlink(descriptor))
        sockets = {target[8:-1] for target in targets if target.startswith("socket:[")}
        status = (folder / "status").read_text()
        threads = int(status.partition("Threads:")[2].split()[0])
        return cls(memory_bytes(process_id), len(targets), len(sockets & _established(folder)), threads)


def _established(folder: Path) -> set[str]:
    """Inodes of the established TCP connections that the process can see."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in (folder / "net" / name).read_text().splitlines()[1:]]
    return {fields[9] for fields in lines if fields[3] == "01"}


class _Soak:
    """A cluster under load from this process, and what was seen of its processes."""

    def __init__(self, cluster: ChaosCluster, clients: int) -> None:
        self.finished = 0
        self.rows: list[list[object]] = []
        self.seen: list[dict[str, Usage]] = []
        self._cluster = cluster
        self._clients = clients
        self._applications = applications(6)
        self._unloaded = self._core_connections()

    async def load_for(self, seconds: float) -> None:
        """Clients run applications, one after the other, until the time is over and each has ended its last."""
        end_s = time.monotonic() + seconds

        async def client(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < end_s:
                await rng.choice(self._applications).run(self._cluster.url, rng.getrandbits(32))
                self.finished += 1

        await asyncio.gather(*map(client, range(self._clients)))

    async def settle(self) -> None:
        """Waits until the core has no more connections than when nobody had loaded it yet, for SETTLE_S at the most."""
        until_s = time.monotonic() + SETTLE_S
        while self._core_connections() > self._unloaded and time.monotonic() < until_s:
            await asyncio.sleep(1.0)

    def _core_connections(self) -> int:
        return Usage.of(self._cluster.process_id(CORE)).connections

    def sample(self, when: str) -> None:
        usage = {name: Usage.of(self._cluster.process_id(name)) for name in (CORE, *self._cluster.engines)}
        self.seen.append(usage)
        cells = [(f"{u.memory_bytes / MIB:.1f}", u.descriptors, u.connections, u.threads) for u in usage.values()]
        journal = f"{self._cluster.journal_bytes() / 1024:.0f}"
        self.rows.append([when, self.finished, *itertools.chain.from_iterable(cells), journal])

    def growth(self, middle: int, last: int) -> list[str]:
        """What grew, by the rule above: `middle` and `last` are the samples in the middle and at the end of the load."""
        found = []
        for name, begin in self.seen[0].items():
            end = self.seen[-1][name]
            for what in ("descriptors", "connections", "threads"):
                if getattr(end, what) > getattr(begin, what):
                    found.append(f"{name}: {what}: {getattr(begin, what)} at the start, {getattr(end, what)} at the end")
            found += _memory_growth(name, self.seen[middle][name].memory_bytes, self.seen[last][name].memory_bytes)
        return found


async def real(minutes: float, clients: int) -> bool:
    """Loads real processes; whether none of them grew."""
    with tempfile.TemporaryDirectory(prefix="parrot-soak-") as folder:
        cluster = ChaosCluster(Path(folder), 2, "emulated")
        try:
            await cluster.start()
            soak = _Soak(cluster, clients)
            await soak.load_for(5.0)  # what is made once is made: thread pools, caches, connections to the engines
            await soak.settle()
            soak.sample("start")
            soak.finished = 0
            steps = max(2, round(minutes))
            loading = asyncio.create_task(soak.load_for(minutes * 60.0))
            for step in range(1, steps):
                await asyncio.sleep(minutes * 60.0 / steps)
                soak.sample(f"{minutes * step / steps:g} min")
            await loading
            soak.sample(f"{minutes:g} min")
            await soak.settle()
            soak.sample("closed")
        finally:
            cluster.stop()
    each = ["MiB", "fds", "TCP", "threads"]
    print(f"{'':>20}" + "".join(f"{name:<26}" for name in soak.seen[0]))
    print_table(["at", "applications", *each * len(soak.seen[0]), "journal KiB"], soak.rows)
    middle, last = (steps + 1) // 2, steps
    return _verdict(soak.growth(middle, last))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulated-hours", type=float, metavar="H", help="simulated operation")
    parser.add_argument(
        "--rate", type=float, default=0.3, help="simulated: programs a second of each of three kinds (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="real load")
    parser.add_argument("--clients", type=int, default=8, help="real: applications at a time (%(default)s)")
    arguments = parser.parse_args()
    if arguments.simulated_hours is None and arguments.minutes is None:
        parser.error("say --simulated-hours H, --minutes M or both")
    good = True
    if arguments.simulated_hours is not None:
        good &= simulated(arguments.simulated_hours, arguments.rate)
    if arguments.minutes is not None:
        good &= asyncio.run(real(arguments.minutes, arguments.clients))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
