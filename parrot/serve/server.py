"""A whole ServeCore on the network: the core, its shell and its routes put together, from first bind to clean stop.

It decides what is listened to, and when. It is what the command, the tests and the simulator's real backends start.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import web

from parrot.configuration import ConfigurationError
from parrot.protocol.errors import ErrorInfo
from parrot.serve.api_routes import ApiRoutes
from parrot.serve.asking import Stores
from parrot.serve.config import ServeCoreConfig
from parrot.serve.connections import HttpServer, Limits
from parrot.serve.core import ServeCore
from parrot.serve.cors import Cors
from parrot.serve.credentials import Credentials
from parrot.serve.debug_routes import DebugRoutes
from parrot.serve.engine_links import EngineLinks
from parrot.serve.engine_routes import EngineRoutes
from parrot.serve.events import Restarted
from parrot.serve.keys import Keys
from parrot.serve.ledger import Ledger, Past
from parrot.serve.openai_routes import OpenAIRoutes
from parrot.serve.recovery import RecoveryError, recover, restore
from parrot.serve.routing import Routes
from parrot.serve.served_models import ServedModels
from parrot.serve.shell import Shell
from parrot.serve.streams import OutputStreams
from parrot.serve.texts import Texts
from parrot.serve.tokenization import Tokenization, Tokenizer
from parrot.serve.wire import answer
from parrot.tls import client_context, server_context

if TYPE_CHECKING:
    from parrot.serve.journal import Journal

_log = logging.getLogger(__name__)
#: A name such as localhost may have an address of a family that this machine does not run.
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_STOP_S = 2.0  # how long open connections may take to end


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`. Imported late: the libraries behind it are large."""
    from parrot.tokenizer import load_tokenizer as load

    return load(name)


class Server:
    """One ServeCore behind HTTP. Make it with a running loop, then `start`, and in the end `stop`.

    With a journal it goes on where its last life ended. Raises ConfigurationError, which says what is wrong with it.
    """

    def __init__(self, config: ServeCoreConfig, *, load: Callable[[str], Tokenizer] = load_tokenizer) -> None:
        self._config = config
        keys = Keys(config.tenants)
        self._cors = Cors(config.cors_origins)
        self._tls = server_context(config.ssl_certfile, config.ssl_keyfile)
        trust = None if config.engine_ca_file is None else client_context(config.engine_ca_file, "engine_ca_file")
        texts = Texts()
        streams = OutputStreams()
        self._journal, past = _open_journal(config)
        try:
            self.core = _recovered(config, past, texts, streams)
            if self._journal is not None:
                self._journal.begin(self.core.epoch, past.now, config)
            credentials = Credentials(config.engine_secret, f"{config.journal_path}.key" if self._journal is not None else None)
        except BaseException:
            if self._journal is not None:
                self._journal.close()
            raise
        self._tokenization = Tokenization(texts, load)
        self.links = EngineLinks(
            texts, self._tokenization, streams, config.engine_heartbeat_timeout, config.engine_stall_timeout, trust
        )
        ledger = Ledger(config.journal_mode, texts, past) if self._journal is not None else None
        self.shell = Shell(self.core, self.links, self._journal, ledger, past.now)
        self.links.attach(self.shell)
        if past.epoch:
            self.shell.post(Restarted(self.core.epoch))
            counts = self.core.counts()
            _log.info(
                "life %d goes on with %d sessions, %d tasks in the queue", self.core.epoch, counts["sessions"], counts["queue"]
            )
        wait_s = config.reader_timeout
        tools = (texts, self._tokenization, streams, credentials)
        api = ApiRoutes(self.shell, self.core.models, *tools, keys=keys, reader_timeout_s=wait_s)
        stores = Stores(self.shell, texts, streams, credentials)
        served = ServedModels(lambda: self.core.engines, self._tokenization)
        openai = OpenAIRoutes(stores, served, self.core.models, self._tokenization, keys, wait_s)
        engines = EngineRoutes(self.links, credentials)
        debug = DebugRoutes(self.core.placements, credentials)
        paths = {**api.paths(), **engines.paths(), **debug.paths(), "/health": {"GET": self._health}}
        self._routes = Routes(paths, openai.paths())
        self._runner: web.ServerRunner | None = None

    async def start(self) -> list[tuple[str, int]]:
        """Listens; returns the addresses. Raises ConfigurationError when that is not possible. Port 0 is any free one."""
        try:
            sockets = _listen(self._config.host, self._config.port)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigurationError(f"cannot listen on {self._config.host}:{self._config.port}: {reason}") from error
        config = self._config
        limits = Limits(config.header_timeout, config.body_timeout, config.max_body_bytes, self._cors)
        self._runner = web.ServerRunner(HttpServer(self._handle, limits), shutdown_timeout=_STOP_S)
        await self._runner.setup()
        for each in sockets:
            await web.SockSite(self._runner, each, backlog=1024, ssl_context=self._tls).start()
        return [each.getsockname()[:2] for each in sockets]

    async def stop(self) -> None:
        """Stops accepting, answers who waits, aborts running tasks, closes everything."""
        if self._runner is not None:
            for site in list(self._runner.sites):
                await site.stop()
        self.shell.close()
        await asyncio.sleep(0)
        await self.links.close()
        if self._runner is not None:
            await self._runner.cleanup()
        self._tokenization.close()
        if self._journal is not None:
            self._journal.close()

    @property
    def scheme(self) -> str:
        """http, or https where it shows a certificate."""
        return "http" if self._tls is None else "https"

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request comes through here."""
        preflight = self._cors.preflight(request)
        if preflight is not None:
            return preflight
        limit_s = self._config.request_timeout
        if limit_s is None:
            return await self._routes.handle(request)
        try:
            async with asyncio.timeout(limit_s):
                return await self._routes.handle(request)
        except TimeoutError:
            if request.writer.output_size > 0:  # a stream: all that is left is to break it
                raise ConnectionResetError(f"the answer took more than {limit_s:g} s") from None
            late = ErrorInfo("request_timeout", f"not answered within {limit_s:g} s, the server's request_timeout")
            return self._routes.refuse(request, late)

    async def _health(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """GET /health: for scripts that wait for the cluster."""
        return answer({"status": "ok", "engines": len(self.links)})


def _open_journal(config: ServeCoreConfig) -> tuple[Journal | None, Past]:
    """The journal that the configuration names, and what it holds of the lives before."""
    if not config.journal_path:  # None, or left out
        return None, Past()
    from parrot.serve.journal import Journal  # imported late: not every core has one

    journal = Journal.open(config.journal_path, config.journal_mode, sync=config.journal_sync)
    for note in journal.notes:
        _log.warning("%s", note)
    past, journal.past = journal.past, Past()
    return journal, past


def _recovered(config: ServeCoreConfig, past: Past, texts: Texts, streams: OutputStreams) -> ServeCore:
    gc.disable()  # all of it stays: looking for garbage meanwhile would take as long again
    try:
        core = recover(config, past, past.epoch + 1 if config.journal_path else 0)
        restore(past, texts, streams)
    except RecoveryError as error:
        raise ConfigurationError(
            f"journal {config.journal_path!r} contradicts itself: {error}; what is whole in it can be saved with "
            f"`python3 -m parrot.serve.journal salvage {config.journal_path} NEW`"
        ) from error
    finally:
        gc.enable()
    return core


def _listen(host: str, port: int) -> list[socket.socket]:
    """Bound sockets, one for each address of `host` that this machine has. Raises OSError when none can be bound."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    bound: list[socket.socket] = []
    missing: OSError | None = None
    for family, address in addresses:
        if bound and port == 0:  # every family has the port that the first was given
            address = (address[0], bound[0].getsockname()[1], *address[2:])
        try:
            each = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            missing = error
            continue
        try:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            each.bind(address)
            each.listen(1024)
            bound.append(each)
        except OSError as error:
            each.close()
            if error.errno in _ABSENT:
                missing = error
                continue
            for other in bound:
                other.close()
            raise
    if not bound:
        raise missing or OSError(f"{host!r} has no address")
    return bound
