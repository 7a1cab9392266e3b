"""Session ids and auth tokens, and the comparison of shared secrets. Nothing here is kept: tokens are computed again.

A session's auth is a keyed hash of its id, so that a repeated open can be answered with the same token while only the
token's hash is ever stored. The key is drawn once a process and never leaves it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from parrot.protocol.errors import ParrotError

_ID_BITS = 53  # what JSON numbers hold exactly everywhere


class Credentials:
    """Makes ids and tokens for the sessions of one process."""

    def __init__(self, engine_secret: str | None = None) -> None:
        self._key = secrets.token_bytes(32)
        self._engine_secret = engine_secret

    def new_session_id(self) -> int:
        """An id that tells nothing of any other."""
        return secrets.randbits(_ID_BITS - 1) + 1

    def auth(self, session_id: int) -> str:
        """The token that opens this session."""
        return hmac.new(self._key, b"session:%d" % session_id, hashlib.sha256).hexdigest()

    def check_engine(self, secret: str | None) -> None:
        """Raises `unauthorized` without, `forbidden` with a wrong cluster secret, when one is configured."""
        if self._engine_secret is None:
            return
        if secret is None:
            raise ParrotError("unauthorized", "this core has an engine_secret; the engine must send it as `secret`")
        if not hmac.compare_digest(secret.encode(), self._engine_secret.encode()):
            raise ParrotError("forbidden", "the engine's secret is not this core's engine_secret")


def hashed(token: str | None) -> str | None:
    """What events carry instead of a token."""
    return None if token is None else hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
