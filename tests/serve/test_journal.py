"""The journal's store: what went in comes out, whoever waits is told, one process at a time, and it stays small."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot.configuration import ConfigurationError
from parrot.serve import events as ev
from parrot.serve import journal_writer
from parrot.serve.journal import Journal, read
from parrot.serve.journal_writer import Writer
from parrot.serve.ledger import EFFECT, EVENT, KEPT, Ended, Entry, Mode, Row, Shown, StoredText, encode
from tests.properties.journal_model import MemoryJournal
from tests.serve.journal_support import CONFIG, committed, crashed, opened, over, past_of, said, value, write

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "core.sqlite"


# -------------------------------------------------------------------------------------------------- in, and out again


def test_what_is_appended_is_the_past_of_the_next_opening(path: Path) -> None:
    write(
        path, "recover", opened(7, 0), value(7, 1, "k", "a text \ud800"), said(7, "v1", (1, 2), "ab"), said(7, "v1", (3,), "c")
    )
    past = past_of(path)
    assert past.epoch == 1
    assert past.next_instant > 1
    assert past.now == 1.0
    assert [type(event) for _, event in past.kept] == [ev.OpenSession, ev.SetVariable]
    assert past.texts == {"k": StoredText("k", "a text \ud800", {"t": b"[1,2,3]"})}
    assert past.shown == {(7, "v1"): ([1, 2, 3], "abc")}


def test_a_recover_journal_keeps_nothing_of_a_session_that_ended(path: Path) -> None:
    write(path, "recover", opened(7, 0), value(7, 1, "k", "text"), said(7, "v1", (1,), "a"), over(7, 2.5, "k"))
    past = past_of(path)
    assert (past.kept, past.texts, past.shown, past.ended, past.now) == ([], {}, {}, [(7, "closed")], 2.5)
    with sqlite3.connect(path) as db:
        assert [db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("row", "text", "shown")] == [0, 0, 0]


def test_a_record_journal_keeps_the_rows_of_a_session_that_ended(path: Path) -> None:
    write(path, "record", opened(7, 0), value(7, 1, "k", "text"), over(7, 2.5, "k"))
    past = past_of(path, "record")
    assert (past.kept, past.ended) == ([], [(7, "closed")])
    with read(path) as reading:
        assert [row.instant for row in reading.rows()] == [0, 1]
        assert [row.instant for row in reading.rows(1, 2)] == [1]


def test_a_text_can_go_and_come_again_in_one_transaction(path: Path) -> None:
    write(path, "recover", opened(7, 0), value(7, 1, "k", "text"), over(7, 1, "k"), opened(8, 2), value(8, 3, "k", "text"))
    assert list(past_of(path).texts) == ["k"]


def test_an_output_that_is_settled_has_nothing_shown(path: Path) -> None:
    write(path, "recover", opened(7, 0), said(7, "v1", (1,), "a"), said(7, "v2", (2,), "b"), Entry(settled=[(7, "v1")]))
    assert past_of(path).shown == {(7, "v2"): ([2], "b")}


def test_each_life_counts_and_a_recover_journal_remembers_the_last(path: Path) -> None:
    for _ in range(3):
        write(path, "recover")
    with read(path) as reading:
        assert [life.epoch for life in reading.lives] == [3]
    assert past_of(path).epoch == 3


def test_a_secret_is_not_written(path: Path) -> None:
    write(path, "recover", opened(7, 0))
    with read(path) as reading:
        assert reading.lives[0].config.engine_secret is None
    assert b"a secret" not in path.read_bytes()


def test_the_files_are_for_their_owner_alone(path: Path) -> None:
    path.touch(mode=0o644)
    journal = Journal.open(path, "recover")
    journal.begin(1, 0.0, CONFIG)
    files = [file for file in path.parent.iterdir() if file.name != path.name]
    assert {file.name for file in files} >= {"core.sqlite-wal", "core.sqlite-shm", "core.sqlite.lock"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in [path, *files]} == {0o600}
    journal.close()


def test_the_past_before_a_life_is_what_its_opening_found(path: Path) -> None:
    found = []
    for life in range(4):
        journal = Journal.open(path, "record")
        past = journal.past
        found.append(past)
        journal.begin(life + 1, past.now, CONFIG)
        first = past.next_instant
        journal.append(opened(10 + life, first))
        journal.append(value(10 + life, first + 1, f"k{life}", "text"))
        journal.append(said(10 + life, "v1", (life,), "a"))
        if life:
            journal.append(said(9 + life, "v1", (life,), "b"))
        if life == 2:
            journal.append(over(10, past.now, "k0"))
            journal.append(Entry(settled=[(11, "v1")]))
        journal.close()
    with read(path) as reading:
        assert [reading.past(life.instant) for life in reading.lives] == found
        assert reading.past() == past_of(path, "record")
        assert [(end.session, end.state) for end in reading.ended] == [(10, "closed")]


def test_a_live_journal_can_be_read(path: Path) -> None:
    async def run() -> None:
        journal = Journal.open(path, "record")
        journal.begin(1, 0.0, CONFIG)
        journal.append(opened(7, 0))
        assert await committed(journal) is None
        with read(path) as reading:
            journal.append(opened(8, 1))
            assert await committed(journal) is None
            assert [row.session for row in reading.rows()] == [7]
        journal.close()

    asyncio.run(run())


def test_a_recover_journal_has_no_earlier_pasts(path: Path) -> None:
    write(path, "recover", opened(7, 0))
    with read(path) as reading, pytest.raises(ConfigurationError, match="record"):
        reading.past(0)


# ------------------------------------------------------------------------------------------- the same as in memory


_SESSIONS, _KEYS, _VARIABLES = (1, 2, 3), ("k0", "k1", "k2"), ("v0", "v1")


@st.composite
def _histories(draw: st.DrawFn) -> list[list[Entry]]:
    """Lives, each some entries, as a ledger makes them: what an event names is there, and nothing comes behind an end."""
    lives: list[list[Entry]] = []
    instant = 0
    holders: dict[str, set[int]] = {}
    alive = set(_SESSIONS)
    for _ in range(draw(st.integers(1, 3))):
        entries = []
        for _ in range(draw(st.integers(0, 12))):
            if not alive:
                break
            session = draw(st.sampled_from(sorted(alive)))
            kind = draw(st.sampled_from(["open", "set", "set", "show", "settle", "end", "other"]))
            rows, entry = [], Entry()
            if kind == "open":
                rows = [(KEPT, encode(ev.OpenSession(1, session, "hash")))]
            elif kind == "set":
                key = draw(st.sampled_from(_KEYS))
                rows = [(KEPT, encode(ev.SetVariable(1, session, "h", "v0", ev.Content(key, {}))))]
                if not holders.setdefault(key, set()):
                    entry.texts.append(StoredText(key, draw(st.text(max_size=5)), {}))
                holders[key].add(session)
            elif kind == "show" and any(session in held for held in holders.values()):
                entry.shown.append(Shown(session, draw(st.sampled_from(_VARIABLES)), (instant,), draw(st.text(max_size=3))))
            elif kind == "settle":
                entry.settled.append((session, draw(st.sampled_from(_VARIABLES))))
            elif kind == "end":
                keys = tuple(key for key, held in holders.items() if held == {session})
                for held in holders.values():
                    held.discard(session)
                alive.discard(session)
                entry.ended.append(Ended(session, draw(st.sampled_from(["closed", "expired"])), float(instant), keys))
            else:
                rows = [(EVENT, encode(ev.Tick())), (EFFECT, b"\xc0")]
            entry.rows = [Row(instant, place, float(instant), session, *row) for place, row in enumerate(rows)]
            instant += bool(rows)
            entries.append(entry)
        lives.append(entries)
    return lives


@pytest.mark.parametrize("mode", ["recover", "record"])
@given(lives=_histories())
@settings(deadline=None, max_examples=int(os.environ.get("PARROT_EXAMPLES", "40")))
def test_the_past_is_that_of_a_journal_in_memory(mode: Mode, lives: list[list[Entry]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path, model = Path(directory, "j"), MemoryJournal(mode)
        for epoch, entries in enumerate(lives, start=1):
            journal = Journal.open(path, mode)
            _assert_same(journal, model)
            journal.begin(epoch, journal.past.now, CONFIG)
            model.begin(epoch, journal.past.now)
            for entry in entries:
                journal.append(entry)
                model.commit(entry)
            journal.close()
        journal = Journal.open(path, mode)
        _assert_same(journal, model)
        journal.close()


def _assert_same(journal: Journal, model: MemoryJournal) -> None:
    found, wanted = journal.past, model.past()
    assert found.next_instant >= wanted.next_instant  # a life without rows has an instant too
    found.next_instant = wanted.next_instant
    assert found == wanted
    assert journal.notes == []


# ------------------------------------------------------------------------------------------------------ who waits


async def test_who_waits_is_told_at_once_when_all_is_committed(path: Path) -> None:
    journal = Journal.open(path, "recover")
    told: list[object] = []
    journal.after_commit(told.append)
    assert told == [None]
    journal.append(Entry())
    journal.after_commit(told.append)
    assert told == [None, None]
    journal.append(opened(7, 0))
    journal.after_commit(told.append)
    assert len(told) == 2
    assert await committed(journal) is None
    assert told == [None, None, None]
    journal.close()


async def test_what_comes_while_a_commit_runs_is_one_transaction(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    commit = Writer.commit

    def slow(self: Writer, entries: list[Entry]) -> None:
        sizes.append(len(entries))
        time.sleep(0.05)
        commit(self, entries)

    monkeypatch.setattr(Writer, "commit", slow)
    journal = Journal.open(path, "recover")
    journal.append(opened(1, 0))
    while not sizes:
        await asyncio.sleep(0.001)
    for number in range(50):
        journal.append(opened(2 + number, 1 + number))
    assert await committed(journal) is None
    journal.close()
    assert sizes == [1, 50]


async def test_a_disk_that_hangs_does_not_hold_up_the_event_loop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parrot.serve.journal._HANGS_S", 0.05)
    commit = Writer.commit

    def hang(self: Writer, entries: list[Entry]) -> None:
        time.sleep(0.3)
        commit(self, entries)

    monkeypatch.setattr(Writer, "commit", hang)
    journal = Journal.open(path, "recover")
    journal.append(opened(1, 0))
    waiting = asyncio.ensure_future(committed(journal))
    while journal.failing is None:
        await asyncio.sleep(0.001)
    assert not waiting.done()
    assert journal.failing.code == "unavailable"
    assert await waiting is None
    assert journal.failing is None
    journal.close()


class _Broken:
    """A connection whose commits fail while `error` is set."""

    def __init__(self, db: sqlite3.Connection, at: str) -> None:
        self._db = db
        self._at = at
        self.error: sqlite3.Error | None = None

    def execute(self, sql: str, *parameters: object) -> sqlite3.Cursor:
        if self.error is not None and sql.startswith(self._at):
            raise self.error
        return self._db.execute(sql, *parameters)

    def __getattr__(self, name: str) -> object:
        return getattr(self._db, name)


@pytest.mark.parametrize("at", ["BEGIN", "INSERT OR IGNORE INTO text", "COMMIT"])
async def test_a_full_disk_is_told_and_nothing_is_lost(path: Path, at: str, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal.open(path, "recover")
    journal.begin(1, 0.0, CONFIG)
    broken = _Broken(journal._db, at)
    journal._writer._db = broken  # type: ignore[assignment]
    journal.append(opened(1, 0))
    assert await committed(journal) is None
    broken.error = sqlite3.OperationalError("database or disk is full")
    journal.append(value(1, 1, "k", "text"))
    for _ in range(3):
        told = await committed(journal)
        assert told is not None
        assert told.code == "unavailable"
        assert "disk is full" in told.message
        assert str(path) in told.message
        assert journal.failing == told
    broken.error = None
    journal.append(opened(2, 2))
    assert await committed(journal) is None
    assert journal.failing is None
    journal.close()
    assert [type(event) for _, event in past_of(path).kept] == [ev.OpenSession, ev.SetVariable, ev.OpenSession]
    told_of = [record.getMessage() for record in caplog.records]
    assert ["can be written again" in message for message in told_of] == [False, True]


async def test_a_commit_is_tried_again_when_nothing_is_appended(path: Path) -> None:
    journal = Journal.open(path, "recover")
    broken = _Broken(journal._db, "COMMIT")
    journal._writer._db = broken  # type: ignore[assignment]
    broken.error = sqlite3.OperationalError("disk I/O error")
    journal.append(opened(1, 0))
    assert await committed(journal) is not None
    broken.error = None
    while await committed(journal) is not None:
        pass
    assert journal.failing is None
    journal.close()
    assert len(past_of(path).kept) == 1


async def test_a_locked_database_is_a_failure_that_passes(path: Path) -> None:
    journal = Journal.open(path, "recover")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    journal.append(opened(1, 0))
    told = await committed(journal)
    assert told is not None
    assert "locked" in told.message
    other.execute("ROLLBACK")
    other.close()
    while await committed(journal) is not None:
        pass
    journal.close()
    assert len(past_of(path).kept) == 1


async def test_a_callback_that_fails_harms_no_other(path: Path) -> None:
    journal = Journal.open(path, "recover")
    journal.append(opened(1, 0))

    def fail(_: object) -> None:
        raise RuntimeError("the client is gone")

    journal.after_commit(fail)
    assert await committed(journal) is None
    journal.close()


async def test_closing_commits_what_is_left_and_tells_who_waits(path: Path) -> None:
    journal = Journal.open(path, "recover")
    told: list[object] = []
    for number in range(100):
        journal.append(opened(1 + number, number))
    journal.after_commit(told.append)
    journal.close()
    journal.close()
    assert told == [None]
    journal.append(opened(1000, 1000))
    assert len(past_of(path).kept) == 100


async def test_closing_over_a_full_disk_tells_who_waits(path: Path) -> None:
    journal = Journal.open(path, "recover")
    broken = _Broken(journal._db, "COMMIT")
    journal._writer._db = broken  # type: ignore[assignment]
    broken.error = sqlite3.OperationalError("database or disk is full")
    journal.append(opened(1, 0))
    told: list[object] = []
    journal.after_commit(told.append)
    journal.close()
    assert len(told) == 1
    assert told[0] is not None
    assert past_of(path).kept == []


def test_a_file_that_may_not_grow_fails_and_nothing_dies(path: Path) -> None:
    """A real limit, in a process of its own: the journal fails, the limit goes, and all of it is there."""
    child = """
import asyncio, resource, sys
from pathlib import Path
from parrot.serve.journal import Journal
from tests.serve.journal_support import CONFIG, committed, opened, value
async def main():
    journal = Journal.open(Path(sys.argv[1]), "recover")
    journal.begin(1, 0.0, CONFIG)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    number, error = 0, None
    while error is None:
        journal.append(opened(number + 1, 2 * number))
        journal.append(value(number + 1, 2 * number + 1, f"k{number}", "x" * 2000))
        number += 1
        error = await committed(journal)
    assert error.code == "unavailable", error
    assert journal.failing is not None
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    while await committed(journal) is not None:
        pass
    assert journal.failing is None
    journal.close()
    print(number)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", child, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(past_of(path).kept) == 2 * int(done.stdout)


# ----------------------------------------------------------------------------------------------------------- crashes


async def test_what_was_committed_survives_a_crash(path: Path) -> None:
    journal = Journal.open(path, "recover")
    journal.begin(1, 0.0, CONFIG)
    for number in range(20):
        journal.append(opened(1 + number, number))
    assert await committed(journal) is None
    past = past_of(crashed(path))
    assert [event.session_id for _, event in past.kept] == list(range(1, 21))  # type: ignore[union-attr]
    assert past.epoch == 1
    journal.close()


def test_a_killed_process_has_kept_what_it_acknowledged_and_nothing_in_half(path: Path) -> None:
    child = """
import asyncio, sys
from pathlib import Path
from parrot.serve.journal import Journal
from tests.serve.journal_support import CONFIG, committed, value, opened
async def main():
    journal = Journal.open(Path(sys.argv[1]), "recover")
    journal.begin(journal.past.epoch + 1, 0.0, CONFIG)
    number = journal.past.next_instant
    while True:
        for _ in range(7):
            entry, text = opened(number, number), value(number, number, f"k{number}", "x" * 500)
            entry.rows.append(text.rows[0]._replace(position=1))
            entry.texts += text.texts
            journal.append(entry)
            number += 1
        assert await committed(journal) is None
        print(number - 1, flush=True)
asyncio.run(main())
"""
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", child, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(40)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.wait()
        journal = Journal.open(path, "recover")
        journal.close()
        kinds: dict[int, list[type]] = {}
        for _, event in journal.past.kept:
            kinds.setdefault(event.session_id, []).append(type(event))  # type: ignore[union-attr]
        assert set(range(acknowledged[0] - 6, acknowledged[-1] + 1)) <= kinds.keys()
        assert all(found == [ev.OpenSession, ev.SetVariable] for found in kinds.values())
        assert {f"k{session}" for session in kinds} == journal.past.texts.keys()


# ------------------------------------------------------------------------------------------------------------- its size


async def test_the_write_ahead_log_stays_small(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_writer, "CHECKPOINT_BYTES", 256 << 10)
    journal = Journal.open(path, "recover")
    largest = 0
    for number in range(400):
        journal.append(opened(1 + number, 2 * number))
        journal.append(value(1 + number, 2 * number + 1, f"k{number}", "x" * 10_000))
        assert await committed(journal) is None
        largest = max(largest, Path(f"{path}-wal").stat().st_size)
    assert path.stat().st_size + largest > 400 * 10_000
    assert largest < 1 << 20
    journal.close()


async def test_a_recover_journal_of_short_sessions_does_not_grow(path: Path) -> None:
    journal = Journal.open(path, "recover")
    sizes = []
    for number in range(3000):
        journal.append(opened(1 + number, 2 * number))
        journal.append(value(1 + number, 2 * number + 1, f"k{number}", "x" * 1000))
        journal.append(over(1 + number, 2.0 * number + 1, f"k{number}"))
        if number % 500 == 499:
            assert await committed(journal) is None
            journal._writer.checkpoint()
            sizes.append(path.stat().st_size)
    journal.close()
    assert sizes[-1] < sizes[0] + 3000 * 100  # what is remembered of ended sessions, and no more


def test_ended_sessions_are_remembered_up_to_a_number(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("journal_writer", "journal_files"):
        monkeypatch.setattr(f"parrot.serve.{module}.REMEMBERED_SESSIONS", 10)
    monkeypatch.setattr(journal_writer, "_ENDED_SLACK", 5)
    write(path, "recover", *(over(1 + number, float(number)) for number in range(100)))
    assert [session for session, _ in past_of(path).ended] == list(range(91, 101))
    with read(path) as reading:
        assert len(reading.ended) <= 15
