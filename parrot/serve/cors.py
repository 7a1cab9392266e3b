"""Which pages of other origins a browser may let speak to this server: none unless the configuration names them.

It decides on headers alone. That somebody may ask says nothing of whether they are let in: keys and session tokens do.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from aiohttp import web

from parrot.configuration import ConfigurationError

ANY = "*"
_METHODS = "GET, POST, DELETE"
_HEADERS = "Authorization, Content-Type, Idempotency-Key, X-Parrot-Program, X-Parrot-Tenant"
_EXPOSED = "Retry-After"
_MAX_AGE_S = "600"  # for how long a browser need not ask again


class Cors:
    """The rules of one configuration."""

    def __init__(self, origins: Sequence[str]) -> None:
        """Raises ConfigurationError for what is no origin."""
        for origin in origins:
            parts = urlsplit(origin)
            if origin != ANY and (parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"):
                raise ConfigurationError(
                    f"key 'cors_origins' has {origin!r}; expected are origins as https://example.org, http://host:8080, or *"
                )
        self._any = ANY in origins
        self._origins = frozenset(origin.lower() for origin in origins)

    def allow(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Marks a response for a page that may read it. To be called before its head is sent."""
        if not self._origins:
            return
        if not self._any:
            response.headers["Vary"] = "Origin"
        origin = request.headers.get("Origin")
        if origin is not None and (self._any or origin.lower() in self._origins):
            response.headers["Access-Control-Allow-Origin"] = ANY if self._any else origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED

    def preflight(self, request: web.BaseRequest) -> web.Response | None:
        """The answer to a browser that asks whether its page may ask; None for any other request, and where nobody may."""
        if request.method != "OPTIONS" or not self._origins or "Access-Control-Request-Method" not in request.headers:
            return None
        response = web.Response(status=204)
        origin = request.headers.get("Origin", "")
        if self._any or origin.lower() in self._origins:
            asked = request.headers.get("Access-Control-Request-Headers", "")
            response.headers["Access-Control-Allow-Methods"] = _METHODS
            response.headers["Access-Control-Allow-Headers"] = asked if _are_names(asked) else _HEADERS
            response.headers["Access-Control-Max-Age"] = _MAX_AGE_S
        return response


def _are_names(headers: str) -> bool:
    """Names of headers, as a browser lists them; clients send some of their own (x-stainless-…)."""
    return bool(headers) and len(headers) < 2048 and all(name.strip().replace("-", "").isalnum() for name in headers.split(","))
