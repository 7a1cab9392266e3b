"""`python -m experiments.run calibrate ENGINE.json --out PROFILE.json`: records an engine's iterations at loads over its whole
range, and fits a latency profile to them.

One load after the other, each with a scheduler and an iteration log of its own over the one loaded model, and requests that
come over HTTP from a client process. The loads marked `held` are not fitted: they tell the profile's error. In the end
they are simulated with it, and compared with what was measured. With `--against` they alone are run, to tell what a profile
that exists is worth on today's engine.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec

from experiments.engine_load import Load, Outcome, Request, closed, send, simulate
from parrot.configuration import ConfigurationError
from parrot.engine.batches import EngineLimits
from parrot.engine.config import ATTENTION, BuiltinEngineConfig, default_attention, load_engine_config
from parrot.engine.derived import description_of
from parrot.engine.profiles import find_profile
from parrot.latency import LatencyProfile
from sim.calibrate.__main__ import main as fit_logs
from sim.calibrate.fitting import error_on
from sim.calibrate.logs import CalibrationError, read_logs
from sim.workloads import WorkloadError
from sim.workloads.azure import lengths_of

ABOUT = "records iteration logs of an engine over its whole range and fits a latency profile"

MIN_LONGEST = 64  #: tokens of a request, below which all of the loads would be alike


class Planned(NamedTuple):
    load: Load
    held: bool = False


def planned(
    limits: EngineLimits,
    requests: Sequence[tuple[int, int]] = (),
    seed: int = 0,
    *,
    longest: int | None = None,
    rate: float = 4.0,
) -> list[Planned]:
    """The loads, scaled to the engine: batch sizes, prefill and context lengths, sharing, mixed iterations. `requests`:
    (prompt, output) of a trace, sent all at once, held out. `longest`: the most tokens of a request, prompt and output, that
    an engine is given the time for (None: what it can hold); `rate`: arrivals a second, where they come at random."""
    longest = min(limits.largest_task, longest or limits.largest_task)
    most = min(limits.max_batch_size, limits.tasks_capacity)
    usual = {"prompt": (32, max(33, min(4000, longest * 2 // 3))), "output": (8, max(9, min(400, longest // 4)))}
    found = [
        Planned(closed(f"pool-{n}", n, round(1.2 * n) + 5, seed=seed + n, **usual), n in (12, 96))  # type: ignore[arg-type]
        for n in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
        if n <= most
    ]
    few, many = min(16, most), min(64, most)
    prompts = (max(8, longest // 4), max(9, longest * 3 // 4))
    prefix = min(5107, longest * 2 // 3)
    rest: dict[str, tuple[int, int]] = {"prompt": (8, max(9, longest // 16)), "output": (16, max(17, longest // 16))}
    chunk = max(17, min(limits.max_num_batched_tokens, longest // 2))
    found += [
        Planned(closed("fills", few, 4 * few, seed=seed + 1001, prompt=(16, max(17, longest // 3)), output=(1, 4))),
        Planned(every_size("sizes", 4, max(40, min(400, chunk // 6)), seed=seed + 1009, most=chunk)),
        Planned(closed("long", few, few + 4, seed=seed + 1002, prompt=prompts, output=(40, min(200, longest // 4)))),
        Planned(closed("sharing-1", many, many + 8, seed=seed + 1003, shared=[(1, prefix)], **rest)),
        Planned(closed("sharing-2", many, many + 8, seed=seed + 1004, shared=[(1, prefix // 2), (2, prefix // 4)], **rest)),
        Planned(closed("sharing-few", few, 2 * few, seed=seed + 1005, shared=[(1, prefix)], **rest)),
        Planned(
            closed("sharing-held", many // 2, many, seed=seed + 1006, shared=[(1, prefix // 3), (2, prefix)], **rest), True
        ),
        Planned(arriving("arriving", 30, rate, seed=seed + 1007, **usual)),
        Planned(arriving("arriving-held", 40, 1.75 * rate, seed=seed + 1008, **usual), True),
    ]
    if requests:
        found.append(Planned(at_once("at-once", requests), True))
    return found


def every_size(name: str, concurrency: int, count: int, *, seed: int, most: int) -> Load:
    """`count` requests with prompts of 16 to `most` tokens, evenly: an engine may have a graph for each of many sizes."""
    draw = random.Random(seed)
    requests = [Request(((1000 + i, draw.randint(16, most)),), draw.randint(3, 12)) for i in range(count)]
    return Load(name, tuple(requests), concurrency)


def arriving(name: str, count: int, rate: float, *, seed: int, prompt: tuple[int, int], output: tuple[int, int]) -> Load:
    """`count` requests in a Poisson process of `rate` a second."""
    draw = random.Random(seed)
    pool = closed(name, 1, count, seed=seed, prompt=prompt, output=output).requests
    at, requests = 0.0, []
    for request in pool:
        requests.append(msgspec.structs.replace(request, at_s=at))
        at += draw.expovariate(rate)
    return Load(name, tuple(requests))


def at_once(name: str, lengths: Sequence[tuple[int, int]]) -> Load:
    return Load(name, tuple(Request(((1000 + i, prompt),), output) for i, (prompt, output) in enumerate(lengths)))


def azure_lengths(path: str, count: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of the first requests of a public Azure trace. Raises WorkloadError."""
    return [(prompt, max(1, output)) for prompt, output in islice(lengths_of(path), count)]


def record(config: BuiltinEngineConfig, loads: Sequence[Load], folder: Path) -> dict[str, Outcome]:
    """Runs the loads one after the other on one loaded model; a log of each in `folder`, NAME.jsonl."""
    from parrot.engine.builtin.load import load_runner
    from parrot.engine.builtin.process import prepare_builtin, spare_what_is_loaded

    config = prepare_builtin(config)
    began = time.perf_counter()
    loaded = load_runner(config)
    spare_what_is_loaded()
    print(f"{config.model} loaded in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return asyncio.run(_record(config, loaded, loads, folder))


async def _record(config: BuiltinEngineConfig, loaded: object, loads: Sequence[Load], folder: Path) -> dict[str, Outcome]:
    from parrot.engine.builtin.load import LoadedRunner
    from parrot.engine.core import EngineCore
    from parrot.engine.iteration_log import IterationLog, log_header
    from parrot.engine.listening import bind
    from parrot.engine.loop import BuiltinLoop
    from parrot.engine.serving import serve

    assert isinstance(loaded, LoadedRunner)
    limits = loaded.limits
    description = description_of(config, limits, tokenizer=loaded.tokenizer.name, accepts_output_length=loaded.dummy)
    outcomes = {}
    for load in loads:
        log = folder / f"{load.name}.jsonl"
        log.unlink(missing_ok=True)
        loop = BuiltinLoop(
            EngineCore(limits),
            loaded.runner,
            pipeline_depth=limits.pipeline_depth,
            iteration_log=IterationLog(log, log_header(config, description, limits, loaded.runner.fill_graphs)),
        )
        engine = await serve(config, description, loop, loaded.tokenizer, bind("127.0.0.1", 0), with_core=False)
        try:
            outcome = await asyncio.to_thread(send, load, engine.url)
        finally:
            contexts = loop.context_ids()
            await engine.close()
            loaded.runner.drop_contexts(contexts)
        if outcome.failed:
            raise RuntimeError(f"load {load.name!r}: {len(outcome.failed)} requests failed; first: {outcome.failed[0]}")
        outcomes[load.name] = outcome
        print(f"{load.name:<14} {len(load.requests):>4} requests {outcome.total_s:8.2f} s", file=sys.stderr, flush=True)
    return outcomes


def compare(load: Load, outcome: Outcome, limits: EngineLimits, profile: LatencyProfile) -> str:
    """Measured beside simulated, in one line."""
    told = simulate(load, limits, profile)
    mean, told_mean = (sum(o.latencies_s) / len(o.latencies_s) for o in (outcome, told))
    return (
        f"{load.name:<14} end to end {outcome.total_s:8.2f} s, simulated {told.total_s:8.2f} s "
        f"({told.total_s / outcome.total_s - 1:+.1%}); "
        f"mean latency {mean:7.3f} s, simulated {told_mean:7.3f} s ({told_mean / mean - 1:+.1%})"
    )


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.run calibrate", description=ABOUT)
    parser.add_argument("engine", metavar="ENGINE.json", help="a builtin engine's configuration")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", metavar="PROFILE", help="the profile to write (JSON)")
    wanted.add_argument("--against", metavar="PROFILE", help="a profile or a shipped one's name: run what is held out, compare")
    parser.add_argument("--attn_func", help="stands above the file's")
    parser.add_argument("--logs", default="results/calibrate", metavar="DIR", help="where the iteration logs go")
    parser.add_argument("--azure", metavar="CSV", help="a public Azure trace: its first requests are sent at once, held out")
    parser.add_argument("--azure-count", type=int, default=500)
    parser.add_argument("--note", default="", help="what a reader of the profile should know too, e.g. the GPU's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, metavar="TOKENS", help="of a request; for an engine that takes hours otherwise")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second where they arrive at random (4)")
    args = parser.parse_args(argv)
    try:
        overrides = {"instance.attn_func": args.attn_func} if args.attn_func else {}
        if args.longest is not None and args.longest < MIN_LONGEST:
            raise ConfigurationError(f"--longest {args.longest}: loads need requests of at least {MIN_LONGEST} tokens")
        if not 0.0 < args.rate < math.inf:
            raise ConfigurationError(f"--rate {args.rate:g}: expected requests a second, more than 0")
        config = load_engine_config(args.engine, overrides)
        if not isinstance(config, BuiltinEngineConfig):
            raise ConfigurationError(f"{args.engine}: calibrate needs an engine_type 'builtin', this is {config.engine_type!r}")
        return _calibrate(config, args)
    except (ConfigurationError, WorkloadError, CalibrationError) as error:
        print(error, file=sys.stderr)
        return 1


def _calibrate(config: BuiltinEngineConfig, args: argparse.Namespace) -> int:
    from parrot.configuration import load as read
    from parrot.engine.builtin.load import limits_for

    known = profile_of_engine(args.against, config) if args.against else None
    limits = limits_for(config)
    folder = Path(args.logs)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = azure_lengths(args.azure, args.azure_count) if args.azure else ()
    plans = planned(limits, lengths, args.seed, longest=args.longest, rate=args.rate)
    plans = [plan for plan in plans if plan.held or known is None]
    outcomes = record(config, [plan.load for plan in plans], folder)
    fitted, held = ([str(folder / f"{p.load.name}.jsonl") for p in plans if p.held is wanted] for wanted in (False, True))
    if known is not None:
        profile = known
        print(describe_error(error_on(profile, read_logs(held))), file=sys.stderr)
    else:
        once = ["--shared-kv-once"] if attention_of(config) == "xformers_shared_prefix" else []
        status = fit_logs([*fitted, "--out", args.out, "--hold-out", *held, *once, "--plots", str(folder), "--note", args.note])
        if status:
            return status
        profile = read(Path(args.out), LatencyProfile)
    for plan in plans:
        if plan.held:
            print(compare(plan.load, outcomes[plan.load.name], limits, profile), file=sys.stderr)
    return 0


def profile_of_engine(name_or_path: str, config: BuiltinEngineConfig) -> LatencyProfile:
    """A profile that may be compared with this engine. Raises ConfigurationError for one of another."""
    profile = find_profile(name_or_path)
    for what, of_profile, of_engine in (
        ("model", profile.model, config.model),
        ("device", profile.device.partition(":")[0], config.device.partition(":")[0]),
        ("attn_func", profile.attn_func, attention_of(config)),
    ):
        if of_profile != of_engine:
            raise ConfigurationError(f"profile {name_or_path!r} is of {what} {of_profile!r}; this engine's is {of_engine!r}")
    return profile


def attention_of(config: BuiltinEngineConfig) -> str:
    return ATTENTION[config.instance.attn_func or default_attention(config.device)]


def describe_error(error: dict[str, float]) -> str:
    """What a profile is worth, for a reader at a terminal: of all iterations, and of each run's total."""
    runs = "".join(f"\n  {name.removeprefix('total of ')}: {value:+.1%}" for name, value in error.items() if " of " in name)
    return (
        f"{error['iterations']:.0f} iterations of {error['runs']:.0f} runs, predicted against measured: "
        f"mean {error['mean']:.1%}, p99 {error['p99']:.1%}, of the sum {error['total']:+.1%}; of each run's sum:{runs}"
    )
