"""The efficiencies of the paper's GPUs, from the runs that are `fitted`: one set for each model, GPU and attention function.

What a run's iterations look like does not depend on how long they take where requests form a closed pool or a chain, which
is what is fitted: each fitted run is simulated once, and its iterations are priced anew for every set of efficiencies.
Least squares on log(predicted / measured). The A6000's profiles are the A100's on another device: nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from scipy.optimize import least_squares

from experiments.fidelity.hardware import A100, A6000, Device, Efficiency, model_of, on, profile_of
from experiments.fidelity.measured import (
    A6000_PAGED,
    A6000_SHARED,
    PAGED,
    SHARED,
    THIRTEEN,
    Experiment,
    Row,
    experiments_of,
)
from experiments.fidelity.scenarios import Setting, simulated
from parrot.latency import BatchShape, LatencyModel, LatencyProfile, seen_ranges

START = Efficiency(weights=0.6, kv=0.8, arithmetic=0.4)


class Kind(NamedTuple):
    """What a profile is of."""

    model: str
    device: Device
    attention: str
    shared_kv_once: bool


PAGED_ATTENTION, SHARED_ATTENTION = "xformers_fill_vllm_paged_attention_generate", "xformers_fill_shared_prompts_generate"
KINDS = {
    PAGED: Kind("lmsys/vicuna-7b-v1.3", A100, PAGED_ATTENTION, False),
    SHARED: Kind("lmsys/vicuna-7b-v1.3", A100, SHARED_ATTENTION, True),
    THIRTEEN: Kind("lmsys/vicuna-13b-v1.3", A100, PAGED_ATTENTION, False),
    A6000_PAGED: Kind("lmsys/vicuna-7b-v1.3", A6000, PAGED_ATTENTION, False),
    A6000_SHARED: Kind("lmsys/vicuna-7b-v1.3", A6000, SHARED_ATTENTION, True),
}


class Fitted(NamedTuple):
    """Profile and efficiencies of each name."""

    profiles: dict[str, LatencyProfile]
    efficiencies: dict[str, Efficiency]


class _Priced(NamedTuple):
    """A fitted run: its iterations (the first shape of so many), what was measured, and what of it is no iteration."""

    experiment: Experiment
    iterations: list[tuple[BatchShape, int]]
    measured: dict[str, float]
    rest_s: float


def profile_for(name: str, efficiency: Efficiency, notes: str = "") -> LatencyProfile:
    """The profile `name` with these efficiencies."""
    kind = KINDS[name]
    return profile_of(
        name, model_of(kind.model), kind.device, kind.attention, efficiency, shared_kv_once=kind.shared_kv_once, notes=notes
    )


def fit(rows: Sequence[Row], workloads: str | Path) -> Fitted:
    """Fits the A100's profiles to the fitted runs among `rows`, and takes the A6000's from them."""
    runs = [_priced(experiment, values, workloads) for experiment, values in _values(rows).items()]
    pools, chains = ([run for run in runs if ("run_s" in run.measured) is wanted] for wanted in (True, False))
    iteration_s, row_s = _own_time(pools)
    start = msgspec.structs.replace(START, iteration_s=iteration_s, row_s=row_s)
    found: dict[str, Efficiency] = {}
    found[PAGED] = _least_squares(PAGED, pools, start, ("weights", "kv", "arithmetic"))
    same_weights = msgspec.structs.replace(start, weights=found[PAGED].weights, attention_s=0.004)
    found[SHARED] = _least_squares(SHARED, pools, same_weights, ("kv", "arithmetic", "attention_s"))
    same_kv = msgspec.structs.replace(start, kv=found[PAGED].kv)  # a chain of short calls reads hardly any
    found[THIRTEEN] = _least_squares(THIRTEEN, chains, same_kv, ("weights", "arithmetic"))
    found[A6000_PAGED], found[A6000_SHARED] = on(A6000, found[PAGED], A100), on(A6000, found[SHARED], A100)
    profiles = {name: profile_for(name, efficiency) for name, efficiency in found.items()}
    for name, profile in profiles.items():
        origin = {A6000_PAGED: PAGED, A6000_SHARED: SHARED}.get(name, name)
        seen = seen_ranges([shape for run in runs if run.experiment.profile == origin for shape, _ in _ends(run)])
        profiles[name] = msgspec.structs.replace(profile, seen=seen)
    return Fitted(profiles, found)


def _values(rows: Sequence[Row]) -> dict[Experiment, dict[str, float]]:
    """Measured values of the fitted runs; the mean where one was made twice."""
    collected: dict[Experiment, dict[str, list[float]]] = {e: {} for e in experiments_of(rows) if e.fitted}
    for row in rows:
        if row.experiment in collected:
            collected[row.experiment].setdefault(row.metric, []).append(row.value)
    return {e: {metric: float(np.mean(values)) for metric, values in found.items()} for e, found in collected.items()}


def _priced(experiment: Experiment, values: dict[str, float], workloads: str | Path) -> _Priced:
    profile = profile_for(experiment.profile, START)
    outcome = simulated(experiment, profile, Setting(str(workloads)))
    columns = list(BatchShape.FIELDS)
    shapes = [BatchShape(*row) for row in outcome.iterations[columns].itertuples(index=False, name=None)]
    runs = list(zip(shapes, outcome.iterations["iterations"].astype(int).tolist(), strict=True))
    metric = "run_s" if "run_s" in outcome.metrics else "jct_s"
    rest_s = outcome.metrics[metric] - _total_s(LatencyModel(profile), runs)
    return _Priced(experiment, runs, values, rest_s if metric == "jct_s" else 0.0)


def _own_time(pools: Sequence[_Priced]) -> tuple[float, float]:
    """Seconds an iteration and seconds a row that the engine's own processor takes: what `run_s` has and `run_model_s` has
    not."""
    counts = [(sum(n for _, n in run.iterations), sum(n * shape.decode_rows for shape, n in run.iterations)) for run in pools]
    own = np.array([run.measured["run_s"] - run.measured["run_model_s"] for run in pools])
    solution = np.linalg.lstsq(np.array(counts, dtype=float) / own[:, None], np.ones(len(own)), rcond=None)[0]
    return float(solution[0]), float(solution[1])


def _least_squares(name: str, runs: Sequence[_Priced], start: Efficiency, free: tuple[str, ...]) -> Efficiency:
    """On `run_s` of pools, whose iterations are all of the run, and on `jct_s` of chains, which have round trips besides."""
    own = [run for run in runs if run.experiment.profile == name]

    def efficiency(logs: np.ndarray) -> Efficiency:
        return msgspec.structs.replace(start, **dict(zip(free, np.exp(logs).tolist(), strict=True)))

    def residuals(logs: np.ndarray) -> list[float]:
        model = LatencyModel(profile_for(name, efficiency(logs)))
        predicted = [_total_s(model, run.iterations) + run.rest_s for run in own]
        measured = [run.measured.get("run_s") or run.measured["jct_s"] for run in own]
        return np.log(np.divide(predicted, measured)).tolist()  # type: ignore[no-any-return]

    at = np.log([getattr(start, field) for field in free])
    return efficiency(least_squares(residuals, at).x)


def _total_s(model: LatencyModel, iterations: Sequence[tuple[BatchShape, int]]) -> float:
    """Seconds that all iterations take; in a run of n that decode, each reads one more KV token a row than the one before."""
    return sum(model.decode_run(shape).at(n) for shape, n in iterations)


def _ends(run: _Priced) -> list[tuple[BatchShape, int]]:
    """The first and the last iteration of each run of iterations."""
    last = [shape.after(n - 1) for shape, n in run.iterations]
    return [*run.iterations, *((shape, 1) for shape in last)]
