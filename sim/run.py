"""The command `python -m sim.run`: runs a workload under policies on a simulated, an emulated or a real cluster.

It carries out what the flags say (`sim.flags`), prints one JSON object a run on stdout and then one a cell, and leaves
everything else to stderr and the folder of results. Exit status: 0 done, 1 refused or failed (stderr says why), 2 wrong
usage, 130 interrupted.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
from rich.console import Console

from parrot.configuration import ConfigurationError
from sim.cells import Cell, cells_of
from sim.configs import engine_configs_of, spreads_of, writes_log
from sim.flags import parser, specification_of
from sim.outside import farthest
from sim.results import FINISHED, ResultsError, inputs_of, open_folder, write_results, write_timing
from sim.spec import Run, Specification, runs_of
from sim.stdout import leave_stdout
from sim.sweep import Failure, Result, RunError, Where, check_runs, run_all
from sim.terminal import Display, table_of


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
        if any(cell.runs > 1 or cell.draws for cell in cells):
            for cell in cells:
                _print(cell)
        _tell_of_seeds(cells)
        _warn_of_what_was_not_seen(results)
        _warn_of_policies(results)
        if console.is_terminal:
            console.print(table_of(cells, specification.metrics, console.width))
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


def _tell_of_seeds(cells: Sequence[Cell]) -> None:
    """A line on stderr where several seeds came to the same numbers."""
    same = sum(len(cell.seeds) > 1 and cell.over is None for cell in cells)
    if same:
        which = "all cells" if same == len(cells) else f"{same} of {len(cells)} cells"
        print(
            f"sim.run: in {which} every seed came to the same numbers, as with recorded arrivals and a policy without chance: "
            "no confidence intervals",
            file=sys.stderr,
        )


def _warn_of_logs(runs: Sequence[Run]) -> None:
    """A line on stderr for each iteration log that is asked for and that no engine will write."""
    ours = {msgspec.json.encode((run.engines, run.settings)): run for run in runs if run.core_url is None}
    engines = [(run, c) for run in ours.values() for c in engine_configs_of(run) if c.iteration_log is not None]
    for log in sorted({config.iteration_log or "" for run, config in engines if not writes_log(run, config)}):
        what = "is not written: only real engines have iterations of their own to log"
        print(f"sim.run: iteration_log {log}: {what}", file=sys.stderr)


def _warn_of_what_was_not_seen(results: Sequence[Result]) -> None:
    """A line on stderr for each profile whose seen range an engine has left, with the farthest of all runs."""
    told: dict[str, list[str]] = {}
    for profile, name, (value, low, high) in farthest(result.summary.outside for result in results):
        told.setdefault(profile, []).append(f"{name} {value:g} (seen {low:g} to {high:g})")
    for profile, far in told.items():
        print(f"sim.run: profile {profile}: beyond what it was fitted to: {', '.join(far)}; --strict refuses", file=sys.stderr)


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
    except BrokenPipeError:
        print(f"{prog}: nobody reads stdout any more{_kept(folder)}", file=sys.stderr)
        return leave_stdout()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted{_kept(folder)}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    _tell(failures, len(runs_of(specification)), prog, folder)
    return 1 if failures else 0


def _kept(folder: Path) -> str:
    done = len(list(folder.glob(f"*/{FINISHED}")))
    return f"; {done} finished runs are kept in {folder}, and the same command goes on from there" if done else ""


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
