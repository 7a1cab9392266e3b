"""What the readers of traces have in common: pieces of a file with their line numbers, and errors that name the file.

Never holds more of a file than one piece and a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BufferedReader
from typing import BinaryIO

from sim.workloads.plain import refuse_compressed
from sim.workloads.program import WorkloadError

CHUNK_BYTES = 1 << 20
LARGEST_ELEMENT_BYTES = 64 << 20  #: of a JSON list; a longer one is taken for one that is not closed

#: a whole string, or what opens or closes a level; a quotation mark alone begins a string that is not there to its end
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]|"', re.DOTALL)
_SPACE = re.compile(rb"[\s,]*")


def text_lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers from 1, each with its end, a byte order mark left out.

    Raises WorkloadError when it cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if isinstance(file.buffer, BufferedReader):
                refuse_compressed(file.buffer)
            yield from enumerate(file, 1)
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path}: not a text file: {error}") from error


def byte_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not empty, with their numbers from 1. Raises WorkloadError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            refuse_compressed(file)
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, line
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}") from error


def json_elements(path: str) -> Iterator[tuple[int, bytes]]:
    """The elements of a JSON list of objects, or the lines of a JSONL file, with the number of the line that each begins in.

    What is between two elements of a list is not looked at, but for brackets. Raises WorkloadError for a file that cannot be
    read, a list that is not closed, and what follows its end.
    """
    try:
        with open(path, "rb") as file:
            refuse_compressed(file)
            head = file.read(CHUNK_BYTES)
            begin = len(head) - len(head.lstrip(b"\xef\xbb\xbf \t\r\n"))
            if head[begin : begin + 1] == b"[":
                yield from _list_elements(path, file, head, begin + 1)
                return
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}") from error
    yield from byte_lines(path)


def _list_elements(path: str, file: BinaryIO, buffer: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """`buffer` is the file's beginning, `at` the place behind the opening bracket."""
    line = 1 + buffer.count(b"\n", 0, at)
    while True:
        begin = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]
        line += buffer.count(b"\n", at, begin)
        if buffer[begin : begin + 1] == b"]":
            if (buffer[begin + 1 :] + file.read(CHUNK_BYTES)).strip():
                raise WorkloadError(f"{path}:{line}: something follows the end of the list")
            return
        if begin < len(buffer) and buffer[begin : begin + 1] != b"{":
            found = buffer[begin : begin + 20].decode(errors="replace")
            raise WorkloadError(f"{path}:{line}: the elements of the list must be objects, found {found!r}")
        end = _end_of_object(buffer, begin)
        if end is not None:
            yield line, buffer[begin:end]
            line += buffer.count(b"\n", begin, end)
            at = end
            continue
        if len(buffer) - begin > LARGEST_ELEMENT_BYTES:
            raise WorkloadError(f"{path}:{line}: an element of more than {LARGEST_ELEMENT_BYTES >> 20} MiB: is it not closed?")
        more = file.read(max(CHUNK_BYTES, len(buffer) - begin))
        if not more:
            raise WorkloadError(f"{path}:{line}: the file ends inside the list: truncated")
        buffer, at = buffer[begin:] + more, 0


def _end_of_object(buffer: bytes, begin: int) -> int | None:
    """Where the object that begins at `begin` ends; None when the buffer ends first."""
    depth = 0
    for match in _STRUCTURE.finditer(buffer, begin):
        first = match[0]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
            if depth == 0:
                return match.end()
        elif first == b'"':
            return None
    return None
