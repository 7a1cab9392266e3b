"""`make chaos`: kills the core and engines of a real cluster at random while applications run, and checks that none notices.

    python -m experiments.chaos [--kills N] [--seed S] [--clients C] [--engines E] [--engine emulated|builtin]

First every application runs undisturbed; then clients run them over and over while processes are killed with -9 and started
again. docs/chaos.md says what is checked. Exit status: 0 when nothing was lost and nothing contradicted, 1 otherwise (the
folder with the logs is kept and named), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from experiments.chaos_client import Contradiction
from experiments.chaos_cluster import CORE, ChaosCluster
from experiments.chaos_load import Application, Ran, applications
from parrot.configuration import ConfigurationError
from parrot.protocol.errors import ParrotError

TARGETS = ("all", "core", "engines")
#: The odds that a kill meets the core and an engine in one instant, and that the next one does not wait for recovery.
BOTH, HURRIED = 0.08, 0.15


@dataclass(frozen=True)
class Plan:
    """What is done. Seconds; `gap_s` lies between a recovery and the next kill, `away_s` between a kill and the start."""

    kills: int = 200
    seed: int = 0
    clients: int = 8
    engines: int = 2
    engine: str = "emulated"
    targets: str = "all"
    numbers: int = 6  #: how many applications of each kind there are
    duration_limit_s: float = 1200.0
    gap_s: tuple[float, float] = (0.1, 1.5)
    away_s: tuple[float, float] = (0.0, 0.8)


@dataclass
class Report:
    """What happened. `kills`: by the name of the process. Times in seconds."""

    kills: dict[str, int] = field(default_factory=dict)
    finished: int = 0
    lost: list[str] = field(default_factory=list)
    compared: int = 0
    different: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    checked: Ran = field(default_factory=lambda: Ran({}))
    recovery_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    journal_bytes: int = 0
    took_s: float = 0.0

    @property
    def failures(self) -> list[str]:
        return [*self.lost, *self.different, *self.contradictions, *self.tracebacks]


async def run(plan: Plan, folder: Path) -> Report:
    """Carries out the plan; logs and the journal go to `folder`. Raises ConfigurationError when the cluster cannot start."""
    report = Report()
    cluster = ChaosCluster(folder, plan.engines, plan.engine)
    # The blocking applications each hold a thread.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(plan.clients))
    begun_s = time.monotonic()
    try:
        await cluster.start()
        load = _Load(plan, cluster.url, report)
        await load.undisturbed()
        print(f"undisturbed: {load.expected_outputs} outputs in {time.monotonic() - begun_s:.1f} s", file=sys.stderr)
        await _disturbed(plan, cluster, load, report)
        report.journal_bytes = cluster.journal_bytes()
    finally:
        cluster.stop()
    report.tracebacks = cluster.tracebacks()
    report.took_s = time.monotonic() - begun_s
    return report


async def _disturbed(plan: Plan, cluster: ChaosCluster, load: _Load, report: Report) -> None:
    killing = asyncio.create_task(_Killer(plan, cluster, report).run())
    clients = [asyncio.create_task(load.client(number, killing)) for number in range(plan.clients)]
    try:
        async with asyncio.timeout(plan.duration_limit_s):
            await asyncio.gather(killing, *clients)
    except TimeoutError:
        report.lost += [f"{what} was not over after {plan.duration_limit_s:g} s" for what in load.running.values()]
    finally:
        for task in (killing, *clients):
            task.cancel()
        await asyncio.gather(killing, *clients, return_exceptions=True)


class _Load:
    """Clients that run one application after the other, and what the applications have to say."""

    def __init__(self, plan: Plan, url: str, report: Report) -> None:
        self._plan = plan
        self._url = url
        self._report = report
        self._applications = applications(plan.numbers)
        self._expected: dict[Application, dict[str, str]] = {}
        self.running: dict[int, Application] = {}

    @property
    def expected_outputs(self) -> int:
        return sum(map(len, self._expected.values()))

    async def undisturbed(self) -> None:
        """Runs every application once, a few at a time, before anything is killed."""
        places = asyncio.Semaphore(self._plan.clients)

        async def one(application: Application) -> None:
            async with places:
                self._expected[application] = (await application.run(self._url, self._plan.seed)).texts

        async with asyncio.timeout(self._plan.duration_limit_s):
            await asyncio.gather(*map(one, self._applications))

    async def client(self, number: int, killing: asyncio.Task[None]) -> None:
        """Runs applications until the killing is over, and the last one to its end."""
        rng = random.Random(f"{self._plan.seed}/client/{number}")
        while not killing.done():
            application = rng.choice(self._applications)
            self.running[number] = application
            await self._one(application, rng.getrandbits(32))
            del self.running[number]

    async def _one(self, application: Application, seed: int) -> None:
        report = self._report
        try:
            ran = await application.run(self._url, seed)
        except Contradiction as error:
            report.contradictions.append(f"{application}: {error}")
            return
        except ParrotError as error:
            report.lost.append(f"{application}: {error.code}: {error}")
            return
        except Exception as error:
            report.lost.append(f"{application}: {type(error).__name__}: {error}")
            return
        report.finished += 1
        for name in ("streams", "reconnects", "repeated_posts", "second_gets", "lost_connections"):
            setattr(report.checked, name, getattr(report.checked, name) + getattr(ran, name))
        expected = self._expected[application]
        for name in sorted({*ran.texts, *expected}):
            report.compared += 1
            if ran.texts.get(name) != expected.get(name):
                told = f"{name} is {ran.texts.get(name)!r}, undisturbed {expected.get(name)!r}"
                report.different.append(f"{application}: {told}")


class _Killer:
    """Kills processes and starts them again, as the seed says."""

    def __init__(self, plan: Plan, cluster: ChaosCluster, report: Report) -> None:
        self._plan = plan
        self._cluster = cluster
        self._report = report
        self._rng = random.Random(f"{plan.seed}/kills")
        self._names = [name for name in (CORE, *cluster.engines) if plan.targets in ("all", _sort_of(name))]
        self._killed_s: dict[str, float] = {}  # since when nobody has had an answer of that process
        self._away: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Returns when all kills are done and every process runs again. Raises ConfigurationError for one that dies."""
        done = 0
        while done < self._plan.kills:
            await asyncio.sleep(self._rng.uniform(*self._plan.gap_s))
            targets = [name for name in self._targets() if self._cluster.is_running(name)]
            for name in targets[: self._plan.kills - done]:
                self._kill(name)
                done += 1
            if self._rng.random() >= HURRIED:
                await self._all_back()
            if targets and sys.stderr.isatty():
                print(f"\r{done} of {self._plan.kills} kills, {self._report.finished} applications", end="", file=sys.stderr)
        await self._all_back()
        dead = self._cluster.died_by_themselves((CORE, *self._cluster.engines))
        if dead:
            raise ConfigurationError(f"died without being killed: {'; '.join(dead)}")

    def _targets(self) -> list[str]:
        if self._plan.targets == "all" and self._rng.random() < BOTH:
            return [CORE, self._rng.choice(self._cluster.engines)]
        if self._plan.targets == "all" and self._rng.random() < 0.5:
            return [CORE]
        return [self._rng.choice([name for name in self._names if name != CORE] or self._names)]

    def _kill(self, name: str) -> None:
        self._cluster.kill(name)
        self._killed_s.setdefault(name, time.monotonic())
        self._report.kills[name] = self._report.kills.get(name, 0) + 1
        self._away.add(asyncio.create_task(self._bring_back(name, self._rng.uniform(*self._plan.away_s))))

    async def _bring_back(self, name: str, away_s: float) -> None:
        await asyncio.sleep(away_s)
        self._cluster.start_again(name)
        started_s = time.monotonic()
        if await self._cluster.has_answered(name):  # else it was killed again, and the next life recovers for both
            killed_s = self._killed_s.pop(name)
            if name == CORE:
                self._report.recovery_s.append(time.monotonic() - killed_s)
                self._report.start_s.append(time.monotonic() - started_s)

    async def _all_back(self) -> None:
        while self._away:
            task = self._away.pop()
            await task


def _sort_of(name: str) -> str:
    return CORE if name == CORE else "engines"


# ------------------------------------------------------------------------------------------------------------ the command


def table(plan: Plan, report: Report) -> str:
    """The result, for a person."""
    core, checked = report.kills.get(CORE, 0), report.checked
    rows = [
        ("seed", f"{plan.seed}"),
        ("kills of the core", f"{core}"),
        ("kills of engines", f"{sum(report.kills.values()) - core}"),
        ("applications finished", f"{report.finished}"),
        ("applications lost", f"{len(report.lost)}"),
        ("outputs compared", f"{report.compared}"),
        ("outputs different", f"{len(report.different)}"),
        ("streams checked", f"{checked.streams}, taken up again {checked.reconnects} times"),
        ("POSTs repeated", f"{checked.repeated_posts}"),
        ("second gets", f"{checked.second_gets}"),
        ("contradictions", f"{len(report.contradictions)}"),
        ("connections lost on the way", f"{checked.lost_connections}"),
        ("tracebacks in the logs", f"{len(report.tracebacks)}"),
        ("core: kill to first answer", _times(report.recovery_s)),
        ("core: start to first answer", _times(report.start_s)),
        ("journal at the end", f"{report.journal_bytes / 1024:.0f} KiB"),
        ("took", f"{report.took_s:.0f} s"),
    ]
    return "\n".join(f"{name:<30}{value}" for name, value in rows)


def _times(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    return f"median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s"


def _parser() -> argparse.ArgumentParser:
    plan = Plan()
    p = argparse.ArgumentParser(prog="python -m experiments.chaos", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--kills", type=int, default=plan.kills, help="how many processes are killed (%(default)s)")
    p.add_argument("--seed", type=int, help="of who is killed when and what clients do (drawn, and printed)")
    p.add_argument("--clients", type=int, default=plan.clients, help="applications that run at a time (%(default)s)")
    p.add_argument("--engines", type=int, default=plan.engines, help="engines of the cluster (%(default)s)")
    p.add_argument("--engine", choices=["emulated", "builtin"], default=plan.engine, help="their kind (%(default)s)")
    p.add_argument("--targets", choices=TARGETS, default=plan.targets, help="who is killed (%(default)s)")
    p.add_argument(
        "--duration-limit",
        type=float,
        default=plan.duration_limit_s,
        metavar="S",
        help="seconds until it gives up (%(default)g)",
    )
    p.add_argument("--keep", action="store_true", help="keep the folder with logs and journal, whatever happened")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    logging.getLogger("parrot.frontend").setLevel(logging.ERROR)
    plan = Plan(
        kills=arguments.kills,
        seed=secrets.randbelow(10**6) if arguments.seed is None else arguments.seed,
        clients=arguments.clients,
        engines=arguments.engines,
        engine=arguments.engine,
        targets=arguments.targets,
        numbers=6 if arguments.engine == "emulated" else 2,
        duration_limit_s=arguments.duration_limit,
    )
    folder = Path(tempfile.mkdtemp(prefix="parrot-chaos-"))
    print(f"seed {plan.seed}, logs in {folder}", file=sys.stderr)
    good = False
    try:
        report = asyncio.run(run(plan, folder))
        print(table(plan, report))
        for failure in report.failures[:20]:
            print(f"  {failure}")
        good = not report.failures
    except (ConfigurationError, TimeoutError) as error:
        print(f"experiments.chaos: {str(error) or 'the cluster was not ready in time'}", file=sys.stderr)
    except KeyboardInterrupt:
        print("experiments.chaos: interrupted", file=sys.stderr)
        return 130
    finally:
        if good and not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"logs and journal: {folder}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
