"""sim.calibrate finds the model that made a log, says how well it does, and refuses what is no log."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from matplotlib.figure import Figure

from parrot.configuration import load
from parrot.latency import BatchShape, FixedCost, Hinge, LatencyModel, LatencyProfile
from sim.calibrate import CalibrationError, fit, hold_out_by_load, read_log, read_logs, write_profile
from sim.calibrate.__main__ import main
from sim.calibrate.fitting import error_on

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
        lines.append({"kind": "iteration", "t": float(i), "duration_s": duration_s, **shape.fields(), "tasks": []})
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


def test_the_graphs_of_fills_get_a_cost_each_and_a_rare_one_that_of_the_next(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    costs = {64: 0.005, 128: 0.006, 192: 0.009, 256: 0.011}
    lines: list[dict[str, object]] = [{**HEADER, "fill_graphs": list(costs)}]
    for i in range(400):
        decode, prefill = int(rng.integers(0, 9)), int(rng.integers(1, 300)) * (i % 2)
        if 128 < decode + prefill <= 192 and i > 40:
            prefill = 0
        decode, kv = max(decode, 1), 500 * max(decode, 1)
        shape = BatchShape(decode, int(prefill > 0), prefill, prefill * int(rng.integers(1, 60)), kv, kv)
        replays = bool(prefill) and shape.tokens <= 256
        shape.graph = replays or not prefill
        own_s = next(s for most, s in costs.items() if shape.tokens <= most) + 1e-6 * shape.prefill_pairs if replays else 0.004
        duration_s = own_s + (0.02 if not shape.graph else 0.0) + 2e-7 * shape.decode_kv
        if i % 50 == 9:
            duration_s *= 4  # its end was seen late
        lines.append({"kind": "iteration", "t": float(i), "duration_s": duration_s, **shape.fields(), "tasks": []})
    path = tmp_path / "log"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    profile = fit(read_log(path), "p")
    assert [graph.tokens for graph in profile.fill_graphs] == [64, 128, 256]
    assert [graph.seconds for graph in profile.fill_graphs] == pytest.approx([0.005, 0.006, 0.011], rel=0.06)
    assert profile.graph_pair_s == pytest.approx(1e-6, rel=0.2)
    model = LatencyModel(profile)
    launched = BatchShape(0, 1, 290)
    assert model.duration(launched) == pytest.approx(0.024, rel=0.05)


def test_noise_does_not_pull_the_sum_of_durations(tmp_path: Path) -> None:
    profile = fit(read_log(write_log(tmp_path / "log", shapes(3000), noise=0.3)), "p")
    assert abs(profile.error["total"]) < 0.06
    assert profile.error["mean"] > 0.1  # and it does not claim to know single iterations


def test_fixed_costs_never_fall_with_the_batch(tmp_path: Path) -> None:
    profile = fit(read_log(write_log(tmp_path / "log", shapes(500), noise=0.3)), "p")
    seconds = [cost.seconds for cost in profile.fixed]
    assert seconds == sorted(seconds)


def loaded(rows: int, count: int, seed: int = 0) -> list[BatchShape]:
    """A run at one load: about `rows` rows decode, with a prompt now and then."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        decode = max(1, rows + int(rng.integers(-1, 2)))
        tokens = int(rng.integers(20, 300)) if rng.random() < 0.3 else 0
        kv = decode * int(rng.integers(10, 800))
        result.append(BatchShape(decode, min(tokens, 1), tokens, tokens * int(rng.integers(1, 600)), kv, kv))
    return result


def write_loads(folder: Path, rows: tuple[int, ...], noise: float = 0.05) -> list[str]:
    return [str(write_log(folder / f"{n}-{r}.jsonl", loaded(r, 120, seed=n), noise)) for n, r in enumerate(rows)]


def test_whole_runs_at_loads_of_their_own_are_held_out(tmp_path: Path) -> None:
    runs = read_logs(write_loads(tmp_path, (1, 3, 3, 6, 6)))
    split = hold_out_by_load(runs)
    assert [run.name for run in split.held] == ["1-3.jsonl#1", "2-3.jsonl#1"]  # both engines of the middle load, and no part
    assert [run.name for run in split.fitted] == ["0-1.jsonl#1", "3-6.jsonl#1", "4-6.jsonl#1"]
    assert hold_out_by_load(list(reversed(runs))).held[0].load == split.held[0].load  # by load, not by order


def test_the_error_is_that_of_the_runs_held_out(tmp_path: Path) -> None:
    fitted, held = hold_out_by_load(read_logs(write_loads(tmp_path, (1, 3, 6))))
    profile = fit(fitted, "p", held=held)
    assert profile.error["iterations"] == 120
    assert profile.error["runs"] == 1
    model = LatencyModel(profile)
    predicted = sum(model.duration(i.shape) for i in held[0].iterations)
    assert profile.error["total of 1-3.jsonl#1"] == pytest.approx(predicted / held[0].total_s - 1.0)
    assert profile.seen["rows"] == (1.0, 8.0)  # the range that was fitted


def test_a_held_out_run_does_not_move_the_fit(tmp_path: Path) -> None:
    fitted, held = hold_out_by_load(read_logs(write_loads(tmp_path, (1, 3, 6))))
    slow = read_log(write_log(tmp_path / "slow", loaded(3, 120), noise=0.7))
    one, other = fit(fitted, "p", held=held), fit(fitted, "p", held=slow)
    assert (one.fixed, one.hinges, one.pair_s, one.kv_s) == (other.fixed, other.hinges, other.pair_s, other.kv_s)
    assert other.error["mean"] > 3 * one.error["mean"]


def test_one_load_alone_claims_no_held_out_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path / "log", shapes(100))
    log.write_text(log.read_text() * 2)  # a second start of the engine at the same load, appended
    runs = read_log(log)
    assert [run.name for run in runs] == ["log#1", "log#2"]
    split = hold_out_by_load(runs)
    assert split.held == []
    profile = fit(split.fitted, "p")
    assert (profile.error["runs"], profile.error["iterations"]) == (0, 40)
    assert "NO RUN WAS HELD OUT" in profile.notes
    assert main([str(log), "--out", str(tmp_path / "p.json")]) == 0
    assert "no run was held out: one load only" in capsys.readouterr().err


def test_spread_is_what_runs_as_a_whole_deviate_by(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = (1, 2, 3, 4, 5, 7) * 3
    factors = np.exp(rng.normal(0.0, 0.2, len(rows)))
    names = []
    for n, (r, factor) in enumerate(zip(rows, factors, strict=True)):
        path = write_log(tmp_path / f"{n}.jsonl", loaded(r, 100, seed=n))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines[2:]:
            line["duration_s"] *= factor  # all of this run
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        names.append(str(path))
    quiet = fit(read_logs(write_loads(tmp_path, (1, 3, 6), noise=0.2)), "quiet")
    assert quiet.spread < 0.06  # noise of single iterations averages out
    assert 0.1 < fit(read_logs(names), "p").spread < 0.4


def test_files_can_be_named_to_be_held_out(tmp_path: Path) -> None:
    logs = write_loads(tmp_path, (1, 3, 6))
    assert main([*logs, "--hold-out", logs[2], "--out", str(tmp_path / "p.json")]) == 0
    profile = load(tmp_path / "p.json", LatencyProfile)
    assert "total of 2-6.jsonl#1" in profile.error
    assert profile.seen["rows"][1] <= 5
    assert main([*logs[:1], "--hold-out", logs[0], "--out", str(tmp_path / "q.json")]) == 1


def test_a_held_out_run_at_a_fitted_load_is_told(tmp_path: Path) -> None:
    logs = write_loads(tmp_path, (3, 3, 6))
    assert main([*logs, "--hold-out", logs[1], "--out", str(tmp_path / "p.json")]) == 0
    assert "Not at a load of its own: 1-3.jsonl#1" in load(tmp_path / "p.json", LatencyProfile).notes


def test_the_same_logs_give_the_same_bytes(tmp_path: Path) -> None:
    logs = write_loads(tmp_path, (1, 3, 6))
    for name in ("a", "b"):
        assert main([*logs, "--name", "p", "--out", str(tmp_path / name / "p.json")]) == 1  # the folder is not there
        (tmp_path / name).mkdir()
        assert main([*logs, "--name", "p", "--out", str(tmp_path / name / "p.json")]) == 0
    for file in ("p.json", "p.residuals.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def stalled(log: Path, every: int, seconds: float) -> Path:
    """The log with `seconds` more on one iteration in `every`."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines[2 + every // 2 :: every]:
        line["duration_s"] += seconds
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return log


def test_a_machine_that_stood_still_once_does_not_spoil_the_fit(tmp_path: Path) -> None:
    quiet = fit(read_log(write_log(tmp_path / "quiet", shapes(400), noise=0.05)), "p")
    once = fit(read_log(stalled(write_log(tmp_path / "once", shapes(400), noise=0.05), 400, 23.0)), "p")
    for shape in shapes(50, seed=9):
        assert LatencyModel(once).duration(shape) == pytest.approx(LatencyModel(quiet).duration(shape), rel=0.05)
    assert "Left out: 1 iteration(s)" in once.notes
    assert "Left out" not in quiet.notes


def test_an_iteration_whose_beginning_was_seen_late_is_left_out_of_the_fit_and_of_the_error(tmp_path: Path) -> None:
    """It is over when the one before is seen to be: the log has next to no time for it."""
    quiet = fit(read_log(write_log(tmp_path / "quiet", shapes(400), noise=0.05)), "p")
    log = write_log(tmp_path / "late", shapes(400), noise=0.05)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    iterations = [line for line in lines if line["kind"] == "iteration"]
    iterations[200]["duration_s"] += iterations[201]["duration_s"] - 1e-6
    iterations[201]["duration_s"] = 1e-6
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    late = fit(read_log(log), "p")
    for shape in shapes(50, seed=9):
        assert LatencyModel(late).duration(shape) == pytest.approx(LatencyModel(quiet).duration(shape), rel=0.05)
    assert "Left out: 1 iteration(s)" in late.notes
    error = error_on(quiet, read_log(log))
    assert error["iterations"] == 399
    assert error["mean"] < 0.1


def test_a_busy_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"10 of 400 iterations took more than 10 times what the others say"):
        fit(read_log(stalled(write_log(tmp_path / "busy", shapes(400)), 40, 60.0)), "p", trace="busy")


def test_failed_iterations_are_left_out(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", shapes(50))
    lines = log.read_text().splitlines(keepends=True)
    failed = json.loads(lines[-1]) | {"failed": True, "duration_s": 1000.0}
    log.write_text("".join(lines) + json.dumps(failed) + "\n")
    assert len(read_log(log)[0].iterations) == 50


def test_a_log_cut_in_a_line_is_refused_unless_allowed(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", shapes(50))
    log.write_text(log.read_text()[:-30])
    with pytest.raises(CalibrationError, match=r"log:52: cut off inside this line"):
        read_log(log)
    assert len(read_log(log, allow_cut=True)[0].iterations) == 49
    assert main([str(log), "--out", str(tmp_path / "p.json")]) == 1
    assert main([str(log), "--allow-cut", "--out", str(tmp_path / "p.json")]) == 0


def test_lines_of_two_engines_in_one_file_are_refused(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", shapes(50))
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:40], *lines[5:]]))
    with pytest.raises(CalibrationError, match=r"log:41: t goes back from 37 to 3 with no header between"):
        read_log(log)


def test_a_file_named_twice_is_refused_however_it_is_named(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", shapes(50))
    (tmp_path / "link").symlink_to(log)
    for again in (log, f"{tmp_path}/../{tmp_path.name}/log", tmp_path / "link"):
        with pytest.raises(CalibrationError, match=r"(log|link): named twice"):
            read_logs([log, again])


def test_the_command_writes_a_profile_that_configurations_can_name(tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    assert main([str(write_log(tmp_path / "log", shapes(200))), "--out", str(out), "--plots", str(tmp_path / "plots")]) == 0
    profile = load(out, LatencyProfile)
    assert (profile.name, profile.model, profile.trace) == ("mine", "m", "log")
    assert msgspec.json.decode(out.read_bytes())["versions"] == {"python": "3.11"}
    assert (tmp_path / "plots" / "mine.residuals.png").read_bytes().startswith(b"\x89PNG")


def test_noise_alone_makes_no_median_of_residuals_lean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    logs = [str(write_log(tmp_path / str(rows), loaded(rows, 1500, seed=rows), noise=0.3)) for rows in (2, 4, 6)]
    assert main([*logs, "--out", str(tmp_path / "p.json")]) == 0
    panels = {axes.get_xlabel(): axes for axes in drawn[0].axes}
    assert "predicted duration (ms)" in panels
    for label, axes in panels.items():
        for line in axes.get_lines():
            if str(line.get_label()).endswith("median"):
                assert np.abs(np.asarray(line.get_ydata(), dtype=float)).max() < 12.0, label


def test_a_profile_of_another_model_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = str(write_log(tmp_path / "log", shapes(100))), tmp_path / "p.json"
    other = msgspec.structs.replace(TRUTH, model="another")
    write_profile(other, out)
    assert main([log, "--out", str(out)]) == 1
    assert "holds a profile of another model, 'another'; the logs are of 'm'" in capsys.readouterr().err
    assert load(out, LatencyProfile) == other
    out.write_text("notes of mine")
    assert main([log, "--out", str(out)]) == 1
    assert "is no latency profile" in capsys.readouterr().err
    assert out.read_text() == "notes of mine"
    write_profile(TRUTH, out)
    assert main([log, "--out", str(out)]) == 0


def test_an_output_that_cannot_be_written_is_refused_before_the_logs_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for flags, reason in (
        (["--out", str(tmp_path / "none" / "p.json")], "none: cannot be written to: no such folder"),
        (["--out", str(tmp_path)], "it is a folder"),
        (["--out", str(tmp_path / "p.json"), "--plots", str(tmp_path / "file")], "file: cannot be written to: it is a file"),
    ):
        assert main([str(tmp_path / "no log"), *flags]) == 1
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1


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
