"""What the tests of the journal's store share: entries in one line, and a crash, which is a copy of the files."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from parrot.protocol.errors import ErrorInfo
from parrot.serve import events as ev
from parrot.serve.config import ServeCoreConfig
from parrot.serve.journal import Journal
from parrot.serve.ledger import KEPT, Ended, Entry, Mode, Past, Row, Shown, StoredText, encode

CONFIG = ServeCoreConfig(engine_secret="a secret")


def opened(session: int, instant: int) -> Entry:
    return Entry(rows=[Row(instant, 0, float(instant), session, KEPT, encode(ev.OpenSession(1, session, "hash")))])


def value(session: int, instant: int, key: str, text: str | None = None) -> Entry:
    """A variable is set to a text; None: one that is stored already."""
    event = ev.SetVariable(2, session, "hash", "v0", ev.Content(key, {"t": 3}))
    texts = [] if text is None else [StoredText(key, text, {"t": b"[1,2,3]"})]
    return Entry(rows=[Row(instant, 0, float(instant), session, KEPT, encode(event))], texts=texts)


def said(session: int, var_id: str, ids: tuple[int, ...], text: str) -> Entry:
    return Entry(shown=[Shown(session, var_id, ids, text)])


def over(session: int, t: float, *keys: str) -> Entry:
    return Entry(ended=[Ended(session, "closed", t, keys)])


def write(path: Path, mode: Mode, *entries: Entry, sessions: int = 0) -> Path:
    """A closed journal: a life, `sessions` sessions with a value each, then `entries`."""
    journal = Journal.open(path, mode)
    journal.begin(journal.past.epoch + 1, journal.past.now, CONFIG)
    for number in range(sessions):
        journal.append(opened(100 + number, 2 * number))
        journal.append(value(100 + number, 2 * number + 1, f"k{number}", f"text {number} " + "x" * 300))
    for entry in entries:
        journal.append(entry)
    journal.close()
    return path


def past_of(path: Path, mode: Mode = "recover") -> Past:
    journal = Journal.open(path, mode)
    journal.close()
    return journal.past


async def committed(journal: Journal) -> ErrorInfo | None:
    future: asyncio.Future[ErrorInfo | None] = asyncio.get_running_loop().create_future()
    journal.after_commit(future.set_result)
    return await asyncio.wait_for(future, 30)


def crashed(path: Path, name: str = "crashed") -> Path:
    """The files as a process that died at once would have left them."""
    copy = path.with_name(name)
    for suffix in ("", "-wal"):
        if Path(f"{path}{suffix}").exists():
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
    return copy
