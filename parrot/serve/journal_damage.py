"""Whether a core may go on from a journal, and if not, what is wrong and whose sessions are whole. It writes nothing.

A journal that is cut short in its last row loses that row and nothing else. Damage anywhere else is refused: a core that
goes on without what it promised would contradict itself. Then whole sessions can be saved, never parts of one
(`journal_salvage.py`).
"""

from __future__ import annotations

import sqlite3
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from parrot.serve import events as ev
from parrot.serve import journal_files as files
from parrot.serve import ledger
from parrot.serve.journal_files import COLUMNS, Damaged, JournalError, is_sound, select, where
from parrot.serve.ledger import KEPT, Mode, Past, content_keys

_INSTANT = files.place_of(1)
_MOST_QUERIES = 2000  # while the readable parts of a damaged table are looked for …
_HOPELESS = 64  # … and when so many have found nothing

_WAL_HEADER = struct.Struct(">8I")
_FRAME_HEADER = struct.Struct(">6I")


class Damage(NamedTuple):
    """A place that is not as it was written. `key` … `last`: of the table's integer key."""

    table: str
    key: int
    last: int
    session: int | None
    what: str

    def __str__(self) -> str:
        if self.table == "row":
            span = f" to instant {files.instant_of(self.last)}" if self.last != self.key else ""
            return f"{where(self.key, self.session)}{span}: {self.what}"
        return f"table {self.table}, {COLUMNS[self.table].split(',')[0]} {self.key}: {self.what}"


class Survey(msgspec.Struct):
    """All that a damaged journal still says. `rows`: place -> session; `lost`: session -> why it is not whole."""

    lives: list[tuple[Any, ...]] = []
    rows: dict[int, int | None] = {}
    texts: dict[str, int] = {}  # key -> number
    shown: int = 0
    over: dict[int, int] = {}  # session -> number in `ended`
    damages: list[Damage] = []
    lost: dict[int, str] = {}
    epoch: int = 0  # the largest that anything names

    @property
    def sessions(self) -> set[int]:
        return {session for session in self.rows.values() if session is not None} | set(self.lost)

    def is_saved(self, session: int | None) -> bool:
        return session is None or session not in self.lost

    def damaged(self, table: str) -> list[Damage]:
        return [damage for damage in self.damages if damage.table == table]


class Examined(NamedTuple):
    """A journal that a core may go on from. `torn`: the place of a last row that must be dropped first."""

    mode: Mode
    past: Past
    notes: list[str]
    torn: int | None


def examine(path: Path) -> Examined | None:
    """Looks at all of a journal before anything is written to it; None when the file is empty. Raises JournalError."""
    if not path.stat().st_size and not wal(path).exists():
        return None
    notes = look_at_wal(path)
    with closing(connected(path)) as db:
        try:
            mode = files.identify(db, path)
        except Damaged as error:
            raise JournalError(refusal(path, str(error), None)) from error
        if mode is None:
            return None
        try:
            quick_check(db)
            return Examined(mode, files.load(db), notes, None)
        except (Damaged, sqlite3.DatabaseError) as error:
            found = survey(db, mode)
            torn = torn_row(db, found)
            if torn is None:
                raise JournalError(refusal(path, first(found, error), found)) from error
        try:
            past = files.load(db, skip=torn.key)
        except (Damaged, sqlite3.DatabaseError) as error:
            raise JournalError(refusal(path, str(error), found)) from error
        return Examined(mode, past, [*notes, f"its last row was cut short and is dropped ({torn})"], torn.key)


def connected(path: Path) -> sqlite3.Connection:
    try:
        return files.connect(path, writable=False)
    except sqlite3.DatabaseError as error:
        told = files.explained(path, error)
        raise told if isinstance(told, JournalError) else JournalError(refusal(path, str(told), None)) from error


def quick_check(db: sqlite3.Connection) -> None:
    (told,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if told != "ok":
        raise Damaged(" ".join(told.replace("*** in database main ***", "").split()))


def torn_row(db: sqlite3.Connection, found: Survey) -> Damage | None:
    """The one thing that is wrong, if it is the last row."""
    if len(found.damages) != 1 or found.damages[0].table != "row":
        return None
    damage = found.damages[0]
    try:
        quick_check(db)
        (last,) = db.execute("SELECT max(place) FROM row").fetchone()
    except (Damaged, sqlite3.DatabaseError):
        return None
    return damage if damage.key == damage.last == last and damage.what == _CHECKSUM else None


def first(found: Survey, error: Exception) -> str:
    rows = found.damaged("row")
    return str(rows[0] if rows else found.damages[0] if found.damages else error)


def refusal(path: Path, what: str, found: Survey | None) -> str:
    if found is None or not (found.lives or found.rows):
        return f"{path}: damaged: {what}: nothing of it can be read; put a copy in its place, or name another journal_path"
    sessions = len(found.sessions)
    rows = sum(found.is_saved(session) for session in found.rows.values())
    return (
        f"{path}: damaged: {what}; {sessions - len(found.lost)} of {sessions} sessions ({rows} rows) can be saved: "
        f"`python3 -m parrot.serve.journal salvage {path} NEW`, then start with NEW as journal_path"
    )


# --------------------------------------------------------------------------------------------------- the write-ahead log


def wal(path: Path) -> Path:
    return Path(f"{path}-wal")


def look_at_wal(path: Path) -> list[str]:
    """Whether SQLite is going to leave out what was committed: it ends its reading at the first frame that is not whole.

    One transaction at the end may be so: a write that was cut short. Raises JournalError when there are more.
    """
    try:
        data = wal(path).read_bytes()
    except FileNotFoundError:
        return []
    if len(data) < _WAL_HEADER.size:
        return []
    _, _, page_bytes, _, *salts, _, _ = _WAL_HEADER.unpack_from(data)
    size = _FRAME_HEADER.size + page_bytes
    lost = kept = 0
    sums = _checksum(data[:24], (0, 0), data[3] & 1)
    whole = sums == _WAL_HEADER.unpack_from(data)[6:]
    if not whole and any(data[:24]):
        salts = list(_FRAME_HEADER.unpack_from(data, _WAL_HEADER.size)[2:4]) if len(data) >= _WAL_HEADER.size + size else salts
    for at in range(_WAL_HEADER.size, len(data) - size + 1, size):
        _, commit, *frame_salts, first, second = _FRAME_HEADER.unpack_from(data, at)
        if frame_salts != salts:
            if whole:
                break  # what an earlier round has left
            continue
        if whole:
            sums = _checksum(data[at : at + 8] + data[at + 24 : at + size], sums, data[3] & 1)
            whole = sums == (first, second)
        if commit:
            kept, lost = (kept + 1, lost) if whole else (kept, lost + 1)
    if lost > 1:
        raise JournalError(
            f"{path}: damaged: {wal(path).name} is broken behind its transaction {kept}; {lost} more are there and cannot be "
            f"read; the sessions before can be saved: `python3 -m parrot.serve.journal salvage {path} NEW`"
        )
    torn = (len(data) - _WAL_HEADER.size) % size != 0
    if lost or torn:
        return [f"{wal(path).name} ends within a transaction; what was not committed whole is dropped"]
    return []


def _checksum(data: bytes, start: tuple[int, int], big_endian: int) -> tuple[int, int]:
    """SQLite's checksum of a write-ahead log, as its file format defines it."""
    words = struct.unpack(f"{'>' if big_endian else '<'}{len(data) // 4}I", data)
    first, second = start
    for i in range(0, len(words), 2):
        first = (first + words[i] + second) & 0xFFFFFFFF
        second = (second + words[i + 1] + first) & 0xFFFFFFFF
    return first, second


# -------------------------------------------------------------------------------------------------------------- a survey

_CHECKSUM = "its checksum is wrong"


def survey(db: sqlite3.Connection, mode: Mode) -> Survey:
    """Reads all that can be read, and finds out whose sessions are not whole."""
    found = Survey()
    named: dict[str, set[int]] = {}  # text -> the sessions that need it
    for stored in readable(db, "life", found):
        found.lives.append(stored)
        found.epoch = max(found.epoch, stored[0])
    for number, session, *_ in readable(db, "ended", found):
        found.over[session] = number
    opened: dict[int, int] = {}  # session -> its first place
    for stored in readable(db, "row", found):
        place, _, session, kind, body = stored[:5]
        if kind == KEPT and session not in found.over:
            try:
                event = ledger.decode_event(body)
            except msgspec.DecodeError as error:
                found.damages.append(Damage("row", place, place, session, f"not an event: {error}"))
                continue
            if type(event) is ev.TaskFinished:
                found.epoch = max(found.epoch, event.epoch)
            for key in content_keys(event):
                named.setdefault(key, set()).add(session)
        found.rows[place] = session
        if session is not None:
            opened[session] = min(place, opened.get(session, place))
    _find_lost_rows(db, found, opened)
    for stored in readable(db, "text", found):
        found.texts[stored[1]] = stored[0]
    for key in named.keys() - found.texts.keys():
        for session in named[key]:
            found.lost.setdefault(session, f"text {key} is not there")
    if named.keys() - found.texts.keys() and not found.damages:
        key = min(named.keys() - found.texts.keys())
        found.damages.append(Damage("text", 0, 0, None, f"text {key} is not there, but session {min(named[key])} names it"))
    for _ in readable(db, "shown", found):
        found.shown += 1
    _find_uncertain(found, mode)
    found.damages.sort()
    return found


def _find_lost_rows(db: sqlite3.Connection, found: Survey, opened: dict[int, int]) -> None:
    """Whose the rows are that cannot be read: the index knows, and where it is broken too, all older sessions may be."""
    damages = found.damaged("row")
    try:
        for session, place in db.execute("SELECT session, place FROM row INDEXED BY row_session ORDER BY session"):
            if place not in found.rows or found.rows[place] != session:
                if not damages:
                    found.damages.append(Damage("row", place, place, session, "it is in the index and not in the table"))
                if session is not None:
                    found.lost.setdefault(session, f"{where(place, None)} cannot be read")
    except sqlite3.DatabaseError as error:
        if not damages:
            found.damages.append(Damage("row", 0, 0, None, f"its index: {error}"))
        last = max((damage.last for damage in damages), default=-1)
        for session, place in opened.items():
            if place <= last:
                found.lost.setdefault(session, "it may have rows that cannot be read")
    for damage in damages:
        if damage.session is not None:
            found.lost.setdefault(damage.session, damage.what)


def _find_uncertain(found: Survey, mode: Mode) -> None:
    """Sessions that may be over, or may have shown more than is known."""
    for damage in found.damaged("shown"):
        unknown = found.sessions - found.over.keys() if damage.session is None else {damage.session}
        for session in unknown:
            found.lost.setdefault(session, "what it has shown cannot be read")
    if mode == "record" and found.damaged("ended"):
        for session in found.sessions - found.over.keys():
            found.lost.setdefault(session, "it may be over")


def readable(db: sqlite3.Connection, table: str, found: Survey) -> Iterator[tuple[Any, ...]]:
    """The sound rows of a table, in no order; what is not sound or cannot be read becomes a damage."""
    key = COLUMNS[table].split(",")[0]
    session_at = {"row": 2, "shown": 1, "ended": 1}.get(table)
    ranges = deque([(-(1 << 63), (1 << 63) - 1)])
    queries = rows = 0
    while ranges:
        low, high = ranges.popleft()
        error: Exception | None = None
        for order in ("ASC", "DESC"):
            if low > high:
                break
            queries += 1
            try:
                error = None
                for stored in db.execute(f"{select(table, f'WHERE {key} BETWEEN ? AND ?')} {order}", (low, high)):
                    rows += 1
                    if order == "ASC":
                        low = stored[0] + 1
                    else:
                        high = stored[0] - 1
                    if is_sound(stored):
                        yield stored
                    else:
                        session = stored[session_at] if session_at is not None else None
                        session = session if isinstance(session, int) else None
                        found.damages.append(Damage(table, stored[0], stored[0], session, _CHECKSUM))
                low = high + 1
                break
            except sqlite3.DatabaseError as caught:
                error = caught
        if error is None or low > high:
            continue
        if queries < (_MOST_QUERIES if rows else _HOPELESS) and high - low > (_INSTANT if table == "row" else 8):
            middle = (low + high) // 2
            ranges += [(low, middle), (middle + 1, high)]
        else:
            found.damages.append(Damage(table, max(low, 0), high, None, f"cannot be read: {error}"))
