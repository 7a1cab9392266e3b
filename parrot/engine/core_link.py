"""Keeps an engine known to its core: registers, sends heartbeats, registers again when the core has lost it.

Runs beside the work and never stops it: a core that cannot be reached is tried again for ever. An engine whose loop stands
still (a device that hangs) goes on sending heartbeats, which say so; once the core has given it up, it registers again only
when its loop moves, for it would take tasks and never end them. Each change of state is logged once.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable

import aiohttp
import msgspec

from parrot.engine.context_ids import ContextIds
from parrot.engine.tasks import Tasks
from parrot.protocol.engine import EngineDescription, HeartbeatRequest, RegisterAnswer, RegisterRequest, RuntimeInfo
from parrot.protocol.errors import ErrorBody

log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0
REQUEST_TIMEOUT_S = 10.0
#: An engine that has done nothing for so long, with work before it, takes on no new work.
STALLED_S = 1.0

_encode = msgspec.json.Encoder().encode
_ANSWER = msgspec.json.Decoder(RegisterAnswer)
_ERROR = msgspec.json.Decoder(ErrorBody)


class CoreLink:
    """One engine's connection to the core at `url`."""

    def __init__(
        self,
        url: str,
        description: EngineDescription,
        instance: str,
        tasks: Tasks,
        context_ids: ContextIds,
        runtime_info: Callable[[], RuntimeInfo],
        *,
        heartbeat_interval_s: float,
        secret: str | None = None,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        """`trust`: whose certificates of the core it believes (None: the system's authorities')."""
        self._url = url
        self._description = description
        self._instance = instance
        self._tasks = tasks
        self._context_ids = context_ids
        self._runtime_info = runtime_info
        self._interval_s = heartbeat_interval_s
        self._secret = secret
        self._trust = trust
        self._state = ""
        self.registered = asyncio.Event()  #: set while the core knows this engine

    async def run(self) -> None:
        """Until it is cancelled."""
        connector = aiohttp.TCPConnector(ssl=self._trust if self._trust is not None else True)
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while True:
                engine_id = await self._register(session)
                self.registered.set()
                await self._beat(session, engine_id)
                self.registered.clear()
                # Before the new registration: tasks that it brings may come before its answer.
                self._tasks.forget("the core no longer knows this engine")

    async def _register(self, session: aiohttp.ClientSession) -> int:
        body = _encode(RegisterRequest(self._description, self._instance, self._secret))
        wait_s = FIRST_WAIT_S
        while True:
            while self._runtime_info().stalled_s >= STALLED_S:
                self._say("its loop stands still; registering when it has ended its iteration", True)
                await asyncio.sleep(FIRST_WAIT_S)
            try:
                status, answer = await self._post(session, "/register_engine", body)
                if status == 200:
                    registration = _ANSWER.decode(answer)
                    self._tasks.registered(registration.epoch, registration.engine_id)
                    self._say(f"registered at {self._url} as engine {registration.engine_id} (epoch {registration.epoch})")
                    return registration.engine_id
                self._say(f"{self._url} refuses to register {self._description.engine_name!r}: {_reason(status, answer)}", True)
            except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
                self._say(f"cannot register at {self._url}: {_short(error)}; trying again until it can", True)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    async def _beat(self, session: aiohttp.ClientSession, engine_id: int) -> None:
        """Sends heartbeats until the core answers that it does not know this engine."""
        name = self._description.engine_name
        while True:
            await asyncio.sleep(self._interval_s)
            evicted = self._context_ids.take_evicted()
            beat = HeartbeatRequest(engine_id, name, self._runtime_info(), evicted, self._secret, self._instance)
            try:
                status, answer = await self._post(session, "/engine_heartbeat", _encode(beat))
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self._context_ids.keep_evicted(evicted)
                self._say(f"no answer to a heartbeat from {self._url}: {_short(error)}", True)
                continue
            if status == 404:
                self._say(f"{self._url} no longer knows engine {engine_id}; registering again", True)
                return
            if status == 200:
                self._say(f"heartbeats reach {self._url}")
            else:
                self._context_ids.keep_evicted(evicted)
                self._say(f"{self._url} refuses a heartbeat: {_reason(status, answer)}", True)

    async def _post(self, session: aiohttp.ClientSession, path: str, body: bytes) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"}
        async with session.post(self._url + path, data=body, headers=headers) as response:
            return response.status, await response.read()

    def _say(self, state: str, warn: bool = False) -> None:
        if state != self._state:
            self._state = state
            log.log(logging.WARNING if warn else logging.INFO, "%s: %s", self._description.engine_name, state)


def _reason(status: int, answer: bytes) -> str:
    try:
        error = _ERROR.decode(answer).error
    except msgspec.DecodeError:
        return f"status {status}"
    return f"{error.code}: {error.message}"


def _short(error: BaseException) -> str:
    return str(error) or type(error).__name__
