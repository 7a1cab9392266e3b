"""Replaying a journal: the same effects, the first difference with both sides, and what is refused."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec
import pytest

from parrot.protocol.api import SamplingConfig
from parrot.protocol.engine import EngineDescription
from parrot.serve import events as ev
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from parrot.serve.effects import AnyEffect, Dispatch, Reply
from parrot.serve.journal import Journal
from parrot.serve.journal_files import row_columns
from parrot.serve.ledger import EFFECT, Ledger, Mode, Row, encode
from parrot.serve.recovery import recover
from parrot.serve.texts import Piece
from sim.replay import main, replay

CALLS = 6


class AnyText:
    """A store that has every text: its key."""

    def find(self, key: str) -> Piece:
        return Piece(key, key)


def engine(number: int) -> EngineDescription:
    return EngineDescription(
        f"e{number}", "m", "tok", "localhost", number, "emulated", tasks_capacity=4, tokens_capacity=10_000, max_seq_len=2048
    )


def live(path: Path, mode: Mode = "record", config: ServeCoreConfig | None = None) -> None:
    """One life on the journal at `path`: two engines, sessions with calls that share a prefix; the last is left running."""
    journal = Journal.open(path, mode)
    past = journal.past
    core = recover(config or ServeCoreConfig(), past, past.epoch + 1)
    journal.begin(core.epoch, past.now, core.config)
    ledger = Ledger(mode, AnyText(), past)
    now, request = past.now, 0
    dispatched: list[Dispatch] = []
    replies: dict[int, Reply] = {}

    def at(*events: ev.AnyEvent) -> None:
        nonlocal now
        now += 0.125
        effects = core.handle(events, now)
        assert not core.take_faults()
        journal.append(ledger.instant(now, events, effects, {})[0])
        dispatched.extend(effect for effect in effects if isinstance(effect, Dispatch))
        replies.update((effect.request, effect) for effect in effects if isinstance(effect, Reply))

    def number() -> int:
        nonlocal request
        request += 1
        return request

    if past.epoch:
        at(ev.Restarted(core.epoch))
    at(ev.RegisterEngine(number(), engine(1)), ev.RegisterEngine(number(), engine(2)))
    for call in range(CALLS):
        session = core.epoch * 100 + call
        at(ev.OpenSession(number(), session, "hash"))
        segments = (ev.Constant(ev.Content("system", {"tok": 200})), ev.Output("o", SamplingConfig(max_gen_length=50)))
        asked = number()
        at(ev.SubmitCall(asked, session, "hash", segments))
        at(ev.GetVariable(number(), session, "hash", replies[asked].payload.param_info[0].var_id))
    for task in dispatched[:-1]:
        name = (task.epoch, task.task, task.attempt)
        at(ev.TaskStarted(*name), ev.FirstToken(*name))
        at(ev.TaskFinished(*name, ev.Content(f"out{task.task.session_id}", {"tok": 5}), 5))
    at(ev.TaskFailed(*(dispatched[0].epoch, dispatched[0].task, dispatched[0].attempt), "engine_failed", "late", True))
    at(ev.CloseSession(number(), core.epoch * 100, "hash"))
    journal.close()


def rewrite(path: Path, which: type[AnyEffect], change: dict[str, object]) -> Row:  # type: ignore[valid-type]
    """Changes the first effect of that kind, with a checksum that fits; returns its row."""
    decoder = msgspec.msgpack.Decoder(AnyEffect)
    with sqlite3.connect(path) as db:
        for place, t, session, kind, body in db.execute(
            "SELECT place, t, session, kind, body FROM row ORDER BY place"
        ).fetchall():
            if kind == EFFECT and isinstance(effect := decoder.decode(body), which):
                changed = encode(msgspec.structs.replace(effect, **change))
                row = Row(place >> 24, place & 0xFFFFFF, t, session, kind, changed)
                columns = row_columns(row)
                assert columns[0] == place
                db.execute("UPDATE row SET body = ?, crc = ? WHERE place = ?", (changed, columns[-1], place))
                return row
    raise AssertionError(f"no {which}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def test_every_life_replays_to_the_same_effects(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        live(path)
    found = replay(path)
    assert (found.lives, found.difference, found.faults) == (3, None, 0)
    each = [replay(path, life=number) for number in (1, 2, 3)]
    assert sum(one.instants for one in each) == found.instants > 60
    assert sum(one.events for one in each) == found.events
    assert sum(one.effects for one in each) == found.effects
    assert main([str(path)]) == 0
    assert "3 lives" in (said := capsys.readouterr().out)
    assert "the same effects" in said


def test_the_first_difference_is_shown_with_both_sides(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live(path)
    live(path)
    row = rewrite(path, Dispatch, {"engine_id": 77})
    found = replay(path)
    assert found.difference is not None
    assert (found.difference.epoch, found.difference.instant, found.difference.t) == (1, row.instant, row.t)
    assert found.difference.events
    assert [e.engine_id for e in found.difference.recorded if isinstance(e, Dispatch)] == [77]
    assert [e.engine_id for e in found.difference.replayed if isinstance(e, Dispatch)] == [1]
    assert main([str(path)]) == 1
    said = capsys.readouterr().out
    assert f"life 1, instant {row.instant}" in said
    marked = [line for line in said.splitlines() if line.startswith("-->")]
    assert len(marked) == 2
    assert '"engine_id":77' in marked[0]
    assert '"engine_id":1' in marked[1]
    assert replay(path, life=2).difference is None


def test_an_effect_that_is_missing_is_a_difference(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live(path)
    row = rewrite(path, Dispatch, {})
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM row WHERE place = ?", (row.instant << 24 | row.position,))
    assert main([str(path)]) == 1
    assert "--> (none)" in capsys.readouterr().out


def test_another_policy_is_told_by_its_decisions(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def under(policy: str) -> ServeCoreConfig:
        return ServeCoreConfig(global_scheduler=GlobalSchedulerConfig(policy=policy, ctx_aware=policy == "parrot"))

    live(path, config=under("round_robin"))
    same = replay(path, config=under("round_robin"))
    assert (same.decisions, same.changed) == (CALLS, 0)
    other = replay(path, config=under("parrot"))
    assert other.difference is None
    assert other.decisions == CALLS
    assert 0 < other.changed < CALLS
    assert other.first_changed is not None
    assert other.first_changed.recorded != other.first_changed.replayed
    file = tmp_path / "core.json"
    file.write_bytes(msgspec.json.encode(under("parrot")))
    assert main([str(path), "--config", str(file)]) == 0
    assert f"{other.changed} of {CALLS} decisions differ" in capsys.readouterr().out


def test_what_cannot_be_replayed_is_one_line(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        return said.err

    assert "no such journal" in refused(str(tmp_path / "nowhere.sqlite"))
    live(path, "recover")
    assert '"journal_mode": "record"' in refused(str(path))
    recorded = tmp_path / "recorded.sqlite"
    live(recorded)
    assert "it has no life 4; it has: 1" in refused(str(recorded), "--life", "4")
    assert "nowhere.json" in refused(str(recorded), "--config", str(tmp_path / "nowhere.json"))
    with sqlite3.connect(recorded) as db:
        db.execute("UPDATE row SET body = zeroblob(20) WHERE place >> 24 = 4")
    assert "damaged" in refused(str(recorded))


def test_a_journal_is_left_as_it_was(path: Path) -> None:
    live(path)
    before = path.read_bytes()
    replay(path)
    assert path.read_bytes() == before
