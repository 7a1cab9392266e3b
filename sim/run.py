"""The command `python -m sim.run`: runs a workload under policies on a simulated, an emulated or a real cluster.

It reads the flags into a specification, prints one JSON object a run on stdout and then one a cell, and leaves everything
else to stderr and the folder of results. Exit status: 0 done, 1 refused or failed (stderr says why), 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from rich.console import Console

from parrot.configuration import ConfigurationError
from sim.cells import cells_of
from sim.clients import Mode
from sim.objectives import Objectives
from sim.results import FINISHED, ResultsError, inputs_of, open_folder, write_results, write_timing
from sim.spec import (
    EngineChoice,
    Run,
    Specification,
    WorkloadChoice,
    engine_configs_of,
    load_specification,
    runs_of,
    spreads_of,
    with_every_policy,
    writes_log,
)
from sim.sweep import Failure, Result, RunError, Where, check_runs, run_all
from sim.terminal import Display, table_of

DEFAULT_DRAWS = 8  #: a seed, with --intervals


def parser(prog: str = "python -m sim.run") -> argparse.ArgumentParser:
    """The command line. Lists are separated by commas; of files and workloads, which may have commas, by spaces."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Run workloads under policies, and print one JSON object a run, then one for each cell of several runs.",
        epilog="Example: python -m sim.run --core sample_configs/core/localhost_serve_core.json "
        "--engines sample_configs/engine/smollm2-135m-cpu.json:2 --workload map_reduce --policy parrot:all,round_robin "
        "--rate 0.1,0.2 --out results/first",
    )
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
    switch = argparse.BooleanOptionalAction
    how.add_argument("--strict", action=switch, default=None, help="an iteration outside its profile's range ends the run")
    how.add_argument("--engine-delay-ms", type=float, metavar="N", help="delay between core and engines, each way (0)")
    step = how.add_mutually_exclusive_group()
    step.add_argument("--jump", dest="jump", action="store_true", default=None, help="jump over equal iterations (default)")
    step.add_argument("--step", dest="jump", action="store_false", help="simulate each iteration; same results, slower")
    how.add_argument("--workers", type=int, metavar="N", help="processes for simulations (one a core)")
    how.add_argument("--ray", metavar="ADDRESS", help="simulations on a Ray cluster: host:port of its head, or local")

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
    result.add_argument("--tables", action=switch, default=None, help="write tables of programs, gets, calls, tasks, engines")
    result.add_argument(
        "--explain", action=switch, default=None, help="write why each task went where it went, for python -m sim.explain"
    )
    result.add_argument("--trace", action=switch, default=None, help="write a Perfetto trace of each run")
    result.add_argument("--report", action=switch, default=None, help="write report.html")
    return p


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


# ------------------------------------------------------------------------------------------------------------ a sweep


def execute(specification: Specification, folder: Path, where: Where = Where(), fresh: bool = False) -> list[Failure]:
    """Carries out the runs of `specification` that `folder` does not have yet, and writes what they say together.

    Prints on stdout as the command does. Returns the runs that gave no result. Raises RunError, ConfigurationError and
    ResultsError for what cannot be begun.
    """
    begun_s = time.monotonic()
    runs = runs_of(specification)
    check_runs(runs)
    _warn_of_logs(runs)
    if specification.intervals:
        runs = _with_spread(runs)
    finished = open_folder(folder, specification, inputs_of(runs), fresh)
    console = Console(stderr=True)
    results: list[Result] = []
    failures: list[Failure] = []
    try:
        with Display(console, len(runs)) as display:
            shown = display.show if console.is_terminal else None
            for outcome in run_all(runs, str(folder), where=where, finished=finished, on_progress=shown):
                if isinstance(outcome, Failure):
                    failures.append(outcome)
                else:
                    results.append(outcome)
                    _print(outcome.summary)
                display.ended(isinstance(outcome, Result) and outcome.wall_s is None)
    finally:
        write_timing(folder, time.monotonic() - begun_s, [(result.run, result.wall_s) for result in results])
    if results:
        cells = cells_of([(result.run, result.summary) for result in results], specification.confidence)
        write_results(folder, [result.summary for result in results], cells)
        if any(cell.over or cell.draws for cell in cells):
            for cell in cells:
                _print(cell)
        _warn_of_what_was_not_seen(results)
        _warn_of_policies(results)
        if console.is_terminal:
            console.print(table_of(cells, specification.metrics))
        if specification.report and specification.tables:
            from sim.report import write_report  # matplotlib

            try:
                page = write_report(folder)
            except OSError as error:
                raise ResultsError(f"{folder}: the report cannot be written: {error.strerror}") from None
            if console.is_terminal:
                console.print(page, style="dim")
    return failures


def _print(item: msgspec.Struct) -> None:
    print(msgspec.json.encode(item).decode(), flush=True)


def _with_spread(runs: Sequence[Run]) -> list[Run]:
    """`runs` without the draws in which nothing would vary. What states no spread is said."""
    none: set[str] = set()
    kept = []
    for run in runs:
        spreads = spreads_of(run) if run.draw is not None else {}
        none.update(name for name, spread in spreads.items() if spread == 0.0)
        if run.draw is None or any(spreads.values()):
            kept.append(run)
    for name in sorted(none):
        print(f"sim.run: --intervals: profile {name} states no spread: its durations are taken as exact", file=sys.stderr)
    return kept


def _warn_of_logs(runs: Sequence[Run]) -> None:
    """A line on stderr for each iteration log that is asked for and that no engine will write."""
    ours = {msgspec.json.encode((run.engines, run.settings)): run for run in runs if run.core_url is None}
    engines = [(run, c) for run in ours.values() for c in engine_configs_of(run) if c.iteration_log is not None]
    for log in sorted({config.iteration_log or "" for run, config in engines if not writes_log(run, config)}):
        what = "is not written: only real engines have iterations of their own to log"
        print(f"sim.run: iteration_log {log}: {what}", file=sys.stderr)


def _warn_of_what_was_not_seen(results: Sequence[Result]) -> None:
    """A line on stderr for each profile whose seen range an engine has left, with the farthest of all runs."""
    farthest: dict[str, dict[str, tuple[float, float, float]]] = {}
    for result in results:
        for profile, features in result.summary.outside.items():
            worst = farthest.setdefault(profile, {})
            for name, seen in features.items():
                worst[name] = max(worst.get(name, seen), seen, key=_beyond)
    for profile, worst in sorted(farthest.items()):
        far = ", ".join(f"{name} {most:g} (seen {low:g} to {high:g})" for name, (most, low, high) in sorted(worst.items()))
        print(f"sim.run: profile {profile}: beyond what it was fitted to: {far}; --strict refuses", file=sys.stderr)


def _warn_of_policies(results: Sequence[Result]) -> None:
    """A line on stderr for each thing that a policy did wrong, over all runs."""
    wrong: dict[tuple[str, str], int] = {}
    for result in results:
        for what, count in result.summary.policy_errors.items():
            key = (result.run.policy, what)
            wrong[key] = wrong.get(key, 0) + count
    for (policy, what), count in wrong.items():
        print(
            f"sim.run: policy {policy} failed {count} times ({what}); least_loaded placed in its stead; "
            f"`python -m sim.check_policy {policy}` looks closer",
            file=sys.stderr,
        )


def _beyond(seen: tuple[float, float, float]) -> float:
    value, least, most = seen
    return max(value - most, least - value)


def main(argv: Sequence[str] | None = None, prog: str = "sim.run") -> int:
    """The command; returns its exit status. prog: the module's name, in messages."""
    arguments = parser(f"python -m {prog}").parse_args(argv)
    folder = Path(arguments.out)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.workers is not None and arguments.workers < 1:
            raise ConfigurationError(f"--workers {arguments.workers}: at least 1 is needed")
        specification = specification_of(arguments)
        failures = execute(specification, folder, Where(arguments.workers, arguments.ray), arguments.fresh)
    except (ConfigurationError, RunError, ResultsError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        done = len(list(folder.glob(f"*/{FINISHED}")))
        kept = f"; {done} finished runs are kept in {folder}, and the same command goes on from there" if done else ""
        print(f"{prog}: interrupted{kept}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    _tell(failures, len(runs_of(specification)), prog, folder)
    return 1 if failures else 0


def _tell(failures: Sequence[Failure], runs: int, prog: str, folder: Path) -> None:
    """Why runs failed: a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for failure in failures:
        reasons.setdefault(failure.reason, []).append(failure.run.name)
    for reason, names in reasons.items():
        which = f"run {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        print(f"{prog}: {reason}" if runs == 1 else f"{prog}: {which}: {reason}", file=sys.stderr)
    if 0 < len(failures) < runs:
        kept = f"{runs - len(failures)} of {runs} runs are finished and kept in {folder}"
        print(f"{prog}: {kept}; the same command tries the others again", file=sys.stderr)


def _interrupt(*_: object) -> NoReturn:
    """SIGTERM stops a run as Ctrl-C does: workers and clusters are ended, not orphaned."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
