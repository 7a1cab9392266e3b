"""Tables and figures of merit derived from a run's tables (`sim.metrics`): load, queue, fairness, knee, Pareto front.

Pure functions of data frames; nothing is read or written here. Times are seconds since the start of the run. What changes
over time is given as its exact average over bins of one length, so that a run of any length gives as many rows.

Tasks count by the stamps of their last attempt. One whose end was not recorded (its program failed meanwhile) counts as
over at its last stamp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]

BINS = 500  #: rows of `engine_load` for each engine, and of `queue_over_time`
KNEE_FACTOR = 2.0  #: of the latency at the lowest rate: see `knee`


# -------------------------------------------------------------------------------------------------------- over time


def engine_load(tasks: pd.DataFrame, bins: int = BINS) -> pd.DataFrame:
    """The load of each engine that got a task, in order of engine and time; the table engines.parquet.

    time_s      start of the bin; all engines have the same bins, from 0 to the last stamp of any task
    bin_s       its length
    engine      name
    running     tasks that the engine had begun and not ended, mean over the bin
    waiting     tasks dispatched to it that it had not begun, mean over the bin
    kv_tokens   tokens that the running ones held, mean over the bin; an estimate: a task grows evenly from its cached tokens
                at its start to its prompt at the first token, and on to prompt + output at its end. A prefix that
                several tasks share counts for each of them.
    """
    placed = tasks[tasks["engine"].notna() & tasks["dispatched_s"].notna()]
    names, engine = np.unique(placed["engine"].to_numpy(dtype=object).astype(str), return_inverse=True)
    end = last_stamps(placed)
    dispatched, started, first = (_seconds(placed, name) for name in ("dispatched_s", "started_s", "first_token_s"))
    begun = ~np.isnan(started)
    left = np.where(begun, started, end)  # the engine's own queue
    width = _width(tasks, bins)
    shape = (len(names), bins)

    waiting = _averages(shape, width, [(engine, dispatched, 1.0, 0.0), (engine, left, -1.0, 0.0)])
    mine, start, stop = engine[begun], started[begun], end[begun]
    running = _averages(shape, width, [(mine, start, 1.0, 0.0), (mine, stop, -1.0, 0.0)])

    first = np.where(np.isnan(first[begun]), stop, first[begun])
    cached, prompt, output = (
        placed[name].to_numpy(dtype=float)[begun] for name in ("cached_tokens", "prompt_tokens", "output_tokens")
    )
    fill, fill_jump = _ramp(prompt - cached, first - start)
    grow, grow_jump = _ramp(output, stop - first)
    kv_tokens = _averages(
        shape,
        width,
        [
            (mine, start, cached + fill_jump, fill),
            (mine, first, grow_jump, grow - fill),
            (mine, stop, -(prompt + output), -grow),
        ],
    )
    return pd.DataFrame(
        {
            "time_s": np.tile(np.arange(bins) * width, len(names)),
            "bin_s": width,
            "engine": pd.Series(np.repeat(names, bins), dtype="string"),
            "running": running.ravel(),
            "waiting": waiting.ravel(),
            "kv_tokens": kv_tokens.ravel(),
        }
    ).astype({"bin_s": "float64"})


def queue_over_time(tasks: pd.DataFrame, bins: int = BINS) -> pd.DataFrame:
    """The core's queue: columns time_s and bin_s as in `engine_load`, and `queued`, the tasks that were ready and not
    dispatched, mean over the bin. A task that waits again after a lost engine counts from when it was first ready."""
    ready = tasks[tasks["ready_s"].notna()]
    begin, dispatched = _seconds(ready, "ready_s"), _seconds(ready, "dispatched_s")
    left = np.where(np.isnan(dispatched), last_stamps(ready), dispatched)
    width = _width(tasks, bins)
    only = np.zeros(len(ready), dtype=np.int64)
    queued = _averages((1, bins), width, [(only, begin, 1.0, 0.0), (only, left, -1.0, 0.0)])
    return pd.DataFrame({"time_s": np.arange(bins) * width, "bin_s": width, "queued": queued[0]})


_STAMPS = ["ready_s", "dispatched_s", "started_s", "first_token_s", "finished_s"]


def _seconds(tasks: pd.DataFrame, column: str) -> Floats:
    return np.asarray(tasks[column].to_numpy(dtype=float, na_value=np.nan))


def last_stamps(tasks: pd.DataFrame) -> Floats:
    """When each task was last heard of: its end, unless that was not recorded. −inf for one without a stamp."""
    ends = np.full(len(tasks), -np.inf)
    for stamp in _STAMPS:
        ends = np.fmax(ends, _seconds(tasks, stamp))
    return ends


def _width(tasks: pd.DataFrame, bins: int) -> float:
    """The length of a bin: all of them reach from 0 to the last stamp."""
    if bins < 1:
        raise ValueError(f"bins {bins}: at least 1 is needed")
    ends = last_stamps(tasks)
    last = float(ends[np.isfinite(ends)].max(initial=0.0))
    return last / bins if last > 0 else 1.0


def _ramp(height: Floats, duration: Floats) -> tuple[Floats, Floats]:
    """The slope of a rise by `height`, and the jump that stands for it where it takes no time."""
    lasts = duration > 0
    return np.where(lasts, height / np.where(lasts, duration, 1.0), 0.0), np.where(lasts, 0.0, height)


Change = tuple[npt.NDArray[np.int64], Floats, Floats | float, Floats | float]


def _averages(shape: tuple[int, int], width: float, changes: Sequence[Change]) -> Floats:
    """The mean over each bin of functions of time that are linear between changes, one function a row of `shape`.

    changes: (row, time, jump of the value, change of the slope), in no order. Sums over whole bins, so that counts are exact.
    """
    rows, bins = shape
    jump_sum, slope_sum, area = (np.zeros(rows * bins) for _ in range(3))
    for row, at, jump, slope in changes:
        place = np.minimum((at / width).astype(np.int64), bins - 1)
        rest = (place + 1) * width - at  # what is left of the bin
        flat = row * bins + place
        rise = slope * rest
        jump_sum += np.bincount(flat, np.broadcast_to(jump + rise, at.shape), rows * bins)
        slope_sum += np.bincount(flat, np.broadcast_to(slope, at.shape), rows * bins)
        area += np.bincount(flat, np.broadcast_to((jump + rise / 2.0) * rest, at.shape), rows * bins)
    slopes = _before(slope_sum.reshape(shape))
    values = _before(jump_sum.reshape(shape) + slopes * width)
    means = values + slopes * (width / 2.0) + area.reshape(shape) / width
    return np.maximum(means.round(6), 0.0) + 0.0


def _before(changes: Floats) -> Floats:
    """The sum of all bins before each."""
    sums = np.zeros_like(changes)
    np.cumsum(changes[:, :-1], axis=1, out=sums[:, 1:])
    return sums


# ---------------------------------------------------------------------------------------------------------- fairness


class Fairness(NamedTuple):
    """How evenly tenants were served. `tenants`: a row each; indices are Jain's (1: all alike; 1/n: one has all), ratios are
    largest/smallest. All null with a single tenant; those of the JCT also when a tenant finished nothing."""

    tenants: pd.DataFrame
    jct_index: float | None
    jct_ratio: float | None
    service_index: float | None
    service_ratio: float | None


def fairness(programs: pd.DataFrame, calls: pd.DataFrame) -> Fairness:
    """Fairness among tenants, of the tables programs and calls. The columns of `tenants`, in order of their names:

    tenant                name; empty: the programs that name none
    programs, finished    counts
    service_tokens        prompt and output tokens of its calls that were computed or read from a cache
    jct_s                 mean job completion time of what finished, seconds
    normalized_jct_s      mean over its finished programs of JCT / output tokens, seconds a token: long programs weigh as
                          short ones do
    """
    by_program = calls.groupby("program")[["prompt_tokens", "output_tokens"]].sum()
    output = programs["program"].map(by_program["output_tokens"]).fillna(0)
    prompt = programs["program"].map(by_program["prompt_tokens"]).fillna(0)
    rows = pd.DataFrame(
        {
            "tenant": programs["tenant"].fillna("").astype(str),
            "programs": 1,
            "finished": (programs["state"] == "finished").astype(int),
            "service_tokens": (prompt + output).astype("int64"),
            "jct_s": programs["jct_s"],
            "normalized_jct_s": programs["jct_s"] / output.where(output > 0),
        }
    )
    groups = rows.groupby("tenant", sort=True)
    tenants = groups[["programs", "finished", "service_tokens"]].sum().join(groups[["jct_s", "normalized_jct_s"]].mean())
    tenants = tenants.reset_index()
    if len(tenants) < 2:
        return Fairness(tenants, None, None, None, None)
    jct, service = tenants["normalized_jct_s"].to_numpy(dtype=float), tenants["service_tokens"].to_numpy(dtype=float)
    known = not np.isnan(jct).any()
    return Fairness(
        tenants,
        jain_index(jct) if known else None,
        _ratio(jct) if known else None,
        jain_index(service),
        _ratio(service),
    )


def jain_index(shares: Sequence[float] | Floats) -> float | None:
    """(Σx)² / (n·Σx²), after Jain, Chiu and Hawe, "A quantitative measure of fairness and discrimination" (1984).
    Null when there is nothing to share."""
    x = np.asarray(shares, dtype=float)
    squares = float((x * x).sum())
    return float(x.sum()) ** 2 / (len(x) * squares) if squares > 0 else None


def _ratio(values: Floats) -> float | None:
    return float(values.max() / values.min()) if values.min() > 0 else None


# ---------------------------------------------------------------------------------------------------- knee and front


def knee(rates: Sequence[float], latencies: Sequence[float], factor: float = KNEE_FACTOR) -> float | None:
    """The rate at which latency first reaches `factor` times that of the lowest rate, linear between the rates measured.

    Null when it never does, or with fewer than two rates. The lowest rate stands for the unloaded system, so it must be one:
    a sweep that begins above the knee has none that can be seen.
    """
    order = np.argsort(rates)
    x, y = np.asarray(rates, dtype=float)[order], np.asarray(latencies, dtype=float)[order]
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    if len(x) < 2:
        return None
    limit = factor * y[0]
    above = np.flatnonzero(y >= limit)
    if not len(above) or above[0] == 0:
        return None
    right = int(above[0])
    left = right - 1
    return float(x[left] + (x[right] - x[left]) * (limit - y[left]) / (y[right] - y[left]))


def pareto_front(throughputs: Sequence[float], latencies: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Which points no other beats: none has as much throughput with less latency, or more with as little.
    A point with a null is never on the front."""
    x, y = np.asarray(throughputs, dtype=float), np.asarray(latencies, dtype=float)
    front = np.zeros(len(x), dtype=bool)
    known = np.flatnonzero(~(np.isnan(x) | np.isnan(y)))
    order = known[np.lexsort((y[known], -x[known]))]
    best = (np.inf, np.nan)  # the least latency so far, and the throughput that came with it
    for point in order:
        if y[point] < best[0] or (y[point], x[point]) == best:
            front[point] = True
            best = (y[point], x[point])
    return front
