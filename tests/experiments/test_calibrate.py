"""The calibration run: its loads cover the engine's range, and a simulated load takes what its profile says."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.calibrate import azure_lengths, compare, planned
from experiments.engine_load import Load, Outcome, Request, closed, simulate
from experiments.run import main
from parrot.engine.batches import EngineLimits
from parrot.latency import LatencyProfile

LIMITS = EngineLimits(
    num_blocks=1000, block_size=16, max_batch_size=64, max_num_batched_tokens=2048, max_total_tokens=16000, tasks_capacity=64,
    max_seq_len=4096, pipeline_depth=1,
)  # fmt: skip
SECOND_AN_ITERATION = LatencyProfile("p", "m", "d", "a", (), (), 0.0, 0.0)


def test_the_loads_fit_the_engine_and_cover_its_range() -> None:
    plans = planned(LIMITS, [(100, 5)])
    names = [plan.load.name for plan in plans]
    assert len(set(names)) == len(names)
    assert all(request.tokens <= LIMITS.largest_task for plan in plans for request in plan.load.requests)
    at_a_time = [plan.load.concurrency for plan in plans if plan.load.concurrency]
    assert (min(at_a_time), max(at_a_time)) == (1, LIMITS.max_batch_size)
    assert [plan.load.name for plan in plans if plan.held] == ["pool-12", "sharing-held", "arriving-held", "at-once"]
    assert planned(LIMITS) == planned(LIMITS)
    small = EngineLimits(10, 16, 2, 64, 160, 4, 120)
    assert all(request.tokens <= 120 for plan in planned(small) for request in plan.load.requests)


def test_a_slow_engine_is_given_shorter_requests_and_fewer_sizes() -> None:
    plans = {plan.load.name: plan.load for plan in planned(LIMITS, longest=600, rate=0.5)}
    assert list(plans) == [plan.load.name for plan in planned(LIMITS)]
    assert 400 < max(request.tokens for load in plans.values() for request in load.requests) <= 600
    assert len(plans["sizes"].requests) < 100
    assert 30 < plans["arriving"].requests[-1].at_s < 120, "thirty requests at one in two seconds"


@pytest.mark.parametrize(("option", "value"), [("--longest", "5"), ("--rate", "0"), ("--rate", "nan")])
def test_what_no_load_can_be_made_of_is_refused(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", "sample_configs/engine/smollm2-135m-cpu.json", "--out", str(tmp_path / "p.json"), option, value]
    assert main(arguments) == 1
    assert f"{option} {value}" in capsys.readouterr().err


@pytest.mark.parametrize("concurrency", [1, 3, None])
def test_a_simulated_load_takes_the_time_of_its_iterations(concurrency: int | None) -> None:
    """Iterations of a second each: a request takes as many as it has output tokens, and pools go one after the other."""
    from parrot.latency import FixedCost

    profile = LatencyProfile("p", "m", "d", "a", (FixedCost(64, 1.0),), (), 0.0, 0.0)
    load = Load("l", tuple(Request(((1000 + i, 10),), 5) for i in range(6)), concurrency)
    told = simulate(load, LIMITS, profile)
    rounds = 6 if concurrency == 1 else 2 if concurrency == 3 else 1
    assert 5.0 * rounds <= told.total_s <= 6.0 * rounds + 1
    assert len(told.latencies_s) == 6
    assert not told.failed
    assert f"{told.total_s:.2f} s (+0.0%)" in compare(load, Outcome(told.total_s, told.latencies_s), LIMITS, profile)


def test_a_request_that_can_never_run_is_told() -> None:
    told = simulate(Load("l", (Request(((1, 5000),), 5), Request(((2, 5),), 5))), LIMITS, SECOND_AN_ITERATION)
    assert told.failed == ["request 0: failed"]


def test_lengths_are_drawn_within_their_range_and_the_same_for_a_seed() -> None:
    loads = [closed("c", 4, 50, seed=3, prompt=(10, 1000), output=(1, 9), shared=[(1, 64), (2, 32)]) for _ in range(2)]
    assert loads[0] == loads[1]
    assert all(10 <= request.chain[-1][1] <= 1000 and 1 <= request.output_tokens <= 9 for request in loads[0].requests)
    assert [request.chain[0] for request in loads[0].requests[:3]] == [(1, 64), (2, 32), (1, 64)]


def test_lengths_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = ["2023-11-16 18:15:46.68,374,44", "2023-11-16 18:15:50.95,396,0", "2023-11-16 18:15:51.22,1,1"]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""]))
    assert azure_lengths(str(path), 2) == [(374, 44), (396, 1)]


def test_an_engine_that_is_not_builtin_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "sample_configs/engine/emulated-zero.json", "--out", "p.json"]) == 1
    assert "'emulated'" in capsys.readouterr().err
