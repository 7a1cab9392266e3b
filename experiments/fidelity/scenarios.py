"""What the simulator runs for a run of the paper, and what is read off it: the real ServeCore, engines and clients of `sim`.

The settings are those of the workloads file and of the artifact's scripts; each function says what it takes from where and
what it cannot know. No latency is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd

from experiments.fidelity.measured import Experiment
from parrot.engine.batches import EngineLimits
from parrot.engine.emulated.engine import Iterations
from parrot.latency import BatchShape, LatencyProfile
from parrot.protocol.engine import EngineDescription
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from sim.clients import Mode
from sim.cluster import EngineModel
from sim.network import Constant, Network, open_network
from sim.population import simulate
from sim.workloads.paper import open_paper
from sim.workloads.program import Program

SEED = 0
WARM_UP_S = 60.0  #: when measured requests begin, where a prefix is filled before
PAGE_TOKENS = 16
LATENCY_CAPACITY = 6144  #: tokens that an engine with chats may hold: the paper's setting for 40 ms a token (its section 8.1)
GPTS_REQUESTS = {("vllm", "0.25"): 50, ("vllm", "0.5"): 100, ("paged_shared", "0.5"): 200, ("paged_shared", "1.0"): 300}
GPTS_REQUESTS_ELSE = 500  #: as the artifact's scripts have it, too
PLAIN = GlobalSchedulerConfig()
LEAST_LOADED = GlobalSchedulerConfig(policy="least_loaded")
CHAT_REQUESTS = 100  #: of figure 10 (the artifact's notes)


class Outcome(NamedTuple):
    """What a simulated run gives: the paper's metrics, and the iterations of the engines, one row a run of them."""

    metrics: dict[str, float]
    iterations: pd.DataFrame


def modelled(experiment: Experiment) -> str:
    """Why a run is not simulated; "" when it is."""
    if experiment.system == "hf":
        return "plain generate: another engine, whose iterations no profile describes"
    return ""


def simulated(
    experiment: Experiment, profile: LatencyProfile, workloads: str | Path, iteration_s: float = 0.0, row_s: float = 0.0
) -> Outcome:
    """Simulates a run under `profile`. `iteration_s`, `row_s`: the engine's own time that the profile holds, which the
    metric `run_model_s` leaves out."""
    return _KINDS[experiment.figure](experiment, profile, str(workloads), iteration_s, row_s)


# -------------------------------------------------------------------------------------------------------- the figures


def _chain(experiment: Experiment, profile: LatencyProfile, file: str, *_: float) -> Outcome:
    """Figure 11: one article at a time on one engine. Parrot's client submits the whole chain, the baseline pays a round trip
    a call (measured samples)."""
    p = experiment.parameters
    name = f"chain_summary,file={file},article={p['article']},chunk_size={p['chunk_size']},output_tokens={p['output_tokens']}"
    mode = Mode.REQUEST if experiment.system == "vllm" else Mode.SEMANTIC
    limits = _limits(tokens=4096, max_batch_size=256)
    run = _run(list(open_paper(name, rate=None, seed=SEED, count=1)), profile, limits, 1, mode, open_network(file, SEED))
    return Outcome({"jct_s": float(run.tables["programs"]["jct_s"].iloc[0])}, run.iterations)


def _copilot(experiment: Experiment, profile: LatencyProfile, file: str, iteration_s: float, row_s: float) -> Outcome:
    """Figures 14 and 15: the artifact drives its runner directly, with no server and no network: a pool of so many requests,
    each followed by the next; the shared prefix is filled first, on its own; all new requests of an iteration are filled in
    it whole, beside those that decode. Figure 14 has the first 64 output lengths, figure 15 every prompt."""
    p = experiment.parameters
    at_once = int(p.get("closed_batch") or p["batch"])
    shared = experiment.system != "paged_no_sharing"
    name = f"bing_copilot,file={file},share={str(shared).lower()}"
    if "output_tokens" in p:
        name += f",output_tokens={p['output_tokens']}"
    requests = _requests(file, experiment.figure)
    programs = [
        msgspec.structs.replace(program, arrival_s=WARM_UP_S if index or not shared else 0.0)
        for index, program in enumerate(open_paper(name, rate=None, seed=SEED, count=requests + shared))
    ]
    if shared:  # the first fills the prefix: what it generates and its own input are as short as can be
        programs = [_prefix_only(programs[-1]), *programs[:-1]]
        programs[1:] = [msgspec.structs.replace(program, arrival_s=WARM_UP_S) for program in programs[1:]]
    limits = _limits(tokens=6800 * PAGE_TOKENS, max_batch_size=at_once, tasks=at_once)
    run = _run(programs, profile, limits, 1, Mode.SEMANTIC, Constant(0.0))
    tasks = run.tables["tasks"]
    measured = tasks[tasks["ready_s"] >= WARM_UP_S - 1e-9]
    within = run.iterations[run.iterations["start"] >= WARM_UP_S - 1e-9]
    prefix_s = float(tasks["finished_s"].iloc[0] - tasks["started_s"].iloc[0]) if shared else 0.0
    run_s = float(measured["finished_s"].max() - measured["started_s"].min())
    own_s = iteration_s * within["iterations"].sum() + row_s * (within["iterations"] * within["decode_rows"]).sum()
    metrics = {
        "prefix_fill_s": prefix_s,
        "run_s": run_s,
        "run_model_s": run_s - float(own_s),
        "total_s": prefix_s + run_s,
        "request_latency_mean_s": float((measured["finished_s"] - measured["started_s"]).mean()),
    }
    return Outcome(metrics, within)


def _requests(file: str, figure: str) -> int:
    part = msgspec.json.decode(Path(file).read_bytes())["bing_copilot"]
    return len(part["figure14_pairs_prompt_output"] if figure == "14" else part["prompt_tokens"])


def _prefix_only(program: Program) -> Program:
    (call,), (query,) = program.calls, program.sets
    *front, write = call.segments
    short = msgspec.structs.replace(write, tokens=1, max_gen_length=1)
    return msgspec.structs.replace(
        program,
        id="prefix",
        arrival_s=0.0,
        calls=(msgspec.structs.replace(call, segments=(*front, short)),),
        sets=(msgspec.structs.replace(query, tokens=1),),
    )


def _gpts(experiment: Experiment, profile: LatencyProfile, file: str, *_: float) -> Outcome:
    """Figure 16: four engines. The baseline is a client with no sharing that pays a round trip, behind FastChat's dispatch to
    the least loaded worker. How many requests: the artifact's scripts."""
    rate = experiment.parameters["request_rate_per_s"]
    baseline = experiment.system == "vllm"
    count = GPTS_REQUESTS.get((experiment.system, rate), GPTS_REQUESTS_ELSE)
    name = f"gpts,file={file},share={str(not baseline).lower()}"
    limits = _limits(tokens=3000 * PAGE_TOKENS, max_batch_size=256, batched=8000)
    always = {"ctx_weight": 1e9}  # the artifact prefers an engine with the prefix whatever its load
    scheduler = LEAST_LOADED if baseline else GlobalSchedulerConfig(ctx_aware=True, params=always)
    mode = Mode.REQUEST if baseline else Mode.SEMANTIC
    programs = open_paper(name, rate=float(rate), seed=SEED, count=count)
    run = _run(programs, profile, limits, 4, mode, open_network(file, SEED) if baseline else Constant(0.0), scheduler)
    outputs = run.tables["calls"]["output_tokens"].groupby(run.tables["calls"]["program"]).sum()
    done = run.tables["programs"].set_index("program")["jct_s"]
    return Outcome({"normalized_latency_ms_per_token": float((1e3 * done / outputs).mean())}, run.iterations)


def _chat(experiment: Experiment, profile: LatencyProfile, file: str, *_: float) -> Outcome:
    """Figure 10: ShareGPT chats under vLLM, whose capacity in tokens is set. Their lengths are in no file: see paper:chat."""
    p = experiment.parameters
    limits = _limits(tokens=int(p["token_capacity"]), max_batch_size=256, batched=2560)
    programs = open_paper("chat", rate=float(p["request_rate_per_s"]), seed=SEED, count=CHAT_REQUESTS)
    run = _run(programs, profile, limits, 1, Mode.REQUEST, Constant(0.0), LEAST_LOADED)
    tpot_ms = 1e3 * run.tables["tasks"]["tpot_s"].dropna()
    return Outcome({"tpot_mean_ms": float(tpot_ms.mean()), "tpot_p90_ms": float(np.percentile(tpot_ms, 90))}, run.iterations)


def _mixed(experiment: Experiment, profile: LatencyProfile, file: str, *_: float) -> Outcome:
    """Figure 18: chats beside map-reduce summaries on four engines. Of Parrot's bounds on requests an engine, the simulated
    policy has the one in tokens (LATENCY_CAPACITY); the baselines differ in the capacity of their engines."""
    parrot = experiment.system == "parrot"
    tokens = 4096 if experiment.system == "vllm_latency_cap4096" else 53000
    limits = _limits(tokens=tokens, max_batch_size=256, batched=8000)
    network = open_network(file, SEED)
    scheduler = (
        GlobalSchedulerConfig(app_fifo=True, graph_group=True, params={"latency_capacity": LATENCY_CAPACITY})
        if parrot
        else LEAST_LOADED
    )
    mode = Mode.SEMANTIC if parrot else Mode.REQUEST
    programs = open_paper(f"mixed,file={file}", rate=None, seed=SEED, count=None)
    run = _run(programs, profile, limits, 4, mode, network, scheduler)
    programs, tasks = run.tables["programs"], run.tables["tasks"]
    chats = programs[programs["application"] == "chat"].set_index("program")
    own = tasks[tasks["program"].isin(chats.index)].set_index("program")
    metrics = {
        "chat_normalized_latency_ms": float((1e3 * chats["jct_s"] / own["output_tokens"]).mean()),
        "chat_decode_ms_per_token": float((1e3 * own["decode_s"] / own["output_tokens"]).mean()),
        "map_reduce_jct_mean_s": float(programs.loc[programs["application"] == "map_reduce", "jct_s"].mean()),
    }
    return Outcome(metrics, run.iterations)


_KINDS: dict[str, Callable[..., Outcome]] = {
    "10": _chat,
    "11": _chain,
    "14": _copilot,
    "15": _copilot,
    "16": _gpts,
    "18": _mixed,
}


# --------------------------------------------------------------------------------------------------------------- a run


class _Run(NamedTuple):
    tables: dict[str, pd.DataFrame]
    iterations: pd.DataFrame


def _limits(*, tokens: int, max_batch_size: int, tasks: int = 256, batched: int = 10**6) -> EngineLimits:
    """An engine without chunking and without batches issued ahead, as the prototype's."""
    return EngineLimits(
        num_blocks=tokens // PAGE_TOKENS,
        block_size=PAGE_TOKENS,
        max_batch_size=max_batch_size,
        max_num_batched_tokens=batched,
        max_total_tokens=tokens,
        tasks_capacity=tasks,
        max_seq_len=tokens,
    )


def _run(
    programs: Sequence[Program] | Iterator[Program],
    profile: LatencyProfile,
    limits: EngineLimits,
    engines: int,
    mode: Mode,
    network: Network,
    scheduler: GlobalSchedulerConfig = PLAIN,
) -> _Run:
    models = [EngineModel(_description(profile, limits, number), limits, profile) for number in range(engines)]
    seen: list[tuple[Any, ...]] = []

    def observe(engine: str, run: Iterations) -> None:
        seen.append((run.start, run.iterations, *run.shape.fields().values()))

    config = ServeCoreConfig(global_scheduler=msgspec.structs.replace(scheduler, max_queue_size=100_000))
    recorder = simulate(programs, config, models, mode=mode, network=network, observe=observe)
    tables = recorder.tables()
    failed = tables["programs"][tables["programs"]["state"] != "finished"]
    if len(failed):
        raise RuntimeError(f"{len(failed)} programs failed in simulation: {failed['error'].iloc[0]}")
    return _Run(tables, pd.DataFrame.from_records(seen, columns=["start", "iterations", *BatchShape.FIELDS]))


def _description(profile: LatencyProfile, limits: EngineLimits, number: int) -> EngineDescription:
    return EngineDescription(
        engine_name=f"engine-{number}",
        model=profile.model,
        tokenizer="synthetic",
        host="",
        port=0,
        engine_type="emulated",
        tasks_capacity=limits.tasks_capacity,
        tokens_capacity=limits.max_total_tokens,
        max_seq_len=limits.max_seq_len,
        bos_tokens=0,
        accepts_output_length=True,
        random_seed=0,
        attn_func=profile.attn_func,
        latency_profile=profile,
    )
