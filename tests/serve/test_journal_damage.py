"""Journals that are not what they should be: each is refused in one line that says what to do, or loses one torn row."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from parrot.configuration import ConfigurationError
from parrot.serve.journal import Journal, read
from parrot.serve.journal_files import place_of, row_columns
from parrot.serve.journal_salvage import main
from parrot.serve.ledger import KEPT, Entry, Mode, Past, Row
from tests.serve.journal_support import CONFIG, committed, crashed, opened, over, past_of, said, write

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "core.sqlite"


def refused(path: Path, mode: Mode = "recover") -> str:
    """Why; the journal is as it was, and can be tried again at once."""
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(ConfigurationError) as caught:
        Journal.open(path, mode)
    with pytest.raises(ConfigurationError) as again:
        Journal.open(path, mode)
    message = str(caught.value)
    assert str(again.value) == message
    assert str(path.resolve()) in message
    assert "\n" not in message
    assert (path.read_bytes() if path.is_file() else b"") == before
    return message


def change(path: Path, sql: str, *parameters: object) -> None:
    with sqlite3.connect(path) as db:
        db.execute(sql, parameters)
    db.close()


def sessions(past: Past) -> set[int]:
    return {event.session_id for _, event in past.kept}  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ not a journal at all


def test_a_text_file_is_not_a_journal(path: Path) -> None:
    path.write_text("what is this? " * 100)
    assert "not a journal" in refused(path)
    with pytest.raises(ConfigurationError, match="not a journal"):
        read(path)


def test_another_database_is_not_a_journal(path: Path) -> None:
    change(path, "CREATE TABLE something(value)")
    assert "not a journal" in refused(path)


def test_a_journal_of_another_version_is_refused(path: Path) -> None:
    write(path, "recover", sessions=1)
    change(path, "PRAGMA user_version = 7")
    message = refused(path)
    assert "version 7" in message
    assert "version 1" in message


def test_an_empty_file_becomes_a_journal(path: Path) -> None:
    path.touch()
    write(path, "recover", sessions=1)
    assert len(sessions(past_of(path))) == 1


@pytest.mark.parametrize(("written", "wanted"), [("recover", "record"), ("record", "recover")])
def test_a_journal_of_the_other_mode_is_refused(path: Path, written: Mode, wanted: Mode) -> None:
    write(path, written, sessions=1)
    assert f"set journal_mode to {written!r}" in refused(path, wanted)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert "is a directory" in refused(tmp_path)


def test_a_directory_that_is_not_there_is_refused(path: Path) -> None:
    assert "cannot be written" in refused(path.parent / "nowhere" / "core.sqlite")


_AS_NOBODY = """
import os, sys
from parrot.configuration import ConfigurationError
from parrot.serve.journal import Journal
if os.geteuid() == 0:
    os.setuid(65534)
try:
    Journal.open(sys.argv[1], "recover")
except ConfigurationError as error:
    print(error)
"""


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that others may enter; pytest's own are closed to them, by every session that begins meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("what", ["the file", "the directory"])
def test_what_may_not_be_written_is_refused(open_path: Path, what: str) -> None:
    directory = open_path / "d"
    directory.mkdir()
    path = write(directory / "core.sqlite", "recover", sessions=1)
    Path(f"{path}.lock").chmod(0o666)
    path.chmod(0o644 if what == "the directory" else 0o444)
    directory.chmod(0o777 if what == "the file" else 0o555)
    if what == "the directory":
        Path(f"{path}.lock").unlink()
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert f"{path}: cannot be written: Permission denied" in done.stdout, done
    assert done.stdout.count("\n") == 1


# -------------------------------------------------------------------------------------------------------- one at a time


def test_two_cores_never_share_a_journal(path: Path) -> None:
    journal = Journal.open(path, "recover")
    link = path.with_name("another-name")
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(ConfigurationError, match=f"in use by another core .process {os.getpid()}.") as caught:
            Journal.open(name, "recover")
        assert "\n" not in str(caught.value)
    journal.close()
    Journal.open(link, "recover").close()


def test_another_process_is_named_and_its_death_frees_the_journal(path: Path) -> None:
    child = """
import sys, time
from parrot.serve.journal import Journal
journal = Journal.open(sys.argv[1], "recover")
print(flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", child, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(ConfigurationError, match=f"process {process.pid}"):
        Journal.open(path, "recover")
    with pytest.raises(ConfigurationError, match=f"process {process.pid}"):
        Journal.open(path, "recover")
    process.kill()
    process.wait()
    Journal.open(path, "recover").close()


@pytest.mark.parametrize("how", ["the lock file removed", "a second name"])
def test_there_is_no_way_around_the_lock(path: Path, how: str) -> None:
    first = Journal.open(path, "recover")
    other = path
    if how == "a second name":
        other = path.with_name("second")
        other.hardlink_to(path)
    else:
        Path(f"{path}.lock").unlink()
    with pytest.raises(ConfigurationError, match="in use by another core"):
        Journal.open(other, "recover")
    first.close()
    Journal.open(path, "recover").close()


def test_a_refusal_gives_the_lock_back(path: Path) -> None:
    write(path, "recover", sessions=1)
    refused(path, "record")
    assert len(sessions(past_of(path))) == 1


# ---------------------------------------------------------------------------------------------------------- a torn end


def test_a_last_row_that_is_cut_short_is_dropped_and_nothing_else(path: Path) -> None:
    write(path, "recover", sessions=10)
    whole = past_of(path)
    change(path, "UPDATE row SET body = substr(body, 1, 9) WHERE place = (SELECT max(place) FROM row)")
    journal = Journal.open(path, "recover")
    (note,) = journal.notes
    assert "last row" in note
    assert "session 109" in note
    assert journal.past.kept == whole.kept[:-1]
    assert journal.past.texts.keys() == whole.texts.keys() - {"k9"}
    journal.close()
    journal = Journal.open(path, "recover")
    assert journal.notes == []
    assert journal.past.kept == whole.kept[:-1]
    journal.close()


async def test_a_write_ahead_log_that_ends_within_a_frame_loses_the_last_transaction(path: Path) -> None:
    journal = Journal.open(path, "recover")
    journal.begin(1, 0.0, CONFIG)
    for number in range(20):
        journal.append(opened(1 + number, number))
        assert await committed(journal) is None
    torn = crashed(path)
    journal.close()
    wal = Path(f"{torn}-wal")
    os.truncate(wal, wal.stat().st_size - 1000)
    journal = Journal.open(torn, "recover")
    assert len(journal.notes) == 1
    assert "ends within a transaction" in journal.notes[0]
    assert sessions(journal.past) == set(range(1, 20))
    journal.close()


async def test_a_write_ahead_log_that_is_broken_in_its_middle_is_refused_and_its_beginning_saved(path: Path) -> None:
    journal = Journal.open(path, "recover")
    journal.begin(1, 0.0, CONFIG)
    for number in range(20):
        journal.append(opened(1 + number, number))
        assert await committed(journal) is None
    broken = crashed(path)
    journal.close()
    wal = Path(f"{broken}-wal")
    data = bytearray(wal.read_bytes())
    data[len(data) // 2] ^= 0xFF
    wal.write_bytes(data)
    message = refused(broken)
    assert "crashed-wal is broken" in message
    assert f"salvage {broken}" in message
    assert wal.read_bytes() == data
    assert main(["check", str(broken)]) == 1
    new = path.with_name("new")
    assert main(["salvage", str(broken), str(new)]) == 0
    saved = sessions(past_of(new))
    assert saved == set(range(1, max(saved) + 1))
    assert 5 < len(saved) < 15


# ------------------------------------------------------------------------------------------------ damage in the middle


def check(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(["check", str(path)])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_a_sound_journal_is_said_to_be_sound(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, "recover", over(100, 50.0, "k0"), sessions=10)
    status, out, err = check(path, capsys)
    assert (status, err) == (0, "")
    for line in ("version   1", "mode      recover", "lives     1, the last is epoch 1", "rows      18", "texts     9"):
        assert line in out
    assert "sessions  9 with rows, 9 of them not over" in out


def test_checking_a_live_journal_finds_it_sound(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal.open(path, "recover")
    journal.begin(1, 0.0, CONFIG)
    assert check(path, capsys)[0] == 0
    journal.close()


@pytest.mark.parametrize("path_given", ["missing", "text"])
def test_the_commands_refuse_what_is_no_journal(tmp_path: Path, path_given: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("no journal")
    for arguments in (["check", str(tmp_path / path_given)], ["salvage", str(tmp_path / path_given), str(tmp_path / "new")]):
        assert main(arguments) == 1
        assert "journal" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_salvage_does_not_write_over_anything(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(path, "recover", sessions=1)
    new = path.with_name("new")
    new.write_text("precious")
    assert main(["salvage", str(path), str(new)]) == 1
    assert new.read_text() == "precious"


def test_a_salvage_of_a_journal_in_use_is_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal.open(path, "recover")
    assert main(["salvage", str(path), str(path.with_name("new"))]) == 1
    assert "in use" in capsys.readouterr().err
    journal.close()


# What is done to a journal of ten sessions (100 …), and what the refusal names.
_DAMAGES = {
    "a body": (
        "UPDATE row SET body = zeroblob(9) WHERE place = ?",
        place_of(8),
        "instant 8, session 104: its checksum is wrong",
    ),
    "a time": ("UPDATE row SET t = t + 1 WHERE place = ?", place_of(8), "instant 8, session 104: its checksum is wrong"),
    "a missing text": ("DELETE FROM text WHERE number = ?", 5, "text k4 is not there, but session 104 names it"),
    "a text": ("UPDATE text SET text = 'x' WHERE number = ?", 5, "table text, number 5: its checksum is wrong"),
}


@pytest.mark.parametrize("mode", ["recover", "record"])
@pytest.mark.parametrize("damage", _DAMAGES)
def test_damage_in_the_middle_is_refused_and_whole_sessions_are_saved(
    path: Path, mode: Mode, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sql, parameter, told = _DAMAGES[damage]
    write(path, mode, sessions=10)
    whole = past_of(path, mode)
    change(path, sql.replace("'x'", "CAST('x' AS BLOB)"), parameter)
    message = refused(path, mode)
    assert told in message
    assert "9 of 10 sessions (18 rows) can be saved" in message
    assert f"salvage {path} NEW" in message
    status, _, err = check(path, capsys)
    assert status == 1
    assert told in err
    before, new = path.read_bytes(), path.with_name("new")
    assert main(["salvage", str(path), str(new)]) == 0
    assert "left behind: session 104" in capsys.readouterr().out
    assert path.read_bytes() == before
    saved = past_of(new, mode)
    assert saved.kept == [(t, event) for t, event in whole.kept if event.session_id != 104]  # type: ignore[union-attr]
    assert saved.texts == {key: text for key, text in whole.texts.items() if key != "k4"}
    assert (saved.epoch, saved.next_instant) == (whole.epoch, whole.next_instant)


def test_a_row_that_is_no_event_is_refused(path: Path) -> None:
    row = Row(3, 1, 3.0, 101, KEPT, b"\x81\xa4type\xa4what")
    write(path, "recover", Entry(rows=[row]), sessions=10)
    assert row_columns(row)[0] == place_of(3, 1)
    message = refused(path)
    assert "instant 3, session 101: not an event" in message
    assert "9 of 10 sessions" in message


def test_what_was_shown_belongs_to_a_session(path: Path) -> None:
    write(path, "recover", said(101, "v1", (1, 2), "ab"), said(102, "v1", (3,), "c"), sessions=10)
    change(path, "UPDATE shown SET text = CAST('xx' AS BLOB) WHERE session = 101")
    assert "table shown" in refused(path)
    new = path.with_name("new")
    assert main(["salvage", str(path), str(new)]) == 0
    saved = past_of(new)
    assert 101 not in sessions(saved)
    assert saved.shown == {(102, "v1"): ([3], "c")}


def test_a_lost_life_does_not_let_an_epoch_be_used_twice(path: Path) -> None:
    write(path, "recover", sessions=3)
    change(path, "UPDATE life SET config = '{}'")
    assert "table life" in refused(path)
    new = path.with_name("new")
    assert main(["salvage", str(path), str(new)]) == 0
    saved = past_of(new)
    assert saved.epoch > 1
    assert len(sessions(saved)) == 3


def test_what_a_lost_row_of_ended_sessions_leaves_open_is_not_saved_from_a_record(path: Path) -> None:
    write(path, "record", over(100, 50.0), over(101, 51.0), sessions=4)
    change(path, "UPDATE ended SET state = 'expired' WHERE session = 101")
    assert "table ended" in refused(path, "record")
    new = path.with_name("new")
    assert main(["salvage", str(path), str(new)]) == 0
    with read(new) as reading:
        assert {row.session for row in reading.rows()} == {100}


def test_a_page_that_cannot_be_read_costs_the_sessions_that_have_rows_on_it(path: Path) -> None:
    write(path, "recover", sessions=200)
    whole = past_of(path)
    data = bytearray(path.read_bytes())
    table_leaf = 13  # SQLite's page type
    leaf = next(at for at in range(0, len(data), 4096) if data[at] == table_leaf and b"SetVariable" in data[at : at + 4096])
    data[leaf : leaf + 100] = b"\xff" * 100
    path.write_bytes(data)
    assert "can be saved" in refused(path)
    new = path.with_name("new")
    assert main(["salvage", str(path), str(new)]) == 0
    saved = past_of(new)
    assert 100 < len(sessions(saved)) < 200
    assert saved.kept == [(t, event) for t, event in whole.kept if event.session_id in sessions(saved)]  # type: ignore[union-attr]


def opened_or_refused(path: Path, mode: Mode) -> Journal | None:
    try:
        journal = Journal.open(path, mode)
    except ConfigurationError as error:
        message = str(error)
    else:
        journal.close()
        return journal
    assert "\n" not in message
    return None


@pytest.mark.parametrize("mode", ["recover", "record"])
@pytest.mark.parametrize("how", ["flip", "cut", "blank"])
def test_random_damage_is_refused_or_harmless(tmp_path: Path, mode: Mode, how: str) -> None:
    """Whatever is broken: a core finds what was there (less one torn row), or it is refused and whole sessions are saved."""
    original = write(tmp_path / "original", mode, said(105, "v1", (1,), "a"), over(100, 90.0, "k0"), sessions=40)
    whole = past_of(original, mode)
    data = original.read_bytes()
    generator = random.Random(f"{mode} {how}")
    refusals = 0
    for number in range(int(os.environ.get("PARROT_EXAMPLES", "25"))):
        path, new = tmp_path / f"{number}", tmp_path / f"{number}.new"
        broken = bytearray(data)
        at = generator.randrange(len(data))
        if how == "flip":
            broken[at] ^= 1 << generator.randrange(8)
        elif how == "cut":
            del broken[at:]
        else:
            broken[at : at + 512] = bytes(len(broken[at : at + 512]))
        path.write_bytes(broken)
        journal = opened_or_refused(path, mode)
        if journal is None:
            refusals += 1
        else:
            assert journal.past.kept in (whole.kept, whole.kept[:-1] if journal.notes else whole.kept)
            assert (journal.past.ended, journal.past.shown) == (whole.ended, whole.shown)
        path.write_bytes(broken)
        if main(["salvage", str(path), str(new)]) == 0:
            saved = past_of(new, mode)
            mine = sessions(saved)
            assert saved.kept == [(t, event) for t, event in whole.kept if event.session_id in mine]  # type: ignore[union-attr]
            assert saved.texts.items() <= whole.texts.items()
        for file in tmp_path.glob(f"{number}*"):
            file.unlink()
    assert refusals > 0


def test_the_commands_run_as_the_refusal_says(path: Path) -> None:
    write(path, "recover", sessions=3)
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    run = [sys.executable, "-m", "parrot.serve.journal"]
    for arguments in (["check", str(copy)], ["salvage", str(copy), str(path.with_name("new"))]):
        done = subprocess.run([*run, *arguments], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert "saved 3 sessions, 6 rows and 3 texts" in done.stdout


def test_refusals_checks_and_salvages_leave_no_file_open(path: Path) -> None:
    write(path, "recover", sessions=3)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        refused(path, "record")
        assert main(["salvage", str(path), str(path.with_name(f"new{number}"))]) == 0
        assert main(["check", str(path)]) == 0
    assert len(os.listdir("/proc/self/fd")) == before
