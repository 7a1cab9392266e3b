"""TLS from certificate files: what a server of this project shows, and whom a client of it trusts.

Whatever is wrong with a file is told in one line, when the process starts; a key that asks for a password is refused, for
nobody is there to type it.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from parrot.configuration import ConfigurationError


def server_context(certfile: str | None, keyfile: str | None) -> ssl.SSLContext | None:
    """What a server with these PEM files speaks: TLS 1.2 and later; None without files, for plain HTTP.

    `certfile`: the certificate, with those between it and its authority behind it. Raises ConfigurationError.
    """
    if certfile is None and keyfile is None:
        return None
    if certfile is None or keyfile is None:
        missing, given = ("ssl_certfile", "ssl_keyfile") if certfile is None else ("ssl_keyfile", "ssl_certfile")
        raise ConfigurationError(f"missing key {missing!r}: {given} is given, and TLS needs both")
    for name, path in (("ssl_certfile", certfile), ("ssl_keyfile", keyfile)):
        _check_readable(name, path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certfile, keyfile, password=_refuse_password)
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        if reason == "KEY_VALUES_MISMATCH":
            reason = "the key is not the certificate's"
        raise ConfigurationError(
            f"ssl_certfile {certfile!r} and ssl_keyfile {keyfile!r} cannot be used: {reason}; expected are PEM files"
        ) from None
    except _PasswordWanted:
        raise ConfigurationError(f"ssl_keyfile {keyfile!r} is encrypted; expected is a key without a password") from None
    return context


def client_context(ca_file: str | None, key: str = "ca_file") -> ssl.SSLContext:
    """Whom a client trusts: the authorities in the PEM file `ca_file`, or those of the system. The name is verified too.

    `key`: what the file's key is called in the configuration. Raises ConfigurationError.
    """
    if ca_file is None:
        return ssl.create_default_context()
    _check_readable(key, ca_file)
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise ConfigurationError(
            f"{key} {ca_file!r} cannot be used: {error.reason or error}; expected is a PEM file of certificates"
        ) from None


class _PasswordWanted(Exception):
    """The key file is encrypted."""


def _refuse_password() -> str:
    raise _PasswordWanted


def _check_readable(name: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigurationError(f"{name} {path!r} cannot be read: {error.strerror}") from None
