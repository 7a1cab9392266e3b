"""A cluster of this machine: the core and its engines as processes, started with the documented commands on free ports.

It starts them, waits until they are ready, notices when one dies, kills one when it is asked to, and ends every one of them,
whatever happens. It sends no program to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp
import msgspec

from parrot.configuration import ConfigurationError
from parrot.engine.config import EngineConfig, ServeCoreAddress
from parrot.engine.derived import as_emulated
from parrot.engine.profiles import AnyProfile
from parrot.serve.config import ServeCoreConfig

HOST = "127.0.0.1"
START_TIMEOUT_S = 120.0  #: for the core and all engines, model loading included
STOP_TIMEOUT_S = 5.0  #: between SIGTERM and SIGKILL


class Processes:
    """The processes of a cluster. `stop` ends every one of them, those that they started included."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: dict[str, tuple[str, ...]] = {}

    def start(self, name: str, module: str, arguments: Sequence[str]) -> None:
        """Starts `python -m module arguments…`; what it prints goes to FOLDER/NAME.log."""
        self._log(name).write_bytes(b"")
        self._commands[name] = (module, *arguments)
        self.start_again(name)

    def start_again(self, name: str) -> None:
        """Starts what `name` was started as, after a `kill`; what it prints goes behind what it printed before."""
        module, *arguments = self._commands[name]
        with open(self._log(name), "ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops them in order
            )

    def kill(self, name: str) -> None:
        """kill -9, and nothing of it is left when this returns: the process and all that it started."""
        process = self._running.pop(name)
        _signal(process, signal.SIGKILL)
        process.wait()

    def is_running(self, name: str) -> bool:
        """Whether `name` was started and has neither been killed nor died by itself."""
        return name in self._running and self._running[name].poll() is None

    def process_id(self, name: str) -> int:
        return self._running[name].pid

    def running(self) -> list[subprocess.Popen[bytes]]:
        """The processes that were started and not yet stopped."""
        return list(self._running.values())

    def check(self) -> None:
        """Raises ConfigurationError when one has died, with the last that it said."""
        for name, process in self._running.items():
            if process.poll() is not None:
                said = self._log(name).read_text(errors="replace").strip().splitlines()[-3:]
                last = " / ".join(said) or "it said nothing"
                raise ConfigurationError(f"{name} died with status {process.returncode}: {last}")

    def stop(self) -> None:
        for process in self._running.values():
            _signal(process, signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()
        self._running.clear()

    def _log(self, name: str) -> Path:
        return self._folder / f"{name.replace('/', '-')}.log"


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is None:  # once it is reaped its number may be another's
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listened on a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def lasting_ports(count: int) -> list[int]:
    """Free ports for servers that come and go: while one is away, no outgoing connection of this machine is given its port.

    Such a connection would keep the server from coming back; one to the port itself would even be answered, by itself.
    """
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return free_ports(count)
    found: list[int] = []
    candidates = list(range(min(lowest, 32768) - 1, 10_000, -1))
    random.shuffle(candidates)  # of several programs that look at once, each finds others
    for port in candidates:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            found.append(port)
        if len(found) == count:
            return found
    return free_ports(count)


@contextlib.asynccontextmanager
async def local_cluster(
    config: ServeCoreConfig,
    engines: Sequence[tuple[EngineConfig, AnyProfile | None]],
    lengths_are_told: bool = False,
) -> AsyncIterator[tuple[str, Processes]]:
    """Starts a core and engines on free ports and yields the core's address; an engine with a profile is emulated.
    lengths_are_told: clients send the lengths of outputs, so that a policy may read them."""
    with tempfile.TemporaryDirectory(prefix="parrot-") as folder:
        processes = Processes(Path(folder))
        core_port, *ports = free_ports(len(engines) + 1)
        url = f"http://{HOST}:{core_port}"
        try:
            core_file = Path(folder) / "core.json"
            # No other run is to find this one's sessions: a journal, where one is asked for, costs what it does and goes.
            journal = str(Path(folder) / "journal.sqlite") if config.journal_path else None
            config = msgspec.structs.replace(config, journal_path=journal)
            core_file.write_bytes(msgspec.json.encode(msgspec.structs.replace(config, host=HOST, port=core_port)))
            told = ["--lengths_are_told"] if lengths_are_told else []
            processes.start("core", "parrot.serve.http_server", ["--config_path", str(core_file), *told])
            await _until_ready(url, 0, processes)
            for number, ((engine, profile), port) in enumerate(zip(engines, ports, strict=True)):
                address = msgspec.structs.replace(engine.serve_core, host=HOST, port=core_port)
                file = Path(folder) / f"engine{number}.json"
                file.write_bytes(msgspec.json.encode(_placed(engine, profile, port, address, Path(folder), number)))
                processes.start(engine.name, "parrot.engine.http_server", ["--config_path", str(file)])
            await _until_ready(url, len(engines), processes)
            yield url, processes
        finally:
            processes.stop()


def _placed(
    engine: EngineConfig, profile: AnyProfile | None, port: int, core: ServeCoreAddress, folder: Path, number: int
) -> EngineConfig:
    """The engine at `port` under `core`; with a profile, the emulated one that stands for it."""
    if profile is not None:
        profile_file = folder / f"profile{number}.json"
        profile_file.write_bytes(msgspec.json.encode(profile))
        engine = as_emulated(engine, str(profile_file))
    return msgspec.structs.replace(engine, host=HOST, port=port, serve_core=core)


async def _until_ready(url: str, engines: int, processes: Processes) -> None:
    """Waits until the core answers and has that many engines. Raises ConfigurationError."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + START_TIMEOUT_S
    async with aiohttp.ClientSession() as http:
        while loop.time() < deadline_s:
            processes.check()
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
                async with http.get(f"{url}/health", timeout=aiohttp.ClientTimeout(2)) as answer:
                    if answer.status == 200 and (await answer.json())["engines"] >= engines:
                        return
            await asyncio.sleep(0.05)
    raise ConfigurationError(f"the cluster was not ready after {START_TIMEOUT_S:g} s: {engines} engines were expected at {url}")
