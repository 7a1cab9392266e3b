"""The instances of a program: when each begins, what becomes of what it raises, and what is told of it in the end.

The same for both worlds: in virtual time each runs in a strand (`simulated`), in real time in a thread (`real`).
"""

from __future__ import annotations

import contextvars
import itertools
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from parrot.configuration import ConfigurationError
from parrot.frontend.link import CARRIERS, Carriers
from parrot.frontend.pfunc import environment
from parrot.protocol.errors import ErrorInfo, ParrotError
from sim.programs.accounts import Account
from sim.programs.loops import Refused
from sim.programs.source import Arguments, Source, check_arguments
from sim.workloads.arrivals import draw_arrivals, parse_arrivals, stream
from sim.workloads.program import WorkloadError

_OURS = Path(__file__).parent
_SHOWN = 5  # tracebacks that differ


def starts_at(rate: float | None, seed: int, arrivals: str | None = None) -> Iterator[float]:
    """Seconds at which instances begin: at `rate` a second as `arrivals` says (a Poisson process); all at once without one.

    Raises ConfigurationError.
    """
    try:
        how = parse_arrivals(arrivals or "poisson")
    except WorkloadError as error:
        raise ConfigurationError(str(error)) from None
    if how.kind == "recorded":
        raise ConfigurationError(f"arrivals {arrivals}: a program has no trace; expected poisson, gamma:CV or constant")
    if rate is None:
        if arrivals is not None:
            raise ConfigurationError(f"arrivals {arrivals}: at which --rate?")
        return itertools.repeat(0.0)
    return draw_arrivals(how, rate, stream(seed, "arrivals"))


def check_source(source: Source, inputs: Sequence[Arguments]) -> None:
    """Imports the program once, with no core, and looks whether it can be called. Raises ConfigurationError."""

    def look() -> None:
        environment.isolate()
        CARRIERS.set(Carriers(lambda _: _NoCore(), lambda _: _NoCore()))
        with source.loaded() as function:
            check_arguments(function, inputs, source.spec)

    try:
        contextvars.Context().run(look)
    except ConfigurationError:
        raise
    except (Exception, SystemExit) as error:
        where = f"{source.path}:{_line_of(error, source.path)}"
        raise ConfigurationError(
            f"--program {source.spec}: {where}: it cannot be imported: {type(error).__name__}: {error}"
        ) from error


class _NoCore:
    """A transport of a program that is only looked at."""

    def open(self, _: object) -> None:
        raise Refused("it calls the core while it is imported; put what runs it under `if __name__ == '__main__':`")

    def close(self) -> None:
        pass


def _line_of(error: BaseException, path: Path) -> int:
    lines = [frame.lineno or 0 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else 0


class Failures:
    """What instances raised, as tracebacks: equal ones are told once."""

    def __init__(self) -> None:
        self._found: dict[str, list[int]] = {}

    def add(self, account: Account, error: BaseException) -> ErrorInfo:
        """Takes what the instance raised; returns it as the account has it."""
        lines = traceback.format_exception(type(error), error, _theirs(error.__traceback__))
        self._found.setdefault("".join(lines), []).append(account.serial)
        if isinstance(error, ParrotError):
            return error.info
        return ErrorInfo(type(error).__name__, str(error))

    def __bool__(self) -> bool:
        return bool(self._found)

    def tell(self, spec: str, count: int) -> str:
        """For standard error."""
        failed = sum(map(len, self._found.values()))
        parts = [f"{failed} of {count} instances of {spec} failed"]
        for text, serials in itertools.islice(self._found.items(), _SHOWN):
            more = f" and {len(serials) - 1} more" if len(serials) > 1 else ""
            parts.append(f"instance {serials[0]}{more}: {text.rstrip()}")
        if len(self._found) > _SHOWN:
            parts.append(f"and {len(self._found) - _SHOWN} other tracebacks; the table of programs has every error")
        return "\n".join(parts)


def _theirs(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the program's own first frame on."""
    theirs = trace
    while theirs is not None and Path(theirs.tb_frame.f_code.co_filename).parent == _OURS:
        theirs = theirs.tb_next
    return theirs or trace
