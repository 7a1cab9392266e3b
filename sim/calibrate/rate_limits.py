"""What limited the requests of a log: what its engine was configured to keep to, else what answers 429 of the endpoint show."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

from parrot.engine.rate_limits import MINUTE_S
from sim.calibrate.request_logs import REFUSED, RemoteRun

LEAST_REFUSALS = 3  #: after a run's first minute, to tell a limit on tokens from one on requests


class Limits(NamedTuple):
    """A minute's; `source` as RemoteProfile.limits_from; `note`: for the profile's notes, a sentence or nothing."""

    requests: int | None
    tokens: int | None
    source: Literal["", "configuration", "refusals"]
    note: str


def limits_in(runs: Sequence[RemoteRun]) -> Limits:
    """The configured limits where every run had one (of several, the largest); else those that refusals show.

    A refusal comes when a minute's worth has been taken: the most that was accepted in a minute that ended in one is the limit.
    Whether it is on requests or on tokens shows in which of the two varies less from refusal to refusal.
    """
    headers = [run.header for run in runs]
    requests = _largest([header.requests_per_minute for header in headers])
    tokens = _largest([header.tokens_per_minute for header in headers])
    if requests is not None or tokens is not None:
        return Limits(requests, tokens, "configuration", "")
    counts: list[int] = []
    sums: list[int] = []
    late: list[tuple[int, int]] = []
    for run in runs:
        for at, count, total in _before_refusals(run):
            counts.append(count)
            sums.append(total)
            if at >= MINUTE_S:
                late.append((count, total))
    if not counts or max(counts) < 1:
        return Limits(None, None, "", "")
    on_tokens = len(late) >= LEAST_REFUSALS and _variation([c for c, _ in late]) > _variation([t for _, t in late])
    note = (
        f"{len(counts)} answers 429: the limit is the most that was accepted in a minute that ended in one, taken for one on "
        f"{'tokens (prompt and max_gen_length)' if on_tokens else 'requests'}; others' requests to the endpoint are not seen. "
    )
    return Limits(None, max(sums), "refusals", note) if on_tokens else Limits(max(counts), None, "refusals", note)


def _largest(limits: Sequence[int | None]) -> int | None:
    known = [limit for limit in limits if limit is not None]
    return max(known) if known and len(known) == len(limits) else None


def _before_refusals(run: RemoteRun) -> list[tuple[float, int, int]]:
    """For each refusal: when that request was sent, and the requests and tokens that were accepted in the minute before."""
    accepted = sorted((r.t, r.limit_tokens or r.prompt_tokens + r.output_tokens) for r in run.requests if r.reason != REFUSED)
    times = [at for at, _ in accepted]
    sums = [0, *accumulate(tokens for _, tokens in accepted)]
    found = []
    for request in run.requests:
        if request.reason == REFUSED:
            begin, end = bisect_right(times, request.t - MINUTE_S), bisect_left(times, request.t)
            found.append((request.t, end - begin, sums[end] - sums[begin]))
    return found


def _variation(values: Sequence[int]) -> float:
    return float(np.std(values) / max(float(np.mean(values)), 1e-9))
