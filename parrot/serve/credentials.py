"""Session ids and auth tokens, and the comparison of shared secrets. Nothing here is kept: tokens are computed again.

A session's auth is a keyed hash of its id, so that a repeated open can be answered with the same token while only the
token's hash is ever in the journal. The key is drawn once; with a journal it lies in a file of its own beside it, so that
a repeated open is answered alike after a restart, and a journal that is passed on opens nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets

from parrot.configuration import ConfigurationError
from parrot.protocol.errors import ParrotError

_ID_BITS = 53  # what JSON numbers hold exactly everywhere
_KEY_BYTES = 32


class Credentials:
    """Makes ids and tokens for the sessions of one process, or of all processes with the same `key_file`."""

    def __init__(self, engine_secret: str | None = None, key_file: str | None = None) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES) if key_file is None else _kept_key(key_file)
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
            raise ParrotError("unauthorized", "this core has an engine_secret, which must be sent as `secret`")
        if not hmac.compare_digest(secret.encode(), self._engine_secret.encode()):
            raise ParrotError("forbidden", "the secret is not this core's engine_secret")


def _kept_key(path: str) -> bytes:
    """The key in `path`, drawn and written when it is not there. Raises ConfigurationError."""
    try:
        with open(path, "rb") as file:
            key = file.read()
        if len(key) != _KEY_BYTES:
            raise ConfigurationError(f"key file {path!r} has {len(key)} bytes, expected {_KEY_BYTES}; remove it to begin anew")
        return key
    except FileNotFoundError:
        key = secrets.token_bytes(_KEY_BYTES)
    except OSError as error:
        raise ConfigurationError(f"key file {path!r} cannot be read: {error.strerror}") from error
    try:
        descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(key)
        os.replace(f"{path}.new", path)  # whole or not at all
    except OSError as error:
        raise ConfigurationError(f"key file {path!r} cannot be written: {error.strerror}") from error
    return key


def hashed(token: str | None) -> str | None:
    """What events carry instead of a token."""
    return None if token is None else hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
