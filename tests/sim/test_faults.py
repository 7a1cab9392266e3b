"""Simulation testing: no seed violates anything, a seed is one run for ever, and every planted bug is found."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from parrot.protocol.errors import ErrorInfo
from parrot.serve.events import CreateVariable
from parrot.serve.ledger import KEPT, Ended, Entry, Row, Shown, StoredText, encode
from sim.faults.__main__ import main, run_seeds
from sim.faults.dice import Dice
from sim.faults.disk import SimDisk, SimJournal
from sim.faults.loops import ProcessLoop
from sim.faults.plants import PLANTS, planted
from sim.faults.tokenizers import Halves
from sim.faults.world import run_seed
from sim.timeline import Timeline

SEEDS = 60
#: The seed at which each planted bug is found, counted from 0.
FOUND = {
    "attempt-check": 13,
    "epoch-check": 3,
    "early-reply": 0,
    "unstored-stream": 5,
    "forgotten-idempotency": 0,
    "from-the-start": 5,
    "believing": 13,
    "old-contexts": 0,
    "unkept-gets": 2,
}


@pytest.mark.parametrize("first", range(0, SEEDS, 20))
def test_no_seed_violates_anything(first: int) -> None:
    results = run_seeds(range(first, first + 20))
    assert [(result.seed, result.violation) for result in results if result.violation] == []
    assert len(results) == 20
    done = {name: sum(result.counts.get(name, 0) for result in results) for name in ("outputs checked", "core kills", "cut")}
    assert min(done.values()) > 0, done


def test_a_seed_is_the_same_run_in_every_process() -> None:
    program = "from sim.faults.world import run_seed; print([run_seed(seed).trace for seed in range(4)])"
    environment = os.environ | {"PYTHONHASHSEED": "4711"}
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    here = [run_seed(seed).trace for seed in range(4)]
    assert there.stdout.strip() == str(here)
    assert len(set(here)) == 4


def test_a_trace_shows_the_run_that_its_hash_names() -> None:
    lines: list[str] = []
    assert run_seed(1, lines.append).trace == run_seed(1).trace
    assert any("OpenSession" in line for line in lines)


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_found(plant: str) -> None:
    first = max(0, FOUND[plant] - 2)
    results = run_seeds(range(first, first + 60), plant)
    assert results[-1].violation is not None, f"not within 60 seeds from {first}"


def test_the_command_says_how_to_see_a_violation_again(capsys: pytest.CaptureFixture[str]) -> None:
    with planted("early-reply"):
        assert main(["--seeds", "40", "--jobs", "1"]) == 1
    out = capsys.readouterr().out
    seed = out.rpartition("--trace ")[2].strip()
    assert f"seed {seed} violates" in out
    with planted("early-reply"):
        assert main(["--trace", seed]) == 1


def test_the_command_counts_what_a_run_survived(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "5", "--jobs", "1"]) == 0
    rows = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["seeds"] == "5"
    assert rows["violations"] == "0"
    assert int(rows["core kills"]) > 0


def test_a_plant_that_is_not_found_is_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANTS, "unkept-gets", lambda: planted(None))
    assert main(["--seeds", "2", "--jobs", "1", "--plant", "unkept-gets"]) == 1
    assert "was not found" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- the disk


class Crash:
    """A disk, and a process that writes to it."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        self.failures: list[str] = []
        self.disk = SimDisk()
        self.loop = ProcessLoop(self.timeline, "core", self.failures.append)  # type: ignore[abstract]
        self.journal = SimJournal(self.disk, self.loop, Dice(1, "disk"), 0.01, lambda what: None)
        self.told: list[ErrorInfo | None] = []

    def pass_time(self, seconds: float) -> None:
        self.timeline.run(until=self.timeline.now + seconds)


def kept(instant: int, session: int = 1) -> Entry:
    event = CreateVariable(1, session, "auth")
    return Entry(rows=[Row(instant, 0, float(instant), session, KEPT, encode(event))])


def test_only_what_was_committed_survives_a_crash() -> None:
    crash = Crash()
    crash.journal.append(kept(0))
    crash.journal.after_commit(crash.told.append)
    crash.pass_time(1.0)
    assert crash.told == [None]
    crash.journal.append(kept(1))
    crash.journal.append(kept(2))  # waits for the commit of the one before
    crash.loop.kill()
    crash.journal.process_died()
    assert [t for t, _ in crash.disk.past().kept] in ([0.0], [0.0, 1.0])
    crash.pass_time(1.0)
    assert crash.disk.next_instant < 3


def test_a_full_disk_tells_those_who_wait_and_keeps_the_order() -> None:
    crash = Crash()
    crash.disk.full = True
    crash.journal.append(kept(0))
    crash.journal.after_commit(crash.told.append)
    crash.pass_time(0.4)
    assert [error.code for error in crash.told if error is not None] == ["unavailable"]
    assert crash.journal.failing is not None
    crash.journal.append(kept(1))
    crash.disk.full = False
    crash.journal.after_commit(crash.told.append)
    crash.pass_time(2.0)
    assert crash.told[-1] is None
    assert crash.journal.failing is None
    assert [t for t, _ in crash.disk.past().kept] == [0.0, 1.0]


def test_the_end_of_a_session_takes_all_of_it_away() -> None:
    disk = SimDisk()
    disk.apply(kept(0))
    disk.apply(Entry(texts=[StoredText("k", "text", {})], shown=[Shown(1, "v0", (1,), "w1"), Shown(1, "v0", (2,), " w2")]))
    assert disk.past().shown == {(1, "v0"): ([1, 2], "w1 w2")}
    disk.apply(Entry(ended=[Ended(1, "closed", 3.0, ("k",))]))
    past = disk.past()
    assert (past.kept, past.texts, past.shown, past.ended) == ([], {}, {}, [(1, "closed")])


def test_a_dead_process_runs_nothing_and_a_hanging_one_goes_on_later() -> None:
    timeline, ran = Timeline(), []
    loop = ProcessLoop(timeline, "p", pytest.fail)  # type: ignore[abstract]

    async def work() -> None:
        await asyncio.sleep(1.0)
        ran.append(timeline.now)

    loop.call_soon(loop.create_task, work())
    timeline.run(until=0.5)
    loop.hang(3.0)
    timeline.run(until=3.0)
    assert ran == []
    timeline.run(until=4.0)
    assert ran == [pytest.approx(3.5)]
    loop.call_soon(ran.append, 0.0)
    loop.kill()
    timeline.run(until=5.0)
    assert len(ran) == 1


def test_the_second_tokenizer_is_exact_both_ways_and_shows_no_half_word() -> None:
    halves = Halves()
    ids = halves.encode("w5 w70000")
    assert halves.decode(ids) == "w5 w70000"
    assert halves.decode(ids[:3]) == "w5"
