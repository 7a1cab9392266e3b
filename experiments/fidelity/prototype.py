"""The prototype's engines in the simulator, and one run on them: the real ServeCore, engines and clients of `sim`.

No latency is decided here, and no setting: who runs something says with which limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import pandas as pd

from parrot.engine.batches import EngineLimits
from parrot.engine.emulated.engine import Iterations
from parrot.latency import BatchShape, LatencyProfile
from parrot.protocol.engine import EngineDescription
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from sim.clients import Mode
from sim.engine_models import EngineModel
from sim.network import Network
from sim.population import simulate
from sim.workloads.program import Program

PAGE_TOKENS = 16
UNBOUNDED = 10**9  #: a capacity, see `run`


class Ran(NamedTuple):
    """The tables of a run, and the iterations of its engines, one row a run of them. `prefilled`: when a task's prompt was last
    computed (that of one that was preempted is computed again). Tasks are numbered from 1 as they came to be computed: on one
    engine, in the order of their dispatch."""

    tables: dict[str, pd.DataFrame]
    iterations: pd.DataFrame
    prefilled: dict[int, float]


def limits(*, tokens: int, max_batch_size: int, tasks: int = 256, batched: int = 10**6) -> EngineLimits:
    """An engine of so many tokens, without chunking and without batches issued ahead, as the prototype's."""
    return EngineLimits(
        num_blocks=tokens // PAGE_TOKENS,
        block_size=PAGE_TOKENS,
        max_batch_size=max_batch_size,
        max_num_batched_tokens=batched,
        max_total_tokens=tokens,
        tasks_capacity=tasks,
        max_seq_len=tokens,
    )


def run(
    programs: Sequence[Program] | Iterator[Program],
    profile: LatencyProfile,
    of: EngineLimits,
    engines: int,
    mode: Mode,
    network: Network,
    scheduler: GlobalSchedulerConfig,
    capacity: int | None = None,
) -> Ran:
    """Simulates `programs` on so many engines that are alike. All must finish: raises RuntimeError.

    capacity: tokens that the scheduler lets an engine have at once, one task alone excepted; left out, what the engine holds;
        UNBOUNDED: the engine takes all that comes and decides by itself what it has room for, as one behind FastChat does.
    """
    tokens = of.max_total_tokens if capacity is None else capacity
    models = [EngineModel(_description(profile, of, tokens, number), of, profile) for number in range(engines)]
    seen: list[tuple[Any, ...]] = []
    previous: dict[str, frozenset[Any]] = {}  # engine -> who was in its last iteration
    numbers: dict[Any, int] = {}  # of the tasks, by the engines' keys
    prefilled: dict[int, float] = {}

    def observe(engine: str, edges: Iterations) -> None:
        seen.append((edges.start, edges.iterations, *edges.shape.fields().values()))
        before = previous.get(engine, frozenset())
        for key in edges.keys:
            if key not in before:
                prefilled[numbers.setdefault(key, len(numbers) + 1)] = edges.end  # no fill is cut
        previous[engine] = frozenset(edges.keys)

    config = ServeCoreConfig(global_scheduler=msgspec.structs.replace(scheduler, max_queue_size=100_000))
    recorder = simulate(programs, config, models, mode=mode, network=network, observe=observe)
    tables = recorder.tables()
    failed = tables["programs"][tables["programs"]["state"] != "finished"]
    if len(failed):
        raise RuntimeError(f"{len(failed)} programs failed in simulation: {failed['error'].iloc[0]}")
    return Ran(tables, pd.DataFrame.from_records(seen, columns=["start", "iterations", *BatchShape.FIELDS]), prefilled)


def _description(profile: LatencyProfile, of: EngineLimits, tokens: int, number: int) -> EngineDescription:
    return EngineDescription(
        engine_name=f"engine-{number}",
        model=profile.model,
        tokenizer="synthetic",
        host="",
        port=0,
        engine_type="emulated",
        tasks_capacity=of.tasks_capacity,
        tokens_capacity=tokens,
        max_seq_len=of.max_seq_len,
        bos_tokens=0,
        accepts_output_length=True,
        random_seed=0,
        attn_func=profile.attn_func,
        latency_profile=profile,
    )
