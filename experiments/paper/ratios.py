"""Every run that a ratio needs, and the ratios: seed by seed, under which both systems ran the same programs.

Our ratio is the mean over seeds of the other system's value over Parrot's, with a confidence interval of Student's t; of
figures with nothing random in them there is one seed. Of figures that the paper gives over all articles, seed s has the
s-th of them: articles and seeds vary together. A mean over rows is geometric, so that twice as fast and half as fast make none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.fidelity.measured import Experiment
from experiments.fidelity.scenarios import Setting
from experiments.paper.pairs import Compared
from experiments.paper.scenarios import metrics_of, profile_of
from parrot.latency import LatencyProfile
from sim.cells import confidence_interval
from sim.pool import Died, on_processes

FIXED = ("14", "15")  #: figures with no random draw: no network, and requests whose times follow from one another
CONFIDENCE = 0.95
PIECES = 8  #: of the work, for each worker


class Job(NamedTuple):
    """One simulated run."""

    experiment: Experiment
    seed: int


class RunError(Exception):
    """A run that gave no result."""


def jobs_of(rows: Sequence[Compared], seeds: int) -> list[Job]:
    """Every run that `rows` need, once."""
    return list(dict.fromkeys(job for row in rows for pair in _seeds(row, seeds) for job in pair))


def _seeds(row: Compared, seeds: int) -> Iterator[tuple[Job, Job]]:
    """Parrot's run and the other one, seed by seed."""
    for seed in range(1 if row.pair.figure in FIXED else seeds):
        index = seed % len(row.parrot)
        yield Job(row.parrot[index], seed), Job(row.other[index], seed)


def simulate_all(
    jobs: Sequence[Job], profiles: Mapping[str, LatencyProfile], setting: Setting, workers: int, tell: Callable[[str], None]
) -> dict[Job, dict[str, float]]:
    """The metrics of every job, whatever the number of workers. Raises RunError."""
    pieces = [jobs[number :: workers * PIECES] for number in range(min(len(jobs), workers * PIECES))]
    work = [partial(_carry_out, piece, profiles, setting) for piece in pieces]
    found: dict[Job, dict[str, float]] = {}
    for number, result in on_processes(work, workers):
        if isinstance(result, Died):
            raise RunError(f"a simulation ended: {result.told}")
        found.update(zip(pieces[number], result, strict=True))
        tell(f"{len(found)} of {len(jobs)} runs")
    return found


def _carry_out(jobs: Sequence[Job], profiles: Mapping[str, LatencyProfile], setting: Setting) -> list[dict[str, float]]:
    return [metrics_of(job.experiment, profiles[profile_of(job.experiment)], setting._replace(seed=job.seed)) for job in jobs]


COLUMNS = [
    "figure", "workload", "parrot", "other", "metric", "params", "source", "paper", "ours", "low", "high", "seeds", "bound",
    "same_winner",
]  # fmt: skip


def table_of(rows: Sequence[Compared], outcomes: Mapping[Job, Mapping[str, float]], seeds: int) -> pd.DataFrame:
    """One row a ratio of the paper: the paper's, ours with its interval, and whether the same system wins in both. bound: in
    how many seeds the other system's run was broken off, so that ours is at least that."""
    records = []
    for row in rows:
        ratios, bound = [], 0
        for parrot, other in _seeds(row, seeds):
            ratios.append(outcomes[other][row.pair.metric] / outcomes[parrot][row.pair.metric])
            bound += bool(outcomes[other].get("unfinished", 0.0))
        ours = float(np.mean(ratios))
        low, high = confidence_interval([[ratio] for ratio in ratios], CONFIDENCE) or (np.nan, np.nan)
        same = (ours > 1.0) == (row.paper > 1.0)
        records.append((*row.pair, row.params, row.source, row.paper, ours, low, high, len(ratios), bound, same))
    return pd.DataFrame.from_records(records, columns=COLUMNS)


def by_pair(table: pd.DataFrame) -> pd.DataFrame:
    """Each pair's rows together: geometric means, ranges, in how many rows the same system wins, and in how many it does so
    with an interval that excludes 1. One seed of what is random has no interval; what is fixed needs none."""
    lines = []
    kinds = table["params"].str.contains("azure_load").map({True: " (Azure's lengths)", False: ""})
    table = table.assign(workload=table["workload"] + kinds)
    for keys, group in table.groupby(["figure", "workload", "parrot", "other", "metric"], sort=False):
        excluded = (group["low"] > 1.0) | (group["high"] < 1.0) | group["figure"].isin(FIXED)
        sure = group["same_winner"] & excluded
        values = {
            f"{who} {name}": float(function(group[who]))
            for who in ("paper", "ours")
            for name, function in (("mean", _geometric), ("least", np.min), ("most", np.max))
        }
        counts = (len(group), int(group["same_winner"].sum()), int(sure.sum()), int(group["bound"].sum()))
        lines.append((*keys, *values.values(), *counts))
    columns = ["figure", "workload", "parrot", "other", "metric", *values, "rows", "same", "sure", "bound"]
    return pd.DataFrame.from_records(lines, columns=columns)


def _geometric(values: pd.Series) -> float:
    return float(np.exp(np.log(values).mean()))
