"""The simulator's speed, beside two others in the same run, and how it grows.

    python benchmarks/sim.py --azure FILE --mooncake FILE [--peers PYTHON] [PART ...]

PART: azure, mooncake, steps, programs, requests, engines; all of them when none is named.
--peers names an interpreter that has the two simulators from PyPI:

    python -m venv peers
    peers/bin/pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
    peers/bin/pip install sched-sim==0.2.1 msgspec uvloop zstandard 'pydantic<=2.13.5'

Ours is timed as `timing.json` does it, from the opening of the workload to the last table written; DynoSim around the call
that reads the trace and replays it; sched-sim from the reading of the trace to the end of the last of its processes, one an
instance on as many cores as there are. KV capacity and batch limits are those of sample_configs/engine/sim-7b.json. Runs
alternate; figures are medians, ratios are of the medians of one call. Compare the columns of a run, not runs.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

del sys.path[0]  # this file's folder, in which `sim` is this file
from sim.workloads import open_workload  # noqa: E402

CORE = "sample_configs/core/localhost_serve_core.json"
ENGINE = "sample_configs/engine/sim-7b.json"
KV_TOKENS, MAX_BATCH_SIZE, MAX_BATCHED_TOKENS = 262_144, 256, 2304  # of ENGINE
BLOCK = 64  #: tokens of a block in DynoSim's traces

DYNOSIM = """
import sys, time
from dynamo.replay import run_trace_replay
path, workers, mode, block, kv, rows, tokens = sys.argv[1:]
limits = {"num_gpu_blocks": int(kv) // int(block), "block_size": int(block), "max_num_seqs": int(rows),
          "max_num_batched_tokens": int(tokens), "enable_chunked_prefill": True}
begun = time.perf_counter()
run_trace_replay([path], num_workers=int(workers), replay_mode="offline", router_mode=mode, trace_block_size=int(block),
                 extra_engine_args={"engine": limits})
print(time.perf_counter() - begun)
"""

SCHED_SIM = """
import sys, time
from sched_sim.core.event_engine import Simulator
from sched_sim.hardware.presets import get_hardware_profile
from sched_sim.memory.preemption import PreemptionMode
from sched_sim.schedulers.factory import create_scheduler
from sched_sim.workloads.trace_loader import load_trace_file
hardware = get_hardware_profile("a100")
scheduler = create_scheduler("chunked", hardware, PreemptionMode.RECOMPUTE, token_budget=int(sys.argv[2]))
begun = time.perf_counter()
simulator = Simulator(hardware, scheduler)
simulator.submit_workload(load_trace_file(sys.argv[1]))
simulator.run()
print(time.perf_counter() - begun)
"""


def ours(workload: str, policy: str, engines: int, *flags: str, folder: str) -> tuple[float, float]:
    """Seconds of a run in a process of its own, as timing.json says, and the most memory that it had, in MiB."""
    command = [sys.executable, "-m", "sim.run", "--core", CORE, "--engines", f"{ENGINE}:{engines}", "--workload", workload]
    command += ["--policy", policy, "--workers", "1", "--out", folder, "--fresh", "--no-report", *flags]
    with tempfile.TemporaryFile() as errors:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
        if run.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)}\n{errors.read().decode()}")
    timing = json.loads((Path(folder) / "timing.json").read_bytes())
    return timing["runs"][0]["wall_s"], usage.ru_maxrss / 1024


def peer(python: str, script: str, *arguments: object) -> float:
    """Seconds that the script prints last."""
    done = subprocess.run([python, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python}: {done.stderr}")
    return float(done.stdout.split()[-1])


def sched_sim(python: str, parts: Sequence[str]) -> float:
    """Seconds until the last of its processes has ended, as many at a time as there are cores."""
    lanes = min(os.cpu_count() or 1, len(parts))
    ends = [0.0] * lanes
    running = [list(parts[lane::lanes]) for lane in range(lanes)]
    while any(running):
        batch = [(lane, lane_parts.pop(0)) for lane, lane_parts in enumerate(running) if lane_parts]
        processes = [
            (lane, subprocess.Popen([python, "-c", SCHED_SIM, part, "2048"], stdout=subprocess.PIPE, text=True))
            for lane, part in batch
        ]
        for lane, process in processes:
            ends[lane] += float(process.communicate()[0].split()[-1])
    return max(ends)


def rows_of(trace: str) -> Iterator[tuple[float, int, int]]:
    """(seconds, prompt tokens, output tokens) of each request of an Azure trace."""
    for program in open_workload(f"azure:{trace}"):
        prompt, output = program.calls[0].segments
        yield program.arrival_s, prompt.tokens, output.tokens  # type: ignore[union-attr]


def write_peer_traces(trace: str, folder: Path, engines: int) -> tuple[str, list[str]]:
    """The Azure trace in Mooncake's form, no block of which is shared, and dealt out round robin for sched-sim."""
    whole = folder / "azure.jsonl"
    parts: list[list[dict[str, object]]] = [[] for _ in range(engines)]
    block = 0
    with whole.open("w") as file:
        for number, (at_s, prompt, output) in enumerate(rows_of(trace)):
            blocks = -(-prompt // BLOCK)
            line = {"timestamp": round(at_s * 1000, 3), "input_length": prompt, "output_length": output}
            file.write(json.dumps({**line, "hash_ids": list(range(block, block + blocks))}) + "\n")
            block += blocks
            request = {"id": str(number), "timestamp": at_s, "prompt_tokens": prompt, "output_tokens": output}
            parts[number % engines].append(request)
    names = []
    for number, requests in enumerate(parts):
        path = folder / f"part{number}.json"
        path.write_text(json.dumps(requests))
        names.append(str(path))
    return str(whole), names


def alternate(repeats: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """The median seconds of each, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(run())
    return {name: statistics.median(values) for name, values in seconds.items()}


def growth(repeats: int, sizes: Sequence[int], run: Callable[[int], float]) -> dict[int, float]:
    """The median seconds of `run(size)` by size, the sizes in turn."""
    runs = {str(size): functools.partial(run, size) for size in sizes}
    return {int(size): value for size, value in alternate(repeats, runs).items()}


def table(title: str, count: int, seconds: dict[str, float], unit: str = "requests/s") -> None:
    """Prints the rates and how many times as fast the first is."""
    first = next(iter(seconds.values()))
    print(f"\n{title}")
    print(f"  {'':34} {'s':>8} {unit:>12} {'first is':>10}")
    for name, value in seconds.items():
        print(f"  {name:34} {value:8.2f} {count / value:12,.0f} {value / first:9.2f} ×", flush=True)


def azure(options: argparse.Namespace, folder: Path) -> None:
    count = sum(1 for _ in rows_of(options.azure))
    workload, out = f"azure:{options.azure}", str(folder / "azure")
    runs = {
        "parrot, least_loaded": lambda: ours(workload, "least_loaded", 4, folder=out)[0],
        "parrot, least_loaded, no tables": lambda: ours(workload, "least_loaded", 4, "--no-tables", folder=out)[0],
    }
    if options.peers:
        whole, parts = write_peer_traces(options.azure, folder, 4)
        limits = (BLOCK, KV_TOKENS, MAX_BATCH_SIZE, MAX_BATCHED_TOKENS)
        runs["DynoSim, round_robin"] = lambda: peer(options.peers, DYNOSIM, whole, 4, "round_robin", *limits)
        runs["sched-sim, 4 instances, no router"] = lambda: sched_sim(options.peers, parts)
    table(f"Azure conversation trace, {count:,} requests, 4 engines", count, alternate(options.repeats, runs))


def mooncake(options: argparse.Namespace, folder: Path) -> None:
    count = sum(1 for _ in open_workload(f"mooncake:{options.mooncake}"))
    workload, out = f"mooncake:{options.mooncake}", str(folder / "mooncake")
    # The trace is more than eight such engines can do: like DynoSim's, the queue is not bounded.
    flags = ("--set", f"global_scheduler.max_queue_size={count}", "--set", f"max_sessions_num={count}")
    runs = {
        "parrot, parrot:ctx_aware": lambda: ours(workload, "parrot:ctx_aware", 8, *flags, folder=out)[0],
        "parrot, parrot:ctx_aware, no tables": lambda: ours(workload, "parrot:ctx_aware", 8, *flags, "--no-tables", folder=out)[
            0
        ],
    }
    if options.peers:
        limits = (512, KV_TOKENS, MAX_BATCH_SIZE, MAX_BATCHED_TOKENS)
        runs["DynoSim, kv_router"] = lambda: peer(options.peers, DYNOSIM, options.mooncake, 8, "kv_router", *limits)
    table(f"Mooncake conversation trace, {count:,} requests, 8 engines", count, alternate(options.repeats, runs))


def steps(options: argparse.Namespace, folder: Path) -> None:
    """Jumping against stepping: the first 500 requests, the same tables to the last byte."""
    digests, seconds = {}, {}
    for flag in ("--jump", "--step"):
        out = folder / flag
        seconds[flag] = ours(f"azure:{options.azure}", "least_loaded", 4, flag, "--count", "500", folder=str(out))[0]
        digest = hashlib.sha256()
        for path in sorted(out.glob("*/*.parquet")):
            digest.update(path.name.encode() + path.read_bytes())
        digests[flag] = digest.hexdigest()
    same = "the same tables" if digests["--jump"] == digests["--step"] else "DIFFERENT TABLES"
    table(f"Jumping and stepping, 500 requests: {same}", 500, seconds)
    if len(set(digests.values())) > 1:
        sys.exit("jumping and stepping differ")


def programs(options: argparse.Namespace, folder: Path) -> None:
    count = 2000
    flags = ("--count", str(count), "--rate", "2")
    runs = {
        f"parrot:{switches}": lambda switches=switches: ours(
            "map_reduce:chunks=19", f"parrot:{switches}", 4, *flags, folder=str(folder / "programs")
        )[0]
        for switches in ("all", "app_fifo")
    }
    table(f"Map-reduce of 20 calls, {count:,} programs, 4 engines", 20 * count, alternate(options.repeats, runs), "calls/s")


def requests(options: argparse.Namespace, folder: Path) -> None:
    """Time and memory by the number of requests, at one rate."""
    print("\nOne call a program (shared_prompts), 4 engines, 5 requests/s, no tables")
    print(f"  {'requests':>10} {'s':>8} {'µs a request':>13} {'peak MiB':>9}")
    peaks: dict[int, float] = {}

    def run(count: int) -> float:
        flags = ("--count", str(count), "--rate", "5", "--no-tables")
        seconds, peaks[count] = ours("shared_prompts", "least_loaded", 4, *flags, folder=str(folder / "requests"))
        return seconds

    counts = (1_000, 10_000, 100_000, *((1_000_000,) if options.million else ()))
    for count, seconds in growth(options.repeats, counts, run).items():
        print(f"  {count:10,} {seconds:8.2f} {seconds / count * 1e6:13.1f} {peaks[count]:9.0f}", flush=True)


def engines(options: argparse.Namespace, folder: Path) -> None:
    """Time by the number of engines, at the same load of each."""
    count = 60_000
    # A thousand engines have more sessions at a time than the core takes by default: refusals and retries are another load.
    flags = ("--count", str(count), "--set", f"max_sessions_num={count}", "--no-tables")
    print(f"\nOne call a program (shared_prompts), 1.25 requests/s an engine, {count:,} requests, no tables")
    print(f"  {'engines':>8} {'policy':>14} {'s':>8} {'µs a request':>13}")
    for policy in ("least_loaded", "parrot"):

        def run(number: int, policy: str = policy) -> float:
            rate = str(1.25 * number)
            return ours("shared_prompts", policy, number, *flags, "--rate", rate, folder=str(folder / "engines"))[0]

        for number, seconds in growth(options.repeats, (4, 32, 256, 1024), run).items():
            print(f"  {number:8,} {policy:>14} {seconds:8.2f} {seconds / count * 1e6:13.1f}", flush=True)


PARTS = {part.__name__: part for part in (azure, mooncake, steps, programs, requests, engines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("parts", metavar="PART", nargs="*", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--azure", metavar="FILE", help="azure_llm_2023_conv.csv")
    parser.add_argument("--mooncake", metavar="FILE", help="mooncake_conversation.jsonl")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with ai-dynamo and sched-sim")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--million", action="store_true", help="a million requests too")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    needs = {"azure": options.azure, "steps": options.azure, "mooncake": options.mooncake}
    print(f"python {sys.version.split()[0]}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts or PARTS:
            if name in needs and needs[name] is None:
                print(f"\n{name}: left out, its trace is not named")
            else:
                PARTS[name](options, Path(folder))


if __name__ == "__main__":
    main()
