"""The commands `check` and `salvage`: what a journal holds, and every whole session of a damaged one in a new one.

Neither ever writes to the journal that it is given: a salvage works on a copy.
"""

from __future__ import annotations

import argparse
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from parrot.serve import journal_damage as damage
from parrot.serve import journal_files as files
from parrot.serve.journal_damage import Survey
from parrot.serve.journal_files import COLUMNS, Damaged, InUse, JournalError, Lock
from parrot.serve.ledger import Mode, Past

_LOST_EPOCHS = 1000  # past any epoch that a lost life may have had

# ------------------------------------------------------------------------------------------------------------- salvage


class Saved(NamedTuple):
    """What a salvage wrote, and the sessions that it left behind, each with its reason."""

    sessions: int
    rows: int
    texts: int
    left: dict[int, str]


def salvage(path: Path, new: Path) -> Saved:
    """Writes every whole session of the journal at `path` into a new one. Raises JournalError, and then there is no `new`."""
    path, new = path.resolve(), new.resolve()
    if not path.is_file():
        raise JournalError(f"{path}: no such journal")
    if new.exists():
        raise JournalError(f"{new}: is there already: name a file that is not")
    lock = _lock_if_writable(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f"{new.name}.", dir=new.parent) as directory:
            # SQLite mends what a crash has left as it opens a file, so it gets a copy.
            copy, fresh = Path(directory, "copy"), Path(directory, "new")
            shutil.copyfile(path, copy)
            if damage.wal(path).exists():
                shutil.copyfile(damage.wal(path), damage.wal(copy))
            saved = _save(path, copy, fresh)
            fresh.rename(new)
            return saved
    except OSError as error:
        raise JournalError(f"{new}: cannot be written: {error.strerror or error}") from error
    finally:
        if lock is not None:
            lock.release()


def _lock_if_writable(path: Path) -> Lock | None:
    try:
        return Lock(path)
    except InUse:
        raise
    except JournalError:
        return None  # where no lock can be made, no core can run


def _save(path: Path, copy: Path, fresh: Path) -> Saved:
    files.create(fresh)
    with closing(sqlite3.connect(copy, isolation_level=None)) as db, closing(files.connect(fresh, writable=True)) as out:
        db.execute("PRAGMA writable_schema = ON")  # reads a file that is shorter than it says
        try:
            mode = files.identify(db, path)
            if mode is None:
                raise JournalError(f"{path}: is empty: there is nothing to save")
            found = damage.survey(db, mode)
            if not found.lives and not found.rows:
                raise JournalError(damage.refusal(path, damage.first(found, Damaged("nothing can be read")), found))
            files.set_up(out, fresh, "full")
            files.lay_out(out, mode)
            out.execute("BEGIN")
            rows = _copy(db, out, found, mode)
            out.execute("COMMIT")
        except (Damaged, sqlite3.DatabaseError) as error:
            raise JournalError(damage.refusal(path, str(error), None)) from error
        past = files.load(out)
        if found.damaged("life"):
            _add_life(out, past, found)
    sessions = len(found.sessions) - len(found.lost)
    return Saved(sessions, rows, len(found.texts), dict(sorted(found.lost.items())))


def _copy(db: sqlite3.Connection, out: sqlite3.Connection, found: Survey, mode: Mode) -> int:
    """Copies what is sound and whole, as it stands. The number of rows."""
    again = damage.Survey()  # the same damages are met again
    rows = 0
    for table, columns in COLUMNS.items():
        insert = f"INSERT INTO {table}({columns}, crc) VALUES ({', '.join('?' * (columns.count(',') + 2))})"
        for stored in damage.readable(db, table, again):
            if table == "row":
                if stored[0] not in found.rows or not found.is_saved(stored[2]):
                    continue
                rows += 1
            elif table == "shown" and not found.is_saved(stored[1]):
                continue
            out.execute(insert, stored)
    for number, until in db.execute("SELECT number, until FROM shown WHERE until IS NOT NULL") if mode == "record" else ():
        out.execute("UPDATE shown SET until = ? WHERE number = ?", (until, number))
    return rows


def _add_life(out: sqlite3.Connection, past: Past, found: Survey) -> None:
    """Stands for a life whose row is lost: no epoch may be used twice."""
    config = found.lives[-1][3] if found.lives else "{}"
    life = files.sealed(found.epoch + _LOST_EPOCHS, past.next_instant, past.now, config, "{}")
    out.execute(f"INSERT INTO life({COLUMNS['life']}, crc) VALUES (?, ?, ?, ?, ?, ?)", life)


# ------------------------------------------------------------------------------------------------------------ commands


class Report(NamedTuple):
    """What a check found. `problem`: why the journal cannot be used as it is (None: it can)."""

    lines: list[str]
    problem: str | None


def check(path: Path) -> Report:
    """Looks at a journal, live or not, and changes nothing. Raises JournalError when it is no journal of this version."""
    path = path.resolve()
    if not path.is_file():
        raise JournalError(f"{path}: no such journal")
    problem = None
    notes: list[str] = []
    if not _in_use(path):
        try:
            notes = damage.look_at_wal(path)
        except JournalError as error:
            problem = str(error)
    with closing(damage.connected(path)) as db:
        db.execute("BEGIN")
        try:
            mode = files.identify(db, path)
        except Damaged as error:
            return Report([], damage.refusal(path, str(error), None))
        if mode is None:
            raise JournalError(f"{path}: not a journal: it is empty")
        found = damage.survey(db, mode)
        torn = damage.torn_row(db, found)
        if torn is not None:
            notes.append(f"its last row is cut short; a core would drop it and go on ({torn})")
        else:
            try:
                damage.quick_check(db)
                files.load(db)
            except (Damaged, sqlite3.DatabaseError) as error:
                problem = problem or damage.refusal(path, damage.first(found, error), found)
    size = sum(file.stat().st_size for file in (path, damage.wal(path)) if file.exists())
    lines = [
        f"version   {files.VERSION}",
        f"mode      {mode}",
        f"lives     {len(found.lives)}, the last is epoch {found.epoch}",
        f"sessions  {len(found.sessions)} with rows, {len(found.sessions - found.over.keys())} of them not over",
        f"rows      {len(found.rows)}",
        f"texts     {len(found.texts)}",
        f"size      {size} bytes",
        *(f"damaged   {found_damage}" for found_damage in found.damages[:20]),
        *(f"note      {note}" for note in notes),
    ]
    return Report(lines, problem)


def _in_use(path: Path) -> bool:
    if not Path(f"{path}.lock").exists():
        return False
    try:
        lock = _lock_if_writable(path)
    except InUse:
        return True
    if lock is not None:
        lock.release()
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python3 -m parrot.serve.journal`."""
    parser = argparse.ArgumentParser(prog="python3 -m parrot.serve.journal", description="Looks at a journal, or saves it.")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="say what a journal holds; exit status 1 when it is damaged")
    checking.add_argument("journal", type=Path)
    saving = commands.add_parser("salvage", help="copy every whole session of a damaged journal into a new one")
    saving.add_argument("journal", type=Path)
    saving.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            report = check(options.journal)
            print(*report.lines, sep="\n")
            if report.problem is not None:
                print(report.problem, file=sys.stderr)
                return 1
            return 0
        saved = salvage(options.journal, options.new)
    except JournalError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"saved {saved.sessions} sessions, {saved.rows} rows and {saved.texts} texts in {options.new}")
    for session, why in saved.left.items():
        print(f"left behind: session {session}: {why}")
    return 0
