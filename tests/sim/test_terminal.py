"""What a person sees on a terminal: a bar while runs go on, and a table of the cells; nothing of it elsewhere."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sim.cells import Cell, Estimate
from sim.metrics import METRICS
from sim.terminal import DEFAULT_METRICS, table_of
from sim.workloads.program import write_programs
from tests.sim.clusters import write_files
from tests.sim.programs import chain

NOTHING = Estimate(None, None, None)


def cell(policy: str = "parrot", rate: float | None = 1.0, **metrics: Estimate) -> Cell:
    return Cell(
        policy=policy,
        workload="chat",
        cluster=("configs/sim-7b.json:4",),
        engines=4,
        rate=rate,
        clients=None,
        arrivals=None,
        client="semantic",
        backend="sim",
        rtt_ms=0.0,
        settings={},
        seeds=(1, 2),
        runs=2,
        draws=0,
        over="seeds",
        confidence=0.95,
        metrics={**dict.fromkeys(METRICS, NOTHING), **{name.replace("__", "."): value for name, value in metrics.items()}},
    )


def shown(cells: list[Cell], metrics: tuple[str, ...] = ()) -> list[list[str]]:
    output = io.StringIO()
    Console(file=output, width=400).print(table_of(cells, metrics))
    return [line.split() for line in output.getvalue().splitlines()]


def test_the_table_has_what_differs_between_cells_and_the_metrics_that_were_asked_for() -> None:
    jct = Estimate(12.345678, (11.0, 13.691356), None)
    rows = shown([cell(jct_s__mean=jct), cell("round_robin", 2.0)], ("jct_s.mean", "failed"))
    assert rows == [
        ["policy", "rate", "jct_s.mean", "failed"],
        ["parrot", "1.0", "12.3", "±1.3", "–"],
        ["round_robin", "2.0", "–", "–"],
    ]


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.0, None, None), ["0"]),
        (Estimate(60.0, (60.0, 60.0), None), ["60"]),
        (Estimate(0.123456, None, None), ["0.1235"]),
        (Estimate(1749.3, (1429.0, 2069.0), None), ["1,749", "±320"]),
        (Estimate(0.02, (0.01939, 0.02061), None), ["0.02000", "±0.00061"]),
        (Estimate(5.0, (4.0, 6.0), (2.5, 9.75)), ["5", "±1", "[2,", "10]"]),
        (Estimate(5.0, (4.1, 5.9), (2.5, 9.75)), ["5.00", "±0.90", "[2.50,", "9.75]"]),
    ],
)
def test_a_number_has_as_many_digits_as_its_interval_gives_reason_for(estimate: Estimate, text: list[str]) -> None:
    assert shown([cell(jct_s__mean=estimate)], ("jct_s.mean",))[1][1:] == text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_name_and_no_number_is_cut_on_a_narrow_terminal(width: int) -> None:
    output = io.StringIO()
    same = dict.fromkeys(METRICS, Estimate(12.345678, (11.0, 13.691356), None))
    rows = [cell("preble_e2:threshold=0.25", **same), cell("round_robin", 2.0, **same)]  # type: ignore[arg-type]
    Console(file=output, width=width).print(table_of(rows, (), width))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in output.getvalue()
    words = output.getvalue().split()
    shown_metrics = len(DEFAULT_METRICS) + 1  # goodput
    assert words.count("12.3") == words.count("±1.3") == 2 * shown_metrics
    names = "".join(re.split(r"\s", line)[0] for line in lines)  # the column of policies
    assert "preble_e2:threshold=0.25" in names
    assert "round_robin" in names


def test_goodput_is_a_column_when_objectives_were_given() -> None:
    assert "goodput_programs_per_s" not in shown([cell()])[0]
    assert "goodput_programs_per_s" in shown([cell(goodput_programs_per_s=Estimate(1.5, None, None))])[0]


def test_a_terminal_gets_a_bar_and_the_table_and_stdout_stays_json(tmp_path: Path) -> None:
    core, engine = write_files(tmp_path)
    write_programs(tmp_path / "programs.jsonl", [chain(2, "a"), chain(3, "b")])
    flags = ["--core", core, "--engines", engine, "--workload", str(tmp_path / "programs.jsonl"), "--no-report"]
    flags += ["--policy", "parrot,round_robin", "--out", str(tmp_path / "out")]
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    command = [sys.executable, "-m", "sim.run", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, env=environment, timeout=120, check=True)
    os.close(slave)
    seen = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # what Linux says at the end of a terminal
            break
        seen += part
        if not part:
            break
    os.close(master)
    assert [line[:13] for line in done.stdout.splitlines()] == [b'{"kind":"run"'] * 2
    assert b"2/2 runs, 4 programs" in seen
    assert b"round_robin" in seen
    assert b"one seed: no confidence intervals" in seen
