"""Traces are often handed out compressed; here that is told apart from a file that is broken."""

from __future__ import annotations

import errno
from io import BufferedReader

#: what a compressed file begins with
_BEGINNINGS = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zX": "xz", b"BZh": "bzip2"}


def refuse_compressed(file: BufferedReader) -> None:
    """Raises OSError when what begins here is compressed; its `strerror` says what to do. Nothing is read from `file`."""
    head = file.peek(4)
    for beginning, name in _BEGINNINGS.items():
        if head.startswith(beginning):
            raise OSError(errno.EINVAL, f"it is compressed ({name}); unpack it first")
