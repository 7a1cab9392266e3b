"""What engines ask of the core: POST /register_engine and POST /engine_heartbeat; both behind the cluster's secret."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from parrot.protocol.engine import HeartbeatRequest, RegisterRequest
from parrot.serve.credentials import Credentials
from parrot.serve.engine_links import EngineLinks
from parrot.serve.routing import Paths
from parrot.serve.wire import answer, body_of, decoded

#: Where an engine that listens everywhere says it is; it is reached where it called from.
_ANYWHERE = ("", "0.0.0.0", "::")
_EMPTY: dict[str, Any] = {}


class EngineRoutes:
    """The handlers; each takes the request, its path's last part and its raw query."""

    def __init__(self, links: EngineLinks, credentials: Credentials) -> None:
        self._links = links
        self._credentials = credentials

    def paths(self) -> Paths:
        """Which of them has which path."""
        return {"/register_engine": {"POST": self.register}, "/engine_heartbeat": {"POST": self.heartbeat}}

    async def register(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """POST /register_engine"""
        body = decoded(await body_of(request), RegisterRequest)
        self._credentials.check_engine(body.secret)
        description = body.engine_config
        if description.host in _ANYWHERE and request.remote:
            description = msgspec.structs.replace(description, host=request.remote)
        return answer(await self._links.register(description, body.instance))

    async def heartbeat(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """POST /engine_heartbeat"""
        body = decoded(await body_of(request), HeartbeatRequest)
        self._credentials.check_engine(body.secret)
        self._links.heartbeat(body.engine_id, body.evicted, body.instance, body.runtime_info.stalled_s)
        return answer(_EMPTY)
