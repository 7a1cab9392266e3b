"""Certificates for tests: an authority of this run's own, and what it vouches for."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

trustme = pytest.importorskip("trustme", reason="trustme is not installed (make install has it)")


class Certificates(NamedTuple):
    """Paths of PEM files: the authority's certificate, a certificate of 127.0.0.1 and localhost, its key."""

    ca_file: str
    certfile: str
    keyfile: str


@lru_cache(maxsize=1)
def _authority() -> trustme.CA:
    return trustme.CA()


def certificates(folder: Path, *names: str) -> Certificates:
    """Files in `folder` for a server with these names (none: 127.0.0.1 and localhost)."""
    made = _authority().issue_cert(*(names or ("127.0.0.1", "localhost")))
    paths = Certificates(*(str(folder / name) for name in ("ca.pem", "server.pem", "server.key")))
    _authority().cert_pem.write_to_path(paths.ca_file)
    for place, blob in enumerate(made.cert_chain_pems):
        blob.write_to_path(paths.certfile, append=place > 0)
    made.private_key_pem.write_to_path(paths.keyfile)
    return paths
