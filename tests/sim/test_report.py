"""A report is one file that needs nothing beside it, and equal results give equal bytes."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from sim.report import Section, write_report
from sim.report.plots import engine_timeline, jct_distribution, latency_against_rate, real_against_simulated


def programs() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"policy": np.repeat(["parrot", "round_robin"], 50), "jct_s": rng.gamma(2.0, 3.0, 100)})


def figures() -> list[Figure]:
    applications = pd.DataFrame({"application": ["a", "b"], "real_s": [[1.0, 1.2, 1.1], [3.0]], "simulated_s": [1.05, 2.9]})
    runs = pd.DataFrame({"policy": ["x", "x", "y", "y"], "rate": [1, 2, 1, 2], "mean": [1.0, 2, 1, 3], "p90": [2.0, 4, 2, 6]})
    tasks = pd.DataFrame(
        {"engine": ["e0", "e1", "e0"], "start_s": [0.0, 0.5, 0.2], "end_s": [1.0, 2.0, None], "group": ["chat", "map", "map"]}
    )
    return [
        real_against_simulated(applications),
        jct_distribution(programs()),
        latency_against_rate(runs, [("mean", "mean (s)"), ("p90", "p90 (s)")]),
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
    assert page.count("<svg") == 4
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
