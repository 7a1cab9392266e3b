"""The folder of results: what is read back from it, and which folders are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sim.metrics import Summary
from sim.results import FINISHED, ResultsError, read_results
from sim.run import main
from sim.workloads.program import write_programs
from tests.sim.clusters import write_files
from tests.sim.programs import chain, map_reduce


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    core, engine = write_files(tmp_path)
    write_programs(tmp_path / "programs.jsonl", [chain(2, "a"), map_reduce(3, "b", arrival_s=0.5)])
    flags = ["--core", core, "--engines", engine, "--workload", str(tmp_path / "programs.jsonl"), "--no-report"]
    assert main([*flags, "--policy", "round_robin,parrot", "--seed", "1,2", "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_runs_come_back_in_the_order_of_the_specification_with_summary_and_tables(folder: Path) -> None:
    results = read_results(folder)
    order = [(r.run.policy, r.run.seed) for r in results.runs]
    assert order == [("round_robin", 1), ("round_robin", 2), ("parrot", 1), ("parrot", 2)]
    assert results.specification.policies == ("round_robin", "parrot")
    assert (results.draws, results.missing) == ([], [])
    for result in results.runs:
        assert isinstance(result.summary, Summary)
        assert (result.summary.policy, result.summary.programs) == (result.run.policy, 2)
        assert result.tables()["programs"]["jct_s"].mean() == pytest.approx(result.summary.jct_s.mean)


def test_a_run_that_has_not_finished_is_missing_and_none_at_all_is_refused(folder: Path) -> None:
    runs = read_results(folder).runs
    (runs[1].folder / FINISHED).unlink()
    results = read_results(folder)
    assert results.missing == ["round_robin_seed2"]
    assert [r.run.name for r in results.runs] == ["round_robin_seed1", "parrot_seed1", "parrot_seed2"]
    for result in results.runs:
        (result.folder / FINISHED).unlink()
    with pytest.raises(ResultsError, match="no run of it has finished"):
        read_results(folder)


def test_what_is_no_folder_of_results_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"no folder of results of sim\.run"):
        read_results(tmp_path)
    run = read_results(folder).runs[0]
    (run.folder / "tasks.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ResultsError, match=r"round_robin_seed1: a table cannot be read"):
        run.tables()
    (run.folder / "tasks.parquet").unlink()
    with pytest.raises(ResultsError, match=r"no tasks\.parquet"):
        run.tables()
    (run.folder / FINISHED).write_text('{"run": 1}')
    with pytest.raises(ResultsError, match=r"run\.json: cannot be read"):
        read_results(folder)
    (folder / "spec.json").write_text('{"workloads": ["chat"], "speed": 1}')
    with pytest.raises(ResultsError, match="unknown key 'speed'"):
        read_results(folder)
