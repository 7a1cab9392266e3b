"""What an operator asks the core: GET /v1/debug/placements. Behind the cluster's secret where there is one, as engines'
requests are, because it shows the sessions of all tenants; it shows no texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from parrot.serve.credentials import Credentials
from parrot.serve.explanations import PlacementsAnswer
from parrot.serve.routing import Paths
from parrot.serve.wire import answer, arguments, body_of


class _Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of GET /v1/debug/placements."""

    limit: Annotated[int, Meta(ge=1)] = 100
    session_id: int | None = None
    secret: str | None = None


class DebugRoutes:
    """The handlers. `placements(most, session_id)` is the core's."""

    def __init__(self, placements: Callable[[int, int | None], PlacementsAnswer], credentials: Credentials) -> None:
        self._placements = placements
        self._credentials = credentials

    def paths(self) -> Paths:
        """Which of them has which path."""
        return {"/v1/debug/placements": {"GET": self.placements}}

    async def placements(self, request: web.BaseRequest, _: str, query: str) -> web.StreamResponse:
        """GET /v1/debug/placements"""
        args = arguments(query, await body_of(request), _Query)
        self._credentials.check_engine(args.secret)
        return answer(self._placements(args.limit, args.session_id))
