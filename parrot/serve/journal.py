"""The journal's store: takes a core's entries in order, commits them on a thread of its own, says when they are safe.

    python3 -m parrot.serve.journal check JOURNAL          what it holds, and whether it is sound
    python3 -m parrot.serve.journal salvage JOURNAL NEW    every whole session of a damaged one, in a new one

It decides what makes up a transaction (all that has come since the last one), when a failed one is tried again, and
whether a journal may be used at all. It never decides what is kept (`ledger.py`) and it never blocks the event loop: a
disk that hangs or is full keeps those waiting who wait for a promise, and nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import queue
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

from parrot.protocol.errors import ErrorInfo
from parrot.serve import journal_damage, journal_salvage
from parrot.serve import journal_files as files
from parrot.serve.config import ServeCoreConfig
from parrot.serve.journal_files import JournalError, Lock, sealed
from parrot.serve.journal_reader import Life, Reading, read
from parrot.serve.journal_writer import Writer
from parrot.serve.ledger import Entry, Mode, Past

__all__ = ["Journal", "JournalError", "Life", "Reading", "read"]

_log = logging.getLogger(__name__)

_RETRY_S = 0.5
#: A commit that takes longer than this counts as failing until it ends: the disk hangs.
_HANGS_S = 5.0
_CLOSE_S = 30.0
_MAX_ENTRIES = 4096  # of one transaction: what a retry writes again and again on a full disk

Callback = Callable[[ErrorInfo | None], None]


class _Attempt(msgspec.Struct, frozen=True):
    """How an attempt to commit ended. `committed`, `seen`: entries, counted from the start."""

    committed: int
    seen: int
    error: ErrorInfo | None


class Journal:
    """One core's journal. All methods are for the thread of the event loop."""

    def __init__(self, path: Path, db: sqlite3.Connection, lock: Lock, mode: Mode, past: Past, notes: list[str]) -> None:
        """For `open`."""
        self.path = path
        self.mode = mode
        self.past = past
        self.notes = notes
        self._db = db
        self._lock = lock
        self._first_instant = past.next_instant
        self._writer = Writer(db, mode, past.next_instant)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._attempts: deque[_Attempt] = deque()  # what the thread has to tell
        self._began_s = 0.0  # when the attempt under way began; 0: there is none
        self._appended = 0
        self._committed = 0
        self._waiting: deque[tuple[int, Callback]] = deque()
        self._failing: ErrorInfo | None = None
        self._closed = False

    @classmethod
    def open(cls, path: str | Path, mode: Mode, *, sync: Literal["normal", "full"] = "normal") -> Journal:
        """Takes the lock, looks at every row, loads `past`. Raises ConfigurationError: one line that names the path."""
        path = Path(path).resolve()
        if path.is_dir():
            raise JournalError(f"{path}: is a directory: journal_path must name a file")
        lock = Lock(path)
        try:
            db, past, notes = _opened(path, mode, sync)
            try:
                journal = cls(path, db, lock, mode, past, notes)
            except BaseException:
                db.close()
                raise
        except BaseException as error:
            lock.release()
            if isinstance(error, sqlite3.Error):
                raise JournalError(f"{path}: cannot be opened: {error}: look at its permissions and its disk") from error
            raise
        return journal

    def begin(self, epoch: int, now: float, config: ServeCoreConfig) -> None:
        """A new life, before anything is appended; it is on the disk when this returns. Raises ConfigurationError."""
        # Neither the cluster's secret nor what keys can be checked against: a journal is passed on.
        tenants = {name: msgspec.structs.replace(tenant, api_keys=()) for name, tenant in config.tenants.items()}
        shown = msgspec.json.encode(msgspec.structs.replace(config, engine_secret=None, tenants=tenants)).decode()
        life = sealed(epoch, self._first_instant, float(now) + 0.0, shown, _versions())
        db = self._db
        (sync,) = db.execute("PRAGMA synchronous").fetchone()
        try:
            db.execute("PRAGMA synchronous = FULL")  # an epoch must not be used twice, not even after a power failure
            db.execute("BEGIN IMMEDIATE")
            if self.mode == "recover":
                db.execute("DELETE FROM life WHERE epoch < ?", (epoch,))
            db.execute(f"INSERT INTO life({files.COLUMNS['life']}, crc) VALUES (?, ?, ?, ?, ?, ?)", life)
            db.execute("COMMIT")
        except sqlite3.Error as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise JournalError(f"{self.path}: life {epoch} cannot be written: {error}: make room on its disk") from error
        finally:
            db.execute(f"PRAGMA synchronous = {sync}")

    def append(self, entry: Entry) -> None:
        """Hands over what an instant adds; never blocks, never raises. Nothing is taken any more after `close`."""
        if not entry or self._closed:
            return
        if self._thread is None:
            self._start()
        self._appended += 1
        self._queue.put(entry)

    def after_commit(self, callback: Callback) -> None:
        """Calls back, on the event loop: at once with None when all that was appended is committed; else when it is, or
        with an error when an attempt to commit it failed (it is tried again, and may still succeed)."""
        self._hear()
        if self._committed >= self._appended:
            callback(None)
        elif self._closed:
            callback(ErrorInfo("unavailable", f"journal {self.path} is closed"))
        else:
            self._waiting.append((self._appended, callback))

    @property
    def failing(self) -> ErrorInfo | None:
        """The reason, while the last attempt to commit failed or the disk hangs: what is promised now may not be kept."""
        began_s = self._began_s
        if self._failing is None and began_s and time.monotonic() - began_s > _HANGS_S:
            return ErrorInfo("unavailable", f"journal {self.path}: its disk has not answered for {_HANGS_S:g} s")
        return self._failing

    def close(self) -> None:
        """Commits what is left, waits for the thread, gives the lock back. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():
                _log.error("journal %s: its disk hangs; it is left as it is", self.path)
        self._hear()
        lost = self._appended - self._committed
        if lost:
            _log.error("journal %s: closed with %d entries that could not be committed", self.path, lost)
            self._answer(self._appended, ErrorInfo("unavailable", f"journal {self.path} is closed"))
        if self._thread is None or not self._thread.is_alive():
            self._db.close()
            self._lock.release()

    # ------------------------------------------------------------------------------------------------ on the event loop

    def _start(self) -> None:
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None  # nobody to tell; `after_commit` looks for itself
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def _hear(self) -> None:
        """Takes in how attempts ended."""
        while self._attempts:
            attempt = self._attempts.popleft()
            self._committed = attempt.committed
            self._failing = attempt.error
            self._answer(attempt.committed, None)
            if attempt.error is not None:
                self._answer(attempt.seen, attempt.error)

    def _answer(self, upto: int, error: ErrorInfo | None) -> None:
        while self._waiting and self._waiting[0][0] <= upto:
            _, callback = self._waiting.popleft()
            try:
                callback(error)
            except Exception:
                _log.exception("journal %s: a callback failed", self.path)

    # --------------------------------------------------------------------------------------------------- on the thread

    def _run(self) -> None:
        pending: deque[Entry] = deque()
        taken = committed = 0
        failing = closing = False
        while not closing:
            timeout_s = _RETRY_S if pending else None
            taken, closing = self._take(pending, taken, timeout_s)
            while pending:
                entries = [pending[i] for i in range(min(len(pending), _MAX_ENTRIES))]
                self._began_s = time.monotonic()
                error = self._commit(entries)
                self._began_s = 0.0
                if error is None:
                    for _ in entries:
                        pending.popleft()
                    committed += len(entries)
                if failing != (error is not None):
                    failing = error is not None
                    _log.log(*_told(failing), self.path, error.message if error else "")
                self._tell(_Attempt(committed, taken, error))
                if error is not None:
                    break
                self._checkpoint()
                if not closing:
                    taken, closing = self._take(pending, taken, 0.0)

    def _take(self, pending: deque[Entry], taken: int, timeout_s: float | None) -> tuple[int, bool]:
        """Everything that has been appended, at least one entry if `timeout_s` allows; and whether that is the end."""
        try:
            entry = self._queue.get(timeout=timeout_s) if timeout_s != 0.0 else self._queue.get_nowait()
            while entry is not None:
                pending.append(entry)
                taken += 1
                entry = self._queue.get_nowait()
        except queue.Empty:
            return taken, False
        return taken, True

    def _commit(self, entries: Sequence[Entry]) -> ErrorInfo | None:
        try:
            self._writer.commit(entries)
        except Exception as error:  # whatever it was: the entries stay, and are tried again
            if not isinstance(error, sqlite3.Error):
                _log.exception("journal %s: %d entries could not be written", self.path, len(entries))
            return ErrorInfo("unavailable", f"journal {self.path} cannot be written: {error}")
        return None

    def _checkpoint(self) -> None:
        if self._writer.checkpoint_due:
            try:
                self._writer.checkpoint()
            except sqlite3.Error as error:
                _log.warning("journal %s: its write-ahead log grows: %s", self.path, error)

    def _tell(self, attempt: _Attempt) -> None:
        self._attempts.append(attempt)
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._hear)
            except RuntimeError:
                self._loop = None  # it is closed; `close` hears the rest


def _told(failing: bool) -> tuple[int, str]:
    if failing:
        return logging.ERROR, "journal %s cannot be written; nothing new is promised until it can: %s"
    return logging.WARNING, "journal %s can be written again%s"


# ------------------------------------------------------------------------------------------------------------- opening


def _opened(path: Path, mode: Mode, sync: str) -> tuple[sqlite3.Connection, Past, list[str]]:
    files.create(path)
    found = journal_damage.examine(path)
    if found is not None and found.mode != mode:
        raise JournalError(
            f"{path}: written in mode {found.mode!r}, and this core is to write {mode!r}: "
            f"set journal_mode to {found.mode!r}, or name another journal_path"
        )
    db = files.connect(path, writable=True)
    try:
        files.set_up(db, path, sync)
        if found is None:
            files.lay_out(db, mode)
            return db, Past(), []
        if found.torn is not None:
            db.execute("DELETE FROM row WHERE place = ?", (found.torn,))
        if mode == "recover":
            _drop_unnamed(db, found.past)
        with contextlib.suppress(sqlite3.OperationalError):  # a reader is at it, or the disk is full: later, then
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()  # what lives that were killed have left in it
    except BaseException:
        db.close()
        raise
    return db, found.past, found.notes


def _drop_unnamed(db: sqlite3.Connection, past: Past) -> None:
    """Texts and shown pieces that no kept row names: a salvage may leave some."""
    db.execute("BEGIN IMMEDIATE")
    db.execute("CREATE TEMP TABLE named(key TEXT PRIMARY KEY)")
    db.executemany("INSERT INTO named VALUES (?)", ((key,) for key in past.texts))
    db.execute("DELETE FROM text WHERE key NOT IN (SELECT key FROM named)")
    db.execute("DELETE FROM shown WHERE session NOT IN (SELECT session FROM row WHERE session IS NOT NULL)")
    db.execute("DROP TABLE named")
    db.execute("COMMIT")


def _versions() -> str:
    found = {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["parrot-testbed"] = metadata.version("parrot-testbed")
    return msgspec.json.encode(found).decode()


if __name__ == "__main__":
    sys.exit(journal_salvage.main())
