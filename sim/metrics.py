"""What a run measured: rows a program, a call and a task, and the summary of a run. The same for every backend.

Decides what the metrics are (`sim.recorder` collects them); never how the numbers are come by. Program metrics are on the
client's clock, call and task metrics from the times of the core's events (`SessionReport`, fetched before a session closes).
All times are seconds; percentiles are numpy's, with linear interpolation between the two nearest ranks.

    ttft        first token − the call became ready (request mode: − its submission), first output of a call
    tpot        (last token − first) / (n − 1) of a task with n ≥ 2 tokens, as its engine measured; `max_gap` beside it
    jct         a program's first request to its last get answered, waits for a refusal included
    normalized  a call's latency (ready or submitted, as for ttft, to its last output finished) / its output tokens

Only what finished has a latency: `failed` counts the programs that did not, and stands beside every percentile.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet  # pandas loads it with the first table that is written: in the middle of a run


class ProgramRow(NamedTuple):
    """`program` is its number in the run; `jct_s` is null unless it finished."""

    program: int
    id: str
    application: str
    tenant: str
    state: str
    arrival_s: float
    started_s: float
    ended_s: float | None
    jct_s: float | None
    calls: int
    gets: int
    refusals: int
    error: str | None


class GetRow(NamedTuple):
    program: int
    id: str
    var: str
    criteria: str
    issued_s: float
    returned_s: float | None


class CallRow(NamedTuple):
    """A call as the core saw it; in request mode each output of a call is one of its own."""

    program: int
    call: int
    output: int
    name: str
    state: str
    submitted_s: float
    ready_s: float | None
    first_token_s: float | None
    finished_s: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: float | None
    latency_s: float | None
    normalized_latency_s: float | None


class TaskRow(NamedTuple):
    program: int
    call: int
    output: int
    state: str
    attempts: int
    engine: str | None
    criteria: str | None
    depth: int
    ready_s: float | None
    dispatched_s: float | None
    started_s: float | None
    first_token_s: float | None
    finished_s: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    decode_s: float
    max_gap_s: float
    tpot_s: float | None


class Distribution(msgspec.Struct, frozen=True):
    """All null when there is nothing to measure."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class Summary(msgspec.Struct, frozen=True, kw_only=True, tag="run", tag_field="kind"):
    """One run, as `python -m sim.run` prints it. `finished`, `failed`: programs. `refused`: answers 429, each tried again.

    clients: of a closed loop. draw: null, or which draw of `--intervals`. cluster: FILE:COUNT of its engines. outside: what the
    engines did that their profile has not seen, feature -> (most observed, least seen, most seen). policy_errors: what the
    policy did wrong (`least_loaded` placed in its stead) -> how often; empty where the core cannot be asked.
    within_objectives, goodput_programs_per_s: null unless objectives are given.
    """

    policy: str
    rate: float | None
    clients: int | None = None
    arrivals: str | None = None
    seed: int
    repeat: int = 0
    draw: int | None = None
    workload: str
    cluster: tuple[str, ...] = ()
    client: str
    backend: str
    engines: int
    rtt_ms: float | str
    settings: dict[str, Any]
    programs: int
    calls: int
    finished: int
    failed: int
    refused: int
    calls_finished: int
    calls_failed: int
    tasks: int
    attempts: int
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    simulated_s: float
    throughput_tokens_per_s: float | None
    throughput_programs_per_s: float | None
    within_objectives: int | None = None
    goodput_programs_per_s: float | None = None
    ttft_s: Distribution
    tpot_s: Distribution
    max_gap_s: Distribution
    jct_s: Distribution
    normalized_latency_s: Distribution
    errors: dict[str, int]
    outside: dict[str, dict[str, tuple[float, float, float]]] = {}
    policy_errors: dict[str, int] = {}


_IDENTITY = {"rate", "clients", "seed", "repeat", "draw", "engines"}  #: numbers of a summary that say which run it was


def _metrics() -> tuple[str, ...]:
    names: list[str] = []
    for name, hint in get_type_hints(Summary).items():
        if hint is Distribution:
            names += [f"{name}.{part}" for part in Distribution.__struct_fields__]
        elif hint in (int, int | None, float, float | None) and name not in _IDENTITY:
            names.append(name)
    return tuple(names)


METRICS = _metrics()  #: every number that a run measures, as `ttft_s.p99`: distributions by part


def metrics_of(summary: Summary) -> dict[str, float | None]:
    """The numbers of a run by the names in METRICS."""
    values: dict[str, float | None] = {}
    for metric in METRICS:
        name, _, part = metric.partition(".")
        value = getattr(summary, name)
        values[metric] = getattr(value, part) if part else value
    return values


def distribution(values: Sequence[float] | array[float]) -> Distribution:
    """Mean and percentiles of `values`."""
    if not len(values):
        return Distribution(None, None, None, None)
    numbers = np.asarray(values, dtype=float)
    p50, p90, p99 = np.percentile(numbers, (50, 90, 99)).tolist()
    return Distribution(float(numbers.mean()), p50, p90, p99)


_TYPES = {int: "int64", float: "float64", float | None: "float64", str: "string", str | None: "string"}


def table_of(kind: type[ProgramRow | GetRow | CallRow | TaskRow], values: Sequence[Any]) -> pd.DataFrame:
    """The table of rows of that kind, in order of program, call and output. `values`: those of all rows, end to end."""
    hints = get_type_hints(kind)
    # A column at a time, from the types: pandas need not find them out, row by row.
    table = pd.DataFrame(
        {
            name: _strings(column) if _TYPES[hint] == "string" else np.array(column, dtype=_TYPES[hint])
            for place, (name, hint) in enumerate(hints.items())
            for column in (values[place :: len(hints)],)
        }
    )
    keys = [name for name in ("program", "call", "output") if name in hints]
    return table.sort_values(keys, kind="stable", ignore_index=True)


def _strings(values: Sequence[str | None]) -> pd.api.extensions.ExtensionArray:
    """A column of texts. Arrow takes them ten times as fast as pandas does."""
    return pd.array(pa.array(values, type=pa.large_string()), dtype="string")


def write_tables(tables: Mapping[str, pd.DataFrame], folder: Path) -> None:
    """Writes each table as FOLDER/NAME.parquet; the same rows give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)


def read_tables(folder: str | Path) -> dict[str, pd.DataFrame]:
    """What `write_tables` wrote."""
    return {path.stem: pd.read_parquet(path) for path in sorted(Path(folder).glob("*.parquet"))}
