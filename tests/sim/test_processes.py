"""Processes that are killed and started again, and the ports that wait for them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sim.processes import HOST, Processes, lasting_ports


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    running = Processes(tmp_path)
    try:
        yield running
    finally:
        running.stop()


def until_logged(log: Path, lines: int) -> list[str]:
    deadline_s = time.monotonic() + 30.0
    while True:
        said = log.read_text().splitlines() if log.exists() else []
        if len(said) >= lines or time.monotonic() > deadline_s:
            return said
        time.sleep(0.02)


def test_what_was_killed_starts_again_as_it_was(processes: Processes, tmp_path: Path) -> None:
    processes.start("server", "http.server", ["0", "--bind", HOST])
    first = processes.process_id("server")
    assert processes.is_running("server")
    processes.kill("server")
    assert not processes.is_running("server")
    processes.check()  # a process that was killed has not died by itself
    processes.start_again("server")
    assert processes.process_id("server") != first
    assert processes.is_running("server")


def test_both_lives_are_in_the_log(processes: Processes, tmp_path: Path) -> None:
    processes.start("version", "timeit", ["-n", "1", "-r", "1", "pass"])
    first = until_logged(tmp_path / "version.log", 1)
    processes.kill("version")
    processes.start_again("version")
    assert until_logged(tmp_path / "version.log", 2)[0] == first[0]
    processes.kill("version")
    processes.start("version", "timeit", ["-n", "1", "-r", "1", "pass"])  # another command: a log of its own
    assert len(until_logged(tmp_path / "version.log", 1)) == 1


def test_lasting_ports_are_free_and_given_to_no_outgoing_connection() -> None:
    ports = lasting_ports(3)
    assert len(set(ports)) == 3
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in ports:
        assert port < lowest
        with socket.socket() as server:
            server.bind((HOST, port))
