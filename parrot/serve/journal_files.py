"""The journal's file: its tables, what makes a row sound, who may open it, and what it says of the lives before.

A journal is one SQLite database in WAL mode. Every row of every table carries a checksum of its other columns, because
SQLite does not see a flipped bit in a body. Nothing here writes what a core appends (`journal.py`) or mends what is
broken (`journal_salvage.py`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from parrot.configuration import ConfigurationError
from parrot.serve import ledger
from parrot.serve.ledger import KEPT, Mode, Past, Row, StoredText, content_keys
from parrot.serve.session_registry import REMEMBERED_SESSIONS

VERSION = 1
APPLICATION_ID = 0x50415252

# A row's key: its instant and its position there in one integer, so that rows are appended at the table's end.
_POSITION_BITS = 24
NO_END = (1 << 63) - 1

SCHEMA = """
CREATE TABLE journal(mode TEXT NOT NULL) STRICT;
CREATE TABLE life(epoch INTEGER PRIMARY KEY, instant INTEGER NOT NULL, t REAL NOT NULL, config TEXT NOT NULL,
    versions TEXT NOT NULL, crc INTEGER NOT NULL) STRICT;
CREATE TABLE row(place INTEGER PRIMARY KEY, t REAL NOT NULL, session INTEGER, kind INTEGER NOT NULL, body BLOB NOT NULL,
    crc INTEGER NOT NULL) STRICT;
CREATE INDEX row_session ON row(session);
CREATE TABLE text(number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, text BLOB NOT NULL, ids BLOB NOT NULL,
    crc INTEGER NOT NULL) STRICT;
CREATE TABLE shown(number INTEGER PRIMARY KEY, session INTEGER NOT NULL, var_id TEXT NOT NULL, instant INTEGER NOT NULL,
    ids BLOB NOT NULL, text BLOB NOT NULL, crc INTEGER NOT NULL, until INTEGER) STRICT;
CREATE INDEX shown_session ON shown(session);
CREATE TABLE ended(number INTEGER PRIMARY KEY, session INTEGER NOT NULL, state TEXT NOT NULL, instant INTEGER NOT NULL,
    t REAL NOT NULL, crc INTEGER NOT NULL) STRICT;
"""

#: The checked columns of each table, its integer key first, the checksum behind them. `shown.until` alone may change.
COLUMNS = {
    "life": "epoch, instant, t, config, versions",
    "row": "place, t, session, kind, body",
    "text": "number, key, text, ids",
    "shown": "number, session, var_id, instant, ids, text",
    "ended": "number, session, state, instant, t",
}

_encode = msgspec.msgpack.Encoder().encode
_ids_of_text = msgspec.msgpack.Decoder(dict[str, bytes]).decode
_ids_of_shown = msgspec.msgpack.Decoder(list[int]).decode


class JournalError(ConfigurationError):
    """A journal that cannot be used: one line that names it, what is wrong, and what to do."""


class InUse(JournalError):
    """Another process holds the lock."""


class Damaged(Exception):
    """The journal's content is not what was written. The message says where."""


# ------------------------------------------------------------------------------------------------ rows as they are stored


def place_of(instant: int, position: int = 0) -> int:
    return instant << _POSITION_BITS | position


def instant_of(place: int) -> int:
    return place >> _POSITION_BITS


def sealed(*columns: Any) -> tuple[Any, ...]:
    """The columns and their checksum."""
    return (*columns, zlib.crc32(_encode(columns)))


def is_sound(stored: tuple[Any, ...]) -> bool:
    """Whether stored columns, the checksum last, are what was written."""
    return bool(zlib.crc32(_encode(stored[:-1])) == stored[-1])


def select(table: str, where: str = "") -> str:
    """The query for a table's columns and checksum, in the order of its key."""
    columns = COLUMNS[table]
    return f"SELECT {columns}, crc FROM {table} {where} ORDER BY {columns.split(',')[0]}"


def row_columns(row: Row) -> tuple[Any, ...]:
    place = place_of(row.instant, row.position)
    return sealed(place, float(row.t) + 0.0, row.session, row.kind, row.body)  # + 0.0: SQLite has no -0.0


def row_of(stored: tuple[Any, ...]) -> Row:
    place, t, session, kind, body = stored[:5]
    return Row(place >> _POSITION_BITS, place & ((1 << _POSITION_BITS) - 1), t, session, kind, body)


def text_columns(number: int, text: StoredText) -> tuple[Any, ...]:
    # As bytes: a text may hold half of a surrogate pair, which no SQLite text may.
    return sealed(number, text.key, text.text.encode("utf-8", "surrogatepass"), _encode(text.ids))


def text_of(stored: tuple[Any, ...]) -> StoredText:
    _, key, text, ids = stored[:4]
    return StoredText(key, text.decode("utf-8", "surrogatepass"), _ids_of_text(ids))


def shown_columns(number: int, instant: int, piece: ledger.Shown) -> tuple[Any, ...]:
    text = piece.text.encode("utf-8", "surrogatepass")
    return sealed(number, piece.session, piece.var_id, instant, _encode(piece.ids), text)


# ------------------------------------------------------------------------------------------------------- opening a file


class Lock:
    """The right to write a journal, held by one process until it gives it back or dies. The file `<journal>.lock` says
    which process that is."""

    def __init__(self, path: Path) -> None:
        """Raises JournalError when another process holds it, or when the directory cannot be written."""
        self._path = Path(f"{path}.lock")
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritable(path, error.strerror or str(error)) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._file, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._file)
            raise InUse(
                f"{path}: in use by another core (process {holder}): stop that one, or name another journal_path"
            ) from None
        try:
            self._journal = self._locked_journal(path)
        except BaseException:
            os.close(self._file)
            raise
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, b"%d\n" % os.getpid(), 0)

    def release(self) -> None:
        """After the last connection is closed: closing a file takes SQLite's own locks on it away."""
        os.ftruncate(self._file, 0)
        os.close(self._journal)
        os.close(self._file)

    def _locked_journal(self, path: Path) -> int:
        """The journal itself, locked too: for whoever removed the lock file, or gave the journal a second name."""
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritable(path, error.strerror or str(error)) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise InUse(f"{path}: in use by another core: stop that one, or name another journal_path") from None
        return file


def create(path: Path) -> None:
    """Makes sure that the file is there, can be written, and is its owner's alone. Raises JournalError."""
    if path.is_dir():
        raise JournalError(f"{path}: is a directory: journal_path must name a file")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error
    for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        with contextlib.suppress(OSError):
            file.chmod(0o600)


def connect(path: Path, writable: bool) -> sqlite3.Connection:
    """A connection with no implicit transactions. A file that is not to be written may be on a read-only disk."""
    if writable:
        return sqlite3.connect(path, timeout=0.25, isolation_level=None, check_same_thread=False)
    uri = f"{path.absolute().as_uri()}?mode=ro"
    db = sqlite3.connect(uri, uri=True, timeout=2.0, isolation_level=None)
    try:
        db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.OperationalError:
        db.close()
        if Path(f"{path}-wal").exists():
            raise
        db = sqlite3.connect(f"{uri}&immutable=1", uri=True, isolation_level=None)
    return db


def set_up(db: sqlite3.Connection, path: Path, sync: str) -> None:
    """Settings of a connection that writes. Raises JournalError where there can be no write-ahead log."""
    (kind,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if kind != "wal":
        raise JournalError(f"{path}: its file system cannot hold a write-ahead log: name a journal_path on a local disk")
    # The writer checkpoints by itself, where nobody waits; SQLite's own checkpoint is the last resort.
    for setting in (f"synchronous = {sync}", "wal_autocheckpoint = 8192", f"journal_size_limit = {64 << 20}"):
        db.execute(f"PRAGMA {setting}")
    db.execute("PRAGMA cache_size = -8192")


def lay_out(db: sqlite3.Connection, mode: Mode) -> None:
    """Makes an empty file into a journal."""
    db.execute("BEGIN IMMEDIATE")
    for statement in filter(str.strip, SCHEMA.split(";")):
        db.execute(statement)
    db.execute("INSERT INTO journal VALUES (?)", (mode,))
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {VERSION}")
    db.execute("COMMIT")


def identify(db: sqlite3.Connection, path: Path) -> Mode | None:
    """The mode of the journal; None when the file is empty. Raises JournalError when it is something else."""
    try:
        application, version = (int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("application_id", "user_version"))
        tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if application == 0 and version == 0 and tables == 0:
            return None
        if application != APPLICATION_ID:
            raise JournalError(f"{path}: an SQLite database, but not a journal of a ServeCore: name another journal_path")
        if version != VERSION:
            raise JournalError(
                f"{path}: a journal of version {version}, and this program reads version {VERSION}: "
                f"use the program that wrote it, or name another journal_path"
            )
        (mode,) = db.execute("SELECT mode FROM journal").fetchone()
    except sqlite3.DatabaseError as error:
        raise explained(path, error) from error
    except TypeError:
        raise Damaged("the table `journal` is empty") from None
    if mode not in ("recover", "record"):
        raise Damaged(f"its mode is {mode!r}")
    return mode  # type: ignore[no-any-return]


def explained(path: Path, error: sqlite3.DatabaseError) -> Exception:
    """What an error of SQLite at a journal's opening means: a JournalError, or Damaged."""
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
        return JournalError(f"{path}: not a journal (not an SQLite database): name another journal_path")
    if isinstance(error, sqlite3.OperationalError):
        return JournalError(f"{path}: cannot be opened: {error}: look at its permissions and its disk, or name another path")
    return Damaged(str(error))


def _unwritable(path: Path, reason: str) -> JournalError:
    return JournalError(f"{path}: cannot be written: {reason}: name a journal_path in a directory that this user may write")


# ------------------------------------------------------------------------------------------------------ what it holds


def load(db: sqlite3.Connection, before: int | None = None, *, whole: bool = True, skip: int | None = None) -> Past:
    """What an opening before instant `before` would find (None: now). `whole`: look at every row, not only those needed;
    `skip`: the place of a row to leave out.

    Raises Damaged at the first thing that is not as it was written, sqlite3.DatabaseError when SQLite sees it.
    """
    end = NO_END if before is None else before
    past = Past()
    times, instants = [0.0], [-1]
    for epoch, instant, t, *_ in checked(db, "life", "WHERE instant < ?", end):
        past.epoch = max(past.epoch, epoch)
        times.append(t)
        instants.append(instant)
    over = set()
    for _, session, state, instant, t, _ in checked(db, "ended", "WHERE instant < ?", end):
        over.add(session)
        past.ended.append((session, state))
        times.append(t)
        instants.append(instant)
    del past.ended[:-REMEMBERED_SESSIONS]
    wanted: dict[str, None] = {}
    alive = set()
    last = (-1, 0.0)
    end_place = NO_END if before is None else place_of(before)
    which = "WHERE place < ? AND place IS NOT ?" + ("" if whole else f" AND kind = {KEPT}")
    for place, t, session, kind, body, _ in checked(db, "row", which, end_place, skip):
        last = (place, t)
        if kind != KEPT or session in over:
            continue
        try:
            event = ledger.decode_event(body)
        except msgspec.DecodeError as error:
            raise Damaged(f"{where(place, session)}: not an event: {error}") from error
        past.kept.append((t, event))
        alive.add(session)
        wanted.update(dict.fromkeys(content_keys(event)))
    if not whole:
        newest = "SELECT place, t FROM row WHERE place < ? ORDER BY place DESC LIMIT 1"
        last = db.execute(newest, (end_place,)).fetchone() or last
    _load_texts(db, past, wanted)
    for _, session, var_id, instant, ids, text, _ in checked(
        db, "shown", "WHERE instant < ?1 AND (until IS NULL OR until >= ?1)", end
    ):
        instants.append(instant)
        if session in alive:
            all_ids, all_text = past.shown.get((session, var_id), ([], ""))
            past.shown[session, var_id] = (all_ids + _ids_of_shown(ids), all_text + text.decode("utf-8", "surrogatepass"))
    past.now = max(*times, last[1])
    past.next_instant = max(*instants, instant_of(last[0])) + 1
    return past


def _load_texts(db: sqlite3.Connection, past: Past, wanted: dict[str, None]) -> None:
    found = {stored[1]: text_of(stored) for stored in checked(db, "text", "") if stored[1] in wanted}
    for key in wanted:
        if key not in found:
            raise Damaged(f"text {key}: not there, but an event names it")
        past.texts[key] = found[key]


def checked(db: sqlite3.Connection, table: str, condition: str, *parameters: int | None) -> Iterator[tuple[Any, ...]]:
    """The rows of a table as they are stored, in the order of its key. Raises Damaged at one that is not sound."""
    for stored in db.execute(select(table, condition), parameters):
        if not is_sound(stored):
            if table == "row":
                raise Damaged(f"{where(stored[0], stored[2])}: its checksum is wrong")
            raise Damaged(f"table {table}, {COLUMNS[table].split(',')[0]} {stored[0]}: its checksum is wrong")
        yield stored


def where(place: int, session: int | None) -> str:
    """A row in words."""
    return f"instant {instant_of(place)}" + (f", session {session}" if session is not None else "")
