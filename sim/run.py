"""The command `python -m sim.run`: runs a workload under policies on a simulated, an emulated or a real cluster.

It reads the flags into a specification, prints one JSON object a run on stdout, and leaves everything else to stderr and the
folder of results. Exit status: 0 done, 1 refused or failed (one line on stderr says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from parrot.configuration import ConfigurationError
from sim.clients import Mode
from sim.results import write_specification
from sim.spec import EngineChoice, Run, Specification, load_specification, runs_of
from sim.sweep import Result, RunError, run_all, write_timing


def parser() -> argparse.ArgumentParser:
    """The command line. Lists are separated by commas."""
    p = argparse.ArgumentParser(
        prog="python -m sim.run",
        description="Run a workload under one or more policies, and print one JSON object a run.",
        epilog="Example: python -m sim.run --core sample_configs/core/localhost_serve_core.json "
        "--engines sample_configs/engine/smollm2-135m-cpu.json:2 --workload map_reduce --policy parrot:all,round_robin "
        "--rate 0.1,0.2 --out results/first",
    )
    p.add_argument("--core", metavar="FILE", help="configuration file of the core")
    p.add_argument(
        "--engines",
        metavar="FILE[:COUNT]",
        nargs="+",
        action="extend",
        default=[],
        help="configuration files of engines, each with how many engines it stands for (1)",
    )
    p.add_argument(
        "--workload", metavar="FILE|NAME|KIND:PATH", help="program JSONL, a generator (chain, map_reduce, chat), or azure:PATH"
    )
    p.add_argument(
        "--policy", metavar="A,B", help="round_robin, least_loaded, parrot, parrot:all, parrot:SWITCH+SWITCH (parrot)"
    )
    p.add_argument("--client", choices=[m.value for m in Mode], help="semantic: submit, then get; request: a round trip a call")
    p.add_argument("--rtt-ms", metavar="N|FILE", help="round trip between client and core: milliseconds, or measured ones (0)")
    p.add_argument("--rate", metavar="R,R", help="programs a second; recorded gaps are scaled to it")
    p.add_argument("--seed", metavar="N,N", help="seeds of the workload and of the run (0)")
    p.add_argument("--count", type=int, metavar="N", help="at most this many programs")
    p.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="a key of the core's configuration, or of the engines' as engine.KEY; several values V,V are tried each",
    )
    p.add_argument(
        "--profile",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="latency profiles, chosen by model (else the engine file's, else the shipped one)",
    )
    p.add_argument("--max-gen-length", type=int, metavar="N", help="limit of outputs whose workload gives none (2048)")
    p.add_argument("--backend", choices=["sim", "emulated", "real"], help="sim: virtual time; the others: real processes (sim)")
    p.add_argument("--core-url", metavar="URL", help="with a real backend: a cluster that already runs")
    p.add_argument("--repeats", type=int, metavar="N", help="how often each combination is run (1)")
    p.add_argument("--engine-delay-ms", type=float, metavar="N", help="delay between core and engines, each way (0)")
    step = p.add_mutually_exclusive_group()
    step.add_argument("--jump", dest="jump", action="store_true", default=None, help="jump over equal iterations (default)")
    step.add_argument("--step", dest="jump", action="store_false", help="simulate each iteration; same results, slower")
    p.add_argument("--spec", metavar="FILE", help="all of the above as JSON; flags stand above it")
    p.add_argument("--out", metavar="DIR", default="results/run", help="folder of the results (results/run)")
    p.add_argument("--no-tables", action="store_true", help="write no table of programs, gets, calls and tasks")
    p.add_argument("--workers", type=int, metavar="N", help="processes for simulations (one a core)")
    return p


def specification_of(arguments: argparse.Namespace) -> Specification:
    """The specification that the flags say, over that of --spec. Raises ConfigurationError."""
    given: dict[str, Any] = {}
    for name in ("core", "count", "max_gen_length", "backend", "core_url", "repeats", "jump", "engine_delay_ms"):
        if (value := getattr(arguments, name)) is not None:
            given[name] = value
    if arguments.workload is not None:
        given["workloads"] = (arguments.workload,)
    if arguments.no_tables:
        given["tables"] = False
    if arguments.client is not None:
        given["client"] = Mode(arguments.client)
    if arguments.rtt_ms is not None:
        given["rtt_ms"] = _rtt(arguments.rtt_ms)
    if arguments.policy is not None:
        given["policies"] = tuple(filter(None, arguments.policy.split(",")))
    if arguments.rate is not None:
        given["rates"] = _numbers("--rate", arguments.rate, float)
    if arguments.seed is not None:
        given["seeds"] = _numbers("--seed", arguments.seed, int)
    if arguments.engines:
        given["engines"] = tuple(_choice(text) for text in arguments.engines)
    if arguments.profile:
        given["profiles"] = tuple(arguments.profile)
    if arguments.settings:
        given["settings"] = dict(_setting(text) for text in arguments.settings)
    if arguments.spec is not None:
        return msgspec.structs.replace(load_specification(arguments.spec), **given)
    if "workloads" not in given:
        raise ConfigurationError("--workload is needed (or --spec)")
    return Specification(**given)


def _numbers(flag: str, text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(item) for item in text.split(","))
    except ValueError:
        raise ConfigurationError(f"{flag} {text}: expected numbers separated by commas") from None


def _rtt(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _choice(text: str) -> EngineChoice:
    file, colon, count = text.rpartition(":")
    if colon and count.lstrip("-").isdigit():
        return EngineChoice(file, int(count))
    return EngineChoice(text)


def _setting(text: str) -> tuple[str, tuple[Any, ...]]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigurationError(f"--set {text}: expected KEY=VALUE")
    whole = _json(value)
    if not isinstance(whole, str):
        return key, (whole,)
    return key, tuple(_json(item) for item in value.split(","))


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def execute(runs: Sequence[Run], folder: str, workers: int | None) -> None:
    """Carries out `runs` with a progress bar on stderr; prints the summaries, writes the results. Raises RunError."""
    begun_s = time.monotonic()
    results: list[Result] = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, redirect_stdout=False, disable=not console.is_terminal) as progress:
        bar = progress.add_task("runs", total=len(runs))
        programs = progress.add_task("programs", total=runs[0].count) if len(runs) == 1 or workers == 1 else None
        watch = (lambda _: progress.advance(programs)) if programs is not None and console.is_terminal else None
        for result in run_all(runs, folder, workers=workers, on_program=watch):
            results.append(result)
            print(msgspec.json.encode(result.summary).decode(), flush=True)
            progress.advance(bar)
            if programs is not None:
                progress.reset(programs)
    lines = b"".join(msgspec.json.encode(result.summary) + b"\n" for result in results)
    (Path(folder) / "summary.jsonl").write_bytes(lines)
    write_timing(results, time.monotonic() - begun_s, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.workers is not None and arguments.workers < 1:
            raise ConfigurationError(f"--workers {arguments.workers}: at least 1 is needed")
        specification = specification_of(arguments)
        runs = runs_of(specification)
        execute(runs, arguments.out, arguments.workers)
        write_specification(Path(arguments.out), specification)
    except (ConfigurationError, RunError) as error:
        print(f"sim.run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sim.run: interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _interrupt(*_: object) -> NoReturn:
    """SIGTERM stops a run as Ctrl-C does: workers and clusters are ended, not orphaned."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
