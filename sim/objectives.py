"""Objectives of a program, and which programs of a run are within them: the goodput of DistServe (OSDI'24), by program.

A program is within its objectives when it has finished, its JCT is at most `jct_s`, and no call's TTFT and no task's TPOT is
above `ttft_s` and `tpot_s`. Nothing here decides how the numbers are come by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
import pandas as pd
from msgspec import Meta

Seconds = Annotated[float, Meta(gt=0.0)]


class Objectives(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Upper limits in seconds; null promises nothing."""

    ttft_s: Seconds | None = None
    tpot_s: Seconds | None = None
    jct_s: Seconds | None = None

    def __bool__(self) -> bool:
        return self != Objectives()


def within(tables: Mapping[str, pd.DataFrame], objectives: Objectives) -> pd.Series:
    """For each row of the programs table, whether the program is within `objectives`. Needs programs, calls and tasks."""
    programs = tables["programs"]
    good = programs["state"] == "finished"
    if objectives.jct_s is not None:
        good &= programs["jct_s"] <= objectives.jct_s
    for table, column, limit in (("calls", "ttft_s", objectives.ttft_s), ("tasks", "tpot_s", objectives.tpot_s)):
        if limit is not None:
            worst = tables[table].groupby("program")[column].max()
            good &= ~(programs["program"].map(worst) > limit)
    return good.astype(bool)
