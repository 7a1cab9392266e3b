"""A page is one file that needs nothing beside it, and equal results give equal bytes; pictures have names and units."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from sim.report.html import Section, format_interval, write_report
from sim.report.lanes import lanes_of
from sim.report.plots import Metric, Panel, Sample, against, bars, distributions, real_against_simulated, sample_of
from sim.report.standings import Standing
from sim.report.style import line_style
from sim.report.timelines import engine_timeline, queue_lengths
from sim.report.winners import matrix


def programs() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"policy": np.repeat(["parrot", "round_robin"], 50), "jct_s": rng.gamma(2.0, 3.0, 100)})


def figures() -> list[Figure]:
    applications = pd.DataFrame({"application": ["a", "b"], "real_s": [[1.0, 1.2, 1.1], [3.0]], "simulated_s": [1.05, 2.9]})
    runs = pd.DataFrame({"series": ["x", "x", "y", "y"], "rate": [1, 2, 1, 2], "mean": [1.0, 2, 1, 3], "p90": [2.0, 4, 2, 6]})
    metrics = [Metric("mean", "mean (s)"), Metric("p90", "p90 (s)")]
    times = {str(policy): sample_of(rows["jct_s"]) for policy, rows in programs().groupby("policy")}
    tasks = pd.DataFrame(
        {"engine": ["e0", "e1", "e0"], "start_s": [0.0, 0.5, 0.2], "end_s": [1.0, 2.0, None], "group": ["chat", "map", "map"]}
    )
    return [
        real_against_simulated(applications),
        distributions([Panel("at 1/s", "job completion time (s)", "programs", times)], columns=1),
        against(runs, Metric("rate", "rate (1/s)"), metrics, "Latency"),
        bars(runs.iloc[[0, 2]], metrics, "Bars"),
        engine_timeline(tasks),
    ]


def sections() -> list[Section]:
    drawn = [(figure, f"caption {index}") for index, figure in enumerate(figures())]
    return [
        Section("Plots", figures=drawn),
        Section("Words & <tags>", text=["1 < 2"], tables=[programs().head(3)], folded=[("more", "</pre><script>")]),
    ]


class References(HTMLParser):
    """Collects what a page would load, and the ids in it."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        assert tag not in ("script", "link", "iframe")


def test_a_report_loads_nothing_and_its_ids_are_unique(tmp_path: Path) -> None:
    page = write_report(tmp_path / "deep" / "report.html", sections()).read_text()
    references = References()
    references.feed(page)
    assert all(reference.startswith("#") for reference in references.loaded)
    assert len(references.ids) == len(set(references.ids))
    assert {r[1:] for r in references.loaded} <= set(references.ids)
    assert page.count("<svg") == 5
    assert not re.search(r"url\((?!#)", page)


def test_what_is_no_markup_is_escaped(tmp_path: Path) -> None:
    page = write_report(tmp_path / "report.html", sections()).read_text()
    assert "Words &amp; &lt;tags&gt;" in page
    assert "1 &lt; 2" in page
    assert "<script>" not in page


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    one = write_report(tmp_path / "one.html", sections()).read_bytes()
    assert one == write_report(tmp_path / "two.html", sections()).read_bytes()


@pytest.mark.parametrize("figure", figures())
def test_axes_have_labels_and_titles(figure: Figure) -> None:
    assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)
    assert figure.axes[0].get_title() or figure.get_suptitle()


def test_whiskers_do_not_squeeze_the_lines_and_points_of_one_place_stand_side_by_side() -> None:
    table = pd.DataFrame({"series": ["x", "x", "y", "y"], "rate": [1, 2, 1, 2], "mean": [1.0, 2.0, 1.0, 2.0]})
    table = table.assign(**{"mean.low": -500.0, "mean.high": 500.0})
    (axes,) = against(table, Metric("rate", "rate (1/s)"), [Metric("mean", "mean (s)")], "t").axes
    assert axes.get_ylim() == pytest.approx((0.0, 3.2))
    x, y = (line.get_xdata() for line in axes.get_lines())
    assert x[0] < 1.0 < y[0]
    (axes,) = against(table, Metric("rate", "rate (1/s)"), [Metric("mean", "change (%)", signed=True)], "t").axes
    assert axes.get_ylim() == pytest.approx((-6.0, 6.0))


def test_an_empty_queue_is_drawn_on_a_scale_of_tasks() -> None:
    queue = pd.DataFrame({"time_s": [0.0, 1.0], "bin_s": 1.0, "queued": 0.0})
    (axes,) = queue_lengths({"a": queue, "b": queue}, "Queue").axes
    assert axes.get_ylim() == (0.0, 1.0)


def test_panels_of_one_measure_have_one_kind_of_scale_and_goodput_is_never_logarithmic() -> None:
    near, far = (Sample(np.array(values), 3) for values in ([1.0, 2.0, 3.0], [0.01, 0.02, 3.0]))
    figure = distributions([Panel("a", "TTFT (s)", "calls", {"x": near}), Panel("b", "TTFT (s)", "calls", {"x": far})], 2)
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    table = pd.DataFrame({"series": ["x", "x"], "rate": [1.0, 2.0], "y": [5.0, 0.05]})
    for linear, scale in ((True, "linear"), (False, "log")):
        figure = against(table, Metric("rate", "rate"), [Metric("y", "y", linear=linear)], "title")
        assert figure.axes[0].get_yscale() == scale


@pytest.mark.parametrize("names", [["chat 1/s", "chat 2/s"], [f"chain {n}×sim-7b 1/s max_batch_size=16" for n in range(9)]])
def test_names_of_conditions_do_not_run_into_each_other(names: list[str]) -> None:
    standings = [[Standing(name, "jct_s.mean", "parrot", 1.0, 1.0, 1.0, 1.0, 0, "best")] for name in names]
    figure = matrix(standings, "title")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [tick.label2 for tick in axes.xaxis.get_major_ticks()]  # above the matrix
    assert [label.get_text().split()[0] for label in labels] == [*(name.split()[0] for name in names), "all"]
    turned = {label.get_rotation() for label in labels}
    if turned == {0.0}:
        boxes = [label.get_window_extent() for label in labels]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    else:
        assert turned == {40.0}


def test_the_share_of_what_failed_is_missing_at_the_end_of_its_line() -> None:
    panel = Panel("", "time (s)", "programs", {"a": Sample(np.array([1.0, 2.0, 3.0]), 4), "none": Sample(np.empty(0), 2)})
    (line,) = distributions([panel], columns=1).axes[0].get_lines()
    assert line.get_ydata()[-1] == 0.75


def test_thirty_two_series_have_each_a_style_of_their_own() -> None:
    assert len({str(line_style(index)) for index in range(32)}) == 32


@pytest.mark.parametrize(
    ("mean", "low", "high", "text"),
    [
        (93.9, 36.9, 150.9, "94 ± 57"),
        (0.11423, 0.1112, 0.1172, "0.1142 ± 0.0030"),
        (5.0, 5.0, 5.0, "5.00 ± 0"),
        (1234.5, None, None, "1,234"),
        (float("nan"), None, None, "–"),
    ],
)
def test_a_number_has_the_digits_that_its_interval_leaves_it(mean: float, low: float, high: float, text: str) -> None:
    assert format_interval(mean, low, high) == text


def test_intervals_of_a_lane_never_overlap_and_no_lane_is_too_many() -> None:
    rng = np.random.default_rng(2)
    starts = np.sort(rng.integers(0, 60, 200))
    ends = starts + rng.integers(0, 9, 200)
    lanes = lanes_of(starts.tolist(), ends.tolist())
    for lane in set(lanes):
        mine = [(s, e) for s, e, mine in zip(starts, ends, lanes, strict=True) if mine == lane]
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(mine))
    most = max(((starts <= t) & (t < ends)).sum() for t in range(70))
    assert max(lanes) + 1 <= most + 1  # an interval of no length takes a lane too


def test_the_timeline_draws_no_task_over_another() -> None:
    rng = np.random.default_rng(1)
    start = rng.uniform(0, 10, 60)
    table = pd.DataFrame({"engine": "e", "start_s": start, "end_s": start + rng.uniform(0.1, 3, 60), "group": "g"})
    boxes = [c.get_paths()[0].get_extents() for c in engine_timeline(table).axes[0].collections]
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            across = min(one.x1, other.x1) - max(one.x0, other.x0)
            along = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert across < 1e-9 or along < 1e-9
