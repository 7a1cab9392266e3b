"""sim.calibrate finds the model that made a log, says how well it does, and refuses what is no log."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from parrot.configuration import load
from parrot.latency import BatchShape, FixedCost, Hinge, LatencyModel, LatencyProfile
from sim.calibrate import CalibrationError, fit, main, read_log, read_logs

HEADER = {"kind": "header", "iteration_log": 1, "engine": "e", "engine_type": "builtin", "model": "m", "device": "cpu",
          "attn_func": "torch_sdpa", "dtype": "float32", "num_threads": 1,
          "versions": {"python": "3.11"}, "new_key": 1}  # fmt: skip

TRUTH = LatencyProfile(
    name="truth",
    model="m",
    device="cpu",
    attn_func="torch_sdpa",
    fixed=(FixedCost(1, 0.02), FixedCost(2, 0.024), FixedCost(4, 0.03), FixedCost(8, 0.04)),
    hinges=(Hinge(0, 0.0004), Hinge(64, 0.002)),
    pair_s=2e-8,
    kv_s=3e-6,
)


def shapes(count: int, seed: int = 0) -> list[BatchShape]:
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        decode, prefill = int(rng.integers(0, 7)), int(rng.integers(0, 2))
        if decode + prefill == 0:
            decode = 1
        tokens = int(rng.integers(1, 300)) if prefill else 0
        kv = decode * int(rng.integers(10, 800))
        result.append(BatchShape(decode, prefill, tokens, tokens * int(rng.integers(1, 600)), kv, kv))
    return result


def write_log(path: Path, batches: list[BatchShape], noise: float = 0.0, header: dict[str, object] = HEADER) -> Path:
    rng = np.random.default_rng(1)
    model = LatencyModel(TRUTH)
    lines: list[dict[str, object]] = [dict(header), {"kind": "task", "t": 0.0, "task": "1.0.0#1", "overhead_s": 0.004}]
    for i, shape in enumerate(batches):
        duration_s = model.duration(shape) * float(np.exp(rng.normal(0, noise)))
        lines.append({"kind": "iteration", "t": float(i), "duration_s": duration_s, **shape._asdict(), "tasks": []})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_log_without_noise_gives_back_the_durations_of_the_model_that_made_it(tmp_path: Path) -> None:
    profile = fit(read_log(write_log(tmp_path / "log", shapes(800))), "p")
    truth, fitted = LatencyModel(TRUTH), LatencyModel(profile)
    for shape in shapes(200, seed=7):
        assert fitted.duration(shape) == pytest.approx(truth.duration(shape), rel=0.02)
    assert profile.error["mean"] < 0.01
    assert profile.task_overhead_s == pytest.approx(0.004)
    assert profile.seen["decode_rows"][1] <= 6


def test_noise_does_not_pull_the_sum_of_durations(tmp_path: Path) -> None:
    profile = fit(read_log(write_log(tmp_path / "log", shapes(3000), noise=0.3)), "p")
    assert abs(profile.error["total"]) < 0.06
    assert profile.error["mean"] > 0.1  # and it does not claim to know single iterations


def test_fixed_costs_never_fall_with_the_batch(tmp_path: Path) -> None:
    profile = fit(read_log(write_log(tmp_path / "log", shapes(500), noise=0.3)), "p")
    seconds = [cost.seconds for cost in profile.fixed]
    assert seconds == sorted(seconds)


def test_the_last_part_of_each_run_is_held_out(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", shapes(100))
    log.write_text(log.read_text() * 2)  # a second start of the engine, appended
    runs = read_log(log)
    assert [len(run.iterations) for run in runs] == [100, 100]
    assert fit(runs, "p", hold_out=0.3).error["iterations"] == 60


def test_failed_iterations_and_a_cut_last_line_are_left_out(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", shapes(50))
    lines = log.read_text().splitlines(keepends=True)
    failed = json.loads(lines[-1]) | {"failed": True, "duration_s": 1000.0}
    log.write_text("".join(lines) + json.dumps(failed) + "\n" + lines[-1][:30])
    assert len(read_log(log)[0].iterations) == 50


def test_the_command_writes_a_profile_that_configurations_can_name(tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    assert main([str(write_log(tmp_path / "log", shapes(200))), "--out", str(out)]) == 0
    profile = load(out, LatencyProfile)
    assert (profile.name, profile.model, profile.trace) == ("mine", "m", "log")
    assert "last 20%" in profile.notes
    assert msgspec.json.decode(out.read_bytes())["versions"] == {"python": "3.11"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty"),
        ("TIMESTAMP,ContextTokens\n1,2\n", ":1: not an iteration log"),
        (json.dumps({"kind": "task", "t": 0, "overhead_s": 0}) + "\n", ":1: an iteration log begins with a header"),
        (json.dumps(HEADER | {"iteration_log": 9}) + "\n", "format 9"),
        (json.dumps(HEADER) + "\n{}\n", ":2: not a line of an iteration log"),
    ],
)
def test_foreign_and_empty_files_are_refused_with_their_place(tmp_path: Path, content: str, reason: str) -> None:
    log = tmp_path / "log"
    log.write_text(content)
    with pytest.raises(CalibrationError, match=reason):
        read_log(log)


def test_logs_of_different_engines_do_not_mix(tmp_path: Path) -> None:
    one = write_log(tmp_path / "one", shapes(50))
    two = write_log(tmp_path / "two", shapes(50), header=HEADER | {"device": "cuda"})
    with pytest.raises(CalibrationError, match=r"two: mixed logs: its device is 'cuda'"):
        read_logs([one, two])


def test_too_few_iterations_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_log(tmp_path / "log", shapes(9))), "--out", str(tmp_path / "p.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "p.json").exists()


def test_a_missing_log_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing"), "--out", str(tmp_path / "p.json")]) == 1
    assert "nothing: cannot be read" in capsys.readouterr().err
