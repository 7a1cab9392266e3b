"""experiments.knees: a rate for each series, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.knees import main
from sim.run import main as run
from tests.sim.clusters import write_files

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    core, engine = write_files(tmp_path)
    work = ["--workload", "chain:chunks=2,chunk_tokens=100", "--count", "20", "--seed", "1,2", "--workers", "1"]
    return ["--core", core, "--engines", engine, *work, "--no-report", "--no-tables", "--out", str(tmp_path / "out")]


def test_the_knee_lies_between_the_rates_and_parts_of_it_beside(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert run([*flags, "--rate", "0.1,4,400"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "out"), "--metric", "jct_s.mean"]) == 0
    header, _, line = capsys.readouterr().out.splitlines()
    assert header == "| series | knee (programs/s) | 70% of it | 100% of it |"
    name, knee, part, whole = (cell.strip() for cell in line.strip("|").split("|"))
    assert name == "parrot"
    assert 0.1 < float(knee) < 400.0
    assert knee == whole
    assert float(part) == pytest.approx(0.7 * float(knee), rel=0.01)


def test_what_is_no_sweep_over_rates_is_refused(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main([str(tmp_path / "nothing")]) == 1
    assert run([*flags, "--rate", "1"]) == 0
    assert main([str(tmp_path / "out")]) == 1
    assert main([str(tmp_path / "out"), "--metric", "speed"]) == 1
    told = capsys.readouterr().err
    assert "no folder of results" in told
    assert "a sweep over rates is needed" in told
    assert "--metric speed: expected one of" in told
