"""A real cluster on this machine: a core and engines as processes, with the documented commands, stopped whatever happens.

Each process leads a process group of its own, so that Ctrl-C reaches this program alone, which then stops them all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

STOP_S = 10.0
POLL_S = 0.1


class ClusterError(Exception):
    """A process of the cluster did not start, or ended while it was needed."""


class Processes:
    """Processes that run while this is open. On leaving, the last started is stopped first."""

    def __init__(self, log_folder: Path) -> None:
        self._log_folder = log_folder
        self._started: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Processes:
        self._log_folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str]) -> None:
        """Starts `command`; what it prints goes to NAME.log."""
        with open(self._log_folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._started.append((name, process))

    def check(self) -> None:
        """Raises ClusterError when a process has ended; the message has the end of its log."""
        for name, process in self._started:
            status = process.poll()
            if status is not None:
                log = self._log_folder / f"{name}.log"
                last = "\n".join("  " + line for line in log.read_text(errors="replace").splitlines()[-8:])
                raise ClusterError(f"{name} ended with status {status}; the end of {log}:\n{last}")

    def stop(self) -> None:
        """Ends all: SIGTERM, and SIGKILL for whoever is still there after a while."""
        stopping, self._started = self._started[::-1], []
        for _, process in stopping:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for _, process in stopping:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the whole group, and only while its leader is not yet reaped: the number is ours that long."""
    if process.returncode is None and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


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
    """The documented command of a core."""
    return [sys.executable, "-m", "parrot.serve.http_server", "--config_path", str(config), "--port", str(port),
            "--log_dir", str(log_dir), "--log_filename", "core.log"]  # fmt: skip


def engine_command(
    config: Path, name: str, port: int, core_port: int, log_dir: Path, *, iteration_log: Path, core: int
) -> list[str]:
    """The documented command of an engine with one thread, pinned to the processor core `core`."""
    return [sys.executable, "-m", "parrot.engine.http_server", "--config_path", str(config), "--engine_name", name,
            "--port", str(port), "--serve_core", f"localhost:{core_port}", "--iteration_log", str(iteration_log),
            "--num_threads", "1", "--cpu_affinity", str(core), "--log_dir", str(log_dir), "--log_filename", f"{name}.log"]  # fmt: skip


def wait_for_engines(url: str, engines: int, processes: Processes, timeout_s: float) -> None:
    """Returns when that many engines are registered. Raises ClusterError."""
    deadline = time.monotonic() + timeout_s
    found: object = "no answer"
    while time.monotonic() < deadline:
        processes.check()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2.0) as answer:
                found = json.load(answer).get("engines")
        except (OSError, ValueError):
            pass
        if found == engines:
            return
        time.sleep(POLL_S)
    raise ClusterError(f"{url}: {found} of {engines} engines after {timeout_s:g} s")
