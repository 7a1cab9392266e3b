"""The table placements.parquet: why each task went where it went, a row for each engine that was weighed.

Decides how the core's explanations (`parrot.serve.explanations`) become rows; never what they say.

    placement   number of the placement, in the order in which the core made them
    program, call, output   the task, as in the other tables; program -1: of a session that nobody recorded, call and output are
                the core's own then
    attempt     from 1
    time_s      when it was placed, on the core's clock
    waited_s    since it was ready
    queued      tasks that waited then, itself included
    policy      which decided: the run's, or least_loaded where that failed
    rule        which of the policy's rules, "" where it has but one
    fallback    whether least_loaded placed in the policy's stead
    rank        from 0, the best first: in the order in which the policy weighed them
    engine      name
    fits        whether it had room
    chosen      whether the task went there
    terms       JSON: what the score was made of, by name
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from parrot.protocol.engine import TaskId
from parrot.serve.explanations import PlacementReport
from sim.recorder import Recorder

_KINDS = {
    "placement": "int64",
    "program": "int64",
    "call": "int64",
    "output": "int64",
    "attempt": "int64",
    "time_s": "float64",
    "waited_s": "float64",
    "queued": "int64",
    "policy": "string",
    "rule": "string",
    "fallback": "bool",
    "rank": "int64",
    "engine": "string",
    "fits": "bool",
    "chosen": "bool",
    "terms": "string",
}


def placements_table(recorder: Recorder) -> pd.DataFrame:
    """The table of a run whose placements were kept."""
    return table_of(recorder.placements, recorder.names or {})


def table_of(placements: Sequence[PlacementReport], names: Mapping[TaskId, tuple[int, int, int]]) -> pd.DataFrame:
    """The table of `placements`, the oldest first. `names`: as `Recorder.names`."""
    rows: list[tuple[Any, ...]] = []
    for number, placed in enumerate(placements):
        task = names.get(placed.task, (-1, placed.task.call, placed.task.output))
        waited = (placed.time_s, placed.waited_s, placed.queued, placed.policy, placed.rule, placed.fallback)
        for rank, candidate in enumerate(placed.candidates):
            terms = msgspec.json.encode(candidate.terms).decode()
            chosen = candidate.engine_id == placed.engine_id
            rows.append((number, *task, placed.attempt, *waited, rank, candidate.engine_name, candidate.fits, chosen, terms))
    columns = list(zip(*rows, strict=True)) or [()] * len(_KINDS)
    return pd.DataFrame(
        {
            name: pd.array(column, dtype="string") if kind == "string" else np.array(column, dtype=kind)
            for (name, kind), column in zip(_KINDS.items(), columns, strict=True)
        }
    )
