"""A sweep on a local Ray: the same bytes as on processes. Skipped where the extra is not installed (`make test` does not)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sim.run import main
from sim.workloads.program import write_programs
from tests.sim.clusters import write_files
from tests.sim.programs import chain, map_reduce
from tests.sim.test_sweep import files_of

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    core, engine = write_files(tmp_path)
    workload = tmp_path / "programs.jsonl"
    write_programs(workload, [chain(2, "a"), map_reduce(3, "b", arrival_s=0.2)])
    return ["--core", core, "--engines", f"{engine}:2", "--workload", str(workload), "--seed", "1,2", "--no-report"]


def test_a_local_ray_writes_the_bytes_that_processes_write(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("ray")
    assert main([*flags, "--out", str(tmp_path / "pool")]) == 0
    printed = capsys.readouterr().out
    assert main([*flags, "--out", str(tmp_path / "ray"), "--ray", "local", "--workers", "2"]) == 0
    assert capsys.readouterr().out == printed
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "pool")


def test_a_real_backend_is_not_spread_over_machines(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main([*flags, "--backend", "emulated", "--ray", "local", "--out", str(tmp_path / "out")]) == 1
    assert "only simulations" in capsys.readouterr().err


@pytest.mark.parametrize(("address", "told"), [("localhost:1", "nothing answers"), ("somewhere", "expected HOST:PORT")])
def test_an_address_without_a_cluster_is_refused_at_once(
    address: str, told: str, flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("ray")
    assert main([*flags, "--ray", address, "--out", str(tmp_path / "out")]) == 1
    assert told in capsys.readouterr().err


def test_without_the_extra_ray_is_refused_with_how_to_get_it(
    flags: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "sim.ray_cluster", raising=False)
    assert main([*flags, "--ray", "local", "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'parrot-testbed[ray]'" in capsys.readouterr().err
