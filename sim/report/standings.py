"""Which policy wins where: every policy against the best one under the same conditions, seed by seed.

A condition is everything of a cell but its policy. Under one seed all policies ran the same programs, so what is compared is
the ratio of a metric to the best policy's under that seed; of the ratios the mean and a confidence interval (Student's t over
seeds) are taken. The best is the policy with the least mean; it *wins* when the interval of every other policy's ratio
excludes 1. Each interval is of the sweep's confidence by itself: to win, a policy must be told from each of the others. One
that is *level* with the best has 1 in its interval: the sweep does not tell them apart.

Out of the contest: a policy in whose runs programs failed (times are of those that finished), one without the metric, and one
that knows what no real policy does, which is shown as the bound that it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import pandas as pd

from sim.cells import confidence_interval
from sim.metrics import metrics_of
from sim.report.study import Study, short_names
from sim.results import RunResult
from sim.spec import cell_of, is_clairvoyant

Verdict = Literal["best", "level", "behind", "bound", "failed", "unknown"]


class Standing(NamedTuple):
    """A policy under a condition. value: the metric's mean over seeds; ratio, low, high: to the best policy's, 1 at best (null
    where there is none). failed: programs, in all its runs."""

    condition: str
    metric: str
    policy: str
    value: float | None
    ratio: float | None
    low: float | None
    high: float | None
    failed: int
    verdict: Verdict


class Condition(NamedTuple):
    """What was the same for all of its policies. name: what tells it from the others; runs: policy -> its runs."""

    name: str
    runs: dict[str, list[RunResult]]


def conditions_of(study: Study) -> list[Condition]:
    """Every condition of the sweep, in its order."""
    groups: dict[bytes, list[RunResult]] = {}
    for result in study.runs:
        groups.setdefault(_alike(result), []).append(result)
    firsts = [group[0] for group in groups.values()]
    workloads = short_names(dict.fromkeys(result.run.workload for result in firsts))
    found = []
    for group in groups.values():
        runs: dict[str, list[RunResult]] = {}
        for result in group:
            runs.setdefault(result.run.policy, []).append(result)
        found.append(Condition(_name(group[0], firsts, workloads), runs))
    return found


def _alike(result: RunResult) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(cell_of(result.run), policy=""))


def _name(result: RunResult, all_of: Sequence[RunResult], workloads: dict[str, str]) -> str:
    parts = [workloads[result.run.workload]] if len(workloads) > 1 else []
    if len({other.summary.cluster for other in all_of}) > 1:
        groups = (group.rpartition("/")[2].rpartition(":") for group in result.summary.cluster)
        parts.append("+".join(f"{count}×{file.removesuffix('.json')}" for file, _, count in groups))
    if any(other.run.rate != all_of[0].run.rate for other in all_of):
        parts.append("as recorded" if result.run.rate is None else f"{result.run.rate:g}/s")
    if any(other.run.clients != all_of[0].run.clients for other in all_of):
        parts.append(f"{result.run.clients} clients")
    for key, value in result.run.settings.items():
        if any(other.run.settings.get(key) != value for other in all_of):
            parts.append(f"{key.rpartition('.')[2]}={msgspec.json.encode(value).decode()}")
    return " ".join(parts) or workloads[result.run.workload]


def standings_of(condition: Condition, metric: str, confidence: float) -> list[Standing]:
    """Every policy under the condition, in the order of the sweep."""
    failed = {policy: sum(result.summary.failed for result in runs) for policy, runs in condition.runs.items()}
    values = {policy: _by_seed(runs, metric) for policy, runs in condition.runs.items()}
    means = {policy: _mean(found) for policy, found in values.items()}
    contest = {
        policy: mean for policy, mean in means.items() if mean is not None and not failed[policy] and not is_clairvoyant(policy)
    }
    best = min(contest, key=lambda policy: contest[policy]) if contest else None
    found = []
    for policy, mean in means.items():
        ratio = low = high = None
        shared = sorted(set(values[policy]) & set(values[best])) if best is not None else []
        if best is not None and shared and all(values[best][seed] > 0.0 for seed in shared):
            ratios = [values[policy][seed] / values[best][seed] for seed in shared]
            ratio = float(np.mean(ratios))
            if any(len({values[name][seed] for seed in shared}) > 1 for name in (policy, best)):
                low, high = confidence_interval([[value] for value in ratios], confidence) or (None, None)
        verdict = _verdict(policy, best, mean, failed[policy], ratio, (low, high))
        found.append(Standing(condition.name, metric, policy, mean, ratio, low, high, failed[policy], verdict))
    return found


def _by_seed(runs: Sequence[RunResult], metric: str) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for result in runs:
        value = metrics_of(result.summary)[metric]
        if value is not None:
            values.setdefault(result.run.seed, []).append(value)
    return {seed: float(np.mean(repeats)) for seed, repeats in values.items()}


def _mean(by_seed: dict[int, float]) -> float | None:
    return float(np.mean(list(by_seed.values()))) if by_seed else None


def _verdict(
    policy: str,
    best: str | None,
    mean: float | None,
    failed: int,
    ratio: float | None,
    interval: tuple[float | None, float | None],
) -> Verdict:
    if is_clairvoyant(policy):
        return "bound"
    if failed:
        return "failed"
    if mean is None or best is None:
        return "unknown"
    if policy == best:
        return "best"
    low, high = interval
    if low is None or high is None:
        return "level" if ratio == 1.0 else "unknown"
    return "level" if low <= 1.0 <= high else "behind"


def table_of(standings: Sequence[Standing]) -> pd.DataFrame:
    """One row a standing."""
    return pd.DataFrame(standings, columns=list(Standing._fields))


def winner_of(standings: Sequence[Standing]) -> str | None:
    """The policy that wins under a condition: the best, when all others of the contest are behind it."""
    others = [s for s in standings if s.verdict not in ("bound", "failed", "best")]
    best = [s.policy for s in standings if s.verdict == "best"]
    return best[0] if best and others and all(s.verdict == "behind" for s in others) else None
