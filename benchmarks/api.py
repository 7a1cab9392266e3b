"""How fast ServeCore's HTTP API is: semantic_call + get pairs a second, the latency that the core adds to an engine's, and
what the journal costs.

Starts, for each kind of journal, a core and two emulated engines whose iterations cost nothing, as processes, with the
documented commands; then loads them in turn from this process over keep-alive connections. Everything shares this
machine's cores, the load included; a cluster that is not measured is idle.

    python benchmarks/api.py [--clients 1,8,32] [--seconds 5] [--journals none,recover] [--profile FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from parrot.configuration import read_json

ROOT = Path(__file__).resolve().parents[1]
ENGINES = 2
PAIRS_PER_SESSION = 50
AIM_PAIRS_PER_S, AIM_CLIENTS = 1500, 32
AIM_ADDED_MS = 3.0
AIM_JOURNAL_MS = 2.0
ROUNDS = 8  # short turns at one client, so that a disturbance of the machine meets all clusters alike
JOURNALS = {
    "none": {"journal_path": None},
    "recover": {"journal_mode": "recover"},
    "record": {"journal_mode": "record"},
    "recover-full": {"journal_mode": "recover", "journal_sync": "full"},
}
PROMPT = "Say in a few words how the weather is today and whether it will rain. {{answer}}"
OUTPUT_TOKENS = 4
SAMPLING = {"max_gen_length": OUTPUT_TOKENS, "output_length": OUTPUT_TOKENS}


# --------------------------------------------------------------------------------------------------- a lean HTTP client


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time. Knows just enough HTTP to cost little."""

    def __init__(self) -> None:
        self._buffer = b""
        self._answer: asyncio.Future[bytes] | None = None
        self._transport: Any = None

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found or self._answer is None:
            return
        if length := re.search(rb"(?i)content-length: *(\d+)", head):
            whole = len(body) >= int(length[1])
        else:
            whole = body.endswith(b"0\r\n\r\n")
        if whole:
            self._buffer = b""
            answer, self._answer = self._answer, None
            if head.startswith(b"HTTP/1.1 200"):
                answer.set_result(body)
            else:
                answer.set_exception(RuntimeError(f"{head.splitlines()[0]!r}: {body!r}"))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionError("the server closed the connection"))

    async def send(self, method: str, path: str, body: bytes) -> bytes:
        """The answer's raw body. Raises RuntimeError for any status but 200."""
        self._answer = asyncio.get_running_loop().create_future()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        return await self._answer

    def close(self) -> None:
        self._transport.close()


# ------------------------------------------------------------------------------------------------------------- the load


class Client:
    """Runs call + get pairs one after the other, each session for PAIRS_PER_SESSION of them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.latencies_s: list[float] = []

    async def run(self, until_s: float) -> None:
        while time.perf_counter() < until_s:
            session = json.loads(await self._connection.send("POST", "/v1/session", b"{}"))
            parameter = {"name": "answer", "is_output": True, "sampling_config": SAMPLING}
            call = json.dumps({**session, "template": PROMPT, "parameters": [parameter]}).encode()
            get = json.dumps({**session, "criteria": "latency"}).encode()
            for _ in range(PAIRS_PER_SESSION):
                start_s = time.perf_counter()
                await self._pair(call, get)
                self.latencies_s.append(time.perf_counter() - start_s)
                if time.perf_counter() >= until_s:
                    break
            auth = json.dumps({"session_auth": session["session_auth"]}).encode()
            await self._connection.send("DELETE", f"/v1/session/{session['session_id']}", auth)

    async def _pair(self, call: bytes, get: bytes) -> None:
        answer = await self._connection.send("POST", "/v1/semantic_call", call)
        var_id = answer[answer.rindex(b'"var_id":"') + 10 :].split(b'"', 1)[0].decode()
        content = await self._connection.send("GET", "/v1/semantic_var/" + var_id, get)
        if not content.startswith(b'{"content":"'):
            raise RuntimeError(f"no content: {content!r}")


async def load(host: str, port: int, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Pairs a second, and every pair's latency in seconds."""
    running = [Client(await Connection.open(host, port)) for _ in range(clients)]
    start_s = time.perf_counter()
    await asyncio.gather(*(client.run(start_s + seconds) for client in running))
    wall_s = time.perf_counter() - start_s
    latencies_s = [latency_s for client in running for latency_s in client.latencies_s]
    for client in running:
        client._connection.close()
    return len(latencies_s) / wall_s, latencies_s


async def direct(host: str, port: int, seconds: float) -> list[float]:
    """Latencies in seconds of the same task, sent by one client straight to an engine."""
    connection = await Connection.open(host, port)
    latencies_s: list[float] = []
    number, until_s = 0, time.perf_counter() + seconds
    words = len(PROMPT.split()) - 1
    while time.perf_counter() < until_s:
        number += 1
        task = {
            "engine_id": 1,
            "epoch": 0,
            "task": [1, number, 0],
            "attempt": 0,
            "chain": [{"context_id": 10**9 + 2 * number, "token_ids": list(range(words))}],
            "generate": {"context_id": 10**9 + 2 * number + 1, "sampling": {**SAMPLING, "seed": 1}},
            "parent": -1,
        }
        body = json.dumps(task).encode()
        start_s = time.perf_counter()
        await connection.send("POST", "/task", body)
        latencies_s.append(time.perf_counter() - start_s)
    connection.close()
    return latencies_s


# ------------------------------------------------------------------------------------------------------------ processes


@contextlib.contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A server that is stopped at the end, come what may."""
    started = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        assert started.stdout is not None
        started.stdout.close()


def address_of(started: subprocess.Popen[str]) -> tuple[str, int]:
    """Where a server says that it listens. Raises RuntimeError, with what it said, when it does not start."""
    assert started.stdout is not None
    said = ""
    for line in started.stdout:
        said += line
        if found := re.search(r"https?://(\[[^\]]+\]|[^:/\s]+):(\d+)", line):
            return found[1].strip("[]"), int(found[2])
    raise RuntimeError(f"a server did not start:\n{said}")


class Cluster(NamedTuple):
    """Addresses (host, port) of the core and of one of its engines."""

    core: tuple[str, int]
    core_pid: int
    engine: tuple[str, int]


@contextlib.contextmanager
def cluster(journal: str, profile: str | None) -> Iterator[Cluster]:
    """A core with that kind of journal and ENGINES engines that have registered."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parrot-api-")))
        sample = read_json(ROOT / "sample_configs" / "core" / "localhost_serve_core.json")
        configuration = folder / "core.json"
        configuration.write_text(json.dumps({**sample, "journal_path": str(folder / "journal.sqlite"), **JOURNALS[journal]}))
        serve = ["parrot.serve.http_server", "--config_path", str(configuration)]
        serve += ["--host", "127.0.0.1", "--port", "0", "--release_mode"]
        if profile:
            serve = ["cProfile", "-o", profile, "-m", *serve]
        server = stack.enter_context(process(*serve))
        core = address_of(server)
        engine_file = str(ROOT / "sample_configs" / "engine" / "emulated-zero.json")
        command = ["parrot.engine.http_server", "--config_path", engine_file, "--host", "127.0.0.1", "--port", "0"]
        command += ["--serve_core", f"{core[0]}:{core[1]}", "--release_mode"]
        engines = [stack.enter_context(process(*command, "--engine_name", f"zero-{i}")) for i in range(ENGINES)]
        addresses = [address_of(engine) for engine in engines]
        wait_for_engines(core)
        yield Cluster(core, server.pid, addresses[0])


def wait_for_engines(core: tuple[str, int], patience_s: float = 20.0, engines: int = ENGINES) -> None:
    until_s = time.monotonic() + patience_s
    while True:
        with urllib.request.urlopen(f"http://{core[0]}:{core[1]}/health") as answer:
            if json.load(answer)["engines"] == engines:
                return
        if time.monotonic() > until_s:
            raise RuntimeError(f"the engines did not register within {patience_s} s")
        time.sleep(0.05)


# -------------------------------------------------------------------------------------------------------------- results


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, in seconds; 0.0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(running: dict[str, Cluster], clients: Sequence[int], seconds: float) -> None:
    for each in running.values():
        await load(*each.core, max(clients), 1.0)  # warm up
    print(f"{'clients':>8} {'journal':>13} {'pairs/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'core CPU µs/pair':>17}")
    for number in clients:
        for journal, each in running.items():
            before_s = cpu_s(each.core_pid)
            rate, latencies_s = await load(*each.core, number, seconds)
            cpu_us = (cpu_s(each.core_pid) - before_s) / len(latencies_s) * 1e6
            p50_ms, p99_ms = (percentile(latencies_s, share) * 1e3 for share in (0.5, 0.99))
            aim = f"   aim {AIM_PAIRS_PER_S} pairs/s" if number == AIM_CLIENTS else ""
            print(f"{number:>8} {journal:>13} {rate:>9.0f} {p50_ms:>8.2f} {p99_ms:>8.2f} {cpu_us:>17.0f}{aim}")
    await compare(running, seconds)


async def compare(running: dict[str, Cluster], seconds: float) -> None:
    """Medians at one client, all clusters and a bare engine in short turns."""
    alone_s: list[float] = []
    through_s: dict[str, list[float]] = {journal: [] for journal in running}
    for _ in range(ROUNDS):
        alone_s += await direct(*next(iter(running.values())).engine, seconds / ROUNDS)
        for journal, each in running.items():
            through_s[journal] += (await load(*each.core, 1, seconds / ROUNDS))[1]
    alone_ms = statistics.median(alone_s) * 1e3
    print(f"one client, median: engine alone {alone_ms:.2f} ms")
    first_ms = None
    for journal, latencies_s in through_s.items():
        median_ms = statistics.median(latencies_s) * 1e3
        line = f"  through the core, journal {journal}: {median_ms:.2f} ms,"
        line += f" added {median_ms - alone_ms:.2f} ms (aim {AIM_ADDED_MS:.0f})"
        if first_ms is None:
            first_ms = median_ms
        else:
            line += f", {median_ms - first_ms:+.2f} ms by the journal (aim {AIM_JOURNAL_MS:.0f})"
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures ServeCore's HTTP API with engines of zero latency.")
    parser.add_argument("--clients", default="1,8,32", help="numbers of clients, comma between (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each number is measured (default: %(default)s)")
    parser.add_argument(
        "--journals",
        default="none,recover",
        help=f"kinds of journal, comma between, of {', '.join(JOURNALS)} (default: %(default)s)",
    )
    parser.add_argument("--profile", help="write a cProfile of the last core to this file (the numbers are slower then)")
    arguments = parser.parse_args()
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    clients = [int(n) for n in arguments.clients.split(",")]
    journals = arguments.journals.split(",")
    if unknown := [name for name in journals if name not in JOURNALS]:
        parser.error(f"no journal {unknown[0]!r}; expected are {', '.join(JOURNALS)}")
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(cluster(name, arguments.profile if name == journals[-1] else None)) for name in journals
        }
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(measure(running, clients, arguments.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
