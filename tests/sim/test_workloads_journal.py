"""The journal of a core becomes programs: what was called, set and fetched, how long outputs were, who waited for what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from parrot.protocol.api import CallAnswer, Criteria, SamplingConfig
from parrot.protocol.engine import EngineDescription
from parrot.serve import events as ev
from parrot.serve.config import ServeCoreConfig
from parrot.serve.effects import Dispatch, Reply
from parrot.serve.journal import Journal
from parrot.serve.ledger import Ledger, Mode
from parrot.serve.recovery import recover
from parrot.serve.texts import Piece
from sim.workloads import WorkloadError, open_workload
from sim.workloads.__main__ import main
from sim.workloads.journal import read_journal
from sim.workloads.program import After, Get, Program, Read, Set, Text, Write

ENGINE = EngineDescription(
    "e", "m", "tok", "localhost", 1, "emulated", tasks_capacity=64, tokens_capacity=10_000, max_seq_len=2048
)
SAMPLING = SamplingConfig(max_gen_length=64)


class AnyText:
    """A store that has every text: its key."""

    def find(self, key: str) -> Piece:
        return Piece(key, key)


class Cluster:
    """A core with one engine that answers when it is told to, and the journal of it all."""

    def __init__(self, path: Path, mode: Mode = "record") -> None:
        self.path = path
        self.mode: Mode = mode
        self._begin(0.0)
        self.at(0.0, ev.RegisterEngine(self.next(), ENGINE))

    def _begin(self, now: float) -> None:
        self.journal = Journal.open(self.path, self.mode)
        past = self.journal.past
        self.core = recover(ServeCoreConfig(), past, past.epoch + 1)
        self.journal.begin(self.core.epoch, now, self.core.config)
        self.ledger = Ledger(self.mode, AnyText(), past)
        self.running: list[Dispatch] = []
        self.replies: dict[int, Reply] = {}
        self.request = 0

    def restart(self, now: float) -> None:
        """The core dies and lives again; its engine comes back."""
        self.journal.close()
        self._begin(now)
        self.at(now, ev.Restarted(self.core.epoch))
        self.at(now, ev.RegisterEngine(self.next(), ENGINE))

    def programs(self) -> Sequence[Program]:
        self.journal.close()
        return read_journal(self.path).programs

    def next(self) -> int:
        self.request += 1
        return self.request

    def at(self, now: float, *events: ev.AnyEvent) -> None:
        effects = self.core.handle(events, now)
        assert not self.core.take_faults()
        self.journal.append(self.ledger.instant(now, events, effects, {})[0])
        for effect in effects:
            if isinstance(effect, Dispatch):
                self.running.append(effect)
            elif isinstance(effect, Reply):
                self.replies[effect.request] = effect

    def open(self, now: float, session: int, tenant: str = "") -> None:
        self.at(now, ev.OpenSession(self.next(), session, "hash", tenant=tenant))

    def call(self, now: float, session: int, *segments: ev.Segment, **fields: Any) -> list[str]:
        """Submits; returns the variables of the placeholders, in order."""
        number = self.next()
        self.at(now, ev.SubmitCall(number, session, "hash", segments, **fields))
        answer = self.replies[number].payload
        assert isinstance(answer, CallAnswer), self.replies[number]
        return [info.var_id for info in answer.param_info]

    def get(
        self, now: float, session: int, var: str, criteria: Criteria | None = Criteria.LATENCY, deadline: float | None = None
    ) -> int:
        number = self.next()
        self.at(now, ev.GetVariable(number, session, "hash", var, criteria, deadline=deadline))
        return number

    def finish(self, now: float, tokens: int) -> None:
        """The engine ends the task that it was given first."""
        task = self.running.pop(0)
        name = (task.epoch, task.task, task.attempt)
        self.at(
            now, ev.TaskStarted(*name), ev.FirstToken(*name), ev.TaskFinished(*name, content(f"out{tokens}", tokens), tokens)
        )


def content(key: str, tokens: int) -> ev.Content:
    return ev.Content(key, {"tok": tokens, "other": tokens + 1})


def text(key: str, tokens: int) -> ev.Constant:
    return ev.Constant(content(key, tokens))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def cluster(path: Path) -> Iterator[Cluster]:
    cluster = Cluster(path)
    yield cluster
    cluster.journal.close()


def test_a_chat_keeps_its_lengths_and_the_time_that_its_user_took(cluster: Cluster) -> None:
    cluster.open(10.0, 7, tenant="t")
    (first,) = cluster.call(10.0, 7, text("system", 30), ev.Output("a", SAMPLING), func_name="turn")
    cluster.get(10.0, 7, first)
    cluster.finish(12.0, 20)
    known, second = cluster.call(
        15.5, 7, text("system", 30), ev.Input("a", var_id=first), text("more", 5), ev.Output("b", SAMPLING), cache_prefix=False
    )
    assert known == first
    cluster.get(15.75, 7, second, None, deadline=8.0)
    cluster.finish(17.0, 9)
    (program,) = cluster.programs()
    assert (program.arrival_s, program.tenant, program.application) == (0.0, "t", "turn")
    assert program.calls[0].segments == (Text("system", 30), Write(first, 20, 64, "out20"))
    assert program.calls[0].after == ()
    assert program.calls[1].segments == (Text("system", 30), Read(first), Text("more", 5), Write(second, 9, 64, "out9"))
    assert program.calls[1].after == (After("get0", 3.5),)
    assert not program.calls[1].cache_prefix
    assert program.gets == (
        Get("get0", first, Criteria.LATENCY),
        Get("get1", second, Criteria.THROUGHPUT, (After("get0", 3.75),), 8.0),
    )


def test_a_step_after_several_gets_follows_all_of_them(cluster: Cluster) -> None:
    cluster.open(0.0, 1)
    parts = [cluster.call(0.0, 1, text(f"chunk{i}", 10), ev.Output("s", SAMPLING))[0] for i in range(2)]
    for part in parts:
        cluster.get(0.0, 1, part)
    cluster.finish(1.0, 5)
    cluster.finish(2.0, 6)
    (last,) = cluster.call(2.5, 1, text("joined by the client", 11), ev.Output("s", SAMPLING))
    cluster.get(2.5, 1, last)
    cluster.finish(3.0, 7)
    (program,) = cluster.programs()
    assert program.calls[2].after == (After("get0", 0.5), After("get1", 0.5))


def test_variables_set_from_outside_and_values_given_with_a_call_are_sets(cluster: Cluster) -> None:
    cluster.open(1.0, 1)
    number = cluster.next()
    cluster.at(1.0, ev.CreateVariable(number, 1, "hash", "doc"))
    var = cluster.replies[number].payload
    var = var if isinstance(var, str) else msgspec.to_builtins(var)["var_id"]
    cluster.at(1.25, ev.SetVariable(cluster.next(), 1, "hash", var, content("document", 200)))
    (_, given, out) = cluster.call(
        1.25,
        1,
        text("read", 4),
        ev.Input("d", var_id=var),
        ev.Input("v", value=content("given", 8)),
        ev.Output("o", SAMPLING),
    )
    cluster.get(1.25, 1, out)
    cluster.finish(2.0, 3)
    (_, last) = cluster.call(2.0, 1, text("again", 4), ev.Input("v", var_id=given), ev.Output("o", SAMPLING))
    cluster.get(2.0, 1, last)
    cluster.finish(3.0, 6)
    (program,) = cluster.programs()
    after = (After(None, 0.25),)
    assert program.sets == (Set(var, "document", 200, after), Set(given, "given", 8, after))
    assert program.calls[0].segments == (Text("read", 4), Read(var), Read(given), Write(out, 3, 64, "out3"))
    assert program.calls[1].segments == (Text("again", 4), Read(given), Write(last, 6, 64, "out6"))


def test_sessions_are_programs_in_order_of_arrival_and_scale_to_a_rate(cluster: Cluster) -> None:
    for session, opened in ((5, 2.0), (3, 4.0), (4, 6.0)):
        cluster.open(opened, session)
        (out,) = cluster.call(opened, session, text("x", 4), ev.Output("o", SAMPLING))
        cluster.get(opened, session, out)
        cluster.finish(opened + 1.0, 3)
    assert [(p.id, p.arrival_s) for p in cluster.programs()] == [("session-5", 0), ("session-3", 2), ("session-4", 4)]
    assert [p.arrival_s for p in open_workload(f"journal:{cluster.path}", rate=1.0)] == [0.0, 1.0, 2.0]


def test_unfinished_and_failed_sessions_are_left_out_with_their_reason(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for session in (1, 2, 3):
        cluster.open(0.0, session)
    (one,) = cluster.call(0.0, 1, text("x", 4), ev.Output("o", SAMPLING))
    (two,) = cluster.call(0.0, 2, text("x", 4), ev.Output("o", SAMPLING))
    cluster.get(0.0, 1, one)
    cluster.get(0.0, 2, two)
    failed = next(d for d in cluster.running if d.task.session_id == 1)
    cluster.at(1.0, ev.TaskFailed(failed.epoch, failed.task, failed.attempt, "generation_failed", "it broke"))
    cluster.journal.close()
    recorded = read_journal(cluster.path)
    assert not recorded.programs
    assert [reason.split(": ", 1)[0] for reason in recorded.skipped] == ["session 1", "session 2", "session 3"]
    assert "still waited" in recorded.skipped[1]
    assert "fetched nothing" in recorded.skipped[2]
    assert main(["from-journal", str(cluster.path), str(tmp_path / "out.jsonl")]) == 0
    assert "0 programs" in capsys.readouterr().err


def test_another_tokenizer_gives_its_own_lengths(cluster: Cluster) -> None:
    cluster.open(0.0, 1)
    (out,) = cluster.call(0.0, 1, text("x", 4), ev.Output("o", SAMPLING))
    cluster.get(0.0, 1, out)
    cluster.finish(1.0, 3)
    cluster.journal.close()
    assert read_journal(cluster.path, "other").programs[0].calls[0].segments[0] == Text("x", 5)
    with pytest.raises(WorkloadError, match="no length under tokenizer 'third'; it has: tok, other"):
        read_journal(cluster.path, "third")


def test_texts_that_came_before_their_tokenizer_have_its_lengths(path: Path) -> None:
    cluster = Cluster.__new__(Cluster)
    cluster.path, cluster.mode = path, "record"
    cluster._begin(0.0)
    try:
        cluster.open(0.0, 1)
        number = cluster.next()
        cluster.at(0.0, ev.CreateVariable(number, 1, "hash", "doc"))
        var = cluster.replies[number].payload["var_id"]
        cluster.at(0.0, ev.SetVariable(cluster.next(), 1, "hash", var, ev.Content("document", {})))
        constant = ev.Constant(ev.Content("early", {}))
        (_, out) = cluster.call(0.0, 1, constant, ev.Input("d", var_id=var), ev.Output("o", SAMPLING))
        cluster.get(0.0, 1, out)
        cluster.at(1.0, ev.RegisterEngine(cluster.next(), ENGINE, {"early": 12, "document": 34}))
        cluster.finish(2.0, 3)
        (program,) = cluster.programs()
    finally:
        cluster.journal.close()
    assert program.calls[0].segments[0] == Text("early", 12)
    assert program.sets == (Set(var, "document", 34),)


def test_a_session_that_lived_through_a_restart_is_one_program(cluster: Cluster) -> None:
    cluster.open(0.0, 1)
    (first,) = cluster.call(0.0, 1, text("x", 4), ev.Output("o", SAMPLING), idempotency_key="first")
    cluster.get(0.0, 1, first)
    cluster.finish(1.0, 5)
    (second,) = cluster.call(3.0, 1, text("y", 4), ev.Output("o", SAMPLING), idempotency_key="second")
    cluster.get(3.5, 1, second)
    cluster.restart(4.0)
    assert cluster.call(6.0, 1, text("y", 4), ev.Output("o", SAMPLING), idempotency_key="second") == [second]
    cluster.get(6.0, 1, second)
    cluster.finish(7.0, 6)
    (third,) = cluster.call(9.0, 1, text("z", 4), ev.Output("o", SAMPLING), idempotency_key="third")
    cluster.get(9.0, 1, third)
    cluster.finish(10.0, 7)
    (program,) = cluster.programs()
    assert [call.after for call in program.calls] == [(), (After("get0", 2.0),), (After("get1", 2.0),)]
    assert [call.segments[-1] for call in program.calls] == [
        Write(first, 5, 64, "out5"),
        Write(second, 6, 64, "out6"),
        Write(third, 7, 64, "out7"),
    ]
    # The get that the restart cut off is asked again, and is one get: it waits as long after the first as it did then.
    assert [(get.var, get.after) for get in program.gets] == [
        (first, ()),
        (second, (After("get0", 2.5),)),
        (third, (After("get1", 2.0),)),
    ]


def test_what_was_to_be_done_while_the_core_was_away_counts_as_think_time(cluster: Cluster) -> None:
    cluster.open(0.0, 1)
    (first,) = cluster.call(0.0, 1, text("x", 4), ev.Output("o", SAMPLING))
    cluster.get(0.0, 1, first)
    cluster.finish(1.0, 5)
    cluster.restart(4.0)
    (second,) = cluster.call(6.0, 1, text("y", 4), ev.Output("o", SAMPLING))
    cluster.get(6.0, 1, second)
    cluster.finish(7.0, 6)
    (program,) = cluster.programs()
    assert program.calls[1].after == (After("get0", 5.0),)


def test_a_repeated_open_makes_no_second_session(cluster: Cluster) -> None:
    cluster.at(0.0, ev.OpenSession(cluster.next(), 1, "hash", idempotency_key="mine"))
    cluster.at(0.5, ev.OpenSession(cluster.next(), 2, "hash", idempotency_key="mine"))
    (out,) = cluster.call(1.0, 1, text("x", 4), ev.Output("o", SAMPLING))
    cluster.get(1.0, 1, out)
    cluster.finish(2.0, 3)
    cluster.journal.close()
    recorded = read_journal(cluster.path)
    assert [program.id for program in recorded.programs] == ["session-1"]
    assert recorded.skipped == []


def test_a_recover_journal_is_refused_with_what_to_set(path: Path) -> None:
    Cluster(path, "recover").journal.close()
    with pytest.raises(WorkloadError, match='"journal_mode": "record"'):
        read_journal(path)


def test_what_is_no_journal_is_one_line(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text("TIMESTAMP,ContextTokens\n" * 100)
    assert main(["from-journal", str(path), str(tmp_path / "out.jsonl")]) == 1
    message = capsys.readouterr().err
    assert "not a journal" in message
    assert message.count("\n") == 1
