"""What the journal costs: recovery time, file size, and how long a promise waits for its commit.

    python benchmarks/journal.py [--calls N] [--commits N] [--million]

Drives a ServeCore, its ledger and its journal in one process, with no sockets. A call is a shared constant, an input value
of its own and an output, fetched, started, finished; a session has ten of them. `recovery` opens a journal whose sessions
are all alive (the worst case) and builds the core again. `commit` is the time from handing an entry over to the callback
on the event loop, with one writer that waits for each. `--million` runs a million calls in sessions that are closed, and
shows the file at ten points. Compare the rows of one run, not runs.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from parrot.protocol.api import Criteria, SamplingConfig
from parrot.protocol.engine import EngineDescription
from parrot.serve import events as ev
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from parrot.serve.core import ServeCore
from parrot.serve.effects import Dispatch, SessionEnded
from parrot.serve.journal import Journal
from parrot.serve.ledger import KEPT, Entry, Ledger, Mode, Row, StoredText, encode
from parrot.serve.recovery import recover, restore
from parrot.serve.streams import OutputStreams
from parrot.serve.texts import Piece, Texts, content_key, pack_ids

CONFIG = ServeCoreConfig(max_sessions_num=1 << 30, global_scheduler=GlobalSchedulerConfig(policy="least_loaded"))
AUTH = "0" * 64
CALLS_A_SESSION = 10
SYSTEM = "You are a helpful assistant. " * 20
SAMPLING = SamplingConfig(max_gen_length=64)


class Life:
    """A core whose instants go into a journal, as a shell would have it."""

    def __init__(self, path: Path, mode: Mode) -> None:
        self.journal = Journal.open(path, mode)
        self.journal.begin(1, 0.0, CONFIG)
        self.texts = Texts()
        self.core = ServeCore(CONFIG, epoch=1)
        self.ledger = Ledger(mode, self.texts, self.journal.past)
        self.now = 0.0
        engine = EngineDescription(
            "e", "m", "t", "localhost", 1, "emulated", tasks_capacity=256, tokens_capacity=100_000, max_seq_len=8192
        )
        self.instant(ev.RegisterEngine(0, engine))

    def instant(self, event: Any) -> list[Any]:
        self.now += 0.001
        effects = self.core.handle([event], self.now)
        dropped = {e.session_id: self.texts.end(e.session_id) for e in effects if isinstance(e, SessionEnded)}
        entry, _ = self.ledger.instant(self.now, [event], effects, dropped)
        self.journal.append(entry)
        return effects

    def text(self, session: int, text: str) -> ev.Content:
        piece = Piece(content_key(text), text)
        piece.ids["t"] = pack_ids(range(30))
        self.texts.hold(session, [piece])
        return piece.content()

    def open(self, session: int) -> None:
        self.texts.open(session)
        self.instant(ev.OpenSession(1, session, AUTH))

    def call(self, session: int, number: int) -> None:
        segments = (
            ev.Constant(self.text(session, SYSTEM)),
            ev.Input("question", value=self.text(session, f"Question {session} {number}: " + "why is that so? " * 8)),
            ev.Output("answer", SAMPLING),
        )
        self.instant(ev.SubmitCall(2, session, AUTH, segments, "ask", idempotency_key=f"key {session} {number}"))
        (dispatch,) = (
            effect
            for effect in self.instant(ev.GetVariable(3, session, AUTH, f"v{2 * number + 1}", Criteria.LATENCY))
            if isinstance(effect, Dispatch)
        )
        self.instant(ev.TaskStarted(1, dispatch.task, dispatch.attempt, 100))
        self.instant(ev.FirstToken(1, dispatch.task, dispatch.attempt))
        answer = self.text(session, f"Answer {session} {number}: " + "because it is. " * 10)
        self.instant(ev.TaskFinished(1, dispatch.task, dispatch.attempt, answer, 40, 130, 100, 0.5, 0.01))

    def close(self, session: int) -> None:
        self.instant(ev.CloseSession(4, session, AUTH))

    async def settle(self) -> None:
        await committed(self.journal)


async def committed(journal: Journal) -> None:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    journal.after_commit(future.set_result)
    error = await future
    if error is not None:
        raise SystemExit(error.message)


def size_of(path: Path) -> tuple[float, float]:
    """MiB of the database and of its write-ahead log."""
    files = (path, Path(f"{path}-wal"))
    return tuple(file.stat().st_size / (1 << 20) if file.exists() else 0.0 for file in files)  # type: ignore[return-value]


async def recovery(path: Path, mode: Mode, calls: int) -> None:
    start_s = time.perf_counter()
    life = Life(path, mode)
    for session in range(1, calls // CALLS_A_SESSION + 1):
        life.open(session)
        for number in range(CALLS_A_SESSION):
            life.call(session, number)
        await life.settle()
    life.journal.close()
    del life
    written_s = time.perf_counter()
    size_mib, _ = size_of(path)
    journal = Journal.open(path, mode)
    opened_s = time.perf_counter()
    texts, streams = Texts(), OutputStreams()
    core = recover(CONFIG, journal.past, journal.past.epoch + 1)
    restore(journal.past, texts, streams)
    recovered_s = time.perf_counter()
    journal.close()
    assert core.counts()["finished"] == calls // CALLS_A_SESSION * CALLS_A_SESSION
    print(
        f"{mode:<9}{written_s - start_s:>10.1f}{size_mib:>10.1f}{opened_s - written_s:>10.1f}"
        f"{recovered_s - opened_s:>13.1f}{recovered_s - written_s:>9.1f}",
        flush=True,
    )


async def million(path: Path, calls: int = 1_000_000) -> None:
    life = Life(path, "recover")
    print(f"\n{'calls':>10}{'database MiB':>15}{'log MiB':>10}{'seconds':>10}")
    start_s = time.perf_counter()
    done = 0
    for session in range(1, calls // CALLS_A_SESSION + 1):
        life.open(session)
        for number in range(CALLS_A_SESSION):
            life.call(session, number)
        life.close(session)
        if session % 8 == 0:
            await life.settle()
        done += CALLS_A_SESSION
        if done % (calls // 10) == 0:
            await life.settle()
            database_mib, log_mib = size_of(path)
            print(f"{done:>10}{database_mib:>15.2f}{log_mib:>10.2f}{time.perf_counter() - start_s:>10.1f}", flush=True)
    life.journal.close()


async def commit_latency(path: Path, sync: Literal["normal", "full"], commits: int) -> None:
    journal = Journal.open(path, "recover", sync=sync)
    journal.begin(1, 0.0, CONFIG)
    body = encode(
        ev.SubmitCall(2, 1, AUTH, (ev.Constant(ev.Content("k" * 32, {"t": 30})), ev.Output("answer", SAMPLING)), "ask")
    )
    waits_us = []
    for number in range(commits):
        entry = Entry(
            rows=[Row(number, 0, float(number), number + 1, KEPT, body)],
            texts=[StoredText(f"{number:032x}", "why is that so? " * 8, {})],
        )
        start_s = time.perf_counter()
        journal.append(entry)
        await committed(journal)
        waits_us.append((time.perf_counter() - start_s) * 1e6)
        await asyncio.sleep(0.0005)
    journal.close()
    waits_us.sort()
    p99 = waits_us[int(len(waits_us) * 0.99)]
    print(f"{sync:<9}{statistics.median(waits_us):>11.0f}{p99:>10.0f}{waits_us[-1]:>10.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--calls", type=int, default=25_000, help="calls of the journals that are recovered (the aim is said of 100,000)"
    )
    parser.add_argument("--commits", type=int, default=3000, help="commits that are timed")
    parser.add_argument("--million", action="store_true", help="a million calls in sessions that end; minutes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if arguments.million:
            asyncio.run(million(Path(directory, "million")))
            return
        print("a commit, one writer, microseconds")
        print(f"{'sync':<9}{'median':>11}{'p99':>10}{'worst':>10}")
        for sync in ("normal", "full"):
            asyncio.run(commit_latency(Path(directory, sync), sync, arguments.commits))  # type: ignore[arg-type]
        print(f"\n{arguments.calls:,} calls in sessions of {CALLS_A_SESSION}, all alive; seconds")
        print(f"{'mode':<9}{'writing':>10}{'MiB':>10}{'opening':>10}{'rebuilding':>13}{'in all':>9}")
        for mode in ("recover", "record"):
            asyncio.run(recovery(Path(directory, mode), mode, arguments.calls))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
