"""A workload read to its end before any of it is used, in memory that does not grow with it: it waits, encoded, in a file.

Decides where programs wait until they arrive; they come back equal and in their order. It checks nothing of them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from tempfile import SpooledTemporaryFile
from typing import Final

import msgspec

from sim.workloads.program import Program

IN_MEMORY: Final = 16 << 20  #: bytes of encoded programs up to which no file is made: of small programs, some 60,000
_BLOCK: Final = 16  #: programs that are encoded together, which takes half of the time that each alone takes
_PREFIX: Final = 4  #: bytes in front of a block, which say how many it has

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Program]).decode


def read_ahead(
    programs: Iterator[Program], again: Callable[[], Iterator[Program]], in_memory: int = IN_MEMORY
) -> tuple[int, Iterator[Program]]:
    """Reads `programs` to their end. How many there are, and the same again, a few at a time.

    again: begins them anew, for what cannot wait in a file. in_memory: bytes; more go to an unnamed temporary file. What
    reading `programs` raises goes through.
    """
    file = SpooledTemporaryFile[bytes](in_memory)
    count, all_kept = 0, True
    try:
        while block := list(itertools.islice(programs, _BLOCK)):
            count += len(block)
            all_kept = all_kept and _append(file, block)
        all_kept = all_kept and _rewind(file)
    except BaseException:
        _drop(file)
        raise
    if all_kept:
        return count, _read(file)
    _drop(file)
    return count, again()


def _append(file: SpooledTemporaryFile[bytes], programs: list[Program]) -> bool:
    """False: the disk has no room, or a program has no such form (a name that is not Unicode, a number above 64 bits)."""
    try:
        body = _encode(programs)
        file.write(len(body).to_bytes(_PREFIX, "little") + body)
    except (OSError, OverflowError, UnicodeEncodeError):
        return False
    return True


def _rewind(file: SpooledTemporaryFile[bytes]) -> bool:
    """Back to the first program. False: the disk has no room for the last of them."""
    try:
        file.seek(0)
    except OSError:
        return False
    return True


def _read(file: SpooledTemporaryFile[bytes]) -> Iterator[Program]:
    with file:
        while prefix := file.read(_PREFIX):
            yield from _decode(file.read(int.from_bytes(prefix, "little")))


def _drop(file: SpooledTemporaryFile[bytes]) -> None:
    with contextlib.suppress(OSError):  # what it could not write it tries to write once more
        file.close()
