"""Reads a journal for tools (`sim.replay`, workloads): its lives, its rows, and what each life found. It changes nothing."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from parrot.serve import journal_files as files
from parrot.serve.config import ServeCoreConfig
from parrot.serve.journal_files import Damaged, JournalError
from parrot.serve.ledger import Mode, Past, Row, StoredText


class Life(NamedTuple):
    """One run of a core. `instant`: the first that it may have used; `t`: seconds of the core's clock as it began."""

    epoch: int
    instant: int
    t: float
    config: ServeCoreConfig


class EndedAt(NamedTuple):
    """A session that is over. `instant`: the last one written when it ended; `t`: seconds of the core's clock."""

    session: int
    state: str
    instant: int
    t: float


class Reading:
    """One moment of a journal, live or not, for tools: it takes no lock and changes nothing. Close it, or use `with`."""

    def __init__(self, path: str | Path) -> None:
        """Raises JournalError."""
        self.path = Path(path).resolve()
        if not self.path.is_file():
            raise JournalError(f"{path}: no such journal")
        try:
            self._db = files.connect(self.path, writable=False)
        except sqlite3.DatabaseError as error:
            raise self._broken(files.explained(self.path, error)) from error
        try:
            self._db.execute("BEGIN")
            with self._told():
                mode = files.identify(self._db, self.path)
                if mode is None:
                    raise JournalError(f"{path}: not a journal: it is empty")
                self.mode: Mode = mode
                self.lives: list[Life] = [
                    Life(epoch, instant, t, msgspec.json.decode(config, type=ServeCoreConfig))
                    for epoch, instant, t, config, _, _ in files.checked(self._db, "life", "")
                ]
                ended = [EndedAt(*stored[1:5]) for stored in files.checked(self._db, "ended", "")]
                self.ended: list[EndedAt] = ended
        except BaseException:
            self._db.close()
            raise

    def rows(self, begin: int = 0, end: int | None = None) -> Iterator[Row]:
        """The rows of the instants `begin` … `end` - 1 (None: to the last), in order. Raises JournalError."""
        low, high = files.place_of(begin), files.NO_END if end is None else files.place_of(end)
        with self._told():
            for stored in files.checked(self._db, "row", "WHERE place >= ?1 AND place < ?2", low, high):
                yield files.row_of(stored)

    def texts(self) -> Iterator[StoredText]:
        """All texts that the journal still has. Raises JournalError."""
        with self._told():
            for stored in files.checked(self._db, "text", ""):
                yield files.text_of(stored)

    def past(self, before_instant: int | None = None) -> Past:
        """What an opening before that instant found (None: what one would find now). Raises JournalError."""
        if before_instant is not None and self.mode != "record":
            raise JournalError(f"{self.path}: mode {self.mode!r} keeps no past but the last; record a run with 'record'")
        with self._told():
            return files.load(self._db, before_instant, whole=False)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (Damaged, sqlite3.DatabaseError, msgspec.DecodeError) as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> JournalError:
        if isinstance(error, JournalError):
            return error
        return JournalError(f"{self.path}: damaged: {error}: `python3 -m parrot.serve.journal check {self.path}` says more")


def read(path: str | Path) -> Reading:
    """Opens a journal for reading. Raises JournalError."""
    return Reading(path)
