"""Opens the files of workloads. Traces are often handed out compressed, which is told apart from one that is broken."""

from __future__ import annotations

import errno
from io import BufferedReader
from pathlib import Path

#: what a compressed file begins with
_BEGINNINGS = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zX": "xz", b"BZh": "bzip2"}


def open_plain(path: str | Path) -> BufferedReader:
    """The file, to be read. Raises OSError, also for one that is compressed; `strerror` says what to do."""
    file = open(path, "rb")
    head = file.peek(4)
    for beginning, name in _BEGINNINGS.items():
        if head.startswith(beginning):
            file.close()
            raise OSError(errno.EINVAL, f"it is compressed ({name}); unpack it first", str(path))
    return file
