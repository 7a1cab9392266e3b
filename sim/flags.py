"""The flags of `python -m sim.run`, and the specification that they say, over that of a file.

It reads the command line and refuses what is no specification; what one means `sim.spec` says, and nothing is run here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import msgspec

from parrot.configuration import ConfigurationError
from sim.clients import Mode
from sim.objectives import Objectives
from sim.spec import EngineChoice, Specification, WorkloadChoice, load_specification, runs_of, with_every_policy

DEFAULT_DRAWS = 8  #: a seed, with --intervals
SWITCH = argparse.BooleanOptionalAction


def parser(prog: str = "python -m sim.run") -> argparse.ArgumentParser:
    """The command line. Lists are separated by commas; of files and workloads, which may have commas, by spaces."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Run workloads under policies, and print one JSON object a run, then one for each cell of several runs.",
        epilog="Example: python -m sim.run --core sample_configs/core/localhost_serve_core.json "
        "--engines sample_configs/engine/smollm2-135m-cpu.json:2 --workload map_reduce --policy parrot:all,round_robin "
        "--rate 0.1,0.2 --out results/first",
    )
    _add_what(p)
    _add_how(p)
    _add_results(p)
    return p


def _add_what(p: argparse.ArgumentParser) -> None:
    what = p.add_argument_group("what to run (every combination of the lists is a run)")
    what.add_argument("--core", metavar="FILE", help="configuration file of the core")
    what.add_argument(
        "--engines",
        metavar="FILE[:COUNT]",
        nargs="+",
        action="extend",
        default=[],
        help="configuration files of engines, each with how many engines it stands for (1); FILE:2,4 tries each count, "
        "FILE,FILE each file",
    )
    what.add_argument(
        "--workload",
        metavar="FILE|NAME|KIND:PATH",
        nargs="+",
        help="program JSONL, a generator (chain, map_reduce, chat, …), or a trace as azure:PATH; each is tried",
    )
    what.add_argument(
        "--program", metavar="FILE.py:FUNCTION", help="in the place of a workload: an application's own code, written with P"
    )
    what.add_argument("--inputs", metavar="FILE.jsonl", help="with --program: the arguments of an instance a line (none)")
    what.add_argument(
        "--outputs",
        metavar="FILE.py:FUNCTION|journal:PATH|synthetic:mean=N,cv=N",
        help="with --program: what the model says (synthetic text of lognormal length, mean 128 tokens, cv 1)",
    )
    what.add_argument(
        "--policy",
        metavar="A,B",
        help="NAME or module:Class, with options: parrot:all, parrot:SWITCH+SWITCH, NAME:PARAMETER=VALUE; *: every shipped one "
        "that is not named (parrot)",
    )
    what.add_argument("--rate", metavar="R,R", help="programs a second; recorded gaps are scaled to it")
    what.add_argument("--clients", metavar="N,N", help="a closed loop: this many programs are under way at any time")
    what.add_argument("--arrivals", metavar="HOW", help="how programs arrive: poisson, gamma:CV, constant, recorded[:SCALE]")
    what.add_argument("--seed", metavar="N,N", help="seeds of the workload and of the run (0)")
    what.add_argument("--repeats", type=int, metavar="N", help="how often each combination is run (1)")
    what.add_argument("--count", type=int, metavar="N", help="at most this many programs")
    what.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="a key of the core's configuration, or of the engines' as engine.KEY; several values V,V are tried each",
    )
    what.add_argument("--spec", metavar="FILE", help="all of this as JSON; flags stand above it")


def _add_how(p: argparse.ArgumentParser) -> None:
    how = p.add_argument_group("how a run is carried out")
    how.add_argument("--client", choices=[m.value for m in Mode], help="semantic: submit, then get; request: each call apart")
    how.add_argument("--rtt-ms", metavar="N|FILE", help="round trip from client to core: milliseconds, or measured ones (0)")
    how.add_argument("--max-gen-length", type=int, metavar="N", help="limit of outputs whose workload gives none (2048)")
    how.add_argument(
        "--backend", choices=["sim", "emulated", "real"], help="sim: virtual time; the others: real processes (sim)"
    )
    how.add_argument("--core-url", metavar="URL", help="with a real backend: a cluster that already runs")
    how.add_argument(
        "--profile",
        metavar="FILE",
        nargs="+",
        action="extend",
        default=[],
        help="latency profiles, chosen by model (else the engine file's, else the shipped one)",
    )
    how.add_argument("--strict", action=SWITCH, default=None, help="an iteration outside its profile's range ends the run")
    how.add_argument("--engine-delay-ms", type=float, metavar="N", help="delay between core and engines, each way (0)")
    step = how.add_mutually_exclusive_group()
    step.add_argument("--jump", dest="jump", action="store_true", default=None, help="jump over equal iterations (default)")
    step.add_argument("--step", dest="jump", action="store_false", help="simulate each iteration; same results, slower")
    how.add_argument("--workers", type=int, metavar="N", help="processes for simulations (one a core)")
    how.add_argument("--ray", metavar="ADDRESS", help="simulations on a Ray cluster: host:port of its head, or local")


def _add_results(p: argparse.ArgumentParser) -> None:
    result = p.add_argument_group("results")
    result.add_argument("--out", metavar="DIR", default="results/run", help="folder of the results (results/run)")
    result.add_argument("--fresh", action="store_true", help="remove what an earlier sweep has left in it")
    result.add_argument(
        "--intervals",
        type=int,
        nargs="?",
        const=DEFAULT_DRAWS,
        metavar="DRAWS",
        help=f"prediction intervals, from so many runs more a seed with durations drawn from the profiles' spread "
        f"({DEFAULT_DRAWS})",
    )
    result.add_argument("--confidence", type=float, metavar="C", help="of every interval (0.95)")
    result.add_argument(
        "--objectives", metavar="NAME=S,…", help="goodput counts programs within ttft_s=S, tpot_s=S, jct_s=S (any of them)"
    )
    result.add_argument("--metrics", metavar="A,B", help="columns of the table on the terminal, as jct_s.p99")
    result.add_argument("--tables", action=SWITCH, default=None, help="write tables of programs, gets, calls, tasks, engines")
    result.add_argument(
        "--explain", action=SWITCH, default=None, help="write why each task went where it went, for python -m sim.explain"
    )
    result.add_argument("--trace", action=SWITCH, default=None, help="write a Perfetto trace of each run")
    result.add_argument("--report", action=SWITCH, default=None, help="write report.html")


def specification_of(arguments: argparse.Namespace) -> Specification:
    """The specification that the flags say, over that of --spec. Raises ConfigurationError."""
    given: dict[str, Any] = {}
    plain = ("core", "arrivals", "count", "max_gen_length", "backend", "core_url", "repeats", "jump", "engine_delay_ms")
    written = ("tables", "trace", "explain", "report")
    for name in (*plain, "program", "inputs", "outputs", "strict", "intervals", "confidence", *written):
        if (value := getattr(arguments, name)) is not None:
            given[name] = value
    if arguments.workload is not None:
        given["workloads"] = tuple(arguments.workload)
    if arguments.client is not None:
        given["client"] = Mode(arguments.client)
    if arguments.rtt_ms is not None:
        given["rtt_ms"] = _rtt(arguments.rtt_ms)
    if arguments.policy is not None:
        given["policies"] = _items(arguments.policy)
    if arguments.metrics is not None:
        given["metrics"] = _items(arguments.metrics)
    if arguments.rate is not None:
        given["rates"] = _numbers("--rate", arguments.rate, float)
    if arguments.clients is not None:
        given["clients"] = _numbers("--clients", arguments.clients, int)
    if arguments.seed is not None:
        given["seeds"] = _numbers("--seed", arguments.seed, int)
    if arguments.objectives is not None:
        given["objectives"] = _objectives(arguments.objectives)
    if arguments.engines:
        given["engines"] = tuple(_choice(text) for text in arguments.engines)
    if arguments.profile:
        given["profiles"] = tuple(arguments.profile)
    settings = dict(_setting(text) for text in arguments.settings)
    if arguments.spec is not None:
        file = load_specification(arguments.spec)
        if "rates" in given or "count" in given:
            given.setdefault("workloads", tuple(_without(item, given) for item in file.workloads))
        whole = with_every_policy(msgspec.structs.replace(file, settings={**file.settings, **settings}, **given))
        try:
            runs_of(whole)
        except ConfigurationError as error:
            raise ConfigurationError(f"{arguments.spec}, with the flags above it: {error}") from None
        return whole
    if "workloads" not in given and "program" not in given:
        raise ConfigurationError("--workload or --program is needed (or --spec)")
    return with_every_policy(Specification(settings=settings, **given))


def _without(item: str | WorkloadChoice, given: Mapping[str, Any]) -> str | WorkloadChoice:
    """A workload of a file without what flags stand above."""
    if isinstance(item, str):
        return item
    own = {"rates": None} if "rates" in given else {}
    return msgspec.structs.replace(item, **own, **({"count": None} if "count" in given else {}))


def _items(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _numbers(flag: str, text: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(item) for item in text.split(","))
    except ValueError:
        expected = "whole numbers" if kind is int else "numbers"
        raise ConfigurationError(f"{flag} {text}: expected {expected} separated by commas") from None


def _rtt(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _choice(text: str) -> EngineChoice:
    """FILE[,FILE…][:COUNT[,COUNT…]]."""
    files, colon, counts = text.rpartition(":")
    numbers = counts.split(",")
    if not (colon and all(number.lstrip("-").isdigit() for number in numbers)):
        files, numbers = text, ["1"]
    names, sizes = tuple(files.split(",")), tuple(int(number) for number in numbers)
    return EngineChoice(names if len(names) > 1 else names[0], sizes if len(sizes) > 1 else sizes[0])


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


def _objectives(text: str) -> Objectives:
    pairs = dict(item.partition("=")[::2] for item in _items(text))
    try:
        return msgspec.convert(pairs, Objectives, strict=False)
    except msgspec.ValidationError as error:
        names = ", ".join(f"{name}=SECONDS" for name in Objectives.__struct_fields__)
        raise ConfigurationError(f"--objectives {text}: expected any of {names}: {error}") from None
