"""Where an engine listens, and the address under which its core reaches it. Opens sockets; serves nothing."""

from __future__ import annotations

import errno
import logging
import socket

from parrot.configuration import ConfigurationError

log = logging.getLogger(__name__)

BACKLOG = 1024
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for every address of `host`, all with the same port (0: a free one is chosen).

    Raises ConfigurationError when the port is in use or the host is none of this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"host {host!r} cannot be resolved: {error}") from error
    # IPv4 first: it is there everywhere, and a missing IPv6 must not hinder a start.
    addresses = sorted({(family, address[0]) for family, _, _, _, address in found}, key=lambda a: a[0] != socket.AF_INET)
    sockets: list[socket.socket] = []
    for family, address in addresses:
        try:
            sockets.append(_listen(family, str(address), port or (sockets[0].getsockname()[1] if sockets else 0)))
        except OSError as error:
            if sockets and (error.errno != errno.EADDRINUSE or not port):  # an address family that is not there
                continue
            for opened in sockets:
                opened.close()
            reason = f"{host}:{port} cannot be listened on: {error.strerror}"
            raise ConfigurationError(f"{reason}; choose another with --port (0: any free one)") from error
    return sockets


def _listen(family: int, address: str, port: int) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind((address, port))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


def reachable(host: str, core_host: str) -> str:
    """The address under which the core reaches an engine that listens on `host`."""
    if host not in ("0.0.0.0", "::", ""):
        if host in LOOPBACK and core_host not in LOOPBACK:
            log.warning("this engine listens on %s, where the core at %s cannot reach it; use --host 0.0.0.0", host, core_host)
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((core_host, 9))  # sends nothing: only asks which of our addresses leads there
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
