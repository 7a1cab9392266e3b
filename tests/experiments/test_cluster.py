"""The demo's processes are gone afterwards, whatever happened, and what failed is named."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from experiments.cluster import ClusterError, free_port, output_of, running, wait_for_engines
from parrot.configuration import ConfigurationError

SERVER = ["http.server", "0", "--bind", "127.0.0.1"]


def children() -> set[str]:
    """The processes that this one has started and that still run."""
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def interrupted(folder: Path) -> None:
    with running(folder, [("one", SERVER), ("two", SERVER)]) as processes:
        processes.check()
        assert len(children()) >= 2
        raise KeyboardInterrupt


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to see processes")
def test_no_process_is_left_after_an_interrupt(tmp_path: Path) -> None:
    before = children()
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path)
    assert children() <= before


def test_an_engine_that_dies_is_named_before_the_wait_is_over(tmp_path: Path) -> None:
    with (
        running(tmp_path, [("engine-1", ["no.such.module"])]) as processes,
        pytest.raises(ConfigurationError, match=r"engine-1 died with status 1.*no\.such"),
    ):
        wait_for_engines("http://127.0.0.1:1", 2, processes, 60.0)


def test_a_port_in_use_is_replaced_by_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port
    assert free_port(port, [port]) != port


def test_a_command_gives_its_output_or_its_failure() -> None:
    assert output_of(["platform"]).strip()
    with pytest.raises(ClusterError, match=r"python -m json\.tool ended with status"):
        output_of(["json.tool", "/nowhere"])
