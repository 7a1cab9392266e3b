"""`python -m sim.workloads`: turns a workload into a file of programs, says what is in one, explains parameters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import msgspec

from sim.stdout import leave_stdout
from sim.workloads import open_workload
from sim.workloads.arrivals import FORMS
from sim.workloads.describe import describe
from sim.workloads.generators import GENERATORS
from sim.workloads.kinds import TRACES
from sim.workloads.program import Program, WorkloadError, write_programs


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; results go to stdout, everything else to stderr."""
    arguments = _parser().parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except WorkloadError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:
        return leave_stdout()
    except KeyboardInterrupt:
        print("sim.workloads: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sim.workloads", description="Prepare workloads and look at them.")
    commands = parser.add_subparsers(dest="command", required=True)

    convert = commands.add_parser("convert", help="write the programs of a workload to a file")
    _add_workload(convert)
    convert.add_argument("out", metavar="OUT", help="where to write the programs, as JSONL")
    convert.set_defaults(run=lambda a: _convert(a, a.workload))

    journal = commands.add_parser("from-journal", help="convert journal:JOURNAL OUT")
    journal.add_argument("journal", metavar="JOURNAL", help='a journal written with "journal_mode": "record"')
    journal.add_argument("out", metavar="OUT", help="where to write the programs, as JSONL")
    journal.add_argument("--tokenizer", help="whose lengths to use (default: the first engine's of the journal)")
    journal.set_defaults(
        run=lambda a: _convert(a, f"journal:{a.journal}"), rate=None, seed=0, count=None, max_gen_length=2048, arrivals=None
    )

    look = commands.add_parser("describe", help="print what is in a workload as JSON, and draw it")
    _add_workload(look)
    look.add_argument("--out", metavar="DIR", help="folder for workload.html: arrivals, lengths, sharing")
    look.set_defaults(run=_describe)

    explain = commands.add_parser("parameters", help="explain the parameters of generators and traces")
    explain.add_argument("names", metavar="NAME", nargs="*", help="of which (default: of all)")
    explain.set_defaults(run=_explain)
    return parser


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", metavar="WORKLOAD", help="FILE, NAME[:parameter=value,…], KIND:PATH, mix:PATH")
    parser.add_argument("--rate", type=float, help="programs a second; recorded gaps are scaled to it")
    parser.add_argument("--arrivals", metavar="FORM", help=FORMS)
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    parser.add_argument("--count", type=int, metavar="N", help="at most this many programs")
    parser.add_argument(
        "--max-gen-length", type=int, default=2048, metavar="N", help="limit of outputs whose workload gives none (2048)"
    )


def _programs(arguments: argparse.Namespace, workload: str, notes: list[str]) -> Iterator[Program]:
    tokenizer = getattr(arguments, "tokenizer", None)
    return open_workload(
        workload,
        rate=arguments.rate,
        seed=arguments.seed,
        count=arguments.count,
        max_gen_length=arguments.max_gen_length,
        arrivals=arguments.arrivals,
        options={"tokenizer": tokenizer} if tokenizer is not None else None,
        on_note=notes.append,
    )


def _convert(arguments: argparse.Namespace, workload: str) -> int:
    notes: list[str] = []
    try:
        written = write_programs(arguments.out, _programs(arguments, workload, notes))
    except OSError as error:
        print(f"{arguments.out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    _say(notes)
    print(f"{written} programs written to {arguments.out}", file=sys.stderr)
    return 0


def _describe(arguments: argparse.Namespace) -> int:
    if arguments.out is not None:
        try:
            Path(arguments.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"{arguments.out}: cannot be written: {error.strerror}", file=sys.stderr)
            return 1
    notes: list[str] = []
    description = describe(_programs(arguments, arguments.workload, notes), arguments.workload)
    _say(notes)
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(description.numbers())) + b"\n")
    if arguments.out is not None:
        from sim.workloads.pictures import write_pictures  # matplotlib, only when it is needed

        print(f"pictures written to {write_pictures(description, arguments.out)}", file=sys.stderr)
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    kinds: dict[str, type[msgspec.Struct]] = {name: kind for name, (kind, _) in (GENERATORS | TRACES).items()}
    for name in arguments.names or kinds:
        if name not in kinds:
            print(f"no generator or trace is called {name!r}; there are: {', '.join(kinds)}", file=sys.stderr)
            return 1
        print(f"{name}: {' '.join((kinds[name].__doc__ or '').split())}")
        for parameter, default, meaning in parameters(kinds[name]):
            print(f"    {parameter} ({default})  {meaning}")
    return 0


def parameters(kind: type[msgspec.Struct]) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each parameter."""
    hints = get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        yield field.name, _shown(default), hints[field.name].__metadata__[-1].description


def _shown(default: object) -> str:
    if default is None or default == {}:
        return "none"
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _say(notes: list[str]) -> None:
    for note in notes:
        print(note, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
