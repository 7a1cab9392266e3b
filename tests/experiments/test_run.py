"""Named experiments: each is a specification that runs as it stands, and the command takes sim.run's flags above it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.run import main, names
from sim.spec import load_specification, runs_of
from sim.sweep import check_runs

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list(names()))
def test_every_experiment_can_be_run_as_it_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    specification = load_specification(str(names()[name]))
    assert specification.about
    assert len(specification.seeds) > 1, "an experiment states its uncertainty"
    check_runs(runs_of(specification))


def test_flags_stand_above_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    small = ["--count", "3", "--rate", "2", "--policy", "round_robin", "--seed", "7", "--no-report"]
    assert main(["map_reduce", *small, "--out", str(tmp_path / "out")]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["policy"], line["rate"], line["seed"], line["programs"]) == ("round_robin", 2.0, 7, 3)
    assert (tmp_path / "out" / "round_robin_rate2_seed7" / "run.json").is_file()


def test_without_a_name_the_experiments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in names())


def test_an_unknown_name_is_refused_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing"]) == 2
    assert "map_reduce" in capsys.readouterr().err
