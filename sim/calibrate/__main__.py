"""The command: reads logs, chooses what is held out, fits, writes the profile and the picture of its residuals."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from parrot.configuration import ConfigurationError
from parrot.engine.profiles import AnyProfile, read_profile
from parrot.remote_profile import RemoteProfile
from sim.calibrate import __doc__ as about
from sim.calibrate.fitting import describe, fit, without_stalls, write_profile
from sim.calibrate.logs import CalibrationError, Iteration, Run, read_logs
from sim.calibrate.plots import write_residuals
from sim.calibrate.remote_fitting import describe_remote, fit_remote
from sim.calibrate.remote_plots import write_remote_residuals
from sim.calibrate.request_logs import kind_of_log, read_request_logs
from sim.calibrate.split import R, Split, hold_out_by_load, tails


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status. What it found goes to stderr, the profile and the picture to their files."""
    parser = argparse.ArgumentParser(prog="python -m sim.calibrate", description=(about or "").split("\n", 1)[0])
    parser.add_argument(
        "traces",
        metavar="TRACE",
        nargs="+",
        help="iteration logs of one model, device and attention function; or request logs of one remote endpoint",
    )
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
        picture = folder / f"{out.stem}.residuals.png"
        remote = _kind([*arguments.traces, *arguments.hold_out], arguments.allow_cut) == "requests"
        described = (_of_requests if remote else _of_iterations)(arguments, out, picture)
    except CalibrationError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{described}\n  residuals: {picture}", file=sys.stderr)
    return 0


def _kind(paths: Sequence[str], allow_cut: bool) -> str:
    """What the logs have a line of. Raises CalibrationError when it is not the same in all."""
    kinds = {path: kind_of_log(path, allow_cut=allow_cut) for path in paths}
    first = next(iter(kinds))
    for path, kind in kinds.items():
        if kind != kinds[first]:
            raise CalibrationError(
                f"{path}: mixed logs: it is of {kind}, but {first} of {kinds[first]}; each kind has a profile of its own"
            )
    return kinds[first]


def _of_iterations(arguments: argparse.Namespace, out: Path, picture: Path) -> str:
    """Fits a profile of iterations and writes it, and its picture; what to say of it."""
    split = _split(arguments, read_logs)
    profile = fit(
        split.fitted,
        arguments.name or out.stem,
        held=split.held,
        trace=_names(arguments),
        shared_kv_once=arguments.shared_kv_once,
    )
    _check_replaced(out, profile, ("model", "device", "attn_func"))
    if arguments.note:
        profile = msgspec.structs.replace(profile, notes=f"{profile.notes} {arguments.note}")
    steady = Split(*without_stalls(*split, shared_kv_once=arguments.shared_kv_once)[:2])
    write_residuals(picture, profile, *_parts(steady), [*steady.fitted, *steady.held])
    write_profile(profile, out)
    return describe(profile)


def _of_requests(arguments: argparse.Namespace, out: Path, picture: Path) -> str:
    """The same for a remote profile."""
    if arguments.shared_kv_once:
        raise CalibrationError(f"{arguments.traces[0]}: is of requests to an endpoint, of which --shared-kv-once says nothing")
    split = _split(arguments, read_request_logs)
    profile = fit_remote(split.fitted, arguments.name or out.stem, held=split.held, trace=_names(arguments))
    _check_replaced(out, profile, ("model", "endpoint"))
    if arguments.note:
        profile = msgspec.structs.replace(profile, notes=f"{profile.notes} {arguments.note}")
    write_remote_residuals(picture, profile, split.fitted, split.held)
    write_profile(profile, out)
    return describe_remote(profile)


def _names(arguments: argparse.Namespace) -> str:
    return ", ".join(dict.fromkeys(Path(trace).name for trace in [*arguments.traces, *arguments.hold_out]))


def _split(arguments: argparse.Namespace, read: Callable[..., list[R]]) -> Split[R]:
    """Named files are held out whole, whether or not they are among the traces too."""
    named, allow_cut = arguments.hold_out, arguments.allow_cut
    places = {Path(name).resolve() for name in named}
    paths = [*(trace for trace in arguments.traces if Path(trace).resolve() not in places), *named]
    runs = read(paths, allow_cut=allow_cut)
    if not named:
        return hold_out_by_load(runs)
    held = sum(len(read([name], allow_cut=allow_cut)) for name in named)
    return Split(runs[:-held], runs[-held:])


def _parts(split: Split[Run]) -> tuple[list[Iteration], list[Iteration]]:
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


def _check_replaced(out: Path, profile: AnyProfile, alike: Sequence[str]) -> None:
    """Raises CalibrationError when `out` holds a profile of something else: it would be lost, and engines name it."""
    if not out.exists():
        return
    try:
        old = read_profile(out)
    except ConfigurationError as error:
        raise CalibrationError(f"{out}: exists and is no latency profile, so it is not replaced: {error}") from None
    if type(old) is not type(profile):
        kinds = [f"a profile of {'requests' if isinstance(one, RemoteProfile) else 'iterations'}" for one in (old, profile)]
        raise CalibrationError(f"{out}: holds {kinds[0]}; the logs make {kinds[1]}: name another file")
    for name in alike:
        if getattr(old, name) != getattr(profile, name):
            raise CalibrationError(
                f"{out}: holds a profile of another {name}, {getattr(old, name)!r}; the logs are of "
                f"{getattr(profile, name)!r}: name another file"
            )


if __name__ == "__main__":
    sys.exit(main())
