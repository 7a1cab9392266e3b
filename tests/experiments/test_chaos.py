"""The short version of `make chaos`: a core and engines that are killed while applications run."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiohttp import web

from experiments import chaos, chaos_client, chaos_load
from experiments.chaos import Plan, Report
from experiments.chaos_cluster import CORE, ChaosCluster
from experiments.chaos_load import Ran

PLAN = Plan(kills=6, seed=1, clients=4, engines=2, numbers=1, duration_limit_s=60.0, gap_s=(0.05, 0.6), away_s=(0.0, 0.3))


async def test_nothing_is_lost_and_nothing_contradicted_when_processes_are_killed(tmp_path: Path) -> None:
    report = await chaos.run(PLAN, tmp_path)
    assert report.failures == [], tmp_path
    assert sum(report.kills.values()) == PLAN.kills
    assert report.kills.get("core", 0) > 0
    assert report.finished >= PLAN.clients
    assert report.compared > 0
    assert report.checked.streams > 0
    assert len(report.recovery_s) > 0
    assert report.journal_bytes > 0


def test_what_failed_is_in_the_table_and_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Report(kills={"core": 2, "engine1": 3}, lost=["chat 3: unavailable: no answer"])

    async def run(plan: Plan, folder: Path) -> Report:
        assert (plan.kills, plan.seed) == (5, 77)
        return bad

    monkeypatch.setattr(chaos, "run", run)
    assert chaos.main(["--kills", "5", "--seed", "77"]) == 1
    out, err = capsys.readouterr()
    assert "chat 3: unavailable" in out
    assert "seed 77, logs in" in err
    folder = Path(err.strip().splitlines()[-1].rpartition(" ")[2])
    assert folder.is_dir()
    folder.rmdir()
    bad.lost.clear()
    assert chaos.main(["--kills", "5", "--seed", "77"]) == 0
    assert not Path(capsys.readouterr().err.strip().rpartition(" ")[2]).exists()


async def test_another_text_or_a_failure_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: what an application says decides."""
    said = iter(["calm", "calm", "storm"])

    async def kind(url: str, number: int, rng: object) -> Ran:
        text = next(said, "")
        if not text:
            raise chaos_client.Contradiction("twice")
        return Ran({"answer": text})

    monkeypatch.setattr(chaos_load, "KINDS", {"one": kind})
    report = Report()
    load = chaos._Load(Plan(numbers=1), "http://nowhere", report)
    await load.undisturbed()
    for _ in range(3):
        await load._one(load._applications[0], 0)
    assert (report.finished, report.compared) == (2, 2)
    assert report.different == ["one 0: answer is 'storm', undisturbed 'calm'"]
    assert report.contradictions == ["one 0: twice"]


async def test_the_answer_of_the_next_life_is_not_that_of_the_one_that_was_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = ChaosCluster(tmp_path, 1, "emulated")
    lives = [1]
    monkeypatch.setattr(cluster, "is_running", lambda name: True)
    monkeypatch.setattr(cluster, "process_id", lambda name: lives[-1])

    async def health(request: web.Request) -> web.Response:
        lives.append(2)  # killed and started again while the request was on its way
        return web.Response()

    application = web.Application()
    application.router.add_get("/health", health)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", int(cluster.url.rpartition(":")[2])).start()
        assert not await cluster.has_answered(CORE)
        assert await cluster.has_answered(CORE)
    finally:
        await runner.cleanup()
