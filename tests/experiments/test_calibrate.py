"""The calibration run: its loads cover the engine's range, and a simulated load takes what its profile says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from experiments.calibrate import Planned, azure_lengths, compare, planned
from experiments.engine_load import Load, Outcome, Request, closed, simulate
from experiments.run import main
from parrot.engine.batches import EngineLimits
from parrot.latency import FixedCost, LatencyProfile
from sim.calibrate.logs import read_log

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


CPU_ENGINE = """{"model": "lmsys/vicuna-7b-v1.3", "engine_type": "builtin", "tokenizer": "synthetic", "tasks_capacity": 16,
    "instance": {"device": "cpu", "dtype": "float32", "num_kv_cache_blocks": 512, "use_dummy_weights": true, "model_config": {
        "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 60}},
    "scheduler": {"max_batch_size": 2, "max_num_batched_tokens": 64, "max_total_tokens": 512}}"""


def profile_at(path: Path, **changes: str) -> str:
    profile = LatencyProfile("p", "lmsys/vicuna-7b-v1.3", "cpu", "torch_sdpa", (FixedCost(2, 0.01),), (), 0.0, 0.0)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(profile, **changes)))
    return str(path)


def test_a_profile_is_compared_with_what_was_held_out_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two requests, of a real engine of one small layer, in the place of the loads that are held out."""
    pytest.importorskip("torch")
    held = closed("held", 2, 2, seed=1, prompt=(8, 30), output=(10, 20))
    monkeypatch.setattr("experiments.calibrate.planned", lambda *_, **__: [Planned(held, True), Planned(Load("fitted", ()))])
    (tmp_path / "engine.json").write_text(CPU_ENGINE)
    profile = profile_at(tmp_path / "p.json")
    before = Path(profile).read_bytes()
    logs = tmp_path / "logs"
    assert main(["calibrate", str(tmp_path / "engine.json"), "--against", profile, "--logs", str(logs)]) == 0
    (run,) = read_log(logs / "held.jsonl")
    total = 0.01 * len(run.iterations) / run.total_s - 1
    said = capsys.readouterr().err
    assert f"{len(run.iterations)} iterations of 1 runs" in said
    assert f"of the sum {total:+.1%}" in said
    assert f"held.jsonl#1: {total:+.1%}" in said
    assert "simulated" in said
    assert [path.name for path in logs.iterdir()] == ["held.jsonl"]
    assert Path(profile).read_bytes() == before


@pytest.mark.parametrize(("what", "other"), [("model", "another"), ("device", "cuda"), ("attn_func", "xformers_paged")])
def test_a_profile_of_another_engine_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, other: str
) -> None:
    (tmp_path / "engine.json").write_text(CPU_ENGINE)
    profile = profile_at(tmp_path / "p.json", **{what: other})
    assert main(["calibrate", str(tmp_path / "engine.json"), "--against", profile, "--logs", str(tmp_path / "logs")]) == 1
    assert f"is of {what} {other!r}; this engine's is" in capsys.readouterr().err
