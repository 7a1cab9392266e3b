"""The command: reads logs, chooses what is held out, fits, writes the profile and the picture of its residuals."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import msgspec

from parrot.configuration import ConfigurationError, load
from parrot.latency import LatencyProfile
from sim.calibrate import __doc__ as about
from sim.calibrate.fitting import describe, fit, without_stalls, write_profile
from sim.calibrate.logs import CalibrationError, Iteration, Run, read_logs
from sim.calibrate.plots import write_residuals
from sim.calibrate.split import Split, hold_out_by_load, tails


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status. What it found goes to stderr, the profile and the picture to their files."""
    parser = argparse.ArgumentParser(prog="python -m sim.calibrate", description=(about or "").split("\n", 1)[0])
    parser.add_argument("traces", metavar="TRACE", nargs="+", help="iteration logs of one model, device and attention function")
    parser.add_argument("--out", required=True, metavar="PROFILE", help="the profile to write (JSON)")
    parser.add_argument("--name", help="the profile's name (default: the stem of PROFILE)")
    parser.add_argument("--hold-out", nargs="+", default=[], metavar="FILE",
                        help="logs whose runs are not fitted and tell the error (default: chosen by load)")  # fmt: skip
    parser.add_argument("--plots", metavar="DIR", help="where the picture of residuals goes (default: beside PROFILE)")
    parser.add_argument("--note", default="", help="what a reader of the profile should know too, e.g. the processor's name")
    parser.add_argument("--shared-kv-once", action="store_true", help="the attention reads a shared prefix once for all rows")
    parser.add_argument("--allow-cut", action="store_true", help="leave out a last line that a killed engine left half written")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    folder = Path(arguments.plots) if arguments.plots else out.parent
    try:
        _check_out(out)
        _check_folder(folder, create=arguments.plots is not None)
        split = _split(arguments.traces, arguments.hold_out, arguments.allow_cut)
        profile = fit(
            split.fitted,
            arguments.name or out.stem,
            held=split.held,
            trace=", ".join(dict.fromkeys(Path(trace).name for trace in [*arguments.traces, *arguments.hold_out])),
            shared_kv_once=arguments.shared_kv_once,
        )
        _check_replaced(out, profile)
        if arguments.note:
            profile = msgspec.structs.replace(profile, notes=f"{profile.notes} {arguments.note}")
        picture = folder / f"{out.stem}.residuals.png"
        steady = Split(*without_stalls(*split, shared_kv_once=arguments.shared_kv_once)[:2])
        write_residuals(picture, profile, *_parts(steady), [*steady.fitted, *steady.held])
        write_profile(profile, out)
    except CalibrationError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{describe(profile)}\n  residuals: {picture}", file=sys.stderr)
    return 0


def _split(traces: list[str], named: list[str], allow_cut: bool) -> Split:
    """Named files are held out whole, whether or not they are among the traces too."""
    places = {Path(name).resolve() for name in named}
    paths = [*(trace for trace in traces if Path(trace).resolve() not in places), *named]
    runs = read_logs(paths, allow_cut=allow_cut)
    if not named:
        return hold_out_by_load(runs)
    held = sum(len(read_logs([name], allow_cut=allow_cut)) for name in named)
    return Split(runs[:-held], runs[-held:])


def _parts(split: Split) -> tuple[list[Iteration], list[Iteration]]:
    if not split.held:
        return tails(split.fitted)
    return _iterations(split.fitted), _iterations(split.held)


def _iterations(runs: list[Run]) -> list[Iteration]:
    return [iteration for run in runs for iteration in run.iterations]


def _check_out(out: Path) -> None:
    """Raises CalibrationError before anything is read, when nothing could be written."""
    if out.is_dir():
        raise CalibrationError(f"{out}: cannot be written: it is a folder; name a file")
    _check_folder(out.parent, create=False)


def _check_folder(folder: Path, *, create: bool) -> None:
    if create and not folder.exists():
        folder.mkdir(parents=True)
    if not folder.is_dir():
        raise CalibrationError(f"{folder}: cannot be written to: {'it is a file' if folder.exists() else 'no such folder'}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CalibrationError(f"{folder}: cannot be written to: permission denied")


def _check_replaced(out: Path, profile: LatencyProfile) -> None:
    """Raises CalibrationError when `out` holds a profile of something else: it would be lost, and engines name it."""
    if not out.exists():
        return
    try:
        old = load(out, LatencyProfile)
    except ConfigurationError as error:
        raise CalibrationError(f"{out}: exists and is no latency profile, so it is not replaced: {error}") from None
    for name in ("model", "device", "attn_func"):
        if getattr(old, name) != getattr(profile, name):
            raise CalibrationError(
                f"{out}: holds a profile of another {name}, {getattr(old, name)!r}; the logs are of "
                f"{getattr(profile, name)!r}: name another file"
            )


if __name__ == "__main__":
    sys.exit(main())
