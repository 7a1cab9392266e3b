"""experiments.fidelity: its fit finds the efficiencies that made the measurements, and every row is accounted for."""

from __future__ import annotations

import csv
from pathlib import Path

import msgspec
import pandas as pd
import pytest

from experiments.fidelity import prototype
from experiments.fidelity.__main__ import main
from experiments.fidelity.fitting import KINDS, fit, profile_for
from experiments.fidelity.hardware import A100, A6000, Efficiency, own_time_of
from experiments.fidelity.measured import (
    A6000_PAGED,
    A6000_SHARED,
    COLUMNS,
    PAGED,
    SHARED,
    THIRTEEN,
    Experiment,
    MeasuredError,
    read_measured,
)
from experiments.fidelity.prototype import UNBOUNDED, limits
from experiments.fidelity.scenarios import LEAST_LOADED, Setting, simulated
from parrot.configuration import load
from parrot.engine.config import load_engine_config
from parrot.engine.derived import limits_of, profile_of
from parrot.engine.profiles import find_profile
from parrot.latency import LatencyProfile
from sim.clients import Mode
from sim.network import Constant
from tests.sim.programs import one_call
from tests.sim.test_workloads_paper import FILE

SEVEN, THIRTEEN_B, A100_GPU, A6000_GPU = "vicuna-7b", "vicuna-13b", "A100-80G", "4xA6000-48G"
ITERATION_S, ROW_S = 0.0005, 0.00008
TRUTH = {
    PAGED: Efficiency(0.6, 0.9, 0.4, 0.0, ITERATION_S, ROW_S),
    SHARED: Efficiency(0.6, 0.7, 0.45, 0.003, ITERATION_S, ROW_S),
    THIRTEEN: Efficiency(0.7, 0.9, 0.3, 0.0, ITERATION_S, ROW_S),
    A6000_PAGED: Efficiency(0.6, 0.9, 0.4, 0.0, ITERATION_S, ROW_S),
    A6000_SHARED: Efficiency(0.6, 0.7, 0.45, 0.003 * A100.bandwidth / A6000.bandwidth, ITERATION_S, ROW_S),
}
RUNS = [
    *(Experiment("14", "bing", system, SEVEN, A100_GPU, f"closed_batch={n}")
      for system in ("paged_no_sharing", "paged_shared", "shared_kernel") for n in (8, 16, 64)),
    *(Experiment("15", "bing", system, SEVEN, A100_GPU, f"output_tokens={n};batch=32")
      for system in ("paged_shared", "shared_kernel") for n in (200, 400, 800)),
    *(Experiment("11", "chain", "parrot", THIRTEEN_B, A100_GPU, f"article=article_{a};chunk_size={c};output_tokens=25")
      for a in (0, 1) for c in (512, 2048)),
    Experiment("11", "chain", "hf", THIRTEEN_B, A100_GPU, "article=article_0;chunk_size=512;output_tokens=25"),
    Experiment("11", "chain", "vllm", THIRTEEN_B, A100_GPU, "article=article_0;chunk_size=512;output_tokens=25"),
    Experiment("16", "gpts", "shared_kernel", SEVEN, A6000_GPU, "request_rate_per_s=0.5"),
]  # fmt: skip


def write_workloads(folder: Path) -> Path:
    lengths = {"prompt_tokens": [1100 + 97 * i for i in range(12)], "shared_prefix_tokens": 1000}
    pairs = {"figure14_pairs_prompt_output": [[1500, 40 + 31 * (i % 5)] for i in range(12)]}
    file = {**FILE, "bing_copilot": {**lengths, **pairs}, "client_round_trip_ms": {"samples": [200.0, 250.0, 300.0]}}
    path = folder / "workloads.json"
    path.write_bytes(msgspec.json.encode(file))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Measurements of a cluster that is exactly as the physics says, and the workloads."""
    folder = tmp_path_factory.mktemp("paper")
    workloads = write_workloads(folder)
    lines = []
    for run in RUNS:
        if run.system == "hf":
            lines.append((*run, "jct_s", 12.5, "artifact"))
            continue
        outcome = simulated(run, profile_for(run.profile, TRUTH[run.profile]), Setting(str(workloads), ITERATION_S, ROW_S))
        lines += [(*run, metric, value, "artifact") for metric, value in outcome.metrics.items()]
    measured = folder / "measured.csv"
    with open(measured, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(lines)
    return measured, workloads


def test_the_fit_finds_the_efficiencies_that_made_the_measurements(files: tuple[Path, Path]) -> None:
    measured, workloads = files
    profiles, found = fit(read_measured(measured), workloads)
    for name in (PAGED, SHARED):
        for field in ("weights", "kv", "arithmetic", "attention_s", "iteration_s", "row_s"):
            assert getattr(found[name], field) == pytest.approx(getattr(TRUTH[name], field), rel=0.06, abs=2e-5), (name, field)
    assert found[THIRTEEN].weights == pytest.approx(0.7, rel=0.02)
    assert found[THIRTEEN].arithmetic == pytest.approx(0.3, rel=0.1)
    assert profiles[PAGED].seen["rows"][1] == 12  # all requests at once
    assert profiles[THIRTEEN].seen["rows"] == (1.0, 1.0)


def test_an_engine_that_takes_all_that_comes_preempts_and_what_it_preempted_is_prefilled_again() -> None:
    profile = profile_for(THIRTEEN, TRUTH[THIRTEEN])
    programs = [one_call(f"chat{n}", 0.001 * n, prompt=64, output=200) for n in range(2)]
    runs = {
        capacity: prototype.run(
            programs, profile, limits(tokens=400, max_batch_size=8), 1, Mode.REQUEST, Constant(0.0), LEAST_LOADED, capacity
        )
        for capacity in (None, UNBOUNDED)
    }
    for capacity, ran in runs.items():
        tasks = ran.tables["tasks"].sort_values("ready_s")
        first, second = tasks["first_token_s"]
        assert ran.prefilled[1] == pytest.approx(first)
        assert (second > tasks["finished_s"].iloc[0]) == (capacity is None)  # 264 tokens each: by a bound, one at a time
        assert ran.prefilled[2] > tasks["finished_s"].iloc[0]  # at first, or once more


def test_the_command_accounts_for_every_row(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, _ = files
    assert main(["--measured", str(measured), "--out", str(tmp_path / "out"), "--fit"]) == 0
    table = pd.read_csv(tmp_path / "out" / "rows.csv")
    assert len(table) == len(read_measured(measured))
    assert set(table.loc[table["system"] == "hf", "part"]) == {"not modelled"}
    assert table.loc[table["system"] == "vllm", "part"].tolist() == ["held out"]
    fitted = table[table["part"] == "fitted"]
    assert set(fitted["params"]) & {"closed_batch=16", "output_tokens=400;batch=32"} == set()
    known = table.dropna(subset=["error"])
    assert known.loc[known["figure"] != 16, "error"].abs().max() < 0.03  # the world is the model: hardly any error
    assert "| 11 | hf | jct_s | not modelled | 1 | – | – | – |" in capsys.readouterr().out
    assert (tmp_path / "out" / "predicted.png").read_bytes().startswith(b"\x89PNG")
    for name in KINDS:
        profile = load(tmp_path / "out" / "profiles" / f"{name}.json", LatencyProfile)
        assert profile.name == name
        if name == A6000_PAGED:  # no row of these measurements is of it
            assert profile.error == {}
        else:
            assert profile.error["mean"] < 0.1
        assert ("Nothing fitted" in profile.notes) == name.startswith("a6000")


def test_own_time_is_read_back_from_a_profile() -> None:
    own = own_time_of(profile_for(PAGED, TRUTH[PAGED]))
    assert own == pytest.approx((ITERATION_S, ROW_S))


def test_what_is_no_table_of_measurements_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.csv"
    path.write_text("figure,system\n11,x\n")
    with pytest.raises(MeasuredError, match=r"m.csv:1: not the paper's measurements: no column gpu, metric"):
        read_measured(path)
    head = ",".join(COLUMNS) + "\n"
    path.write_text(head + "11,w,parrot,m,g,p,jct_s,fast,artifact\n")
    with pytest.raises(MeasuredError, match=r"m.csv:2: value 'fast' is no number"):
        read_measured(path)
    path.write_text(head + "11,w,parrot,m,g\n")
    with pytest.raises(MeasuredError, match=r"m.csv:2: cut off: 5 of 9 fields"):
        read_measured(path)
    assert main(["--measured", str(tmp_path / "none.csv"), "--out", str(tmp_path / "out")]) == 1
    assert "none.csv: cannot be read" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--measured", str(files[0]), "--out", str(tmp_path / "file" / "out")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("small", "large"), [(A6000_PAGED, PAGED), (A6000_SHARED, SHARED)])
def test_the_shipped_a6000_is_the_a100_by_the_ratios_of_the_data_sheets(small: str, large: str) -> None:
    one, other = find_profile(small), find_profile(large)
    bandwidth, arithmetic = A100.bandwidth / A6000.bandwidth, A100.arithmetic / A6000.arithmetic
    assert one.kv_s == pytest.approx(other.kv_s * bandwidth)
    assert one.pair_s == pytest.approx(other.pair_s * arithmetic)
    assert one.hinges[0].slope == pytest.approx(other.hinges[0].slope * arithmetic)
    own = own_time_of(find_profile(PAGED))
    device = [profile.fixed[0].seconds - sum(own) for profile in (one, other)]
    assert device[0] == pytest.approx(device[1] * bandwidth)
    assert one.seen == other.seen


def test_the_engine_of_large_simulations_is_as_documented() -> None:
    config = load_engine_config("sample_configs/engine/sim-7b.json")
    limits = limits_of(config)
    assert (limits.max_seq_len, limits.fill_chunk_size) == (131072, 2048)
    assert limits.num_blocks * limits.block_size == limits.max_total_tokens == 262144
    profile = profile_of(config)
    assert profile is not None
    assert (profile.name, profile.model) == (PAGED, config.model)
