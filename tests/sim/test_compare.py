"""The command, on folders that sim.run wrote: what it measures where the answer is known, what it matches, what it refuses.

Real folders here are simulations whose engines are slower by known factors, a factor a repeat, told to be emulated runs.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy import stats

from sim.compare.__main__ import main
from sim.compare.comparing import compare
from sim.compare.document import Comparison
from sim.compare.matching import match_folders
from sim.compare.resampling import Bootstrap
from sim.metrics import write_tables
from sim.results import Finished, read_results
from sim.run import main as run
from sim.spec import Run, Specification, load_specification, runs_of
from sim.workloads.program import Program, write_programs
from tests.sim.clusters import PROFILE, write_files
from tests.sim.programs import chain, map_reduce, one_call
from tests.sim.test_report import References

POLICIES = "parrot:all,round_robin,least_loaded"
SLOWER = 1.25


def slower(factor: float) -> bytes:
    """The profile of an engine that takes `factor` times as long for everything."""
    scaled = {
        "fixed": [msgspec.structs.replace(cost, seconds=factor * cost.seconds) for cost in PROFILE.fixed],
        "hinges": [msgspec.structs.replace(hinge, slope=factor * hinge.slope) for hinge in PROFILE.hinges],
        **{name: factor * getattr(PROFILE, name) for name in ("pair_s", "kv_s", "task_overhead_s")},
    }
    return msgspec.json.encode(msgspec.structs.replace(PROFILE, **scaled))


class Workshop:
    """Makes folders of results from the same files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        core, engine = write_files(folder)
        self.programs = folder / "programs.jsonl"
        write_programs(self.programs, some_programs(12, gap_s=0.4))
        self.flags = ["--core", core, "--engines", f"{engine}:2", "--workload", str(self.programs)]

    def simulate(self, name: str, *flags: str, factor: float = 1.0) -> Path:
        out = self.folder / name
        (self.folder / "profile.json").write_bytes(slower(factor))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                assert run([*self.flags, *flags, "--workers", "1", "--no-report", "--out", str(out)]) == 0
        finally:
            (self.folder / "profile.json").write_bytes(slower(1.0))
        return out

    def emulate(self, name: str, *flags: str, factors: Sequence[float] = (1.0,)) -> Path:
        """One repeat a factor."""
        parts = [self.simulate(f"{name}-{number}", *flags, factor=factor) for number, factor in enumerate(factors)]
        specification = load_specification(str(parts[0] / "spec.json"))
        whole = msgspec.structs.replace(specification, backend="emulated", repeats=len(factors))
        sources = [{key_of(r.run): r for r in read_results(part).runs} for part in parts]
        out = self.folder / name
        write_folder(out, whole)
        for told in runs_of(whole):
            source = sources[told.repeat][key_of(told)]
            summary = msgspec.structs.replace(source.summary, backend="emulated", repeat=told.repeat)
            write_tables(source.tables(), out / told.name)
            (out / told.name / "run.json").write_bytes(msgspec.json.encode(Finished(told, summary)))
        return out


def key_of(run: Run) -> tuple[Any, ...]:
    return (run.policy, run.rate, run.seed, run.workload)


def write_folder(out: Path, specification: Specification) -> None:
    out.mkdir(parents=True)
    (out / "spec.json").write_bytes(msgspec.json.encode(specification))


def some_programs(count: int, gap_s: float) -> list[Program]:
    made: list[Callable[..., Program]] = [one_call, lambda **k: chain(3, **k), lambda **k: map_reduce(4, **k)]
    return [made[number % 3](name=f"p{number}", arrival_s=number * gap_s) for number in range(count)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def simulated(workshop: Workshop) -> Path:
    return workshop.simulate("simulated", "--policy", POLICIES, "--rate", "4,12")


@pytest.fixture(scope="module")
def real(workshop: Workshop) -> Path:
    return workshop.emulate("real", "--policy", POLICIES, "--rate", "4,12", factors=(1.0, 1.05, 0.98))


@pytest.fixture(scope="module")
def document(real: Path, simulated: Path) -> Comparison:
    return compared(real, simulated)


def compared(real: Path, simulated: Path, **options: Any) -> Comparison:
    return compare(match_folders(real, simulated, **options), Bootstrap(draws=200)).document


def rows_of(document: Comparison, cell: int = 0) -> dict[tuple[str, str], Any]:
    return {(row.metric, row.statistic): row for row in document.cells[cell].errors}


# --------------------------------------------------------------------------------------------------- what is measured


def test_engines_slower_by_a_factor_are_found_to_be_so(workshop: Workshop) -> None:
    apart = ["--policy", "least_loaded", "--rate", "0.1"]
    document = compared(workshop.emulate("slow", *apart, factors=(SLOWER,)), workshop.simulate("apart", *apart))
    expected = pytest.approx(1 / SLOWER - 1, abs=1e-6)
    for (metric, statistic), row in rows_of(document).items():
        if metric != "throughput_tokens_per_s" and metric != "throughput_programs_per_s":
            assert row.error == expected, (metric, statistic)
            assert row.error_interval == (expected, expected)
    (cell,) = document.cells
    assert cell.resampled == "programs"
    assert [row.application for row in cell.program_errors] == [None, "", "chain", "map_reduce"]
    assert [row.programs for row in cell.program_errors] == [12, 4, 4, 4]
    for errors in cell.program_errors:
        assert errors.bias == expected
        assert [errors.mean, errors.p50, errors.p99] == pytest.approx([0.2, 0.2, 0.2])
        assert errors.within_10_percent == 0.0
        assert errors.floor_mean is None


def test_a_simulation_of_itself_has_no_error_and_the_same_order(workshop: Workshop, simulated: Path) -> None:
    document = compared(workshop.emulate("exact", "--policy", POLICIES, "--rate", "12", factors=(1.0, 1.0)), simulated)
    for cell in document.cells:
        assert cell.resampled == "repeats"
        assert all(row.error == row.floor == row.real_spread == 0.0 for row in cell.errors if row.real is not None)
    assert document.rankings
    for ranking in document.rankings:
        assert ranking.regret == ranking.floor_regret == 0.0
        assert ranking.agrees == 1.0
        assert ranking.tau is None or ranking.tau == pytest.approx(1.0)


def test_values_are_means_over_repeats_and_the_spread_is_theirs(real: Path, document: Comparison) -> None:
    runs = [result.summary for result in read_results(real).runs if (result.run.policy, result.run.rate) == ("parrot:all", 4.0)]
    values = [summary.jct_s.mean for summary in runs]
    assert len(values) == 3
    row = rows_of(document)["jct_s", "mean"]
    assert row.real == pytest.approx(np.mean(values))
    assert row.real_spread == pytest.approx(np.std(values, ddof=1) / np.mean(values))
    assert row.spread_over == "repeats"
    assert row.error == pytest.approx(row.simulated / row.real - 1)
    assert row.error_interval[0] < row.error < row.error_interval[1]
    assert document.cells[0].real_runs == 3


def test_percentiles_of_few_programs_are_marked(document: Comparison) -> None:
    rows = rows_of(document)
    assert rows["jct_s", "p99"].few
    assert not rows["jct_s", "p90"].few
    assert not rows["jct_s", "mean"].few


def test_orders_are_those_of_the_values(document: Comparison) -> None:
    assert {ranking.condition for ranking in document.rankings} == {"4 programs/s", "12 programs/s"}
    for ranking in document.rankings:
        ours = [choice.real for choice in ranking.choices]
        theirs = [choice.simulated for choice in ranking.choices]
        higher = ranking.statistic == "total"
        assert ours == sorted(ours, reverse=higher)
        tau = stats.kendalltau(ours, theirs).statistic
        assert ranking.tau == (pytest.approx(tau) if np.isfinite(tau) else None)
        first = max(theirs) if higher else min(theirs)
        costs = [abs(value / ours[0] - 1) for value, prediction in zip(ours, theirs, strict=True) if prediction == first]
        assert ranking.regret == pytest.approx(np.mean(costs))
        assert ranking.picked == [c.choice for c in ranking.choices if c.simulated == first]
        assert ranking.best[0] == ranking.choices[0].choice
        for pair in ranking.pairs:
            assert pair.same_order == (np.sign(pair.real_difference) == np.sign(pair.simulated_difference))
        assert ranking.clear_pairs == sum(not pair.tied for pair in ranking.pairs)
        assert ranking.regret_interval is not None
        assert 0.0 <= ranking.regret_interval[0] <= ranking.regret_interval[1]


def test_pairs_within_the_spread_are_ties(workshop: Workshop, simulated: Path) -> None:
    wild = workshop.emulate("wild", "--policy", POLICIES, "--rate", "4", factors=(0.2, 1.0, 5.0))
    ranking = next(r for r in compared(wild, simulated).rankings if (r.metric, r.statistic) == ("jct_s", "mean"))
    assert all(pair.tied for pair in ranking.pairs)
    assert ranking.clear_pairs == 0
    assert ranking.clear_tau is None
    assert ranking.picked_is_tied_with_best


# --------------------------------------------------------------------------------------------------------- matching


def test_only_seeds_of_both_sides_are_used_where_there_are_any(workshop: Workshop) -> None:
    generated = ["--workload", "map_reduce:chunks=2,chunk_tokens=40,output_tokens=6,reduce_tokens=6", "--count", "5"]
    ours = workshop.emulate("seeds-a", *generated, "--seed", "1,2,3")
    theirs = workshop.simulate("seeds-b", *generated, "--seed", "2,3,4")
    (cell,) = compared(ours, theirs).cells
    assert cell.paired
    assert cell.seeds == [2, 3]
    assert cell.left_over_seeds == {"real": [1], "simulated": [4]}
    assert cell.resampled == "seeds"
    assert all(row.error == 0.0 for row in cell.errors)

    others = workshop.simulate("seeds-c", *generated, "--seed", "7,8")
    document = compared(ours, others)
    (cell,) = document.cells
    assert not cell.paired
    assert cell.resampled == "runs"
    assert cell.program_errors == []
    assert any("other programs" in warning for warning in document.warnings)


def test_what_only_one_side_has_is_listed(workshop: Workshop, real: Path) -> None:
    part = workshop.simulate("part", "--policy", "round_robin,parrot", "--rate", "4")
    document = compared(real, part)
    assert [(cell.choice, cell.condition) for cell in document.cells] == [("round_robin", "4 programs/s")]
    assert document.rankings == []
    listed = {(row.side, row.cell) for row in document.unmatched}
    assert ("simulated", "parrot, 4 programs/s") in listed
    assert ("real", "parrot:all, 12 programs/s") in listed
    assert len(listed) == 1 + 5


def test_swept_settings_are_choices(workshop: Workshop) -> None:
    flags = ["--policy", "parrot", "--rate", "12", "--set"]
    ours = workshop.emulate("swept-a", *flags, "global_scheduler.app_fifo=true")
    theirs = workshop.simulate("swept-b", *flags, "global_scheduler.app_fifo=true,false")
    document = compared(ours, theirs)
    assert [cell.choice for cell in document.cells] == ["parrot, global_scheduler.app_fifo=True"]


def test_what_one_side_alone_wrote_down_of_its_runs_is_no_difference(workshop: Workshop) -> None:
    flags = ["--policy", "round_robin,parrot", "--rate", "12"]
    logged = ["--set", "engine.iteration_log=iterations.jsonl", "--set", "journal_path=journal.sqlite"]
    ours = workshop.emulate("logged", *flags, *logged)
    theirs = workshop.simulate("explained", *flags, "--explain", "--trace")
    document = compared(ours, theirs)
    assert [cell.choice for cell in document.cells] == ["round_robin", "parrot"]
    assert document.unmatched == []


def test_runs_without_tables_are_compared_by_their_summaries(workshop: Workshop, real: Path) -> None:
    bare = workshop.simulate("bare", "--policy", POLICIES, "--rate", "4", "--no-tables")
    document = compared(real, bare)
    assert len(document.cells) == 3
    assert document.cells[0].program_errors == []
    assert document.cells[0].resampled == "repeats"


def test_predictions_with_intervals_say_whether_they_hold_the_real_value(workshop: Workshop, tmp_path: Path) -> None:
    """The draws of --intervals, made by hand: the simulation of an engine that is faster and slower."""
    flags = ["--policy", "round_robin", "--rate", "4"]
    real = workshop.emulate("drawn-real", *flags, factors=(1.1, 1.1))
    base = workshop.simulate("drawn", *flags)
    whole = msgspec.structs.replace(load_specification(str(base / "spec.json")), intervals=2)
    out = tmp_path / "drawn"
    write_folder(out, whole)
    factors = {None: base, 1: workshop.simulate("fast", *flags, factor=0.8), 2: workshop.simulate("slow2", *flags, factor=1.3)}
    for told in runs_of(whole):
        (source,) = read_results(factors[told.draw]).runs
        write_tables(source.tables(), out / told.name)
        (out / told.name / "run.json").write_bytes(msgspec.json.encode(Finished(told, source.summary)))
    row = rows_of(compared(real, out))["jct_s", "mean"]
    assert row.real_is_predicted
    assert row.predicted[0] < row.real < row.predicted[1]
    far = workshop.emulate("drawn-far", *flags, factors=(4.0,))
    assert rows_of(compared(far, out))["jct_s", "mean"].real_is_predicted is False


def relabel(folder: Path, **fields: Any) -> None:
    """Changes fields of a folder's specification and of all its runs."""
    specification = msgspec.structs.replace(load_specification(str(folder / "spec.json")), **fields)
    (folder / "spec.json").write_bytes(msgspec.json.encode(specification))
    for told in runs_of(specification):
        path = folder / told.name / "run.json"
        path.write_bytes(msgspec.json.encode(Finished(told, msgspec.json.decode(path.read_bytes(), type=Finished).summary)))


def test_of_a_cluster_that_was_running_only_its_workload_and_its_label_are_known(
    workshop: Workshop, real: Path, simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = shutil.copytree(real, tmp_path / "running")
    relabel(running, core=None, engines=(), core_url="http://localhost:9000", backend="real")
    document = compared(running, simulated)
    assert any("core_url" in warning for warning in document.warnings)
    assert len(document.cells) == 6

    (engines,) = workshop.flags[3:4]
    several = workshop.simulate("sizes", "--policy", "round_robin", "--rate", "4", "--engines", engines.replace(":2", ":1,2"))
    assert "does not say which" in refused(capsys, str(running), str(several), "--out", str(tmp_path / "page"))


def test_where_outputs_come_from_is_the_simulations_alone(real: Path, simulated: Path, tmp_path: Path) -> None:
    """A cluster's engines say what they say: `--outputs` cannot be given there."""
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in (real, simulated)]
    for folder, outputs in zip(folders, (None, "app.py:says"), strict=True):
        relabel(folder, workloads=(), program="app.py:main", outputs=outputs)
    assert len(compared(folders[0], folders[1]).cells) == 6


def test_a_simulation_beyond_its_profile_is_told(simulated: Path, real: Path, tmp_path: Path) -> None:
    beyond = shutil.copytree(simulated, tmp_path / "beyond")
    path = beyond / "round_robin_rate4_seed0" / "run.json"
    finished = msgspec.json.decode(path.read_bytes(), type=Finished)
    summary = msgspec.structs.replace(finished.summary, outside={"made-up": {"rows": (72.0, 1.0, 64.0)}})
    path.write_bytes(msgspec.json.encode(Finished(finished.run, summary)))
    warnings = compared(real, beyond).warnings
    assert warnings == ["profile made-up: rows came to 72 in simulation, outside the 1 to 64 that it was fitted to"]


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_document_and_writes_a_page(
    real: Path, workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated = workshop.simulate("one-rate", "--policy", "parrot:all,round_robin", "--rate", "12")
    assert main([str(real), str(simulated), "--out", str(tmp_path), "--draws", "100"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["kind"] == "comparison"
    assert (document["real"]["runs"], document["simulated"]["runs"]) == (6, 2)
    assert "JCT mean" in captured.err
    page = (tmp_path / "compare.html").read_text()
    references = References()
    references.feed(page)
    assert all(reference.startswith("#") for reference in references.loaded)
    assert len(references.ids) == len(set(references.ids))
    assert page.count("<figure") == 5
    for policy in POLICIES.split(","):
        assert policy in page


def test_the_same_folders_give_the_same_bytes(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--policy", "round_robin", "--rate", "12", "--no-tables"]
    ours = workshop.simulate("bytes", *flags)
    written = []
    for number in range(2):
        out = tmp_path / str(number)
        assert main([str(ours), str(ours), "--anyway", "--out", str(out)]) == 0
        written.append((capsys.readouterr().out, (out / "compare.html").read_bytes()))
    assert written[0] == written[1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("sim.compare: ")
    return captured.err


def test_what_is_no_folder_of_results_is_refused(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, str(real), str(tmp_path))
    assert str(tmp_path) in told
    assert "spec.json" in told


def test_two_simulations_are_refused_and_two_in_the_wrong_order(
    real: Path, simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "both simulations" in refused(capsys, str(simulated), str(simulated))
    assert "REAL comes first" in refused(capsys, str(simulated), str(real))
    assert "SIM needs runs of --backend sim" in refused(capsys, str(real), str(real))


def test_two_simulations_are_compared_anyway_and_that_is_said(simulated: Path) -> None:
    document = compared(simulated, simulated, anyway=True)
    assert any("both simulations" in warning for warning in document.warnings)
    assert all(row.error == 0.0 for cell in document.cells for row in cell.errors)


DIFFERENT = {
    "workload": (["--workload", "chat:turns=1,think_s=0", "--count", "12"], "workload differs"),
    "count": (["--count", "7"], "count differs"),
    "client": (["--client", "request"], "client differs"),
    "network": (["--rtt-ms", "30"], "rtt_ms differs"),
    "policies": (["--policy", "parrot"], "no cell in common: policy is"),
    "rates": (["--rate", "5"], "no cell in common: rate is 4.0 and 12.0"),
}


@pytest.mark.parametrize("what", list(DIFFERENT))
def test_runs_of_something_else_are_refused_with_the_difference(
    what: str, workshop: Workshop, real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, told = DIFFERENT[what]
    other = workshop.simulate(f"different-{what}", "--policy", POLICIES, "--rate", "4,12", *flags)
    assert told in refused(capsys, str(real), str(other))


def test_another_latency_profile_is_refused(workshop: Workshop, real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = workshop.folder / "other.json"
    profile.write_bytes(slower(2.0))
    other = workshop.simulate("profile", "--policy", POLICIES, "--rate", "4", "--profile", str(profile))
    assert "profiles differs" in refused(capsys, str(real), str(other))
    document = compared(real, other, anyway=True)
    assert any("profiles differs" in warning for warning in document.warnings)
    assert document.cells


def test_a_file_of_the_same_name_and_other_contents_is_refused(
    real: Path, simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in (real, simulated)]
    for place, folder in zip(("/here", "/there"), folders, strict=True):
        (folder / "inputs.json").write_text(json.dumps({f"{place}/programs.jsonl": place, "profile x": "0"}))
    assert "programs.jsonl had other contents" in refused(capsys, *map(str, folders))
    (folders[1] / "inputs.json").write_text(json.dumps({"profile y": "0"}))
    assert "latency profiles differ: profile x" in refused(capsys, *map(str, folders))


def test_other_programs_under_the_same_name_are_refused(
    workshop: Workshop, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = Workshop(tmp_path)
    write_programs(elsewhere.programs, [*some_programs(11, 0.4), one_call("intruder", arrival_s=4.4)])
    other = elsewhere.simulate("other", "--policy", POLICIES, "--rate", "4")
    told = refused(capsys, str(real), str(other), "--out", str(tmp_path / "out"))
    assert "the programs are not the same" in told
    assert "p11" in told
    assert "intruder" in told
    document = compared(real, other, anyway=True)
    assert not any(cell.paired for cell in document.cells)


def test_an_unfinished_sweep_is_refused_and_compared_as_far_as_it_goes(
    real: Path, simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = shutil.copytree(real, tmp_path / "part")
    (part / "round_robin_rate4_seed0_repeat1" / "run.json").unlink()
    assert "not finished: round_robin_rate4_seed0_repeat1" in refused(capsys, str(part), str(simulated))
    document = compared(part, simulated, anyway=True)
    assert {cell.real_runs for cell in document.cells} == {2, 3}


def test_an_unwritable_output_is_refused(
    real: Path, simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    told = refused(capsys, str(real), str(simulated), "--out", str(file / "below"), "--draws", "100")
    assert "cannot be written" in told


def test_wrong_usage_is_told_as_such(real: Path, simulated: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(real), str(simulated), "--confidence", "2"])
    assert stopped.value.code == 2
