"""API keys: who a request is from. A key is a tenant's; the file holds its SHA-256, or the name of a variable that has it.

It decides who is let in at the door, and under which name. A key itself is never kept, shown or told: what is told of a
request is its tenant's name. A key that `new` makes has 256 random bits, so that its hash tells nothing of it.

    python3 -m parrot.serve.keys new TENANT      a new key, shown this once, and the line for the core's file
    python3 -m parrot.serve.keys hash TENANT     the line for a key that is there already, read from the standard input
"""

from __future__ import annotations

import argparse
import getpass
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence

from parrot.configuration import ConfigurationError
from parrot.protocol.errors import ParrotError
from parrot.serve.config import TenantConfig
from parrot.serve.tenants import OTHERS

PREFIX = "parrot-"  #: so that a key that leaks is known for what it is
_KEY_BYTES = 32
_HASH = re.compile(r"[0-9a-f]{64}")


def hash_of(key: str) -> str:
    """What the file has of `key`: SHA-256 in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key() -> str:
    """A key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(_KEY_BYTES)


class Keys:
    """The keys of a configuration's tenants. Where there are none, everybody is let in, under whatever key they show."""

    def __init__(self, tenants: Mapping[str, TenantConfig], environment: Mapping[str, str] | None = None) -> None:
        """Raises ConfigurationError for an entry that is no hash, a variable that is not there, a key with two owners."""
        self._owners: list[tuple[bytes, str]] = []
        found: dict[str, str] = {}
        for tenant, config in tenants.items():
            for place, entry in enumerate(config.api_keys):
                where = f"key 'tenants.{tenant}.api_keys[{place}]'"
                if tenant in (OTHERS, ""):
                    raise ConfigurationError(f"{where}: {tenant!r} is no tenant of its own; give the key to one with a name")
                hashed = _hash_in(entry, where, os.environ if environment is None else environment)
                if hashed in found:
                    owner = f"tenant {found[hashed]!r}" if found[hashed] != tenant else "this tenant"
                    raise ConfigurationError(f"{where}: {owner} has the same key already; a key has one owner")
                found[hashed] = tenant
                self._owners.append((hashed.encode(), tenant))

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return bool(self._owners)

    def tenant(self, authorization: str | None, key: str | None = None) -> str:
        """Whose request this is. `authorization`: the header of that name, `Bearer KEY`, which stands above `key`, a field of
        the body. Without configured keys: the key's hash as it stands in the file, "" without a key.

        Raises `unauthorized` without, `invalid_api_key` with a wrong key, when there are any.
        """
        if authorization is not None:
            scheme, _, shown = authorization.partition(" ")
            if scheme.lower() == "bearer" and shown.strip():
                key = shown.strip()
            elif self.required:
                raise ParrotError("unauthorized", "the header Authorization has no key; it is to say: Bearer KEY")
        if not self.required:
            return hash_of(key) if key else ""
        if not key:
            raise ParrotError("unauthorized", "an API key is needed, as the header Authorization: Bearer KEY")
        return self._owner(key)

    def check(self, authorization: str | None) -> None:
        """For requests that something else lets in: a key that is shown all the same must be a right one."""
        if authorization is not None and self.required:
            self.tenant(authorization)

    def _owner(self, key: str) -> str:
        """In a time that does not depend on the key: all owners are looked at."""
        shown = hash_of(key).encode()
        owner = None
        for hashed, tenant in self._owners:
            if hmac.compare_digest(hashed, shown):
                owner = tenant
        if owner is None:
            raise ParrotError("invalid_api_key", "the API key is not one of this server's")
        return owner


def _hash_in(entry: str, where: str, environment: Mapping[str, str]) -> str:
    """The hash that an entry stands for. What the entry says is not told: it may be a key, put there by mistake."""
    if entry.startswith("env:"):
        name = entry.removeprefix("env:")
        if not environment.get(name):
            raise ConfigurationError(f"{where} is {entry!r}, but the environment has no {name}")
        return hash_of(environment[name])
    hashed = entry.removeprefix("sha256:").lower()
    if not _HASH.fullmatch(hashed):
        raise ConfigurationError(
            f"{where} is neither a SHA-256 in hex (64 digits) nor env:NAME; a key itself does not belong in a file "
            "(python3 -m parrot.serve.keys hash TENANT makes the line for it)"
        )
    return hashed


# ------------------------------------------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python3 -m parrot.serve.keys", description="Makes API keys, and the lines for them in a core's configuration."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("new", "a new key, shown this once, and its line for the configuration"),
        ("hash", "the line for a key that there is already; the key is read from the standard input, never from the command"),
    ):
        commands.add_parser(name, help=what, description=what).add_argument("tenant", help="whose key it is")
    flags = parser.parse_args(arguments)
    if flags.tenant in (OTHERS, ""):
        print(f"parrot.serve.keys: {flags.tenant!r} is no tenant's name", file=sys.stderr)
        return 1
    if flags.command == "new":
        key = new_key()
        print(key)
        print("Give it to the tenant; nobody can show it again. Its line among the core's `tenants`:", file=sys.stderr)
    else:
        key = (getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
        if not key:
            print("parrot.serve.keys: there is no key on the standard input", file=sys.stderr)
            return 1
    print(f'{json.dumps(flags.tenant)}: {{"api_keys": [{json.dumps(hash_of(key))}]}}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
