"""A workload read to its end before any of it is used, in memory that does not grow with it: a short one waits as it is, the
rest of a long one waits encoded in a temporary file.

Decides where programs wait until they arrive; they come back equal and in their order. It checks nothing of them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from tempfile import TemporaryFile
from typing import IO, Final

import msgspec

from sim.workloads.program import Program

KEPT_PROGRAMS: Final = 50_000  #: that wait as they are, which takes no time, and of small ones some 50 MiB
_BLOCK: Final = 16  #: programs that are encoded together, which takes half of the time that each alone takes
_PREFIX: Final = 4  #: bytes in front of a block, which say how many it has

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Program]).decode


def read_ahead(
    programs: Iterator[Program], again: Callable[[], Iterator[Program]], kept: int = KEPT_PROGRAMS
) -> tuple[int, Iterator[Program]]:
    """Reads `programs` to their end. How many there are, and the same again.

    again: begins them anew, for what cannot wait in a file. kept: how many wait in memory; more go to an unnamed temporary
    file. What reading `programs` raises goes through.
    """
    first = list(itertools.islice(programs, kept))
    second = next(programs, None)
    if second is None:
        return len(first), _hand_out(first)
    count, rest = _in_file(itertools.chain([second], programs))
    count += len(first)
    return count, again() if rest is None else itertools.chain(_hand_out(first), rest)


def _hand_out(programs: list[Program]) -> Iterator[Program]:
    """Them, none of which is kept for longer than until it is asked for."""
    programs.reverse()
    while programs:
        yield programs.pop()


def _in_file(programs: Iterator[Program]) -> tuple[int, Iterator[Program] | None]:
    """How many they are, and the same again from a file; None: they cannot wait in one."""
    count = 0
    with contextlib.ExitStack() as until_read:
        file = _new_file()
        if file is not None:
            until_read.callback(_close, file)
        while block := list(itertools.islice(programs, _BLOCK)):
            count += len(block)
            if file is not None and not _append(file, block):
                file = None
        if file is None or not _rewind(file):
            return count, None
        until_read.pop_all()
        return count, _read(file)


def _new_file() -> IO[bytes] | None:
    try:
        return TemporaryFile()
    except OSError:  # there is no folder for such files
        return None


def _append(file: IO[bytes], programs: list[Program]) -> bool:
    """False: the disk has no room, or a program has no such form (a name that is not Unicode, a number above 64 bits)."""
    try:
        body = _encode(programs)
        file.write(len(body).to_bytes(_PREFIX, "little") + body)
    except (OSError, OverflowError, UnicodeEncodeError):
        return False
    return True


def _rewind(file: IO[bytes]) -> bool:
    """Back to the first program. False: the disk has no room for the last of them."""
    try:
        file.seek(0)
    except OSError:
        return False
    return True


def _read(file: IO[bytes]) -> Iterator[Program]:
    with file:
        while prefix := file.read(_PREFIX):
            yield from _decode(file.read(int.from_bytes(prefix, "little")))


def _close(file: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # what it could not write it tries to write once more
        file.close()
