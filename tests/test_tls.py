"""Certificate files: what is refused, in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from parrot.configuration import ConfigurationError
from parrot.tls import client_context, server_context
from tests.certificates import certificates


def test_without_files_there_is_no_tls() -> None:
    assert server_context(None, None) is None


@pytest.mark.parametrize(
    ("cert", "key", "complaint"),
    [
        ("server.pem", None, "missing key 'ssl_keyfile'"),
        (None, "server.key", "missing key 'ssl_certfile'"),
        ("nowhere.pem", "server.key", "ssl_certfile '.*nowhere.pem' cannot be read: No such file"),
        ("server.pem", "nowhere.key", "ssl_keyfile '.*nowhere.key' cannot be read: No such file"),
        ("server.pem", "junk", "cannot be used: .*; expected are PEM files"),
        ("junk", "server.key", "cannot be used: .*; expected are PEM files"),
        ("server.pem", "other.key", "the key is not the certificate's"),
        ("server.pem", "locked.key", "is encrypted; expected is a key without a password"),
        ("", "server.key", "ssl_certfile '.*' cannot be read: Is a directory"),
    ],
)
def test_files_that_cannot_be_served_are_refused_in_one_line(
    tmp_path: Path, cert: str | None, key: str | None, complaint: str
) -> None:
    certificates(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "other.key").write_text(Path(certificates(other).keyfile).read_text())
    (tmp_path / "junk").write_text("no certificate")
    _lock(tmp_path / "server.key", tmp_path / "locked.key")
    with pytest.raises(ConfigurationError, match=complaint) as refused:
        server_context(*(None if name is None else str(tmp_path / name) for name in (cert, key)))
    assert "\n" not in str(refused.value)


def _lock(key: Path, to: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    made = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"password")
    to.write_bytes(made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))


def test_a_ca_file_that_is_none_is_refused_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "junk").write_text("no certificate")
    with pytest.raises(ConfigurationError, match=r"engine_ca_file '.*junk' cannot be used"):
        client_context(str(tmp_path / "junk"), "engine_ca_file")
    with pytest.raises(ConfigurationError, match=r"ca_file '.*nowhere' cannot be read"):
        client_context(str(tmp_path / "nowhere"))
