"""What the simulator runs for a run of the paper, and what is read off it: the real ServeCore, engines and clients of `sim`.

The settings are those of the workloads file and of the artifact's scripts; each function says what it takes from where and
what it cannot know. No latency is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pandas as pd

from experiments.fidelity.measured import Experiment
from experiments.fidelity.prototype import PAGE_TOKENS, UNBOUNDED, limits, run
from parrot.latency import LatencyProfile
from parrot.serve.config import GlobalSchedulerConfig
from sim.clients import Mode
from sim.network import Constant, open_network
from sim.workloads.paper import open_paper
from sim.workloads.program import Program

SEED = 0
CLUSTER_ENGINE = limits(tokens=3000 * PAGE_TOKENS, max_batch_size=256, batched=8000)  #: of figure 16 (workloads file)
CHAIN_ENGINE = limits(tokens=4096, max_batch_size=256)  #: of figure 11, both systems (workloads file)
WARM_UP_S = 60.0  #: when measured requests begin, where a prefix is filled before
LATENCY_CAPACITY = 6144  #: tokens that an engine with chats may hold: the paper's setting for 40 ms a token (its section 8.1)
GPTS_REQUESTS = {("vllm", "0.25"): 50, ("vllm", "0.5"): 100, ("paged_shared", "0.5"): 200, ("paged_shared", "1.0"): 300}
GPTS_REQUESTS_ELSE = 500  #: as the artifact's scripts have it, too
PLAIN = GlobalSchedulerConfig()
LEAST_LOADED = GlobalSchedulerConfig(policy="least_loaded")
CHAT_REQUESTS = 100  #: of figure 10 (the artifact's notes)
BASELINES = ("vllm", "vllm_throughput", "vllm_latency_cap4096", "paged_no_sharing")  #: not Parrot's own prototype


class Outcome(NamedTuple):
    """What a simulated run gives: the paper's metrics, and the iterations of the engines, one row a run of them."""

    metrics: dict[str, float]
    iterations: pd.DataFrame


class Setting(NamedTuple):
    """What a run is made with, beside what the paper says of it.

    workloads: the file. iteration_s, row_s: the engine's own time that the profile holds, which the metric `run_model_s` leaves
    out. switches: the policy of Parrot's own runs, in the place of the prototype's for the figure. chats: an Azure trace
    for the lengths of chats, in the place of `paper:chat`'s.
    """

    workloads: str
    iteration_s: float = 0.0
    row_s: float = 0.0
    switches: GlobalSchedulerConfig | None = None
    chats: str | None = None
    seed: int = SEED

    def scheduler(self, experiment: Experiment, prototype: GlobalSchedulerConfig) -> GlobalSchedulerConfig:
        """Of a run: a baseline's requests go to the least loaded engine, as FastChat sends them."""
        if experiment.system in BASELINES:
            return LEAST_LOADED
        return prototype if self.switches is None else self.switches


def modelled(experiment: Experiment) -> str:
    """Why a run is not simulated; "" when it is."""
    if experiment.system == "hf":
        return "plain generate: another engine, whose iterations no profile describes"
    return ""


def simulated(experiment: Experiment, profile: LatencyProfile, setting: Setting) -> Outcome:
    """Simulates a run under `profile`."""
    return _KINDS[experiment.figure](experiment, profile, setting)


# -------------------------------------------------------------------------------------------------------- the figures


def _chain(experiment: Experiment, profile: LatencyProfile, setting: Setting) -> Outcome:
    """Figure 11: one article at a time on one engine. Parrot's client submits the whole chain, the baseline pays a round trip
    a call (measured samples)."""
    p, file, seed = experiment.parameters, setting.workloads, setting.seed
    name = f"chain_summary,file={file},article={p['article']},chunk_size={p['chunk_size']},output_tokens={p['output_tokens']}"
    mode = Mode.REQUEST if experiment.system == "vllm" else Mode.SEMANTIC
    programs = list(open_paper(name, rate=None, seed=seed, count=1))
    ran = run(programs, profile, CHAIN_ENGINE, 1, mode, open_network(file, seed), setting.scheduler(experiment, PLAIN))
    return Outcome({"jct_s": float(ran.tables["programs"]["jct_s"].iloc[0])}, ran.iterations)


def _copilot(experiment: Experiment, profile: LatencyProfile, setting: Setting) -> Outcome:
    """Figures 14 and 15: the artifact drives its runner directly, with no server and no network: a pool of so many requests,
    each followed by the next; the shared prefix is filled first, on its own; all new requests of an iteration are filled in
    it whole, beside those that decode. Figure 14 has the first 64 output lengths, figure 15 every prompt."""
    p, file = experiment.parameters, setting.workloads
    at_once = int(p.get("closed_batch") or p["batch"])
    shared = experiment.system != "paged_no_sharing"
    name = f"bing_copilot,file={file},share={str(shared).lower()}"
    if "output_tokens" in p:
        name += f",output_tokens={p['output_tokens']}"
    requests = _requests(file, experiment.figure)
    programs = [
        msgspec.structs.replace(program, arrival_s=WARM_UP_S if index or not shared else 0.0)
        for index, program in enumerate(open_paper(name, rate=None, seed=setting.seed, count=requests + shared))
    ]
    if shared:  # the first fills the prefix: what it generates and its own input are as short as can be
        programs = [_prefix_only(programs[-1]), *programs[:-1]]
        programs[1:] = [msgspec.structs.replace(program, arrival_s=WARM_UP_S) for program in programs[1:]]
    engine = limits(tokens=6800 * PAGE_TOKENS, max_batch_size=at_once, tasks=at_once)
    mode = Mode.REQUEST if experiment.system in BASELINES else Mode.SEMANTIC
    ran = run(programs, profile, engine, 1, mode, Constant(0.0), setting.scheduler(experiment, PLAIN))
    tasks = ran.tables["tasks"]
    measured = tasks[tasks["ready_s"] >= WARM_UP_S - 1e-9]
    within = ran.iterations[ran.iterations["start"] >= WARM_UP_S - 1e-9]
    prefix_s = float(tasks["finished_s"].iloc[0] - tasks["started_s"].iloc[0]) if shared else 0.0
    run_s = float(measured["finished_s"].max() - measured["started_s"].min())
    rows = (within["iterations"] * within["decode_rows"]).sum()
    own_s = setting.iteration_s * within["iterations"].sum() + setting.row_s * rows
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


def _gpts(experiment: Experiment, profile: LatencyProfile, setting: Setting) -> Outcome:
    """Figure 16: four engines. The baseline is a client with no sharing that pays a round trip, behind FastChat's dispatch to
    the least loaded worker. How many requests: the artifact's scripts."""
    rate, file, seed = experiment.parameters["request_rate_per_s"], setting.workloads, setting.seed
    baseline = experiment.system in BASELINES
    count = GPTS_REQUESTS.get((experiment.system, rate), GPTS_REQUESTS_ELSE)
    name = f"gpts,file={file},share={str(not baseline).lower()}"
    always = {"ctx_weight": 1e9}  # the artifact prefers an engine with the prefix whatever its load
    scheduler = setting.scheduler(experiment, GlobalSchedulerConfig(ctx_aware=True, params=always))
    mode, network = (Mode.REQUEST, open_network(file, seed)) if baseline else (Mode.SEMANTIC, Constant(0.0))
    programs = open_paper(name, rate=float(rate), seed=seed, count=count)
    ran = run(programs, profile, CLUSTER_ENGINE, 4, mode, network, scheduler)
    outputs = ran.tables["calls"]["output_tokens"].groupby(ran.tables["calls"]["program"]).sum()
    done = ran.tables["programs"].set_index("program")["jct_s"]
    return Outcome({"normalized_latency_ms_per_token": float((1e3 * done / outputs).mean())}, ran.iterations)


def _chat(experiment: Experiment, profile: LatencyProfile, setting: Setting) -> Outcome:
    """Figure 10: ShareGPT chats under vLLM, whose capacity in tokens is set: it admits a request when there is room for its
    prompt, and preempts when the outputs have filled the rest. The artifact reads a request's time from vLLM's log: from
    when its prompt was last computed (after a preemption it is computed again) to its end, over all of its output. The
    lengths are in no file: see paper:chat."""
    p = experiment.parameters
    engine = limits(tokens=int(p["token_capacity"]), max_batch_size=256, tasks=CHAT_REQUESTS, batched=2560)
    programs = open_paper("chat", rate=float(p["request_rate_per_s"]), seed=setting.seed, count=CHAT_REQUESTS)
    ran = run(programs, profile, engine, 1, Mode.REQUEST, Constant(0.0), LEAST_LOADED, UNBOUNDED)
    tasks = ran.tables["tasks"].sort_values("ready_s", kind="stable")  # in which order they were dispatched
    prefilled_s = np.array([ran.prefilled[number] for number in range(1, len(tasks) + 1)])
    tpot_ms = 1e3 * (tasks["finished_s"] - prefilled_s) / tasks["output_tokens"]
    return Outcome({"tpot_mean_ms": float(tpot_ms.mean()), "tpot_p90_ms": float(np.percentile(tpot_ms, 90))}, ran.iterations)


def _mixed(experiment: Experiment, profile: LatencyProfile, setting: Setting) -> Outcome:
    """Figure 18: chats beside map-reduce summaries on four engines. Of Parrot's bounds on requests an engine, the simulated
    policy has the one in tokens (LATENCY_CAPACITY); the baselines differ in the capacity of their engines."""
    tokens = 4096 if experiment.system == "vllm_latency_cap4096" else 53000
    engine = limits(tokens=tokens, max_batch_size=256, batched=8000)
    prototype = GlobalSchedulerConfig(app_fifo=True, graph_group=True, params={"latency_capacity": LATENCY_CAPACITY})
    mode = Mode.REQUEST if experiment.system in BASELINES else Mode.SEMANTIC
    name = f"mixed,file={setting.workloads}" + (f",lengths={setting.chats}" if setting.chats else "")
    programs = open_paper(name, rate=None, seed=setting.seed, count=None)
    network = open_network(setting.workloads, setting.seed)
    ran = run(programs, profile, engine, 4, mode, network, setting.scheduler(experiment, prototype))
    return Outcome(_mixed_metrics(ran.tables), ran.iterations)


def _mixed_metrics(tables: dict[str, pd.DataFrame]) -> dict[str, float]:
    """Of chats beside map-reduce summaries."""
    programs, tasks = tables["programs"], tables["tasks"]
    chats = programs[programs["application"] == "chat"].set_index("program")
    own = tasks[tasks["program"].isin(chats.index)].set_index("program")
    return {
        "chat_normalized_latency_ms": float((1e3 * chats["jct_s"] / own["output_tokens"]).mean()),
        "chat_decode_ms_per_token": float((1e3 * own["decode_s"] / own["output_tokens"]).mean()),
        "map_reduce_jct_mean_s": float(programs.loc[programs["application"] == "map_reduce", "jct_s"].mean()),
    }


_KINDS: dict[str, Callable[..., Outcome]] = {
    "10": _chat,
    "11": _chain,
    "14": _copilot,
    "15": _copilot,
    "16": _gpts,
    "18": _mixed,
}
