"""Who wins where: ratios seed by seed, a win only where every other policy is told from the best, a page a workload."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pandas as pd
import pytest

from parrot.serve.policies import POLICIES
from sim.report import write_report
from sim.report.standings import conditions_of, standings_of, winner_of
from sim.report.study import Study, open_study, short_names
from sim.report.winners import order_of, who_wins
from sim.results import ResultFolder, read_results
from sim.run import main as run
from tests.sim.clusters import write_files

SMALL = {"chain": "chain:chunks=2,chunk_tokens=30", "map_reduce": "map_reduce:chunks=2,chunk_tokens=20"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three policies, two workloads with their own rates, four seeds."""
    folder = tmp_path_factory.mktemp("standings")
    core, engine = write_files(folder)
    spec = {
        "about": "A small contest",
        "workloads": [{"workload": SMALL["chain"], "rates": [2, 8]}, {"workload": SMALL["map_reduce"], "rates": [3]}],
        "core": core,
        "engines": [{"file": engine, "count": 2}],
        "policies": ["parrot:all", "round_robin", "least_loaded"],
        "seeds": [1, 2, 3, 4],
        "count": 3,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    assert run(["--spec", str(folder / "spec.json"), "--workers", "1", "--out", str(folder / "out"), "--no-report"]) == 0
    return folder / "out"


def with_times(results: ResultFolder, times: dict[str, list[float]], failed: dict[str, int] | None = None) -> Study:
    """The sweep as if these were the mean JCTs of each policy, a value a seed."""
    runs = []
    for result in results.runs:
        jct = msgspec.structs.replace(result.summary.jct_s, mean=times[result.run.policy][result.run.seed - 1])
        count = (failed or {}).get(result.run.policy, 0)
        runs.append(result._replace(summary=msgspec.structs.replace(result.summary, jct_s=jct, failed=count)))
    return Study(results._replace(runs=runs))


def verdicts(study: Study) -> tuple[dict[str, str], str | None]:
    standings = standings_of(conditions_of(study)[0], "jct_s.mean", 0.95)
    return {s.policy: s.verdict for s in standings}, winner_of(standings)


def test_a_policy_wins_only_where_it_is_told_from_every_other(swept: Path) -> None:
    results = read_results(swept)
    seeds = [10.0, 20.0, 30.0, 40.0]  # seeds differ far more than policies: pairing tells these apart, means would not
    ten_percent = [1.1 * s for s in seeds]
    noisy = [9.0, 23.0, 28.0, 43.0]
    study = with_times(results, {"parrot:all": seeds, "round_robin": ten_percent, "least_loaded": ten_percent})
    assert verdicts(study) == ({"parrot:all": "best", "round_robin": "behind", "least_loaded": "behind"}, "parrot:all")
    (_, behind, _) = standings_of(conditions_of(study)[0], "jct_s.mean", 0.95)
    assert behind.ratio == pytest.approx(1.1)
    study = with_times(results, {"parrot:all": seeds, "round_robin": ten_percent, "least_loaded": noisy})
    assert verdicts(study) == ({"parrot:all": "best", "round_robin": "behind", "least_loaded": "level"}, None)


def test_where_no_seed_changes_anything_nobody_is_told_from_another(swept: Path) -> None:
    times = {"parrot:all": [2.0] * 4, "round_robin": [2.2] * 4, "least_loaded": [2.0] * 4}
    found, wins = verdicts(with_times(read_results(swept), times))
    assert found == {"parrot:all": "best", "round_robin": "unknown", "least_loaded": "level"}
    assert wins is None


def test_out_of_the_contest_are_failures_and_what_knows_the_future(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES["least_loaded"], "clairvoyant", True, raising=False)
    times = {"parrot:all": [2.0] * 4, "round_robin": [0.5] * 4, "least_loaded": [1.0] * 4}
    study = with_times(read_results(swept), times, failed={"round_robin": 1})
    found, wins = verdicts(study)
    assert found == {"parrot:all": "best", "round_robin": "failed", "least_loaded": "bound"}
    assert wins is None  # there is nobody to win against
    standings = standings_of(conditions_of(study)[0], "jct_s.mean", 0.95)
    assert [s.ratio for s in standings] == [1.0, 0.25, 0.5]
    assert order_of([standings])[-1] == "least_loaded"  # the bound stands apart


def test_conditions_are_named_by_what_tells_them_apart(swept: Path) -> None:
    assert [condition.name for condition in conditions_of(open_study(swept))] == ["chain 2/s", "chain 8/s", "map_reduce 3/s"]
    assert short_names(["chat:turns=2", "chat:turns=3", "mix:a/tenants.json", "azure:b/c.csv:x=1", "d/e.jsonl"]) == {
        "chat:turns=2": "chat:turns=2",
        "chat:turns=3": "chat:turns=3",
        "mix:a/tenants.json": "tenants",
        "azure:b/c.csv:x=1": "c",
        "d/e.jsonl": "e",
    }


def test_several_workloads_have_a_page_each(swept: Path, tmp_path: Path) -> None:
    page = write_report(swept).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["What ran", "Who wins where", "By workload", "All numbers"]
    assert "36 runs: 3 policies × 3 conditions × 4 seeds." in page
    assert 'href="report-chain.html"' in page
    assert "chain:chunks=2,chunk_tokens=30 at 2, 8 programs/s; map_reduce" in page
    chain = (swept / "report-chain.html").read_text()
    assert "A small contest: chain" in chain
    assert "Latency against arrival rate" in chain
    assert "24 runs on a simulated cluster: 3 series" in chain
    assert "Latency against" not in (swept / "report-map_reduce.html").read_text()  # of one rate
    table = pd.read_csv(swept / "standings.csv")
    assert len(table) == 3 * 3 * 3  # metrics, conditions, policies
    assert set(table["verdict"]) <= {"best", "level", "behind"}
    assert (table.groupby(["condition", "metric"])["verdict"].apply(lambda v: (v == "best").sum()) == 1).all()
    assert write_report(swept).read_text() == page
    again = ["--spec", str(swept / "spec.json"), "--workers", "1", "--out", str(swept), "--no-report", "--fresh", "--seed", "1"]
    assert run(again) == 0
    assert not list(swept.glob("*.html"))
    assert not (swept / "standings.csv").exists()
    assert who_wins(open_study(swept)) is None  # one seed tells no policies apart
