"""From a request to its handler, and from what a handler raises to a refusal: the same wherever requests come from.

It decides which handler a path has. It knows no sockets: a simulated core is asked through it too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import unquote

from aiohttp import web

from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.serve.wire import openai_refusal, refusal

#: Takes the request, its path's last part and its raw query.
Handler = Callable[[web.BaseRequest, str, str], Awaitable[web.StreamResponse]]
#: Path -> method -> handler. A path that ends in a slash stands for one more part behind it, one that ends in /* for all that
#: is behind it, slashes included.
Paths = Mapping[str, Mapping[str, Handler]]

_log = logging.getLogger(__name__)


class Routes:
    """The handlers of `paths`; those of `openai` refuse in OpenAI's form."""

    def __init__(self, paths: Paths, openai: Paths | None = None) -> None:
        self._openai = openai or {}
        self._paths = {**paths, **self._openai}

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request comes through here; so does every refusal."""
        try:
            handler, tail, query = self._find(request.method, request.raw_path)
            return await handler(request, tail, query)
        except ParrotError as error:
            return self.refuse(request, error.info)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return self.refuse(request, ErrorInfo("internal", "an error inside the server; its log has the details"))

    def refuse(self, request: web.BaseRequest, error: ErrorInfo) -> web.StreamResponse:
        """The answer to a request that comes to nothing, in the form of its path."""
        path = request.raw_path.partition("?")[0]
        return openai_refusal(error) if self._match(self._openai, path)[0] is not None else refusal(error)

    @staticmethod
    def _match(paths: Paths, path: str) -> tuple[Mapping[str, Handler] | None, str]:
        """The methods of a path, and its variable part."""
        methods = paths.get(path) if path[-1:] != "/" else None
        if methods is not None:
            return methods, ""
        head, _, tail = path.rpartition("/")
        if tail and (methods := paths.get(head + "/")) is not None:
            return methods, tail
        while tail and head:
            if (methods := paths.get(head + "/*")) is not None:
                return methods, tail
            head, _, part = head.rpartition("/")
            tail = f"{part}/{tail}"
        return None, ""

    def _find(self, method: str, target: str) -> tuple[Handler, str, str]:
        """The handler of a path, the path's variable part, and the raw query."""
        if not target.isascii():
            raise ParrotError("bad_request", "the path has characters that are not percent-encoded")
        path, _, query = target.partition("?")
        methods, tail = self._match(self._paths, path)
        if methods is None:
            raise ParrotError("not_found", f"there is no path {path!r}")
        handler = methods.get(method)
        if handler is None:
            allowed = ", ".join(methods)
            raise ParrotError("method_not_allowed", f"{path!r} has no method {method}; it has {allowed}", allowed=list(methods))
        return handler, unquote(tail) if "%" in tail else tail, query
