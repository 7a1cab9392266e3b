"""The section "Who wins where": a matrix of policies and conditions for each metric, and in words who wins under which."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sim.report.html import Section, format_number
from sim.report.plots import Metric
from sim.report.standings import Standing, conditions_of, standings_of, winner_of
from sim.report.study import Study

METRICS = (
    Metric("jct_s.mean", "JCT, mean"),
    Metric("jct_s.p99", "JCT, p99"),
    Metric("ttft_s.mean", "TTFT, mean"),
)
WHITE_TO_ORANGE = LinearSegmentedColormap.from_list("behind", ["#e8f4ec", "#ffffff", "#fbd3a2", "#e2711d"])
FAR_BEHIND = 3.0  #: times the best, from which the colour deepens no more
ROW_INCHES, COLUMN_INCHES = 0.27, 0.8
LETTER_INCHES, MOST_LETTERS = 0.06, 13  #: of a condition's name; longer ones stand aslant
MARKS = {"best": "", "level": "=", "behind": "", "bound": "", "failed": "†", "unknown": "°"}
MOST_NAMED = 4  #: policies that are named as level with the best


def who_wins(study: Study) -> Section | None:
    """Null where there is one policy only, or one seed, which tells no policies apart."""
    conditions = conditions_of(study)
    if len({policy for condition in conditions for policy in condition.runs}) < 2 or study.over != "seeds":
        return None
    figures, tables, folded = [], [], []
    for metric in METRICS:
        by_condition = [standings_of(condition, metric.column, study.specification.confidence) for condition in conditions]
        if all(standing.ratio is None for standings in by_condition for standing in standings):
            continue
        figures.append((matrix(by_condition, f"{metric.label}: times that of the best policy"), _caption(by_condition)))
        folded.append((metric.label, _in_words(by_condition, metric)))
    if not figures:
        return None
    tables.append(folded.pop(0)[1])
    confidence = f"{study.specification.confidence:.0%}"
    text = [
        "Every policy beside the best one under the same conditions. Ratios are taken seed by seed, under which all policies "
        f"ran the same programs. The best policy wins (bold) where the {confidence} interval of every other ratio excludes "
        "1; what is level with it (=) this sweep does not tell from it."
    ]
    return Section("Who wins where", text=text, figures=figures, tables=tables, folded=folded)


def standings_table(study: Study) -> pd.DataFrame:
    """Every standing, for programs to read."""
    confidence = study.specification.confidence
    conditions = conditions_of(study)
    rows = [s for metric in METRICS for condition in conditions for s in standings_of(condition, metric.column, confidence)]
    return pd.DataFrame(rows, columns=list(Standing._fields))


def order_of(by_condition: Sequence[Sequence[Standing]]) -> list[str]:
    """Policies by the geometric mean of their ratios, the least first, those out of the contest last."""
    found: dict[str, list[Standing]] = {}
    for standings in by_condition:
        for standing in standings:
            found.setdefault(standing.policy, []).append(standing)

    def place(policy: str) -> tuple[int, float]:
        ratios = [s.ratio for s in found[policy] if s.ratio is not None and s.ratio > 0.0]
        bound = any(s.verdict == "bound" for s in found[policy])
        return int(bound), float(np.mean(np.log(ratios))) if ratios else math.inf

    return sorted(found, key=place)  # stable: as the sweep has them


def matrix(by_condition: Sequence[Sequence[Standing]], title: str) -> Figure:
    """A line a policy, a column a condition: the ratio, its colour, and whether it is told from the best; last, over all."""
    policies = order_of(by_condition)
    columns = [standings[0].condition for standings in by_condition]
    headings = [name.replace(" ", "\n", 1) for name in columns]
    aslant = max(len(line) for heading in headings for line in heading.split("\n")) > MOST_LETTERS
    above = 1.1 + (0.7 * LETTER_INCHES * max(len(name) for name in columns) if aslant else 0.0)
    size = (2.2 + COLUMN_INCHES * (len(columns) + 1), above + ROW_INCHES * len(policies))
    figure = Figure(figsize=(max(6.0, size[0]), size[1]), layout="constrained")
    axes = figure.subplots()
    for x, standings in enumerate(by_condition):
        wins = winner_of(standings)
        for standing in standings:
            y = policies.index(standing.policy)
            mark = "" if standing.verdict == "unknown" and standing.ratio is None else MARKS[standing.verdict]
            _cell(axes, x, y, standing.ratio, mark, bold=standing.policy == wins)
            if standing.verdict == "best":
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, fill=False, edgecolor="#1a1a1a", linewidth=1.2))
    if len(columns) > 1:
        for y, policy in enumerate(policies):
            own = [s.ratio for standings in by_condition for s in standings if s.policy == policy and s.ratio]
            _cell(
                axes, len(columns), y, float(np.exp(np.mean(np.log(own)))) if len(own) == len(columns) else None, "", bold=False
            )
        axes.axvline(len(columns) - 0.5, color="#1a1a1a", linewidth=0.8)
        headings.append("all\n(geom. mean)")
    bound = {s.policy for standings in by_condition for s in standings if s.verdict == "bound"}
    axes.set_xlim(-0.5, len(headings) - 0.5)
    axes.set_ylim(len(policies) - 0.5, -0.5)
    if aslant:
        whole = [heading.replace("\n", " ") for heading in headings]
        axes.set_xticks(range(len(headings)), whole, fontsize=8, rotation=40, ha="left", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(headings)), headings, fontsize=8)
    axes.set_yticks(range(len(policies)), [f"{name} (bound)" if name in bound else name for name in policies], fontsize=9)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def _cell(axes, x: int, y: int, ratio: float | None, mark: str, *, bold: bool) -> None:  # type: ignore[no-untyped-def]
    if ratio is None:
        axes.text(x, y, f"–{mark}", ha="center", va="center", fontsize=8)
        return
    # white at the best, green where a bound is below it
    shade = 0.333 * (1.0 + math.log(max(ratio, 0.5)) / math.log(2.0)) if ratio < 1.0 else None
    if shade is None:
        shade = 0.333 + 0.667 * min(1.0, math.log(ratio) / math.log(FAR_BEHIND))
    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1.0, 1.0, color=WHITE_TO_ORANGE(shade), linewidth=0))
    text = f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}"
    axes.text(x, y, text + mark, ha="center", va="center", fontsize=8, fontweight="bold" if bold else "normal")


def _caption(by_condition: Sequence[Sequence[Standing]]) -> str:
    text = "Less is better. Framed: the best; bold: it wins; =: level with it. Policies in the order of their mean over all."
    verdicts = {standing.verdict for standings in by_condition for standing in standings}
    if "failed" in verdicts:
        text += " †: programs failed, so that the time is of those that finished, and the policy is out of the contest."
    if any(s.verdict == "unknown" and s.ratio is not None for standings in by_condition for s in standings):
        text += " °: no interval, since it is of one seed, or the same under every seed."
    if "bound" in verdicts:
        text += " A bound knows what no real policy does, and is out of the contest."
    return text


def _in_words(by_condition: Sequence[Sequence[Standing]], metric: Metric) -> pd.DataFrame:
    """A row a condition: who wins, by how much, and who is level."""
    rows = []
    for standings in by_condition:
        wins = winner_of(standings)
        best = next((s for s in standings if s.verdict == "best"), None)
        level = sorted((s for s in standings if s.verdict == "level"), key=lambda s: s.ratio or math.inf)
        behind = sorted((s for s in standings if s.verdict == "behind"), key=lambda s: s.ratio or math.inf)
        names = ", ".join(s.policy for s in level[:MOST_NAMED])
        more = f" and {len(level) - MOST_NAMED} more" if len(level) > MOST_NAMED else ""
        rows.append(
            {
                "where": standings[0].condition,
                "wins": wins or "–",
                f"best {metric.label} (s)": "–" if best is None else f"{format_number(best.value or 0.0)}: {best.policy}",
                "level with it": names + more or "–",
                "next behind it": "–" if not behind else f"{behind[0].policy} {_percent(behind[0])}",
            }
        )
    return pd.DataFrame(rows)


def _percent(standing: Standing) -> str:
    assert standing.ratio is not None
    assert standing.low is not None
    half = 100.0 * (standing.ratio - standing.low)
    return f"+{100.0 * (standing.ratio - 1.0):.1f} ± {half:.1f} %"
