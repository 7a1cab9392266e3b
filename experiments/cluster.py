"""The demo's real cluster: its ports, its commands, a wait until its engines are there; and commands run to their end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from sim.processes import Processes

STOP_S = 10.0
POLL_S = 0.1


class ClusterError(Exception):
    """A process or a command did not do what was needed of it."""


@contextlib.contextmanager
def running(folder: Path, commands: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Processes]:
    """Starts each command (its name; the module and its arguments) and stops them all, whatever happens inside.

    What they print goes to FOLDER/NAME.log.
    """
    processes = Processes(folder)
    try:
        for name, (module, *arguments) in commands:
            processes.start(name, module, arguments)
        yield processes
    finally:
        processes.stop()


def free_port(wanted: int, taken: Sequence[int] = ()) -> int:
    """`wanted`, or where that is in use another one. There is a moment between the look and the use, as always."""
    for port in (wanted, 0):
        if port in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("localhost", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ClusterError("no port is free on localhost")


def core_command(config: Path, port: int, log_dir: Path) -> list[str]:
    """The documented command of a core: module and arguments."""
    where = ["--port", str(port), "--log_dir", str(log_dir), "--log_filename", "core.log"]
    return ["parrot.serve.http_server", "--config_path", str(config), *where]


def engine_command(config: Path, name: str, port: int, core_port: int, log_dir: Path, *, log: Path, core: int) -> list[str]:
    """The documented command of an engine with one thread, pinned to the processor core `core`; `log`: its iterations."""
    command = ["parrot.engine.http_server", "--config_path", str(config), "--engine_name", name, "--port", str(port)]
    command += ["--serve_core", f"localhost:{core_port}", "--iteration_log", str(log)]
    command += ["--num_threads", "1", "--cpu_affinity", str(core)]
    return [*command, "--log_dir", str(log_dir), "--log_filename", f"{name}.log"]


def wait_for_engines(url: str, engines: int, processes: Processes, timeout_s: float) -> None:
    """Returns when that many engines are registered. Raises ClusterError, or ConfigurationError when a process dies."""
    deadline = time.monotonic() + timeout_s
    found: object = "no answer"
    while time.monotonic() < deadline:
        processes.check()
        with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(f"{url}/health", timeout=2.0) as answer:
            found = json.load(answer).get("engines")
        if found == engines:
            return
        time.sleep(POLL_S)
    raise ClusterError(f"{url}: {found} of {engines} engines after {timeout_s:g} s")


def output_of(command: Sequence[str]) -> bytes:
    """Runs `python -m command…` to its end and returns its stdout; its stderr (progress, errors) is ours. Raises ClusterError.

    When this program is interrupted, so is the command, with all processes that it started.
    """
    whole = [sys.executable, "-m", *command]
    with subprocess.Popen(whole, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            _signal(process, signal.SIGKILL)
            raise
    if process.returncode != 0:
        raise ClusterError(f"python -m {command[0]} ended with status {process.returncode}")
    return output


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the whole group, and only while its leader is not yet reaped: the number is ours that long."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
