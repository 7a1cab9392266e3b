"""experiments.paper: which rows are compared, what a ratio is, who is the same winner, and the two figures of its own."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest

from experiments.fidelity.measured import COLUMNS, THIRTEEN, Experiment, read_measured
from experiments.fidelity.scenarios import Setting
from experiments.paper import ratios
from experiments.paper.__main__ import main
from experiments.paper.pairs import BACKGROUND, CLAIMS, LOADS, MAP_REDUCE, compared
from experiments.paper.ratios import Job, by_pair, jobs_of, table_of
from experiments.paper.report import as_text, write
from experiments.paper.scenarios import metrics_of, profile_of
from parrot.engine.profiles import find_profile
from parrot.serve.config import GlobalSchedulerConfig
from parrot.serve.policies import parse_policy
from tests.experiments.test_fidelity import write_workloads

ROWS = [
    ("11", "chain", "parrot", "vicuna-13b", "A100-80G", "article=article_0;chunk_size=512;output_tokens=25", "jct_s", "10"),
    ("11", "chain", "vllm", "vicuna-13b", "A100-80G", "article=article_0;chunk_size=512;output_tokens=25", "jct_s", "13"),
    ("11", "chain", "vllm", "vicuna-13b", "A100-80G", "article=article_0;chunk_size=512;output_tokens=25", "jct_s", "17"),
    ("11", "chain", "hf", "vicuna-13b", "A100-80G", "article=article_0;chunk_size=512;output_tokens=25", "jct_s", "20"),
    ("11", "chain", "parrot", "vicuna-13b", "A100-80G", "article=article_1;chunk_size=512;output_tokens=25", "jct_s", "9"),
    ("14", "bing", "shared_kernel", "vicuna-7b", "A100-80G", "closed_batch=8", "request_latency_mean_s", "4"),
    ("14", "bing", "paged_shared", "vicuna-7b", "A100-80G", "closed_batch=8", "request_latency_mean_s", "3"),
]


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    path = tmp_path / "measured.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([*row, "artifact"] for row in ROWS)
    return path


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    lines = [f"2023-11-16 18:15:{10 + i}.0000000,{200 + 30 * i},{20 + 5 * i}" for i in range(10)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    return path


def test_rows_are_compared_where_both_systems_were_measured_with_the_same_parameters(measured: Path) -> None:
    rows = [row for row in compared(read_measured(measured), ["a", "b"]) if row.pair.figure not in (BACKGROUND, MAP_REDUCE)]
    assert [(row.pair.figure, row.pair.other, row.paper) for row in rows] == [("11", "vllm", 1.5), ("14", "paged_shared", 0.75)]


def test_what_the_file_does_not_have_is_claimed_and_the_load_is_tried_in_both_lengths(measured: Path) -> None:
    claimed = [row for row in compared(read_measured(measured), ["a", "b"]) if row.pair.figure in (BACKGROUND, MAP_REDUCE)]
    loads = [row.params for row in claimed if row.pair.figure == BACKGROUND]
    assert loads[: len(LOADS)] == [f"azure_load={part:g}" for part in LOADS.values()]
    assert loads[len(LOADS) :] == [f"request_rate_per_s={rate}" for rate in LOADS]
    assert len(claimed) == len(CLAIMS) + len(LOADS)
    assert [e.params.partition(";")[0] for e in claimed[0].parrot] == ["article=a", "article=b"]


def outcomes(jobs: list[Job], factor: float) -> dict[Job, dict[str, float]]:
    """Parrot takes 10 s more a seed; the other system `factor` as long."""
    values = {}
    for job in jobs:
        base = 10.0 * (1 + job.seed) * (1.0 if job.experiment.system in ("parrot", "shared_kernel") else factor)
        unfinished = float("request_rate_per_s=3.5" in job.experiment.params and job.experiment.system == "vllm")
        values[job] = {"jct_s": base, "request_latency_mean_s": base, "unfinished": unfinished}
    return values


def test_a_ratio_is_taken_seed_by_seed_and_the_winner_is_compared(measured: Path, tmp_path: Path) -> None:
    rows = compared(read_measured(measured), ["a", "b"])
    jobs = jobs_of(rows, 3)
    assert len(jobs) == len(set(jobs))
    table = table_of(rows, outcomes(jobs, 2.0), 3)
    assert table["ours"].tolist() == pytest.approx([2.0] * len(table))
    assert table["seeds"].tolist() == [3] * (len(table) - 1) + [1]  # nothing is random in figure 14
    assert table["same_winner"].tolist() == [True] * (len(table) - 1) + [False]  # Parrot lost there
    assert table.loc[table["params"] == "request_rate_per_s=3.5", "bound"].tolist() == [3]
    summary = by_pair(table)
    assert summary["same"].tolist() == [1, 4, 4, 4, 0]
    text = as_text(summary)
    assert "| 12 | chain under load | vllm | completion time | 4 | 1.61 (1.19 to 2.38) | ≥ 2.00 (2.00 to 2.00) |" in text
    write(table, summary, tmp_path)
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(tmp_path / "ratios.csv")) == len(table)


def test_a_ratio_of_one_seed_has_no_interval_that_excludes_1_where_something_is_random(measured: Path) -> None:
    rows = [row for row in compared(read_measured(measured), ["a", "b"]) if row.pair.figure in ("11", "14")]
    for seeds, sure in ((3, 1), (1, 0)):
        assert by_pair(table_of(rows, outcomes(jobs_of(rows, seeds), 2.0), seeds))["sure"].tolist() == [sure, 0]
    assert by_pair(table_of(rows, outcomes(jobs_of(rows, 1), 0.5), 1))["sure"].tolist() == [0, 1]  # figure 14 is fixed


def test_the_same_runs_give_the_same_metrics_on_any_number_of_processes(tmp_path: Path, azure: Path) -> None:
    setting = Setting(str(write_workloads(tmp_path)), switches=parse_policy("parrot:all", GlobalSchedulerConfig()))
    setting = setting._replace(chats=str(azure))
    settings = ("chunk_size=1024;output_tokens=25", "azure_load=0.5")
    jobs = [
        Job(Experiment(figure, "w", system, "vicuna-13b", "A100-80G", f"article=article_0;{params}"), seed)
        for figure, params in zip((MAP_REDUCE, BACKGROUND), settings, strict=True)
        for system in ("parrot", "vllm")
        for seed in (0, 1)
    ]
    profiles = {THIRTEEN: find_profile(THIRTEEN)}
    found = ratios.simulate_all(jobs, profiles, setting, 2, lambda text: None)
    assert found == ratios.simulate_all(jobs, profiles, setting, 1, lambda text: None)
    assert found[jobs[4]]["jct_s"] < found[jobs[6]]["jct_s"]  # a chain of six calls, a round trip each
    assert metrics_of(jobs[0].experiment, profiles[THIRTEEN], setting) == found[jobs[0]]


def test_a_chain_that_never_ends_under_its_load_is_broken_off_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.paper.scenarios.WATCHED_S", (4.0, 6.0))
    setting = Setting(str(write_workloads(tmp_path)))
    run = Experiment(BACKGROUND, "w", "vllm", "vicuna-13b", "A100-80G", "article=article_0;request_rate_per_s=40")
    assert metrics_of(run, find_profile(profile_of(run)), setting) == {"jct_s": 3.0, "unfinished": 1.0}


def test_what_cannot_be_read_is_refused(
    measured: Path, azure: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_workloads(tmp_path)
    files = ["--measured", str(measured), "--out", str(tmp_path / "out")]
    assert main([*files, "--azure", str(measured)]) == 1
    assert main([*files, "--azure", str(azure), "--policy", "parrot:speed"]) == 1
    assert main(["--measured", str(azure), "--azure", str(azure), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "measured.csv:1: not an Azure trace" in told
    assert "unknown switch 'speed'" in told
    assert "azure.csv:1: not the paper's measurements" in told
    assert not (tmp_path / "out").exists()
