"""Turns entries into SQL: one transaction for all that is handed over, then, now and then, a checkpoint.

It runs on the journal's thread. Statements are few and long: each one lets go of Python's lock, and under load getting it
back may take as long as the switch interval. What it remembers between transactions (numbers of rows) is taken back when
one fails.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

from parrot.serve import ledger
from parrot.serve.journal_files import row_columns, sealed, shown_columns, text_columns
from parrot.serve.ledger import Entry, Mode
from parrot.serve.session_registry import REMEMBERED_SESSIONS

# Rows that one INSERT takes; few sizes, so that each statement stays prepared.
_INSERT_SIZES = (32, 8, 1)
#: After this much the write-ahead log is carried over into the database, so that it stays small.
CHECKPOINT_BYTES = 8 << 20
_ENDED_SLACK = 1024
_PAGES_PER_COMMIT = 4


def _inserts(table: str, columns: str, or_else: str = "") -> dict[int, str]:
    one = f"({', '.join('?' * (columns.count(',') + 1))})"
    return {size: f"INSERT {or_else} INTO {table}({columns}) VALUES {', '.join([one] * size)}" for size in _INSERT_SIZES}


_ROWS = _inserts("row", "place, t, session, kind, body, crc")
_TEXTS = _inserts("text", "number, key, text, ids, crc", "OR IGNORE")
_SHOWN = _inserts("shown", "number, session, var_id, instant, ids, text, crc")
_ENDED = _inserts("ended", "number, session, state, instant, t, crc")


class Writer:
    """The writing side of one open journal. `instant`: the next one that no row has yet."""

    def __init__(self, db: sqlite3.Connection, mode: Mode, instant: int) -> None:
        self._db = db
        self._mode = mode
        self._instant = instant
        self._texts, self._shown, self._ended = (
            db.execute(f"SELECT coalesce(max(number), 0) FROM {table}").fetchone()[0] for table in ("text", "shown", "ended")
        )
        self._kept_ended = db.execute("SELECT count(*) FROM ended").fetchone()[0]
        self._written_bytes = 0

    def commit(self, entries: Iterable[Entry]) -> None:
        """All of it or nothing. Raises whatever went wrong, with the transaction rolled back."""
        before = (self._instant, self._texts, self._shown, self._ended, self._kept_ended)
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            self._write(entries)
            db.execute("COMMIT")
        except BaseException:
            self._instant, self._texts, self._shown, self._ended, self._kept_ended = before
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self._written_bytes += _PAGES_PER_COMMIT * 4096

    @property
    def checkpoint_due(self) -> bool:
        return self._written_bytes >= CHECKPOINT_BYTES

    def checkpoint(self) -> None:
        """Carries the write-ahead log over. Raises sqlite3.Error; nothing is lost by that."""
        self._written_bytes = 0
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def _write(self, entries: Iterable[Entry]) -> None:
        rows: list[tuple[Any, ...]] = []
        texts: list[tuple[Any, ...]] = []
        shown: list[tuple[Any, ...]] = []
        for entry in entries:
            for row in entry.rows:
                self._instant = max(self._instant, row.instant)
                self._written_bytes += len(row.body)
                rows.append(row_columns(row))
            for text in entry.texts:
                self._texts += 1
                self._written_bytes += len(text.text)
                texts.append(text_columns(self._texts, text))
            for piece in entry.shown:
                self._shown += 1
                shown.append(shown_columns(self._shown, self._instant, piece))
            if entry.settled or entry.ended:
                # What ends takes away what came before it, and nothing that comes after.
                self._insert_all(rows, texts, shown)
                self._settle(entry.settled)
                self._end(entry.ended)
        self._insert_all(rows, texts, shown)

    def _insert_all(self, rows: list[tuple[Any, ...]], texts: list[tuple[Any, ...]], shown: list[tuple[Any, ...]]) -> None:
        for statements, stored in ((_ROWS, rows), (_TEXTS, texts), (_SHOWN, shown)):
            self._insert(statements, stored)
            stored.clear()

    def _insert(self, statements: dict[int, str], stored: Sequence[tuple[Any, ...]]) -> None:
        start = 0
        for size in _INSERT_SIZES:
            while len(stored) - start >= size:
                parameters = [value for columns in stored[start : start + size] for value in columns]
                self._db.execute(statements[size], parameters)
                start += size

    def _settle(self, settled: Sequence[tuple[int, str]]) -> None:
        for session, var_id in settled:
            if self._mode == "recover":
                self._db.execute("DELETE FROM shown WHERE session = ? AND var_id = ?", (session, var_id))
            else:
                self._db.execute(
                    "UPDATE shown SET until = ? WHERE session = ? AND var_id = ? AND until IS NULL",
                    (self._instant, session, var_id),
                )

    def _end(self, ended: Sequence[ledger.Ended]) -> None:
        db = self._db
        stored = []
        for end in ended:
            if self._mode == "recover":
                db.execute("DELETE FROM row WHERE session = ?", (end.session,))
                db.execute("DELETE FROM shown WHERE session = ?", (end.session,))
                for start in range(0, len(end.keys), _INSERT_SIZES[0]):
                    keys = end.keys[start : start + _INSERT_SIZES[0]]
                    db.execute(f"DELETE FROM text WHERE key IN ({', '.join('?' * len(keys))})", keys)
            self._ended += 1
            stored.append(sealed(self._ended, end.session, end.state, self._instant, float(end.t) + 0.0))
        self._insert(_ENDED, stored)
        self._kept_ended += len(stored)
        if self._mode == "recover" and self._kept_ended > REMEMBERED_SESSIONS + _ENDED_SLACK:
            db.execute("DELETE FROM ended WHERE number <= ?", (self._ended - REMEMBERED_SESSIONS,))
            self._kept_ended = REMEMBERED_SESSIONS
