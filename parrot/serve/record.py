"""Writes what a core was told, one JSON line an instant (docs/record.md): times, events, keys and lengths; never a text.

It decides nothing. Lines are written in the order of the instants; a disk that fails ends the record, not the server.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from parrot.configuration import ConfigurationError
from parrot.serve.config import ServeCoreConfig
from parrot.serve.events import AnyEvent

VERSION = 1
_log = logging.getLogger(__name__)


class Instant(msgspec.Struct, frozen=True):
    """One line behind the header: the events of one instant, in order. `t`: the core's clock, seconds."""

    t: float
    events: list[AnyEvent]


class Header(msgspec.Struct, frozen=True):
    """The first line. `config` has no secret in it."""

    record: int
    epoch: int
    config: ServeCoreConfig


class Recorder:
    """An open record. Raises ConfigurationError when `path` cannot be written."""

    def __init__(self, path: str | Path, config: ServeCoreConfig, epoch: int = 0) -> None:
        self._path = path
        self._encoder = msgspec.json.Encoder()
        try:
            # For the owner's eyes: it names sessions, variables and engines.
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        except OSError as error:
            raise ConfigurationError(f"record_path {str(path)!r} cannot be written: {error.strerror}") from error
        self._file = open(descriptor, "wb", buffering=256 * 1024)  # noqa: SIM115 - closed by close()
        self._broken = False
        shown = msgspec.structs.replace(config, engine_secret=None)
        self._put(self._encoder.encode(Header(VERSION, epoch, shown)))
        self.flush()

    def write(self, now: float, events: Sequence[AnyEvent]) -> None:
        """Adds an instant."""
        self._put(self._encoder.encode({"t": now, "events": events}))

    def flush(self) -> None:
        """Hands all lines so far to the operating system."""
        if not self._broken:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        try:
            self._file.close()
        except OSError:
            self._broken = True

    def _put(self, line: bytes) -> None:
        if not self._broken:
            try:
                self._file.write(line + b"\n")
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._broken = True
        _log.error("record %s ends here, the server goes on: %s", self._path, error)
