"""Many instances of a program on a cluster in real time: each in a thread of its own, with `P` over HTTP and real sleeps.

Decides when an instance begins. The cluster is started, or found, as `sim.backends` has it; what is measured is seen by the
same accounts as in virtual time.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import aiohttp
import msgspec

from parrot.configuration import ConfigurationError
from parrot.frontend.aio import AsyncTransport
from parrot.frontend.blocking import BlockingTransport
from parrot.frontend.link import CARRIERS, Carriers
from parrot.frontend.pfunc import environment
from parrot.frontend.wire import Answer, LostConnection, Request
from parrot.protocol.api import SessionReference, SessionReport
from sim.http_client import Api, Refusal
from sim.network import Network
from sim.programs.accounts import Account, RecordedBlocking, RecordedLooped
from sim.programs.instances import Failures, check_source, starts_at
from sim.programs.source import Arguments, Source, play
from sim.recorder import Recorder


class Ledger:
    """What all instances write to, each from its thread. Sessions are reported once."""

    def __init__(self, recorder: Recorder) -> None:
        self.failures = Failures()
        self._recorder = recorder
        self._lock = threading.Lock()
        self._reported: set[int] = set()

    def report(self, account: Account, answer: Answer) -> None:
        """The answer to the question for a session that is about to close."""
        if answer.status != 200:
            return
        report = msgspec.json.decode(answer.body, type=SessionReport)
        with self._lock:
            if report.session_id not in self._reported:
                self._reported.add(report.session_id)
                self._recorder.session_ended(account.serial, report, account.outputs_of(report.session_id))

    def ended(self, account: Account, now: float, raised: BaseException | None) -> None:
        with self._lock:
            account.end(now, self.failures.add(account, raised) if raised is not None else None)
            self._recorder.program_ended(account)


def question(request: Request) -> Request:
    """What is asked of a session before the `request` that ends it."""
    auth = msgspec.json.decode(request.body, type=SessionReference).session_auth or ""
    return Request("GET", f"{request.path}?{urlencode({'session_auth': auth, 'calls': 'true'})}")


class _Far:
    """A blocking transport to a core that is a network away."""

    def __init__(self, inner: BlockingTransport, network: Network) -> None:
        self._inner = inner
        self._network = network

    def open(self, request: Request) -> Any:
        half_s = self._network.round_trip_s() / 2
        time.sleep(half_s)
        reply = self._inner.open(request)
        time.sleep(half_s)
        return reply

    def close(self) -> None:
        self._inner.close()


class _FarLooped:
    """The same for an asynchronous one."""

    def __init__(self, inner: AsyncTransport, network: Network) -> None:
        self._inner = inner
        self._network = network

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[Any]:
        half_s = self._network.round_trip_s() / 2
        await asyncio.sleep(half_s)
        async with self._inner.open(request) as reply:
            await asyncio.sleep(half_s)
            yield reply

    async def close(self) -> None:
        await self._inner.close()


def carriers(url: str, account: Account, ledger: Ledger, network: Network, clock: Callable[[], float]) -> Carriers:
    """HTTP to the cluster at `url`, whatever address the program names, with an account of it."""

    def blocking(_: str) -> RecordedBlocking:
        inner = BlockingTransport(url)

        def closing(request: Request) -> None:
            with contextlib.suppress(LostConnection), inner.open(question(request)) as reply:
                ledger.report(account, reply.answer())

        return RecordedBlocking(_Far(inner, network), account, clock, closing=closing)

    def looped(_: str) -> RecordedLooped:
        inner = AsyncTransport(url)

        async def closing(request: Request) -> None:
            with contextlib.suppress(LostConnection):
                async with inner.open(question(request)) as reply:
                    ledger.report(account, await reply.answer())

        return RecordedLooped(_FarLooped(inner, network), account, clock, closing=closing)

    return Carriers(blocking, looped)


async def play_instances(
    url: str,
    source: Source,
    inputs: Sequence[Arguments],
    count: int,
    recorder: Recorder,
    *,
    network: Network,
    rate: float | None = None,
    arrivals: str | None = None,
    clients: int | None = None,
    seed: int = 0,
    on_ended: Callable[[], None] | None = None,
) -> None:
    """Runs `count` instances against the cluster at `url`, and tells on standard error what those raised that failed.

    Raises ConfigurationError for a program that cannot be run, or a core that does not answer.
    """
    await _check_core(url)
    loop = asyncio.get_running_loop()
    ledger = Ledger(recorder)
    zero_s = time.monotonic()
    starts = starts_at(rate, seed, arrivals)
    free = asyncio.Semaphore(clients or count)

    def clock() -> float:
        return time.monotonic() - zero_s

    def live(account: Account, over: Callable[[], object]) -> None:
        environment.isolate()
        CARRIERS.set(carriers(url, account, ledger, network, clock))
        raised: BaseException | None = None
        try:
            with source.loaded() as function:
                play(function, url, inputs[account.serial % len(inputs)])
        except SystemExit as left:
            raised = left if left.code else None
        except Exception as error:
            raised = error
        ledger.ended(account, clock(), raised)
        with contextlib.suppress(RuntimeError):  # the run was given up meanwhile, and its loop closed
            loop.call_soon_threadsafe(over)

    def begin(serial: int, arrival_s: float) -> asyncio.Future[None]:
        ended: asyncio.Future[None] = loop.create_future()

        def over() -> None:
            free.release()
            if on_ended is not None:
                on_ended()
            if not ended.done():
                ended.set_result(None)

        account = Account(serial, f"{source.name}-{serial}", source.name, arrival_s)
        # Daemons: an interrupted run does not wait for them.
        threading.Thread(target=live, args=(account, over), name=f"instance {serial}", daemon=True).start()
        return ended

    with contextlib.redirect_stdout(sys.stderr), source.importable(), inherited_contexts():
        check_source(source, inputs)
        instances = []
        for serial in range(count):
            await free.acquire()
            arrival_s = next(starts) if clients is None else clock()
            await asyncio.sleep(max(arrival_s - clock(), 0.0))
            instances.append(begin(serial, arrival_s))
        await asyncio.gather(*instances)
    if ledger.failures:
        print(ledger.failures.tell(source.spec, count), file=sys.stderr)


@contextlib.contextmanager
def inherited_contexts() -> Iterator[None]:
    """Threads that a program starts belong to its instance: they begin in the context of who starts them."""
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        thread.run = functools.partial(contextvars.copy_context().run, thread.run)  # type: ignore[method-assign]
        real(thread)

    threading.Thread.start = start  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        threading.Thread.start = real  # type: ignore[method-assign]


async def _check_core(url: str) -> None:
    async with aiohttp.ClientSession() as http:
        try:
            await Api(url, http).call("GET", "/v1/models")
        except Refusal as error:
            raise ConfigurationError(f"no core answers at {url}: {error}") from None
