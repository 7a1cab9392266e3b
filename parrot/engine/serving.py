"""Serves an engine whose loop runs: its HTTP server, and its link to the core. It knows nothing of what computes behind it."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web

from parrot.engine.config import EngineConfig, secret_of
from parrot.engine.context_ids import ContextIds
from parrot.engine.core_link import CoreLink
from parrot.engine.listening import bind, reachable
from parrot.engine.loop import EngineLoop
from parrot.engine.openai_routes import OpenAIRoutes
from parrot.engine.primitives import Primitives
from parrot.engine.server import EngineServer, connections_log
from parrot.engine.tasks import Tasks
from parrot.protocol.engine import EngineDescription
from parrot.tls import client_context, server_context
from parrot.tokenizer import Tokenizer

#: How long running responses get to write their last event when an engine stops.
STOP_S = 2.0


@dataclass
class RunningEngine:
    """An engine that serves. `close` ends its tasks with `unavailable`, then its server."""

    description: EngineDescription
    loop: EngineLoop
    link: CoreLink | None
    _link_task: asyncio.Task[None] | None
    _runner: web.AppRunner

    @property
    def port(self) -> int:
        return self.description.port

    @property
    def url(self) -> str:
        host, scheme = self.description.host, "https" if self.description.tls else "http"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"

    async def close(self) -> None:
        if self._link_task is not None:
            self._link_task.cancel()
            await asyncio.gather(self._link_task, return_exceptions=True)
        for site in list(self._runner.sites):
            await site.stop()
        await self.loop.close("the engine is shutting down")
        await self._runner.cleanup()


async def serve(
    config: EngineConfig,
    description: EngineDescription,
    loop: EngineLoop,
    tokenizer: Tokenizer,
    sockets: Sequence[socket.socket] | None,
    with_core: bool,
) -> RunningEngine:
    """The server of an engine whose `loop` runs, on `sockets` (None: those that the configuration says), and its link."""
    tls = server_context(config.ssl_certfile, config.ssl_keyfile)
    core = config.serve_core
    trust = client_context(core.ca_file, "serve_core.ca_file") if with_core and core.tls else None
    if sockets is None:
        sockets = bind(config.host, config.port)
    port = int(sockets[0].getsockname()[1])
    description = msgspec.structs.replace(description, host=reachable(config.host, core.host), port=port)
    context_ids = ContextIds()
    instance = secrets.token_hex(16)
    tasks = Tasks(loop, tokenizer, context_ids, instance)
    loop.on_evicted = tasks.note_evicted
    takes_text = description.engine_type == "openai"
    openai = OpenAIRoutes(loop, tokenizer, context_ids, description)
    app = EngineServer(loop, tasks, Primitives(loop, tokenizer, context_ids, takes_text), openai).application()
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, logger=connections_log, shutdown_timeout=STOP_S)
    await runner.setup()
    for listening in sockets:
        await web.SockSite(runner, listening, ssl_context=tls).start()
    link = link_task = None
    if with_core:
        link = CoreLink(
            core.url,
            description,
            instance,
            tasks,
            context_ids,
            loop.runtime_info,
            heartbeat_interval_s=config.heartbeat_interval,
            secret=secret_of(config),
            trust=trust,
        )
        link_task = asyncio.create_task(link.run(), name=f"link of {description.engine_name}")
    return RunningEngine(description, loop, link, link_task, runner)
