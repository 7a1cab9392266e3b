"""Which two systems are compared by which metric, and what the paper says of the pair: a ratio, the other system's value over
Parrot's (above 1: Parrot is better).

From the file of measurements a ratio is of two rows with the same parameters. Two figures have no rows there; what was
published of them stands in CLAIMS, each with its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.fidelity.measured import Experiment, Row

BACKGROUND, MAP_REDUCE = "12", "13"  #: the artifact's numbers of the figures (the second is the paper's 14)
CHUNK_SIZE, OUTPUT_TOKENS = "1024", "50"  #: of the chains among other requests (the artifact's scripts)
#: rates of the other requests in the paper -> the parts of what the engine takes at most that stand in their place for
#: those that are as long as an Azure trace's
LOADS = {"1": 0.25, "2": 0.5, "3": 0.75, "3.5": 0.9}

_COPILOT, _GPTS, _MIXED = "shared prompt, one engine", "shared prompts, four engines", "chats beside map-reduce"


class Pair(NamedTuple):
    """Parrot's system and another one, by a metric of which less is better."""

    figure: str
    workload: str
    parrot: str
    other: str
    metric: str


PAIRS = (
    Pair("11", "chain summary", "parrot", "vllm", "jct_s"),
    Pair(BACKGROUND, "chain under load", "parrot", "vllm", "jct_s"),
    Pair(MAP_REDUCE, "map-reduce summary", "parrot", "vllm", "jct_s"),
    Pair("14", _COPILOT, "shared_kernel", "paged_no_sharing", "request_latency_mean_s"),
    Pair("14", _COPILOT, "shared_kernel", "paged_shared", "request_latency_mean_s"),
    Pair("15", _COPILOT, "shared_kernel", "paged_shared", "request_latency_mean_s"),
    Pair("16", _GPTS, "shared_kernel", "vllm", "normalized_latency_ms_per_token"),
    Pair("16", _GPTS, "shared_kernel", "paged_shared", "normalized_latency_ms_per_token"),
    *(
        Pair("18", _MIXED, "parrot", other, metric)
        for other in ("vllm_throughput", "vllm_latency_cap4096")
        for metric in ("chat_normalized_latency_ms", "chat_decode_ms_per_token", "map_reduce_jct_mean_s")
    ),
)


class Compared(NamedTuple):
    """A ratio of the paper, and the runs that ours is made from: of several, one a seed in turn (`article`) or all of them."""

    pair: Pair
    params: str
    paper: float
    source: str
    parrot: tuple[Experiment, ...]
    other: tuple[Experiment, ...]


class Claim(NamedTuple):
    """A published ratio of mean completion times over all articles."""

    figure: str
    params: str
    ratio: float
    source: str


_LOGS = "logs in the public repository of the artifact, means of ten articles"
CLAIMS = (
    *(
        Claim(BACKGROUND, f"request_rate_per_s={rate}", ratio, source)
        for rate, ratio, source in (
            ("1", 1.19, _LOGS),
            ("2", 1.31, _LOGS),
            ("3", 1.79, _LOGS),
            ("3.5", 2.38, "the paper's text, section 8.2"),
        )
    ),
    *(
        Claim(MAP_REDUCE, f"chunk_size=1024;output_tokens={tokens}", ratio, _LOGS)  # the paper's text: up to 2.37
        for tokens, ratio in ((25, 1.74), (50, 2.09), (75, 2.30), (100, 2.45))
    ),
)


def compared(rows: Sequence[Row], articles: Sequence[str]) -> list[Compared]:
    """Everything that there is a ratio of, pair by pair."""
    found = []
    for pair in PAIRS:
        found += _measured(pair, rows) if pair.figure not in (BACKGROUND, MAP_REDUCE) else _claimed(pair, articles)
    return found


def _measured(pair: Pair, rows: Sequence[Row]) -> list[Compared]:
    values: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if (row.experiment.figure, row.metric) == (pair.figure, pair.metric):
            values.setdefault((row.experiment.system, row.experiment.params), []).append(row)
    found = []
    for (system, params), parrot in values.items():
        other = values.get((pair.other, params))
        if system == pair.parrot and other is not None:
            ratio = float(np.mean([row.value for row in other]) / np.mean([row.value for row in parrot]))
            found.append(Compared(pair, params, ratio, parrot[0].source, (parrot[0].experiment,), (other[0].experiment,)))
    return found


def _claimed(pair: Pair, articles: Sequence[str]) -> list[Compared]:
    found = []
    for claim in CLAIMS:
        if claim.figure != pair.figure:
            continue
        variants = [claim.params]
        if pair.figure == BACKGROUND:
            rate = claim.params.partition("=")[2]
            variants = [f"azure_load={LOADS[rate]:g}", claim.params]
        for params in variants:
            runs = [
                tuple(
                    Experiment(pair.figure, pair.workload, system, "vicuna-13b", "A100-80G", f"article={article};{params}")
                    for article in articles
                )
                for system in (pair.parrot, pair.other)
            ]
            found.append(Compared(pair, params, claim.ratio, claim.source, *runs))
    return sorted(found, key=lambda row: "azure_load" not in row.params)  # stable: the two kinds apart
