"""What the simulator runs for the two figures that the file of measurements has no rows of, and the others by way of
`experiments.fidelity`. The settings are the artifact's; each function says what it takes from where and what it cannot know.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, takewhile

import msgspec

from experiments.fidelity.measured import A6000_PAGED, Experiment
from experiments.fidelity.prototype import PAGE_TOKENS, limits, run
from experiments.fidelity.scenarios import CHAIN_ENGINE, LEAST_LOADED, PLAIN, Setting, simulated
from experiments.paper.pairs import BACKGROUND, CHUNK_SIZE, MAP_REDUCE, OUTPUT_TOKENS
from parrot.latency import LatencyProfile
from sim.clients import Mode
from sim.network import Constant, open_network
from sim.workloads.arrivals import poisson, stream
from sim.workloads.paper import open_paper, request
from sim.workloads.program import Program

#: Parrot's engine of map-reduce in the artifact: KV memory of 3,800 blocks, of which 8,192 tokens are given out
MAP_REDUCE_ENGINE = limits(tokens=3800 * PAGE_TOKENS, max_batch_size=256, batched=10**6)
MAP_REDUCE_CAPACITY = {Mode.SEMANTIC: 8192, Mode.REQUEST: CHAIN_ENGINE.max_total_tokens}
CHAIN_ARRIVES_S = 3.0  #: after the first of the other requests (the artifact's script)
PROMPT, OUTPUT = 512, 50  #: of the artifact's other requests
FULL_LOAD_REQUESTS = 400  #: from which an engine's most requests a second are measured
WATCHED_S = (240.0, 1200.0)  #: how long other requests come: the longer where the chain takes longer than the shorter


def profile_of(experiment: Experiment) -> str:
    """The name of the profile. Where chats and summaries are mixed no prompt of any length is shared, and which attention
    function the prototype had there is not published: both systems have the same engines."""
    return A6000_PAGED if experiment.figure == "18" else experiment.profile


def metrics_of(experiment: Experiment, profile: LatencyProfile, setting: Setting) -> dict[str, float]:
    """The paper's metrics of a simulated run."""
    if experiment.figure == BACKGROUND:
        return background(experiment, profile, setting)
    if experiment.figure == MAP_REDUCE:
        return {"jct_s": map_reduce(experiment, profile, setting)}
    return simulated(experiment, profile, setting).metrics


def mode_of(experiment: Experiment) -> Mode:
    """Parrot's client submits its program, the other pays a round trip a call."""
    return Mode.SEMANTIC if experiment.system == "parrot" else Mode.REQUEST


def map_reduce(experiment: Experiment, profile: LatencyProfile, setting: Setting) -> float:
    """One article at a time on one engine. The baseline's engine is held to what figure 11 gives it, since it takes every
    request for one that waits for its answer. A last call that is larger is run whole, alone (the baseline cut it off)."""
    p, file, mode = experiment.parameters, setting.workloads, mode_of(experiment)
    name = f"map_reduce,file={file},article={p['article']},chunk_size={p['chunk_size']},output_tokens={p['output_tokens']}"
    programs = list(open_paper(name, rate=None, seed=setting.seed, count=1))
    network = open_network(file, setting.seed)
    scheduler = setting.scheduler(experiment, PLAIN)
    ran = run(programs, profile, MAP_REDUCE_ENGINE, 1, mode, network, scheduler, MAP_REDUCE_CAPACITY[mode])
    return float(ran.tables["programs"]["jct_s"].iloc[0])


def background(experiment: Experiment, profile: LatencyProfile, setting: Setting) -> dict[str, float]:
    """A chain summary among other requests, on the engine of figure 11.

    The artifact's other requests are all of one length (PROMPT, OUTPUT). Those that are as long as an Azure trace's come as
    often as takes a given part of the most that the engine finishes a second. Where the other requests are more than the
    engine can serve, a client that queues anew for each call may never end: `unfinished` says so, and `jct_s` is then how
    long it was watched.
    """
    p, file = experiment.parameters, setting.workloads
    if "azure_load" in p:
        chats = setting.chats
        rate = float(p["azure_load"]) * most_requests_per_s(chats, profile)
    else:
        chats, rate = None, float(p["request_rate_per_s"])
    name = f"chain_summary,file={file},article={p['article']},chunk_size={CHUNK_SIZE},output_tokens={OUTPUT_TOKENS}"
    (chain,) = open_paper(name, rate=None, seed=setting.seed, count=1)
    chain = msgspec.structs.replace(chain, arrival_s=CHAIN_ARRIVES_S)
    for watched_s in WATCHED_S:
        others = takewhile(lambda program: program.arrival_s < watched_s, _requests(chats, rate, setting.seed))  # noqa: B023
        programs = sorted([chain, *others], key=lambda program: program.arrival_s)
        network = open_network(file, setting.seed)
        ran = run(programs, profile, CHAIN_ENGINE, 1, mode_of(experiment), network, setting.scheduler(experiment, PLAIN))
        table = ran.tables["programs"]
        jct_s = float(table.loc[table["application"] == "chain_summary", "jct_s"].iloc[0])
        if CHAIN_ARRIVES_S + jct_s < watched_s:  # else the requests came to an end before the chain did
            return {"jct_s": jct_s, "unfinished": 0.0}
    return {"jct_s": watched_s - CHAIN_ARRIVES_S, "unfinished": 1.0}


def _requests(chats: str | None, rate: float, seed: int) -> Iterator[Program]:
    """The other requests, without end."""
    if chats is not None:
        yield from open_paper(f"chat,lengths={chats}", rate=rate, seed=seed, count=10**9)
    for index, arrival_s in enumerate(poisson(rate, stream(seed, "paper.background"))):
        yield request(f"other{index}", arrival_s, ("", 0), PROMPT, OUTPUT, "background")


def most_requests_per_s(chats: str | None, profile: LatencyProfile) -> float:
    """How many of the other requests the baseline finishes a second when all are there at once."""
    requests = [
        msgspec.structs.replace(program, arrival_s=0.0) for program in islice(_requests(chats, 1.0, 0), FULL_LOAD_REQUESTS)
    ]
    ran = run(requests, profile, CHAIN_ENGINE, 1, Mode.REQUEST, Constant(0.0), LEAST_LOADED)
    return FULL_LOAD_REQUESTS / float(ran.tables["programs"]["ended_s"].max())
