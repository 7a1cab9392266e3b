"""Simulations on a Ray cluster: each run is a task of one core, and its files come back to the one who started the sweep.

Decides nothing about a run. The nodes have the testbed installed (the same version) and see the files that the
specification names under the same paths; results need no common file system. A task whose node or process dies is told
by the name of its run, and no other is lost.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.exceptions

from sim.pool import shared_progress
from sim.results import ResultsError, place_files
from sim.spec import Run
from sim.sweep import Failure, Outcome, Result, RunError, Where, carry_out

POLL_S = 0.5
REACH_S = 10.0  #: for the head of a cluster to answer
OBJECT_STORE_BYTES = 2**29  #: of a local Ray: results on their way


class _Sent(NamedTuple):
    """What comes back from a node: the outcome, and the content of the run's files by name."""

    outcome: Outcome
    files: dict[str, bytes]


def on_ray(runs: Sequence[Run], folder: str | None, where: Where, tell: Callable[[], None]) -> Iterator[Outcome]:
    """The outcomes of `runs` as they come. Raises RunError when there is no cluster at the address."""
    _connect(where)
    try:
        task = ray.remote(num_cpus=1, max_retries=0)(_carry_out_there)
        waiting = {task.remote(run, os.getcwd(), folder is not None): run for run in runs}
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
            for reference in ready:
                yield _received(reference, waiting.pop(reference), folder)
            tell()
    finally:
        ray.shutdown()


def _connect(where: Where) -> None:
    address = where.ray or ""
    if address not in ("local", "auto"):
        _check_reachable(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet |= {"num_cpus": where.workers, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"--ray {address}: no cluster to be had there: {error}") from None


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes for a head that is not there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        raise RunError(f"--ray {address}: expected HOST:PORT of the cluster's head, or local")
    try:
        socket.create_connection((host, int(port)), REACH_S).close()
    except OSError as error:
        raise RunError(f"--ray {address}: nothing answers there: {error.strerror or error}") from None


def _received(reference: Any, run: Run, folder: str | None) -> Outcome:
    try:
        sent: _Sent = ray.get(reference)
    except ray.exceptions.RayError as error:
        return Failure(run, f"lost on the Ray cluster: {str(error).strip().splitlines()[0]}")
    if folder is not None and isinstance(sent.outcome, Result):
        try:
            place_files(Path(folder) / run.name, sent.files)
        except OSError as error:
            return Failure(run, f"{folder}: cannot be written: {error.strerror}")
        except ResultsError as error:
            return Failure(run, str(error))
    return sent.outcome


def _carry_out_there(run: Run, directory: str, files: bool) -> _Sent:
    """On the node."""
    try:
        os.chdir(directory)
    except OSError as error:
        return _Sent(Failure(run, f"node {socket.gethostname()} does not see the folder {directory}: {error.strerror}"), {})
    with tempfile.TemporaryDirectory() as place:
        outcome = carry_out(run, place if files else None, shared_progress(1)[0])
        found = Path(place) / run.name
        contents = {path.name: path.read_bytes() for path in sorted(found.iterdir())} if found.is_dir() else {}
    return _Sent(outcome, contents)
