"""`python -m sim.workloads`: what it says of a workload is true, what it converts is that workload."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import StepPatch

from sim.workloads import WorkloadError, open_workload
from sim.workloads.__main__ import main, parameters
from sim.workloads.describe import depths, describe
from sim.workloads.generators import GENERATORS
from sim.workloads.histogram import Histogram, TimeBins
from sim.workloads.kinds import TRACES
from sim.workloads.pictures import arrivals, lengths, write_pictures
from sim.workloads.program import After, Call, Get, Program, Read, Set, Text, Write
from tests.sim.programs import programs as any_programs

DOCUMENT = Path(__file__).parents[2] / "docs/workloads.md"


def ask(name: str, *texts: Text, arrival_s: float = 0.0, tenant: str = "t", **fields: Any) -> Program:
    call = Call((*texts, Write("answer", 10)), name="ask", **fields)
    return Program(name, arrival_s, (call,), (Get("g", "answer"),), tenant=tenant)


def sharing(*programs: Program) -> tuple[int, int]:
    """Prompt tokens, and those in a repeated prefix."""
    numbers = describe(programs, "w").numbers()
    return numbers["prompt_tokens"]["sum"], numbers["sharing"]["repeated_prompt_tokens"]


# ----------------------------------------------------------------------------------------------------------- sharing


def test_only_a_prefix_that_came_before_is_repeated() -> None:
    a, b, c = Text("a", 100), Text("b", 20), Text("c", 3)
    assert sharing(ask("1", a, b), ask("2", a, b)) == (240, 120)
    assert sharing(ask("1", a, b), ask("2", a, c)) == (223, 100)
    assert sharing(ask("1", a, b), ask("2", b, a)) == (240, 0)
    assert sharing(ask("1", a), ask("2", a), ask("3", a, b)) == (320, 200)


def test_tenants_share_a_leading_constant_and_nothing_behind_it() -> None:
    a, b = Text("a", 100), Text("b", 20)
    assert sharing(ask("1", a, b, tenant="x"), ask("2", a, b, tenant="y")) == (240, 100)
    assert sharing(ask("1", a, b, tenant=""), ask("2", a, b, tenant="")) == (240, 100)
    private = functools.partial(ask, cache_prefix=False)
    assert sharing(private("1", a, b, tenant="x"), private("2", a, b, tenant="y")) == (240, 0)
    assert sharing(private("1", a, b), private("2", a, b)) == (240, 120)


def test_a_turn_repeats_the_turn_before_with_its_answer_and_outputs_of_others_are_new() -> None:
    numbers = describe(open_workload("chat:turns=3,spread=0,systems=1", count=2), "w").numbers()
    first = 256 + 48
    prompts = [first, first + 96 + 48, first + 2 * (96 + 48)]
    new_in_first = 256 + 3 * 48
    assert numbers["prompt_tokens"]["sum"] == 2 * sum(prompts)
    assert numbers["sharing"]["repeated_prompt_tokens"] == 2 * sum(prompts) - (new_in_first + new_in_first - 256)
    assert numbers["sharing"]["calls_with_a_repeated_prefix"] == 5


def test_a_set_variable_is_the_text_that_it_was_set_to() -> None:
    def reads(name: str) -> Program:
        call = Call((Read("document"), Write("answer", 5)))
        return Program(name, 0.0, (call,), (Get("g", "answer"),), (Set("document", "same", 70),), tenant="t")

    assert sharing(reads("1"), reads("2"), ask("3", Text("same", 70), cache_prefix=False)) == (210, 140)


# ------------------------------------------------------------------------------------------------------------- shape


def test_depth_and_width_are_those_of_the_graph() -> None:
    for spec, depth, width in (
        ("chain:chunks=5", 5, 1),
        ("map_reduce:chunks=6", 2, 6),
        ("chat:turns=3", 3, 1),
        ("multi_agent:agents=4,rounds=3", 4, 4),
        ("tree_of_thought:levels=2,branches=3,keep=2", 5, 6),
    ):
        numbers = describe(open_workload(spec, count=2), spec).numbers()
        assert (numbers["dag_depth"]["max"], numbers["dag_width"]["max"]) == (depth, width), spec


@settings(deadline=None)
@given(program=any_programs(), data=st.data())
def test_the_order_of_calls_in_the_file_does_not_change_depths(program: Program, data: st.DataObject) -> None:
    expected = dict(zip((call.name for call in program.calls), depths(program), strict=True))
    shuffled = msgspec.structs.replace(program, calls=tuple(data.draw(st.permutations(program.calls))))
    assert dict(zip((call.name for call in shuffled.calls), depths(shuffled), strict=True)) == expected


def test_a_control_edge_makes_a_graph_deeper() -> None:
    first = Call((Text("a", 1), Write("x", 1)))
    second = Call((Text("b", 1), Write("y", 1)), after=(After("g", 1.0),))
    assert depths(Program("p", 0.0, (second, first), (Get("g", "x"), Get("h", "y")))) == [2, 1]


# ------------------------------------------------------------------------------------------------ numbers in bounds


@settings(deadline=None)
@given(values=st.lists(st.integers(0, 10**7), min_size=1, max_size=300), percent=st.sampled_from([1, 50, 90, 99, 100]))
def test_percentiles_are_right_within_half_a_percent(values: list[int], percent: int) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = float(np.percentile(values, percent, method="inverted_cdf"))
    assert histogram.percentile(percent) == pytest.approx(exact, rel=0.0051, abs=1e-9)
    numbers = histogram.numbers()
    assert (numbers["min"], numbers["max"]) == (min(values), max(values))
    assert numbers["mean"] == pytest.approx(sum(values) / len(values), abs=1e-3)


@settings(deadline=None)
@given(times=st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_bins_over_time_lose_nothing_and_stay_few(times: list[float]) -> None:
    bins = TimeBins(2, most=16)
    for time in sorted(times):
        bins.add(time, 1, 10)
    counts, tens = bins.sums()
    assert sum(counts) == len(times)
    assert tens == [10 * count for count in counts]
    assert len(counts) <= 16
    expected, _ = np.histogram(times, np.arange(len(counts) + 1) * bins.width_s)
    assert counts == expected.tolist()


def test_rate_and_variation_are_those_of_the_arrivals() -> None:
    numbers = describe(open_workload("chain:chunks=1", rate=5.0, count=3000, arrivals="gamma:2"), "w").numbers()
    assert numbers["rate_per_s"] == pytest.approx(5.0, rel=0.1)
    assert numbers["gap_cv"] == pytest.approx(2.0, rel=0.1)
    constant = describe(open_workload("chain:chunks=1", rate=5.0, count=11, arrivals="constant"), "w").numbers()
    assert (constant["rate_per_s"], constant["gap_cv"]) == (pytest.approx(5.0), pytest.approx(0.0, abs=1e-9))
    assert (constant["span_s"], constant["first_arrival_s"]) == (pytest.approx(2.0), pytest.approx(0.2))
    alone = describe(open_workload("chain", count=1), "w").numbers()
    assert (alone["rate_per_s"], alone["gap_cv"]) == (None, None)


def test_many_names_are_counted_together() -> None:
    programs = (ask(str(i), Text("a", 1), tenant=f"tenant{i % 100}") for i in range(1000))
    tenants = describe(programs, "w").numbers()["tenants"]
    assert len(tenants) == 33
    assert (tenants["tenant0"], tenants["(others)"], sum(tenants.values())) == (10, 680, 1000)


def test_a_long_workload_is_described_in_the_memory_of_a_short_one() -> None:
    def peak_bytes(count: int) -> int:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        assert describe(open_workload("shared_prompts", count=count), "w").programs == count
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        peak_bytes(100)  # whatever is made once
        short, long = peak_bytes(200), peak_bytes(1500)
    finally:
        tracemalloc.stop()
    assert long < short + 200_000  # a few more buckets; 1,500 programs would be megabytes


def test_a_workload_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(WorkloadError, match="has no programs"):
        describe(open_workload(str(tmp_path / "none.jsonl")), "none.jsonl")


# ------------------------------------------------------------------------------------------------------- the command


def test_describe_prints_numbers_and_draws_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for folder in ("a", "b"):
        assert main(["describe", "agent", "--count", "20", "--rate", "2", "--out", str(tmp_path / folder)]) == 0
        numbers = json.loads(capsys.readouterr().out)
        assert (numbers["programs"], numbers["calls"], numbers["applications"]) == (20, 120, {"agent": 20})
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["workload.html"]
        pages.append((tmp_path / folder / "workload.html").read_bytes())
    assert pages[0] == pages[1]
    for title in (b"Arrivals", b"Lengths", b"Sharing", b"Kinds"):
        assert title in pages[0]
    assert pages[0].count(b"<svg") == 3
    assert b"<script" not in pages[0]


def test_one_program_alone_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "chain:chunks=1,spread=0", "--count", "1", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "workload.html").stat().st_size > 10_000


def test_programs_that_arrive_at_one_time_have_no_curve_over_time(tmp_path: Path) -> None:
    together = describe((ask(f"p{n}", Text("s", 10)) for n in range(4)), "together")
    page = write_pictures(together, tmp_path).read_bytes()
    assert b"All programs arrive at one time." in page
    assert page.count(b"<svg") == 2
    assert b"programs/s)" not in page


@pytest.mark.parametrize("count", [2, 3, 40, 200])
def test_arrivals_are_drawn_at_their_rate_from_the_first_to_the_last(count: int) -> None:
    programs = (ask(f"p{n}", Text("s", 10), arrival_s=n * 0.7) for n in range(count))
    (axes,) = arrivals(describe(programs, "w")).axes
    (steps,) = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    rates, edges, _ = steps.get_data()
    assert (edges[0], edges[-1]) == (0, pytest.approx((count - 1) * 0.7))
    assert np.dot(rates, np.diff(edges)) == pytest.approx(count)
    assert len(rates) <= max(10, 2 * count**0.5)
    if count == 200:
        assert min(rates) > 0.75 * max(rates)  # also where the last bin is not a whole one


def test_one_length_has_one_tick() -> None:
    for axes in lengths(describe([ask("p", Text("s", 552))], "w")).axes:
        low, high = axes.get_xlim()
        assert len([tick for tick in axes.get_xticks() if low <= tick <= high]) == 1


def test_convert_writes_the_programs_of_any_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, out = tmp_path / "trace.csv", tmp_path / "out.jsonl"
    rows = ["Timestamp,Model,Request tokens,Response tokens,Log Type", "1,m,3,0,API log", "2,m,3,4,API log", "4,m,3,4,API log"]
    trace.write_text("\n".join(rows))
    assert main(["convert", f"burstgpt:{trace}", str(out), "--rate", "5", "--max-gen-length", "64"]) == 0
    assert list(open_workload(str(out))) == list(open_workload(f"burstgpt:{trace}", rate=5.0, max_gen_length=64))
    said = capsys.readouterr()
    assert said.out == ""
    assert "failed requests (0 tokens): 1, left out" in said.err
    assert "2 programs written" in said.err
    assert main(["convert", "chat", str(out), "--arrivals", "constant", "--count", "3", "--seed", "4"]) == 0
    assert list(open_workload(str(out))) == list(open_workload("chat", arrivals="constant", count=3, seed=4))


def test_convert_writes_into_a_pipe_and_through_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    link.symlink_to(target)
    with ThreadPoolExecutor() as other:
        read = other.submit(pipe.read_bytes)
        assert main(["convert", "chat", str(pipe), "--count", "3"]) == 0
    assert pipe.is_fifo()
    assert main(["convert", "chat", str(link), "--count", "3"]) == 0
    assert link.is_symlink()
    assert target.read_bytes() == read.result()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_an_interrupted_conversion_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sim.workloads", "convert", "chat", str(tmp_path / "out.jsonl"), "--count", "100000000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = monotonic() + 60
        while not list(tmp_path.iterdir()) and monotonic() < deadline:
            sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, told) == (130, "sim.workloads: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["describe", "chat"], ["parameters"]])
def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        whole = [sys.executable, "-m", "sim.workloads", *command]
        done = subprocess.run(whole, stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["convert", "azure:{0}/bad.csv", "{0}/out.jsonl"], "bad.csv:3: 2 fields instead of 3"),
        (["convert", "chat", "{0}/out.jsonl", "--rate", "0"], "rate 0: must be"),
        (["convert", "chat", "{0}/none/out.jsonl"], "none/out.jsonl: cannot be written: No such file"),
        (["describe", "azure:{0}/bad.csv"], "bad.csv:3: 2 fields instead of 3"),
        (["describe", "chat", "--out", "{0}/bad.csv/x"], "bad.csv/x: cannot be written"),
        (["describe", "nothing"], "workload 'nothing': no such file"),
        (["describe", "azure:"], "workload 'azure:': names no file; expected azure:PATH"),
        (["describe", "mix:"], "workload 'mix:': names no file; expected mix:PATH"),
        (["describe", "chat", "--seed", "-1"], "seed -1: must be 0 or more"),
        (["describe", "azure:{0}/bad.csv", "--max-gen-length", "0"], "max_gen_length 0: must be at least 1"),
        (["parameters", "paper"], "no generator or trace is called 'paper'; there are: chain"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,37,4\n2023-11-16 18:15:56,3")
    assert main([argument.format(tmp_path) for argument in arguments]) == 1
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == [bad]


@pytest.mark.parametrize("name", [*GENERATORS, *TRACES])
def test_every_parameter_is_explained_and_documented(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = (GENERATORS | TRACES)[name][0]
    known = list(parameters(kind))
    assert all(len(meaning) > 5 for _, _, meaning in known)
    assert main(["parameters", name]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: ")
    assert all(f"    {parameter} ({default})  {meaning}\n" in said for parameter, default, meaning in known)
    row = next(line for line in DOCUMENT.read_text().splitlines() if line.startswith((f"| `{name}` |", f"| `{name}:PATH` |")))
    expected = ", ".join(f"{parameter} {default}" for parameter, default, _ in known) or "–"
    assert f"| {expected} |" in row
