"""What ServeCore adds to an engine that is asked by OpenAI's protocol: time to first token, and how evenly tokens stream.

Starts a core and one emulated engine as processes, with the documented commands; the engine registers with the core and
answers OpenAI's routes by itself as well. Then `--streams` clients stream completions, in turns straight from the engine and
through the core, so that a disturbance of the machine meets both alike. The engine's second row is the same again: what
differs there is noise. Everything shares this machine's cores, the clients included.

    python benchmarks/front_door.py [--streams 64] [--rounds 6] [--tokens 96] [--tpot-ms 25] [--journal recover]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from api import JOURNALS, ROOT, address_of, cpu_s, percentile, process, wait_for_engines

from parrot.configuration import read_json

MODEL = "benchmark"
AIM_ADDED_MS = 5.0
AIM_RATE = 0.95
PROMPT_WORDS = 128
#: Whom each turn asks, by row; the engine twice, so that what differs between its two rows is noise.
ROWS = ("engine", "core", "engine again")
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"


# ------------------------------------------------------------------------------------------------------------- a client


class Stream(asyncio.Protocol):
    """One keep-alive connection that streams one answer at a time. It notes when bytes come and reads them afterwards, so that
    the clients cost little while they measure."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._parts: list[tuple[float, bytes]] = []
        self._whole: asyncio.Future[None] | None = None
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parts.append((time.perf_counter(), data))
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(b"\r\n0\r\n\r\n") and self._whole is not None and not self._whole.done():
            self._whole.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._whole is not None and not self._whole.done():
            said = b"".join(data for _, data in self._parts)[:500]
            self._whole.set_exception(error or ConnectionError(f"the server closed the connection after {said!r}"))

    async def ask(self, body: bytes) -> tuple[float, list[tuple[float, bytes]]]:
        """When the request was sent, and what came when."""
        self._parts, self._tail = [], b""
        self._whole = asyncio.get_running_loop().create_future()
        sent_s = time.perf_counter()
        self._transport.write(HEAD.format(len(body)).encode() + body)
        async with asyncio.timeout(120):
            await self._whole
        return sent_s, self._parts

    def close(self) -> None:
        self._transport.close()


class Measured(NamedTuple):
    """One stream. `rate`: tokens a second after the first text; `gap_s`: the longest wait between two pieces."""

    ttft_s: float
    rate: float
    gap_s: float
    pieces: int


def measured(sent_s: float, parts: Sequence[tuple[float, bytes]], tokens: int) -> Measured:
    """Raises RuntimeError when the answer is not whole."""
    texts = [(at_s, words) for at_s, data in parts if (words := _words(data))]
    whole = b"".join(data for _, data in parts)
    if not whole.startswith(b"HTTP/1.1 200") or b"[DONE]" not in whole or sum(n for _, n in texts) != tokens:
        raise RuntimeError(f"no answer of {tokens} tokens: {whole[:300]!r} … {whole[-300:]!r}")
    first_s, last_s = texts[0][0], texts[-1][0]
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(texts)]
    rate = (tokens - texts[0][1]) / (last_s - first_s) if gaps else 0.0
    return Measured(first_s - sent_s, rate, max(gaps, default=0.0), len(texts))


def _words(data: bytes) -> int:
    """Tokens of the chunks in `data`: the synthetic tokenizer's are words."""
    found = 0
    for piece in data.split(b'"text":"')[1:]:
        found += len(piece[: piece.index(b'"')].split())
    return found


# ------------------------------------------------------------------------------------------------------------- the load


async def turn(address: tuple[str, int], arguments: argparse.Namespace, dice: random.Random) -> list[Measured]:
    """All streams, each of one answer. They begin spread over what an answer takes, so that the engine is as busy with each as
    it would be all the time."""
    loop = asyncio.get_running_loop()
    spread_s = arguments.spread

    async def one() -> Measured:
        words = " ".join(f"w{dice.randrange(60000)}" for _ in range(PROMPT_WORDS))
        asked = {"model": MODEL, "prompt": words, "max_tokens": arguments.tokens, "stream": True, "temperature": 0}
        body = json.dumps(asked).encode()
        _, stream = await loop.create_connection(Stream, *address)
        await asyncio.sleep(dice.random() * spread_s)
        sent_s, parts = await stream.ask(body)
        stream.close()
        return measured(sent_s, parts, arguments.tokens)

    return list(await asyncio.gather(*(one() for _ in range(arguments.streams))))


class Cluster(NamedTuple):
    """Addresses (host, port) and processes."""

    core: tuple[str, int]
    engine: tuple[str, int]
    core_pid: int
    engine_pid: int


async def measure(running: Cluster, arguments: argparse.Namespace) -> bool:
    """Prints the table. Whether the aims are met."""
    dice = random.Random(0)
    found: dict[str, list[Measured]] = {row: [] for row in ROWS}
    cpu: dict[str, list[float]] = {row: [0.0, 0.0] for row in ROWS}
    for row in ROWS[:2]:  # warm up
        await turn(running.core if row == "core" else running.engine, arguments, dice)
    for number in range(arguments.rounds):
        rows = ROWS if number % 2 == 0 else ROWS[::-1]
        for row in rows:
            before = cpu_s(running.core_pid), cpu_s(running.engine_pid)
            found[row] += await turn(running.core if row == "core" else running.engine, arguments, dice)
            cpu[row][0] += cpu_s(running.core_pid) - before[0]
            cpu[row][1] += cpu_s(running.engine_pid) - before[1]
            await asyncio.sleep(0.2)
    print(f"{arguments.streams} streams at once, {len(found['core'])} answers a row, {arguments.tokens} tokens each")
    columns = ("asked", "TTFT p10 ms", "p50 ms", "p90 ms", "tokens/s", "gap ms", "pieces", "core CPU µs/token", "engine's")
    print(" ".join(f"{name:>{max(12, len(name))}}" for name in columns))
    for row, each in found.items():
        tokens = len(each) * arguments.tokens
        values = (
            row,
            *(f"{percentile([m.ttft_s for m in each], share) * 1e3:.2f}" for share in (0.1, 0.5, 0.9)),
            f"{statistics.median(m.rate for m in each):.2f}",
            f"{statistics.median(m.gap_s for m in each) * 1e3:.1f}",
            f"{statistics.mean(m.pieces for m in each):.0f}",
            f"{cpu[row][0] / tokens * 1e6:.0f}",
            f"{cpu[row][1] / tokens * 1e6:.0f}",
        )
        print(" ".join(f"{value:>{max(12, len(name))}}" for value, name in zip(values, columns, strict=True)))
    alone = found["engine"] + found["engine again"]
    added_ms = (statistics.median(m.ttft_s for m in found["core"]) - statistics.median(m.ttft_s for m in alone)) * 1e3
    rate = statistics.median(m.rate for m in found["core"]) / statistics.median(m.rate for m in alone)
    print(f"the core adds {added_ms:.2f} ms to the median time to first token (aim: under {AIM_ADDED_MS:g})")
    print(f"tokens stream through it at {100 * rate:.1f} % of the engine's own rate (aim: {100 * AIM_RATE:g} % and more)")
    return added_ms < AIM_ADDED_MS and rate >= AIM_RATE


# ------------------------------------------------------------------------------------------------------------ processes


@contextlib.contextmanager
def cluster(arguments: argparse.Namespace) -> Iterator[Cluster]:
    """A core and its engine, which streams what it has once an iteration."""
    iteration_s = arguments.tpot_ms / 1e3
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parrot-front-door-")))
        sample = read_json(ROOT / "sample_configs" / "core" / "localhost_serve_core.json")
        core_file, engine_file, profile = (folder / name for name in ("core.json", "engine.json", "profile.json"))
        journal = {"journal_path": str(folder / "journal.sqlite"), **JOURNALS[arguments.journal]}
        core_file.write_text(json.dumps({**sample, **journal}))
        facts = {"name": MODEL, "model": MODEL, "device": "none", "attn_func": "none", "notes": "made up for this benchmark"}
        costs = {"fixed": [{"max_rows": 4096, "seconds": iteration_s}], "hinges": [{"knot": 0, "slope": 1e-6}], "pair_s": 0}
        profile.write_text(json.dumps({**facts, **costs, "kv_s": 0, "task_overhead_s": 0}))
        engine = {
            "model": MODEL,
            "engine_name": MODEL,
            "engine_type": "emulated",
            "tokenizer": "synthetic",
            "latency_profile": profile.name,
            "tasks_capacity": 4 * arguments.streams,
            "instance": {"num_kv_cache_blocks": 1 << 20, "max_seq_len": 8192, "stream_interval_s": iteration_s},
            "scheduler": {"max_batch_size": 1024, "max_num_batched_tokens": 65536, "max_total_tokens": 1 << 20},
        }
        engine_file.write_text(json.dumps(engine))
        serve = ["parrot.serve.http_server", "--config_path", str(core_file), "--host", "127.0.0.1", "--port", "0"]
        if arguments.profile:
            serve = ["cProfile", "-o", arguments.profile, "-m", *serve]
        core_process = stack.enter_context(process(*serve, "--release_mode"))
        core = address_of(core_process)
        command = ["parrot.engine.http_server", "--config_path", str(engine_file), "--host", "127.0.0.1", "--port", "0"]
        engine_process = stack.enter_context(process(*command, "--serve_core", f"{core[0]}:{core[1]}", "--release_mode"))
        address = address_of(engine_process)
        wait_for_engines(core, engines=1)
        if arguments.serve:
            print(f"core: http://{core[0]}:{core[1]}   engine: http://{address[0]}:{address[1]}", flush=True)
        yield Cluster(core, address, core_process.pid, engine_process.pid)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures what ServeCore adds to an engine, by OpenAI's protocol.")
    add = parser.add_argument
    add("--streams", type=int, default=64, help="streams at once (default: %(default)s)")
    add("--rounds", type=int, default=6, help="turns of each row (default: %(default)s)")
    add("--tokens", type=int, default=96, help="tokens of an answer (default: %(default)s)")
    add("--tpot-ms", type=float, default=25.0, help="the engine's time per token (default: %(default)s)")
    add("--journal", default="recover", choices=list(JOURNALS), help="the core's journal (default: %(default)s)")
    add("--profile", help="write a cProfile of the core to this file (the numbers are worse then)")
    add("--serve", action="store_true", help="start core and engine and wait for Ctrl-C: for another load generator")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers are stopped then, too
    arguments.spread = arguments.tokens * arguments.tpot_ms / 1e3 / 2
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with cluster(arguments) as running:
        if arguments.serve:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(1e9)
            return 0
        with asyncio.Runner(loop_factory=factory) as runner:
            met = runner.run(measure(running, arguments))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
